"""Settings of every test process. Tests marked `gpu` run only on machines with a GPU."""

import os
import sys

# One thread, set before torch is imported. The models are tiny, and threads that wait for a busy
# core turn a step of 15 ms into one of 150 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from absl import logging as absl_logging

# When Hydra sets logging up anew, this handler closes its first stream: pytest's own.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
