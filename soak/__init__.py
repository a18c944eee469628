"""A soak test: random requests from many clients, held against the plain ensemble."""
