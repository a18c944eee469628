"""Counts of proposals from a step's output to Prometheus, without an engine."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm.chef import metrics
from vllm.chef import scheduler as scheduler_module
from vllm.chef.config import SCHEDULER
from vllm.chef.counts import AsyncCountedOutput, CountedOutput, StepCounts, TurnCounts, received
from vllm.chef.metrics import TurnMetrics
from vllm.chef.turns import Turns, chef_turns, sd_turns

TURNS = chef_turns([1, 2, 1], [9, 5, 7], (True, True, True))  # members 0, 2, 1; window 3
REQUESTS = ["all", "refused", "empty", "ended"]
# Lengths of the turns' segments, accepted tokens, judged tokens. Columns: member 2, member 1 twice,
# member 0.
ROWS = np.array([[1, 1, 2, 4, 4], [0, 1, 2, 1, 2], [1, 0, 0, 0, 1], [1, 1, 2, 4, 4]])
COUNTS = StepCounts.of_rows(ROWS)
TOKENS = [[5, 6, 7, 8], [5, 6], [5], [5, 6, 7, 8]]


def test_counts_are_by_member_and_place():
    assert COUNTS.num_in_window.tolist() == [3, 3, 0, 3]
    assert TurnCounts(TURNS).sums(COUNTS.of_requests([0, 1, 2])) == {
        "cycles": 3,
        **{"draft 0 0": 2, "draft 1 0": 2, "draft 1 1": 2, "draft 2 0": 2},
        **{"judged 0 0": 2, "judged 1 0": 2, "judged 1 1": 1, "judged 2 0": 2},
        **{"accepted 0 0": 1, "accepted 1 0": 1, "accepted 1 1": 1, "accepted 2 0": 2},
    }
    assert TurnCounts(TURNS).sums(COUNTS.of_requests([])) == {}


def test_a_first_turn_without_proposals_has_no_counts():
    counts = TurnCounts(sd_turns(3, 2))
    assert list(counts.places()) == [(2, 0), (2, 1)]
    rows = np.array([[0, 2, 1, 2]])
    assert counts.sums(StepCounts.of_rows(rows)) == {
        "cycles": 1,
        **{"draft 2 0": 1, "draft 2 1": 1, "judged 2 0": 1, "judged 2 1": 1, "accepted 2 0": 1},
    }


def test_the_counts_stand_behind_the_tokens():
    tokens = np.array([[*tokens, 0, 0, 0][:4] for tokens in TOKENS])
    output = SimpleNamespace(
        sampled_token_ids=np.concatenate([tokens, ROWS], axis=1),
        get_output=lambda: ModelRunnerOutput(REQUESTS, {}, sampled_token_ids=TOKENS),
    )
    found = pickle.loads(pickle.dumps(AsyncCountedOutput(output, num_tokens=4).get_output()))
    assert found.req_ids == REQUESTS and found.sampled_token_ids == TOKENS
    for ours, expected in zip(found.counts, COUNTS, strict=True):
        assert ours.tolist() == expected.tolist()


class StockScheduler:
    """Answers as vLLM's scheduler does. The request `ended` has ended before, `all` ends now."""

    num_spec_tokens = 3
    spec_decode_metrics_level = "detailed"

    def __init__(self) -> None:
        self.vllm_config = None
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        self.requests[request.name] = request

    def update_from_output(self, step: Any, output: Any) -> Any:
        outputs = []
        for name, request in list(self.requests.items()):
            request.spec_decode_metrics.observe(num_draft_tokens=3, num_accepted=1, detailed=True)
            ends = name == "all"
            metrics = self.requests.pop(name).spec_decode_metrics if ends else None
            outputs.append(
                SimpleNamespace(request_id=name, new_token_ids=[5], spec_decode_metrics=metrics)
            )
        # Another request is refused in this step.
        outputs.append(SimpleNamespace(request_id="other", new_token_ids=[]))
        stats = SchedulerStats(spec_decoding_stats=self.make_spec_decoding_stats(None, 3, 1))
        return {
            0: SimpleNamespace(outputs=outputs[:2], scheduler_stats=None),
            1: SimpleNamespace(outputs=outputs[2:], scheduler_stats=stats),
        }


