"""Settings of every test process, and tests marked `gpu` left to machines with one."""

import os
import sys

# One thread, set before torch is imported: the models are tiny, and threads that wait for a busy
# core make a step of 15 ms one of 150.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from absl import logging as absl_logging

# When Hydra sets logging up anew, this handler closes the stream it began with: pytest's own.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
