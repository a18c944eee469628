"""Which cases of a test are in the quick set, `-m "not slow"`."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *names: Any) -> list[Any]:
    """The cases as parameters of a test or a fixture; all except `names` are marked `slow`."""
    cases = list(cases)
    assert all(name in cases for name in names), f"no such cases among {names}"
    return [case if case in names else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
