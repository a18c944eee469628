"""Prompts wait for others where others come, and never for long."""

from types import SimpleNamespace

import pytest

from vllm.chef import scheduler as scheduler_module
from vllm.chef.prompts import ENOUGH_TOKENS, HORIZON, MAX_WAIT, PromptGate


def gate_with_arrivals(every: int) -> PromptGate:
    """A gate after many steps, with a prompt in each `every`-th of them."""
    gate = PromptGate()
    for step in range(20 * HORIZON):
        if step % every == 0:
            gate.arrive()
        gate.waits(0)
    return gate


def test_a_prompt_waits_a_few_steps_and_then_is_read():
    gate = gate_with_arrivals(every=1)
    found = []
    for _ in range(3 * (MAX_WAIT + 1)):
        gate.arrive()
        found.append(gate.waits(50))
    assert found == ([True] * MAX_WAIT + [False]) * 3


def test_enough_prompts_are_read_at_once():
    gate = gate_with_arrivals(every=1)
    assert gate.waits(ENOUGH_TOKENS - 1)
    assert not gate.waits(ENOUGH_TOKENS)
    assert [gate.waits(1) for _ in range(MAX_WAIT + 1)] == [True] * MAX_WAIT + [False]


@pytest.mark.parametrize("every", [MAX_WAIT * 2, 100])
def test_a_prompt_that_nobody_follows_does_not_wait(every):
    gate = gate_with_arrivals(every)
    assert not gate.waits(50)
    assert not PromptGate().waits(50), "as nothing is known of arrivals"


def test_the_mean_of_arrivals_is_per_step():
    assert gate_with_arrivals(every=1).per_step == pytest.approx(1.0)
    assert gate_with_arrivals(every=4).per_step == pytest.approx(0.25, rel=0.1)


class StockScheduler:
    def __init__(self) -> None:
        self.running, self.waiting, self.throttled = [], [], []

    def add_request(self, request) -> None:
        self.waiting.append(request)

    def schedule(self, throttle_prefills: bool = False) -> None:
        self.throttled.append(throttle_prefills)


class Scheduler(scheduler_module._SharedPromptSteps, StockScheduler):
    pass


def request(num_tokens: int, num_computed: int, is_chunk: bool) -> SimpleNamespace:
    return SimpleNamespace(
        num_tokens=num_tokens, num_computed_tokens=num_computed, is_prefill_chunk=is_chunk
    )


def test_vllm_defers_the_prompts_that_wait(monkeypatch):
    scheduler = Scheduler()
    assert scheduler.prompt_gate is None, "nothing waits on a CPU"
    scheduler.schedule()
    scheduler.schedule(True)
    assert scheduler.throttled == [False, True]
    scheduler.prompt_gate = gate_with_arrivals(every=1)
    scheduler.running = [request(80, 79, False), request(90, 30, True)]
    scheduler.add_request(request(70, 0, False))
    assert scheduler._num_prompt_tokens() == 60 + 70
    scheduler.throttled.clear()
    for _ in range(MAX_WAIT + 1):
        scheduler.schedule()
    scheduler.schedule(True)
    assert scheduler.throttled == [True] * MAX_WAIT + [False, True]
    scheduler.waiting = [request(ENOUGH_TOKENS, 0, False)] * 1000
    scheduler.throttled.clear()
    scheduler.schedule()
    assert scheduler.throttled == [False]
