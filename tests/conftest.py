"""Settings of every test process, and tests marked `gpu` left to machines with one."""

import os

# One thread, set before torch is imported: the models are tiny, and threads that wait for a busy
# core make a step of 15 ms one of 150.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
