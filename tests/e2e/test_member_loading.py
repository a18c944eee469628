"""Members that are loaded in a way of their own, and one checkpoint that is a member twice.

What a member computes alone is told by a stock engine with the same options.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from engines import engine, generate, greedy
from tiny_models import VOCAB_SIZE, llama_config, save_model, save_noisy_copy
from torch import nn
from vllm import LLM

PROMPTS = [[5, 6, 7], [(7 * i + 3) % VOCAB_SIZE for i in range(40)], [9] * 15]
FORCED, NUM_TOKENS = 5, 4
TABLE = dict(max_logprobs=VOCAB_SIZE, logprobs_mode="raw_logits")
POLICIES = {"plain": None, "turns": dict(gamma=[1, 2], turn_order=[0, 1])}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first, save_noisy_copy(root / "1", first, 1, 0.05)]


def logits(llm: LLM) -> list[torch.Tensor]:  # num_prompts x [NUM_TOKENS, VOCAB_SIZE]
    params = greedy(NUM_TOKENS, logprobs=VOCAB_SIZE, allowed_token_ids=[FORCED])
    return [
        torch.tensor([[row[t].logprob for t in range(VOCAB_SIZE)] for row in output.logprobs])
        for output in generate(llm, PROMPTS, params)
    ]


def alone(model: str, **options: Any) -> list[torch.Tensor]:
    with engine(model, **TABLE, **options) as llm:
        return logits(llm)


def assert_mean(
    found: Sequence[torch.Tensor],
    members: Sequence[Sequence[torch.Tensor]],
    tolerance: float = 2e-3,
) -> None:
    for rows, *of_members in zip(found, *members, strict=True):
        expected = sum(of_members) / len(of_members)
        torch.testing.assert_close(rows, expected, rtol=0, atol=tolerance)


def members_of(llm: LLM) -> list[nn.Module]:
    """In the order of calls."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
    groups = [runner.model, *(runner.speculator.model if runner.speculator else ())]
    return [member for group in groups for member in group.members]


def addresses(member: nn.Module) -> set[int]:
    """Where the weights are. vLLM's CPU build moves those of most layers out of the module."""
    return {weights.data_ptr() for weights in member.parameters() if weights.numel()}


@pytest.fixture(scope="module")
def tables(models: list[str]) -> Iterator[dict[tuple[int, str], list[torch.Tensor]]]:
    yield {
        (member, dtype): alone(models[member], dtype=dtype)
        for member in (0, 1)
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids="+".join)
def test_members_of_different_dtypes(dtypes, policy, models, tables):
    # In bfloat16 alone, logits differ by more than the tolerance.
    for member in (0, 1):
        low, high = tables[member, "bfloat16"], tables[member, "float32"]
        assert max((a - b).abs().max() for a, b in zip(low, high, strict=True)) > 1e-2
    other = {"model": models[1], "dtype": dtypes[1]}
    ensemble = dict(extra_model=other, ensemble_fn="mean", ensemble_target="raw-logits")
    with engine(models[0], ensemble, POLICIES[policy], 2, dtype=dtypes[0], **TABLE) as llm:
        found = logits(llm)
    assert_mean(found, [tables[member, dtypes[member]] for member in (0, 1)])


@pytest.mark.parametrize("policy", POLICIES)
def test_overrides_are_one_members(policy, models, tables):
    """Each member is asked to read the same checkpoint with another base of rope."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    changed = [alone(model, dtype="float32", hf_overrides=rope) for model in models]
    for overridden in (0, 1):
        other = {"model": models[1], "hf_overrides": rope} if overridden else models[1]
        options = {} if overridden else {"hf_overrides": rope}
        ensemble = dict(extra_model=[other], ensemble_fn="mean", ensemble_target="raw-logits")
        with engine(models[0], ensemble, POLICIES[policy], 2, **TABLE, **options) as llm:
            found = logits(llm)
        expected = [tables[member, "float32"] for member in (0, 1)]
        expected[overridden] = changed[overridden]
        assert_mean(found, expected)


def test_a_members_weights_may_be_dummies(models, tables):
    other = {"model": models[1], "load_format": "dummy"}
    ensemble = dict(extra_model=[other], weights=[1.0, 0.0], ensemble_target="raw-logits")
    with engine(models[0], ensemble, **TABLE) as llm:
        model = (
            llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model
        )
        found, members = logits(llm), model.members
        assert members[1].model.embed_tokens.weight.abs().max() < 0.01, "vLLM's dummy weights"
    assert_mean(found, [tables[0, "float32"]])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_that_is_a_member_twice_is_kept_once(policy, models, tables):
    ensemble = dict(extra_model=models[:1], ensemble_fn="mean", ensemble_target="raw-logits")
    with engine(models[0], ensemble, POLICIES[policy], 2, **TABLE) as llm:
        found = logits(llm)
        one, other = map(addresses, members_of(llm))
        assert one == other and len(one) > 1
    assert_mean(found, [tables[0, "float32"]] * 2)


@pytest.mark.parametrize(
    "second",
    [dict(model=1), dict(model=0, dtype="bfloat16"), dict(model=0, load_format="dummy")],
    ids=str,
)
def test_what_differs_is_kept_apart(second, models):
    ensemble = dict(extra_model={**second, "model": models[second["model"]]}, ensemble_fn="mean")
    with engine(models[0], ensemble, **TABLE) as llm:
        one, other = map(addresses, members_of(llm))
        assert not one & other and one and other


def test_dummy_weights_stand_for_different_models(models):
    with engine(models[0], dict(extra_model=models[:1]), load_format="dummy") as llm:
        one, other = map(addresses, members_of(llm))
        assert not one & other and one and other
