"""What ensembles and their parts cost: measured, expected, drawn.

`docs/benchmarks.md` has the commands and the method. Nothing else imports this package.
"""
