"""Quantized members, in either place of an ensemble, beside one that is not quantized.

A stock engine tells what a checkpoint computes alone. Formats without a CPU kernel need a GPU.
"""

from typing import Any

import pytest
import torch
from engines import engine
from quantized import FORMATS, SIZES, save_quantized
from test_member_loading import POLICIES, TABLE, alone, assert_mean, logits
from tiny_models import llama_config, save_model

# A member's name, and the options of its entry. "online" is quantized while it loads.
MEMBERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in FORMATS},
    "online": dict(quantization="fp8"),
}
ON_CPU = ("int8",)
NAMES = [pytest.param(name, marks=() if name in ON_CPU else pytest.mark.gpu) for name in MEMBERS]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("plain") / "0", llama_config(**SIZES), seed=1)


@pytest.fixture(scope="module")
def plain_logits(plain: str) -> list[torch.Tensor]:
    return alone(plain, dtype="bfloat16")


@pytest.fixture(scope="module", params=NAMES)
def quantized(request, tmp_path_factory, plain: str) -> tuple[str, dict, list[torch.Tensor]]:
    """A checkpoint, the options of its entry, and what it computes alone."""
    name = request.param
    root = tmp_path_factory.mktemp(name) / "0"
    model = plain if name == "online" else save_quantized(root, name, seed=2)
    return model, MEMBERS[name], alone(model, dtype="bfloat16", **MEMBERS[name])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_a_quantized_member(policy, is_first, quantized, plain, plain_logits):
    model, options, of_member = quantized
    assert max((a - b).abs().max() for a, b in zip(of_member, plain_logits, strict=True)) > 1e-2
    ensemble = dict(ensemble_fn="mean", ensemble_target="raw-logits")
    if is_first:
        # What the first member has must not become the other's.
        first, ensemble["extra_model"] = model, [plain]
    else:
        first, ensemble["extra_model"] = plain, [{"model": model, **options}]
        options = {}
    with engine(first, ensemble, POLICIES[policy], 2, dtype="bfloat16", **TABLE, **options) as llm:
        found = logits(llm)
    assert_mean(found, [of_member, plain_logits])


@pytest.mark.gpu
def test_by_turns_in_cuda_graphs(quantized, plain):
    model, options, _ = quantized
    # Compiled code rounds in other places, so the members run compiled when they run alone, too.
    compiled = dict(enforce_eager=False, dtype="bfloat16")
    members = [alone(plain, **compiled), alone(model, **compiled, **options)]
    ensemble = dict(
        extra_model=[{"model": model, **options}],
        ensemble_fn="mean",
        ensemble_target="raw-logits",
    )
    with engine(plain, ensemble, POLICIES["turns"], 2, **compiled, **TABLE) as llm:
        found = logits(llm)
    assert_mean(found, members, 0.05)
