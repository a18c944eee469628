"""Runs a launcher of vLLM twice: with the stock kernel under Triton's interpreter, and with ours.

Every tensor that the kernel was given must then hold the same bits, also where it wrote nothing.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, dispatcher
from vllm.v1.worker.gpu import buffer_utils

from vllm.cpu_kernels import register_cpu_kernels

register_cpu_kernels()


class Recorder:
    """Launches a kernel and keeps copies of its tensors, as they are after the launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.tensors: list[torch.Tensor] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.kernel[grid](*args, **kwargs)
            self.tensors += [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]

        return launch


@pytest.fixture(autouse=True)
def defined_memory(monkeypatch):
    """Make `torch.empty` return NaN and the largest integer, so that unwritten memory is equal."""
    if not (current_platform.is_cpu() and HAS_TRITON):
        pytest.skip("the kernels are replaced on the CPU only")
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no pinned memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compare(monkeypatch):
    """Run `launch` with the stock kernels of these names and with ours; return both results.

    The names are below `vllm.v1.worker.gpu`.
    """

    def compare(names: str | list[str], launch: Callable[[], Any], tolerance: float = 0.0):
        names = [f"vllm.v1.worker.gpu.{n}" for n in ([names] if isinstance(names, str) else names)]
        # On a GPU inf - inf is NaN without a warning; NumPy, which the interpreter uses, warns.
        with np.errstate(invalid="ignore"):
            expected, stock_result = record({n: dispatcher._registry[n][0] for n in names}, launch)
        got, our_result = record({n: installed(n) for n in names}, launch)
        assert_equal(got, expected, tolerance)
        return stock_result, our_result

    def record(kernels: dict[str, object], launch: Callable[[], Any]):
        recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                module, attr = name.rsplit(".", 1)
                patch.setattr(importlib.import_module(module), attr, recorder)
            result = launch()
        assert all(recorder.tensors for recorder in recorders.values())
        return [tensor for r in recorders.values() for tensor in r.tensors], result

    return compare


@pytest.fixture
def compare_returned(compare):
    """Like `compare`, for a `launch` that makes new state; returns the tensors that ours returned.

    The tensors that `launch` returns must be equal as well. Kernels know these only by pointer.
    """

    def compare_returned(
        names: str | list[str], launch: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        stock, ours = compare(names, launch)
        assert_equal(ours, stock)
        return ours

    return compare_returned


def assert_equal(got, expected, tolerance: float = 0.0) -> None:
    for a, b in zip(expected, got, strict=True):
        if "ptr" not in str(a.dtype) and a.dtype != torch.uint64:  # addresses
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)


def installed(name: str) -> dispatcher.KernelOverride:
    module, attr = name.rsplit(".", 1)
    kernel = getattr(importlib.import_module(module), attr)
    assert isinstance(kernel, dispatcher.KernelOverride)
    return kernel


@pytest.fixture
def int1_masks(monkeypatch):
    """The interpreter takes only NumPy's bool for a mask, and makes an integer of `int1 & int1`."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def with_bool_mask(stock, position):
        def call(self, *args):
            mask = args[position]
            handle = TensorHandle((mask.data.astype(np.int64) & 1).astype(bool), mask.dtype)
            return stock(self, *args[:position], handle, *args[position + 1 :])

        return call

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        stock = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, with_bool_mask(stock, position))
