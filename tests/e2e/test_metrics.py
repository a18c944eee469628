"""Metrics of engines whose members take turns, against the algorithm on paper."""

from collections import Counter
from typing import Any

import pytest
from engines import engine, generate, greedy, sampled
from tiny_models import (
    VOCAB_SIZE,
    llama_config,
    load_reference,
    save_byte_tokenizer,
    save_model,
    save_noisy_copy,
)
from turn_counts import NAMES, counting_chef
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm.chef.config import engine_turns
from vllm.chef.metrics import TurnMetrics

PROMPTS = [[5], [6, 7, 8, 9], [index * 7 % VOCAB_SIZE for index in range(20)]]
LENGTH = 24
WEIGHTS = [0.5, 0.3, 0.2]
# By name: turns, window, number of members.
TURNS = {
    "two": (dict(gamma=[1, 3]), 3, 2),
    "three": (dict(gamma=[1, 2, 1]), 3, 3),
    "one token each": (dict(gamma=[1, 1]), 1, 2),
    "sd": (dict(policy="sd", gamma=3), 3, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.015 * s) for s in (1, 2)]


def ensemble(models: list[str], num_members: int) -> dict[str, Any]:
    weights = [weight / sum(WEIGHTS[:num_members]) for weight in WEIGHTS[:num_members]]
    return dict(extra_model=models[1:num_members], ensemble_fn="weighted", weights=weights)


def watch(llm: LLM) -> None:
    """Count as a server does: vLLM loads plugins for statistics in servers only."""
    metrics = TurnMetrics(llm.llm_engine.vllm_config, [0])
    metrics.log_engine_initialized()
    llm.llm_engine.logger_manager.stat_loggers.append(metrics)


def scraped(llm: LLM) -> Counter[Any]:
    """What the metrics show, by the keys of `CountingChef.count`."""
    found: Counter[Any] = Counter()
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if name == "ensemble_num_cycles":
            found["cycles"] += int(metric.value)
        elif name.startswith("ensemble_num_"):
            kind = name.removeprefix("ensemble_num_").removesuffix("_tokens")
            member, position = (int(metric.labels[label]) for label in ("member", "position"))
            found[kind, member, position] += int(metric.value)
        elif name == "spec_decode_num_accepted_tokens_per_pos":
            name = name.removeprefix("spec_decode_")
            found.update({(name, at): int(n) for at, n in enumerate(metric.values)})
        elif name.startswith("spec_decode_"):
            found[name.removeprefix("spec_decode_")] += int(metric.value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_metrics_are_those_of_the_reference(name, async_scheduling, models):
    chef, window, num_members = TURNS[name]
    members = ensemble(models, num_members)
    arguments = dict(async_scheduling=async_scheduling, per_request_spec_decode_metrics="detailed")
    with engine(models[0], members, chef, window, **arguments) as llm:
        watch(llm)
        turns = list(engine_turns(llm.llm_engine.vllm_config))
        before = scraped(llm)
        outputs = generate(llm, PROMPTS, greedy(LENGTH))
        found = scraped(llm) - before
    references = [load_reference(path) for path in models[:num_members]]
    expected = counting_chef(references, members["weights"], turns).count(PROMPTS, LENGTH)
    num_tokens = expected.pop("tokens")
    assert found == +expected
    # Each cycle of a request gives a token of its own, and the accepted tokens of the window.
    assert num_tokens == found["cycles"] + found["num_accepted_tokens"]
    assert 0 < found["num_accepted_tokens"] < found["num_draft_tokens"]
    of_requests = [output.spec_decode_metrics.to_dict() for output in outputs]
    for ours, theirs in (
        ("num_spec_steps", "num_drafts"),
        ("num_draft_tokens", "num_draft_tokens"),
        ("num_accepted_draft_tokens", "num_accepted_tokens"),
    ):
        assert sum(request[ours] for request in of_requests) == found[theirs], ours
    for request in of_requests:
        assert len(request["per_step_drafted"]) == request["num_spec_steps"]
        assert max(request["per_step_drafted"]) == window


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [[1, 2, 1], "auto"])
def test_the_host_counts_what_the_device_counts(gamma, models):
    """Without a step under way when a request ends, both count the same requests.

    Requests are preempted, wait, end at the end of the context and at different times.
    """
    arguments = dict(block_size=32, num_gpu_blocks_override=6, async_scheduling=False)
    if gamma == "auto":
        arguments["max_num_seqs"] = 16
        chef, window = dict(gamma=gamma, max_gamma=[1, 2, 1]), 3
    else:
        chef, window = dict(gamma=gamma), 3
    prompts = [*PROMPTS, [3] * 60, [4] * 90]
    params = [greedy(length) for length in (30, 1, 2, 40, 20)] + [sampled(30)]
    with engine(models[0], ensemble(models, 3), chef, window, **arguments) as llm:
        watch(llm)
        before = scraped(llm)
        llm.collective_rpc("reset_turn_stats")
        generate(llm, [*prompts, PROMPTS[0]], params)
        stats = llm.collective_rpc("turn_stats")[0]
        found = scraped(llm) - before
    assert found["cycles"] == stats["num_cycles"] > 30
    for name in NAMES[1:]:
        expected = Counter(
            {
                (name, member, place): number
                for member, numbers in enumerate(stats[f"num_{name}"])
                for place, number in enumerate(numbers)
            }
        )
        of_kind = {key: n for key, n in found.items() if isinstance(key, tuple) and key[0] == name}
        assert Counter(of_kind) == +expected
    later = {m: sum(found["accepted", m, p] for p in range(window)) for m in range(3)}
    # Every cycle gives the accepted tokens of its window and one more.
    assert stats["num_tokens"] == found["cycles"] + found["num_accepted_tokens"]
    assert sum(later.values()) > found["num_accepted_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_proposal_that_a_grammar_forbids_is_a_draft(async_scheduling, tmp_path):
    """It stays in the window, because it is judged. vLLM itself would leave it out."""
    first = save_model(tmp_path / "0", llama_config(vocab_size=257), seed=0, scale=2.0)
    models = [first, save_noisy_copy(tmp_path / "1", first, seed=1)]
    for path in models:
        save_byte_tokenizer(path)
    arguments = dict(skip_tokenizer_init=False, async_scheduling=async_scheduling)
    params = [
        SamplingParams(
            seed=seed,
            max_tokens=8,
            ignore_eos=True,
            structured_outputs=StructuredOutputsParams(regex="[ -~]{8}"),
        )
        for seed in range(40)
    ]
    with engine(first, dict(extra_model=models[1:]), dict(gamma=[1, 3]), 3, **arguments) as llm:
        watch(llm)
        before = scraped(llm)
        generate(llm, [[66, 67]] * len(params), params)
        found = scraped(llm) - before
    of_drafts = {kind: sum(found[kind, 1, at] for at in range(3)) for kind in NAMES}
    assert found["num_draft_tokens"] == of_drafts["draft"] >= of_drafts["judged"]
    assert found["num_accepted_tokens"] == of_drafts["accepted"] > 0
    # Each window ends with a token that was refused, or is accepted as a whole.
    refused = of_drafts["judged"] - of_drafts["accepted"]
    assert 0 < refused < found["num_drafts"]