class Scheduler(scheduler_module._CountedTurns, StockScheduler):
    pass


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    monkeypatch.setattr(scheduler_module, "engine_turns", lambda _: TURNS)
    scheduler = Scheduler()
    for name in REQUESTS[:3]:
        metrics = RequestSpecDecodeMetrics.new(3)
        scheduler.add_request(SimpleNamespace(name=name, spec_decode_metrics=metrics))
    return scheduler


def test_the_scheduler_counts_requests_that_still_run_and_windows_that_are_there(scheduler):
    requests = dict(scheduler.requests)
    rows = {request: row for row, request in enumerate(REQUESTS)}
    outputs = scheduler.update_from_output(None, CountedOutput(REQUESTS, rows, counts=COUNTS))
    stats = outputs[1].scheduler_stats
    assert received(stats) == TurnCounts(TURNS).sums(COUNTS.of_requests([0, 1, 2]))
    assert stats.spec_decoding_stats == SpecDecodingStats(
        num_spec_tokens=3,
        num_drafts=2,  # an empty window is none
        num_draft_tokens=6,
        num_accepted_tokens=4,  # the first turn's own token is not in the window
        num_accepted_tokens_per_pos=[2, 1, 1],
        num_draft_tokens_per_pos=[2, 2, 2],
    )
    found = {name: request.spec_decode_metrics for name, request in requests.items()}
    of_requests = {name: (m.per_step_drafted, m.per_step_accepted) for name, m in found.items()}
    assert of_requests == {"all": ([3], [3]), "refused": ([3], [1]), "empty": ([], [])}
    assert found["all"].histogram == [0, 0, 0, 1]


def test_windows_that_are_all_empty_are_no_statistics():
    assert TurnCounts(TURNS).drafts(COUNTS.of_requests([2])) is None


def test_a_step_without_requests_has_no_counts(scheduler):
    outputs = scheduler.update_from_output(None, ModelRunnerOutput([], {}))
    assert received(outputs[1].scheduler_stats) == {}


def test_nothing_is_counted_by_request_unless_it_is_asked_for(scheduler):
    request = SimpleNamespace(name="other", spec_decode_metrics=None)
    scheduler.add_request(request)
    assert request.spec_decode_metrics is None
    metrics, scheduler.spec_decode_metrics_level = scheduler.requests["refused"], "none"
    rows = {request: row for row, request in enumerate(REQUESTS)}
    del scheduler.requests["other"]
    scheduler.update_from_output(None, CountedOutput(REQUESTS, rows, counts=COUNTS))
    assert metrics.spec_decode_metrics.num_draft_tokens == 0


def config(scheduler_cls: str | None) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls),
        model_config=SimpleNamespace(served_model_name="tiny"),
    )


@pytest.fixture
def counted_turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    monkeypatch.setattr(metrics, "engine_turns", lambda _: TURNS)
    unregister_vllm_metrics()
    yield TURNS
    unregister_vllm_metrics()


def value(name: str, **labels: str) -> float | None:
    labels = {"model_name": "tiny", "engine": "1", **labels}
    return REGISTRY.get_sample_value(f"vllm:ensemble_num_{name}_total", labels)


def test_counters_start_at_zero_and_count_by_engine(counted_turns):
    counters = TurnMetrics(config(SCHEDULER), [0, 1])
    counters.log_engine_initialized()
    assert value("cycles") == value("draft_tokens", member="1", position="1") == 0
    assert value("draft_tokens", member="0", position="1") is None, "it proposes one token"
    stats = SchedulerStats(running_lora_adapters=TurnCounts(TURNS).sums(COUNTS.of_requests([0, 1])))
    for _ in range(2):
        counters.record(stats, None, engine_idx=1)
    counters.record(None, None, engine_idx=1)
    assert value("cycles") == 4
    assert value("accepted_tokens", member="2", position="0") == 4
    assert value("judged_tokens", member="1", position="1") == 2
    assert value("cycles", engine="0") == 0


def test_an_engine_with_another_scheduler_has_no_counters(counted_turns):
    counters = TurnMetrics(config(None), [1])
    counters.log_engine_initialized()
    counters.record(SchedulerStats(running_lora_adapters={"adapter": 1}), None, engine_idx=1)
    assert value("cycles") is None
