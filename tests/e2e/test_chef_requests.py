"""Requests that join, wait, lose their cache or are aborted, with members that take turns.

Whatever the scheduler does:
- a request's tokens are those of the plain ensemble,
- its window depends on no other request,
- the engine's counts match the committed tokens.
"""

import random
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from engines import engine, generate, greedy, sampled
from tiny_models import (
    VOCAB_SIZE,
    llama_config,
    load_reference,
    next_logits,
    save_model,
    save_noisy_copy,
)
from transformers import MistralConfig
from vllm import LLM
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm.chef.prompts import PromptGate
from vllm.chef.reference import Chef

CHEF, WINDOW = dict(gamma=[1, 2, 1]), 3
NUM_TOKENS = 24
rng = random.Random(0)
SHARED = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
# Prompts of very different lengths. Two share a prefix of more than a block; one is longer than a
# chunk.
PROMPTS = [
    [*SHARED, 1, 2, 3],
    [*SHARED, 4],
    [5],
    [6, 7, 8, 9],
    [rng.randrange(VOCAB_SIZE) for _ in range(60)],
    [rng.randrange(VOCAB_SIZE) for _ in range(17)],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.015 * s) for s in (1, 2)]


@pytest.fixture(scope="module")
def ensemble(models: list[str]) -> dict[str, Any]:
    return dict(extra_model=models[1:], ensemble_fn="weighted", weights=[0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def expected(models, ensemble) -> list[list[int]]:
    with engine(models[0], ensemble) as llm:
        return [list(out.token_ids) for out in generate(llm, PROMPTS, greedy(NUM_TOKENS))]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(out.token_ids) for out in outputs]


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [(None,), (CHEF, WINDOW)], ids=["plain", "turns"])
def test_chunks_and_cached_prefixes(policy, models, ensemble, expected):
    arguments = dict(
        block_size=32, max_num_batched_tokens=24, max_num_scheduled_tokens=12, max_num_seqs=4
    )
    with engine(models[0], ensemble, *policy, **arguments) as llm:
        for _ in range(2):
            assert tokens(generate(llm, PROMPTS, greedy(NUM_TOKENS))) == expected
        assert metric(llm, "vllm:prefix_cache_hits") > 0


@pytest.mark.slow
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_requests_that_are_preempted_resume(async_scheduling, models, ensemble, expected):
    # 6 blocks of 32 tokens. vLLM uses one of them itself, and requests need 1 to 3 each.
    arguments = dict(block_size=32, num_gpu_blocks_override=6, async_scheduling=async_scheduling)
    with engine(models[0], ensemble, CHEF, WINDOW, **arguments) as llm:
        scheduler = Steps(llm).scheduler
        assert isinstance(scheduler, AsyncScheduler) == async_scheduling
        assert tokens(generate(llm, PROMPTS, greedy(NUM_TOKENS))) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_gpu_blocks", [8, 20])
def test_sliding_windows_at_the_end_of_the_context(num_gpu_blocks, tmp_path):
    """vLLM takes away the blocks that a sliding window has passed."""
    config = MistralConfig(
        **llama_config().to_dict() | dict(sliding_window=8, model_type="mistral")
    )
    first = save_model(tmp_path / "0", config, seed=0)
    others = [save_noisy_copy(tmp_path / str(s), first, s, 0.02) for s in (1, 2)]
    ensemble = dict(extra_model=others, ensemble_fn="weighted", weights=[0.5, 0.3, 0.2])
    lengths = [3, 20, 40, 62, 64, 66, 68, 70] * 4
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    arguments = dict(max_model_len=80, block_size=32, num_gpu_blocks_override=num_gpu_blocks)
    with engine(first, ensemble, max_model_len=80) as llm:
        expected = tokens(generate(llm, prompts, greedy(100)))
    with engine(first, ensemble, dict(gamma=[1, 4, 5]), 9, max_num_seqs=4, **arguments) as llm:
        assert tokens(generate(llm, prompts, greedy(100))) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chef", "window", "tokens_per_cycle"),
    [(dict(gamma=1), 1, 2), (dict(gamma=[1, 5]), 5, 6), (dict(policy="sd", gamma=3), 3, 4)],
)
def test_a_model_and_its_second_self_accept_everything(chef, window, tokens_per_cycle, models):
    ensemble = dict(extra_model=[models[0]])
    with engine(models[0], ensemble, chef, window, async_scheduling=False) as llm:
        llm.collective_rpc("reset_turn_stats")
        generate(llm, PROMPTS[2:4], greedy(40))
        stats = llm.collective_rpc("turn_stats")[0]
    assert stats["num_accepted"] == stats["num_judged"]
    # The first cycle of each of the two requests has no window yet.
    cycles = stats["num_cycles"] - 2
    assert stats["num_tokens"] == 2 + tokens_per_cycle * cycles


