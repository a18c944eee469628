"""Fixtures of the tests of facts about vLLM, `test_upstream_*.py`.

Some facts are told from vLLM's Triton kernels. On a CPU, Triton's interpreter runs them.
"""

import importlib

import numpy as np
import pytest
from facts import FACTS


@pytest.fixture
def fact(request: pytest.FixtureRequest) -> str:
    """The page's text about the running test. A test that fails shows it."""
    texts = {fact.test: fact.text for fact in FACTS}
    return texts[request.node.originalname]


@pytest.fixture
def pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, vLLM's buffers do not need pinned memory."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import buffer_utils

    if current_platform.is_cpu():
        monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)


@pytest.fixture
def stock_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own kernels. On a CPU ours may stand in their place."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from vllm.triton_utils import dispatcher

    for path, (kernel, _) in dispatcher._registry.items():
        module, name = path.rsplit(".", 1)
        monkeypatch.setattr(importlib.import_module(module), name, kernel)

    store = InterpreterBuilder.create_masked_store

    def store_with_bool_mask(self, pointers, value, mask, *options):
        # The interpreter makes an integer of `int1 & int1`, and takes only NumPy's bool for a mask.
        bools = TensorHandle((mask.data.astype(np.int64) & 1).astype(bool), mask.dtype)
        return store(self, pointers, value, bools, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store_with_bool_mask)
