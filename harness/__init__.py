"""From a command line to a scored run: configuration -> engine -> task -> files.

Knows methods, models, engines and run directories; knows nothing of how an ensemble decodes
(`vllm.ensemble_decode`, `vllm.chef`) nor of any one data set (`tasks`).
"""