class Steps:
    """An engine driven step by step, whose state can be checked in between."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.outputs: dict[str, list[int]] = {}

    def add(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> str:
        request_id = str(len(self.outputs))
        self.outputs[request_id] = []
        params = greedy(num_tokens)
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return request_id

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs[output.request_id] = list(output.outputs[0].token_ids)

    def slots(self) -> dict[str, int]:
        """The slots of requests in the runner, by the id that was given to `add`."""
        slots = self.runner.req_states.req_id_to_index
        return {request_id.split("-")[0]: slot for request_id, slot in slots.items()}

    def window(self, slot: int) -> tuple[int, list[int]]:
        """The number of committed tokens, and the pending ones."""
        state = self.runner.speculator.state
        length = int(state.lengths[slot].sum())
        num_tokens = int(self.runner.req_states.total_len.gpu[slot])
        return num_tokens, self.runner.req_states.draft_tokens[slot, :length].tolist()


@pytest.fixture(scope="module")
def llm(models, ensemble, expected) -> LLM:
    # `expected` first: an engine that ends takes with it what another has in this process.
    with engine(models[0], ensemble, CHEF, WINDOW, async_scheduling=False) as llm:
        yield llm


def windows(llm: LLM, prompts: list[list[int]]) -> list[dict[int, list[int]]]:
    """By request: the window after every step, by the number of committed tokens."""
    steps = Steps(llm)
    ids = [steps.add(prompt) for prompt in prompts]
    found: list[dict[int, list[int]]] = [{} for _ in prompts]
    while steps.engine.has_unfinished_requests():
        steps.step()
        for request_id, slot in steps.slots().items():
            num_tokens, window = steps.window(slot)
            found[ids.index(request_id)][num_tokens] = window
    return found


@pytest.mark.slow
def test_a_window_depends_on_no_other_request(llm):
    together = windows(llm, PROMPTS)
    alone = [windows(llm, [prompt])[0] for prompt in PROMPTS]
    for request, expected_windows in zip(together, alone, strict=True):
        # A finished request may leave the runner before or after its last window is seen.
        common = request.keys() & expected_windows.keys()
        assert len(common) > 5
        assert {n: request[n] for n in common} == {n: expected_windows[n] for n in common}
    lengths = {len(window) for request in alone for window in request.values()}
    assert len(lengths) > 2, "some windows fell and others did not"


def test_prompts_that_wait_for_others_change_nothing(llm, expected):
    steps, gate = Steps(llm), PromptGate()
    gate.per_step, waits, found = 10.0, gate.waits, []
    gate.waits = lambda num_tokens: found.append(waits(num_tokens)) or found[-1]
    steps.scheduler.prompt_gate = gate
    try:
        for prompt in PROMPTS:
            steps.add(prompt)
            steps.step()
        while steps.engine.has_unfinished_requests():
            steps.step()
    finally:
        steps.scheduler.prompt_gate = None
    assert list(steps.outputs.values()) == expected
    assert sum(found) >= 3, "some prompts waited"


def test_counts_are_those_of_the_committed_tokens(llm, expected):
    steps = Steps(llm)
    for prompt in PROMPTS:
        steps.add(prompt)
    num_checked = 0
    while steps.engine.has_unfinished_requests():
        steps.step()
        slots = steps.runner.req_states.req_id_to_index
        for request in steps.scheduler.running:
            slot = slots[request.request_id]
            states = steps.runner.req_states
            committed = request.num_tokens
            assert int(states.total_len.gpu[slot]) == committed
            assert int(states.num_computed_tokens.gpu[slot]) == committed - 1
            assert request.num_computed_tokens == committed - 1
            assert request.num_output_tokens == committed - request.num_prompt_tokens
            num_checked += 1
    assert num_checked > 20
    assert list(steps.outputs.values()) == expected


def test_turns_are_those_of_the_reference(llm, models):
    """Judged and accepted proposals, member by member, match the algorithm on paper."""
    references = [load_reference(path) for path in models]
    weights = [0.5, 0.3, 0.2]

    def member(reference: torch.nn.Module) -> Callable[[tuple[int, ...]], list[float]]:
        return lambda tokens: next_logits(reference, tokens).softmax(-1).tolist()

    def combine(probs: list[list[float]]) -> list[float]:
        return [
            sum(w * p for w, p in zip(weights, ps, strict=True)) for ps in zip(*probs, strict=True)
        ]

    turns = list(Steps(llm).runner.turns)
    for prompt in (PROMPTS[2], PROMPTS[3]):
        oracle = Chef([member(m) for m in references], combine, turns, Random(0), greedy=True)
        expected = oracle.generate(tuple(prompt), NUM_TOKENS)
        llm.collective_rpc("reset_turn_stats")
        output = generate(llm, [prompt], greedy(NUM_TOKENS))[0]
        stats = llm.collective_rpc("turn_stats")[0]
        assert tuple(output.token_ids) == expected.tokens
        assert stats["num_cycles"] == expected.cycles
        assert [sum(row) for row in stats["num_judged"]] == expected.judged
        assert [sum(row) for row in stats["num_accepted"]] == expected.accepted


def test_requests_join_and_are_aborted_in_mid_window(llm, expected):
    steps = Steps(llm)
    kept = [steps.add(PROMPTS[0]), steps.add(PROMPTS[2])]
    doomed = steps.add(PROMPTS[3], 60)
    for _ in range(3):
        steps.step()
    num_tokens, _ = steps.window(steps.slots()[doomed])
    assert num_tokens > len(PROMPTS[3])
    steps.engine.abort_request([doomed])
    # Takes the slot of the request that is gone, with whatever its windows were.
    kept += [steps.add(PROMPTS[1]), steps.add(PROMPTS[4])]
    while steps.engine.has_unfinished_requests():
        steps.step()
    found = [steps.outputs[request_id] for request_id in kept]
    assert found == [expected[0], expected[2], expected[1], expected[4]]


def test_a_seed_repeats_a_sample_in_the_same_batch(llm):
    params = [sampled(12, temperature=1.0, seed=seed) for seed in range(len(PROMPTS))]
    first, second = (tokens(generate(llm, PROMPTS, params)) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_acceptance_is_told_apart_per_request(llm):
    """A batch of 32. Half of its requests are hot: their proposals are seldom accepted."""
    prompts = [[token, token + 1, token + 2] for token in range(32)]
    params = greedy(10)
    alone = [tokens(generate(llm, [prompt], params))[0] for prompt in prompts[::8]]
    hot = sampled(30, temperature=2.0, seed=1)
    outputs = generate(llm, prompts, [hot if i % 8 else params for i in range(32)])
    assert tokens(outputs)[::8] == alone
    assert [len(out.token_ids) for out in outputs] == [30 if i % 8 else 10 for i in range(32)]


@pytest.mark.gpu
def test_nothing_waits_for_the_device_within_a_step(llm):
    """CUDA synchronisations are errors from the scores to the window of the next step."""
    steps = Steps(llm)
    runner = steps.runner
    sample_tokens = type(runner).sample_tokens

    def checked(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for prompt in PROMPTS:
        steps.add(prompt)
    steps.step()
    runner.sample_tokens = checked
    try:
        while steps.engine.has_unfinished_requests():
            steps.step()
    finally:
        del runner.sample_tokens
