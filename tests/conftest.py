"""Settings of every test process. Tests marked `gpu` run only on machines with a GPU."""

import os
import sys
from collections import defaultdict

# One thread, set before torch is imported. The models are tiny, and threads that wait for a busy
# core turn a step of 15 ms into one of 150 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import recorder
import torch
from absl import logging as absl_logging

# When Hydra sets logging up anew, this handler closes its first stream: pytest's own.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part",
        metavar="K/N",
        help="of the tests marked slow, run the K-th of N parts only (K from 1)",
    )
    recorder.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    recorder.start(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("slow_part"):
        part, num_parts = map(int, config.getoption("slow_part").split("/"))
        others = outside_of_part(items, part, num_parts)
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=[*others])
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def outside_of_part(items: list[pytest.Item], part: int, num_parts: int) -> set[pytest.Item]:
    """The slow tests of all parts but one. Every file has tests in every part.

    The tests of a part follow one another in their file, because neighbours share engines.
    """
    slow = defaultdict(list)
    for item in items:
        if "slow" in item.keywords:
            slow[item.path].append(item)
    others = set()
    for of_file in slow.values():
        start, end = (len(of_file) * at // num_parts for at in (part - 1, part))
        others |= {*of_file[:start], *of_file[end:]}
    return others
