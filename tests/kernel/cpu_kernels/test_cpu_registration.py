"""Which kernels are replaced, where, and with which parameters."""

import inspect

import pytest
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher

from vllm.cpu_kernels import kernels_by_name, register_cpu_kernels, registration


def test_registering_again_changes_nothing(caplog):
    before = dict(dispatcher._registry)
    register_cpu_kernels()
    assert dispatcher._registry == before
    assert not caplog.records
    assert set(kernels_by_name()) <= set(before)


def test_every_kernel_has_our_parameters():
    """Launches are positional: the test must notice one parameter more or less in another vLLM."""
    for name, ours in kernels_by_name().items():
        stock = dispatcher._registry[name][0].arg_names
        parameters = [p.lstrip("_") for p in inspect.signature(ours).parameters]
        assert len(parameters) == len(stock), name
        for constexpr in filter(str.isupper, stock):
            assert parameters.index(constexpr) == stock.index(constexpr), (name, constexpr)


def test_nothing_is_replaced_on_a_gpu(monkeypatch):
    monkeypatch.setattr(registration, "_registered", False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(dispatcher, "register_kernels", lambda overrides: pytest.fail("replaced"))
    register_cpu_kernels()
