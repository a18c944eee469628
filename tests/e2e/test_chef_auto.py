"""Speculation whose depth is chosen at run time.

The tokens stay the same, and nothing is proposed if proposals only cost.
"""

from typing import Any

import pytest
from engines import engine, generate, greedy
from quick import quick
from tiny_models import llama_config, save_model, save_noisy_copy

import vllm.chef.scheduler
from vllm.chef.depth import MIN_HOLD_STEPS, PROBE_STEPS

PROMPTS = [[1, 2, 3], list(range(20)), [7], [5, 6] * 8, [9, 8, 7]]
NUM_TOKENS = 60
POLICIES = [
    dict(gamma="auto", max_gamma=[1, 3]),
    dict(policy="sd", gamma="auto", max_gamma=3),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One model, another that agrees with it on most tokens, and one that never agrees with it."""
    root = tmp_path_factory.mktemp("models")
    config = llama_config()
    first = save_model(root / "first", config, seed=0)
    return {
        "first": first,
        "like": save_noisy_copy(root / "like", first, seed=1, noise=0.01),
        "unlike": save_model(root / "unlike", config, seed=5),
    }


class Clock:
    """Deeper steps take longer, whatever else the machine does."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.now = scheduler, 0.0

    def perf_counter(self) -> float:
        _, depth = self.scheduler._last or (0, 0)
        self.now += 1 + 0.1 * depth
        return self.now


def ensemble(models: dict[str, str], other: str) -> dict:
    return dict(extra_model=[models[other]], ensemble_fn="mean", ensemble_target="logits")


@pytest.mark.parametrize("chef", quick(POLICIES))
def test_depth_may_change_at_every_step_that_is_scheduled_ahead(models, chef):
    settings = ensemble(models, "like")
    with engine(models["first"], settings) as llm:
        expected = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    with engine(models["first"], settings, chef, 3, async_scheduling=True) as llm:
        outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        stats = llm.collective_rpc("turn_stats")[0]
    assert [out.token_ids for out in outputs] == [out.token_ids for out in expected]
    # Some cycles were shallower than the deepest one: the proposer ran fewer passes.
    assert stats["num_calls"][1] < (3 if chef.get("policy") != "sd" else 4) * stats["num_calls"][0]


@pytest.mark.slow
def test_nothing_is_proposed_where_nothing_is_accepted(models, monkeypatch):
    chef = dict(gamma="auto", max_gamma=[1, 4])
    with engine(models["first"], ensemble(models, "unlike"), chef, 4) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        chooser = scheduler.dynamic_sd_lookup = scheduler.depths
        clock = Clock(scheduler)
        monkeypatch.setattr(vllm.chef.scheduler, "time", clock)
        for num_reqs in (1, 4):
            assert chooser[num_reqs] == 4
            generate(llm, PROMPTS[:num_reqs], greedy(NUM_TOKENS))
            # One token costs nothing: it comes from the pass that decides the other member's
            # proposal.
            assert chooser[num_reqs] <= 1
        assert chooser.tokens(4) < 1.5
        # Other depths are tried once more, but then not for long.
        while chooser.batches[2].hold == MIN_HOLD_STEPS:
            generate(llm, PROMPTS[:4], greedy(NUM_TOKENS))
        llm.collective_rpc("reset_turn_stats")
        generate(llm, PROMPTS[:4], greedy(NUM_TOKENS))
        stats = llm.collective_rpc("turn_stats")[0]
    # Each member reads once a cycle.
    assert stats["num_calls"][1] < 1.1 * stats["num_calls"][0]
    assert stats["num_cycles"] >= 4 * (NUM_TOKENS - PROBE_STEPS)
