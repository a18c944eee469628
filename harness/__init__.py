"""From a command line to a scored run: configuration -> engine -> task -> files.

This package knows methods, models, engines and run directories. It does not know how an ensemble
decodes (`vllm.ensemble_decode`, `vllm.chef`), and it knows no single data set (`tasks`).
"""
