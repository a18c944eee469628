"""The benchmarks without an engine: how runs are written, the clock, ratios, targets, resuming."""

import gzip
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quick import quick

from benchmarks import bench_decode, bench_kernels, bench_worker, kinds, plot
from benchmarks.bench_decode import Document, parse_args, plans_of
from benchmarks.bench_engine import (
    BenchEngine,
    Sample,
    decode,
    draft_counts,
    engine_arguments,
    kv_cache_bytes,
    max_model_len,
    merged,
    summary,
)
from benchmarks.engine_setup import sampling_params
from benchmarks.inflate import Shape
from benchmarks.plans import PRESETS, Plan, Run, Target
from benchmarks.ratios import complete
from benchmarks.shapes import SHAPES, make_shape
from benchmarks.simulate_turns import simulate
from benchmarks.tables import requests_table
from benchmarks.theory import one_token_each, run_of, tokens_per_cycle, two_members
from vllm.chef.arguments import model_config
from vllm.chef.sampling import Processing
from vllm.chef.turns import Turn

SETTINGS = dict(
    dtype="bfloat16",
    enforce_eager=False,
    engine_args={},
    engines_at_once=1,
    kv_cache_gib=None,
    models=None,
    num_tokens=128,
    prompt_len=64,
    requests=None,
    skip=4,
    target="probs",
    sampling=[{}],
    temperature=[0.0],
)


# How runs are written


@pytest.mark.parametrize(
    ("text", "members", "policy", "window"),
    [
        ("llama-7b", ("llama-7b",), None, 0),
        ("a+b", ("a", "b"), None, 0),
        ("a+b@1,5", ("a", "b"), "chef", 5),
        ("a+b+c@1,2,3", ("a", "b", "c"), "chef", 5),
        ("a+b@auto1,5", ("a", "b"), "chef", 5),
        ("cd0.1:a+b@sd5", ("a", "b"), "sd", 5),
        ("a/c@5", ("a",), "draft_model", 5),
        ("a+b/c@4", ("a", "b"), "draft_model", 4),
    ],
)
def test_runs_as_written(text, members, policy, window):
    run = Run.parse(text)
    assert (run.members, run.policy, run.window) == (members, policy, window)
    assert run.scores == (True,) * len(members)
    assert run.is_adaptive == ("auto" in text)


def test_members_without_a_say_and_plain_counterparts():
    run = Run.parse("a+b+c:0@1,1,5")
    assert (run.members, run.scores, run.counted) == (
        ("a", "b", "c"),
        (True, True, False),
        ("a", "b"),
    )
    assert run.plain_key == Run.parse("a+b").plain_key == Run.parse("a+b/c@5").plain_key
    # alpha changes the output but not the cost; the kind of the ensemble may change the cost.
    assert Run.parse("cd0:a+b@sd5").plain_key == Run.parse("cd0.1:a+b").plain_key
    assert Run.parse("cd0.1:a+b").plain_key != Run.parse("a+b").plain_key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a+",
        "a@1,1",
        "a@5",
        "a@sd5",
        "a+b@1",
        "a+b@1,0",
        "a+b/c",
        "a/c@sd5",
        "a@auto1",
        "a/c@auto5",
        "a+b:0@sd5",
        "a:0+b+c@sd5",
    ],
)
def test_runs_that_cannot_be_meant_are_refused(text):
    with pytest.raises(ValueError) as error:
        Run.parse(text)
    assert f"'{text}'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_what_their_targets_ask_for(preset):
    plans, targets = PRESETS[preset]
    cells = {(plan.run, rate, size) for plan in plans for rate, size in plan.cells()}
    assert len({plan.run for plan in plans}) == len(plans)
    measured = {Run.parse(plan.run).plain_key for plan in plans if not Run.parse(plan.run).policy}
    for target in targets:
        assert any((run, target.acceptance, 1) in cells for run in target.runs)
        if target.field == "speed_over_plain":
            assert all(Run.parse(run).plain_key in measured for run in target.runs)
        if target.field.startswith("speed_over:"):
            assert (target.field.removeprefix("speed_over:"), target.acceptance, 1) in cells


def test_the_first_acceptance_is_at_all_batch_sizes():
    plan = Plan("a+b@1,1", (0.8, 0.6), (1, 8), (1,))
    assert plan.cells() == [(0.8, 1), (0.8, 8), (0.6, 1)]
    assert Plan("a", batch_sizes=(1, 2)).cells() == [(None, 1), (None, 2)]
    args = parse_args("--runs llama-7b llama-7b+llama-68m@1,5 --acceptance 0.8 0.6".split())
    assert plans_of(args) == [
        Plan("llama-7b", (), (1, 8), (1,)),
        Plan("llama-7b+llama-68m@1,5", (0.8, 0.6), (1, 8), (1,)),
    ]


@pytest.mark.parametrize(
    "line",
    ["--runs llama-7b+x", "--runs x", "--runs llama-7b@5", "--resume", "--preset smoke --runs x"],
)
def test_bad_command_lines_say_what_is_wrong(line, capsys):
    with pytest.raises(SystemExit):
        parse_args(line.split())
    assert "error: --r" in capsys.readouterr().err


# What an engine is started with


def arguments(text: str, acceptances=(), **changes) -> dict:
    plan = Plan(text, acceptances, (1, 8))
    return engine_arguments(plan, Namespace(**{**SETTINGS, **changes}), arguments.root)


@pytest.fixture(autouse=True)
def shapes_in(tmp_path):
    arguments.root = tmp_path


def test_engine_arguments_of_turns():
    found = arguments("llama-7b+llama-68m@1,5", (0.5,))
    chef = {"policy": "chef", "gamma": [1, 5], "turn_order": [0, 1]}
    assert found["additional_config"]["chef"] == chef
    speculative = found["speculative_config"]
    assert speculative["num_speculative_tokens"] == 5
    assert speculative["rejection_sample_method"] == "synthetic"
    assert speculative["synthetic_acceptance_rates"] == [0.5**n for n in range(1, 6)]
    assert "rejection_sample_method" not in arguments("llama-7b/llama-68m@5")["speculative_config"]


def test_engine_arguments_of_adaptive_turns():
    found = arguments("llama-7b+llama-68m@auto1,2", (0.5,))
    chef = {"policy": "chef", "gamma": "auto", "max_gamma": [1, 2], "turn_order": [0, 1]}
    assert found["additional_config"]["chef"] == chef
    schedule = found["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert [depth for _, _, depth in schedule] == [2, 1, 0]
    assert found["max_num_seqs"] == 8


def test_engine_arguments_of_ensembles():
    outside = arguments("llama-7b+llama-7b+llama-68m:0@1,1,5")
    assert outside["additional_config"]["ensemble"]["weights"] == [0.5, 0.5, 0]
    contrastive = arguments("cd0.1:llama-7b+llama-68m")["additional_config"]["ensemble"]
    assert (contrastive["ensemble_fn"], contrastive["alpha"]) == ("contrastive", 0.1)
    assert contrastive["ensemble_target"] == "raw-logits"
    assert "additional_config" not in arguments("llama-7b")
    assert arguments("llama-7b", engine_args={"seed": 3})["seed"] == 3


def test_the_kv_cache_holds_all_requests_to_their_end():
    run, args = Run.parse("llama-7b+llama-7b"), Namespace(**SETTINGS)
    found = arguments(run.text)["kv_cache_memory_bytes"]
    per_token = 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes
    assert found >= 2 * per_token * 8 * max_model_len(run, args)
    one = arguments("llama-7b")["kv_cache_memory_bytes"]
    assert found == pytest.approx(2 * one)
    args.kv_cache_gib = 3.0
    assert kv_cache_bytes([], 8, run, args) == 3 * 2**30


# The clock


class FakeEngine:
    """Gives every request `lengths` tokens in turn, one step a second; requests join one by one."""

    def __init__(self, lengths: list[int], max_tokens: int) -> None:
        self.lengths, self.max_tokens = lengths, max_tokens
        self.now, self.steps, self.waiting, self.running = 0.0, 0, [], {}

    def clock(self) -> float:
        return self.now

    def add_request(self, request_id: str, prompt: dict, params: object) -> None:
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def abort_request(self, ids: list[str]) -> None:
        self.waiting, self.running = [], {}

    def step(self) -> list[SimpleNamespace]:
        self.now += 1.0
        if self.waiting:
            self.running[self.waiting.pop(0)] = 0
        length = self.lengths[self.steps % len(self.lengths)]
        self.steps += 1
        outputs = []
        for request_id in list(self.running):
            self.running[request_id] += length
            finished = self.running[request_id] >= self.max_tokens
            tokens = SimpleNamespace(token_ids=[7] * length)
            outputs.append(
                SimpleNamespace(request_id=request_id, outputs=[tokens], finished=finished)
            )
        return outputs


def test_the_clock_runs_from_where_all_have_begun():
    engine = FakeEngine([2, 1], max_tokens=1000)
    sample = decode(engine, [[1], [2], [3]], [None] * 3, num_tokens=10, skip=2, clock=engine.clock)
    # The third request joins in the third step. By the fourth it has two outputs; 2, 1, 2, ...
    # follow.
    assert (sample.steps, sample.seconds) == (7, 7.0)
    assert sample.counts == {2: 12, 1: 9}
    assert sample.num_tokens == 33 >= 3 * 10
    assert not engine.has_unfinished_requests()


def test_a_finished_request_ends_the_sample():
    engine = FakeEngine([1], max_tokens=6)
    sample = decode(engine, [[1], [2]], [None] * 2, num_tokens=100, skip=1, clock=engine.clock)
    assert sample.steps == 4 and not engine.has_unfinished_requests()
    with pytest.raises(RuntimeError, match="raise num_tokens"):
        decode(FakeEngine([5], 5), [[1]], [None], num_tokens=9, skip=1)


def test_summary_takes_the_median_time_and_the_mean_tokens():
    samples = [Sample(seconds, 10, Counter({1: 10, 3: 10})) for seconds in (0.1, 0.2, 0.9)]
    found = summary(samples, batch_size=2)
    assert found["ms_per_cycle"] == pytest.approx(20)
    assert (found["ms_per_cycle_min"], found["ms_per_cycle_max"]) == pytest.approx((10, 90))
    assert found["tokens_per_cycle"] == 2
    assert found["ms_per_token"] == pytest.approx(10)
    assert found["tokens_per_s"] == pytest.approx(200)
    assert (found["num_cycles"], found["requests_per_step"]) == (60, 2)


def test_acceptance_of_stock_speculation():
    # Of two drafts: rejected at once; one accepted and one rejected; both accepted.
    found = draft_counts([Sample(1.0, 3, Counter({1: 4, 2: 2, 3: 1}))], Run.parse("a+b/c@2"))
    assert found["acceptance"] == [None, None, pytest.approx(4 / (4 + 4 + 2))]
    assert found["calls_per_cycle"] == [1, 1, 2]


# Theory


TURNS = [
    ((1, 1), (0.9, 0.6)),
    ((1, 5), (0.8, 0.8)),
    ((1, 1, 1), (0.9, 0.5, 0.7)),
    ((1, 3), (0.0, 0.5)),
]


@pytest.mark.parametrize(("gammas", "rates"), quick(TURNS))
def test_formulas_agree_with_the_reference(gammas, rates):
    turns = [Turn((member,), gamma) for member, gamma in enumerate(gammas)]
    args = Namespace(sequences=5, num_tokens=2000)
    simulated = simulate(turns, rates, None, args)["tokens_per_cycle"]
    order = [((member,), gamma) for member, gamma in enumerate(gammas)]
    found = tokens_per_cycle(order, (True,) * len(gammas), rates)
    assert found == pytest.approx(simulated, rel=0.03)


def test_formulas_at_their_ends():
    for rate in (0.0, 1.0):
        assert two_members(1, rate, rate) == 2 / (2 - rate)
        assert one_token_each([rate] * 3) == (3 if rate else 1)
        assert run_of(rate, 5) == (6 if rate else 1)
    assert two_members(5, 1.0, 1.0) == 6
    outside = tokens_per_cycle([((0,), 1), ((1,), 1), ((2,), 5)], (True, True, False), [0.8] * 3)
    assert outside == pytest.approx(3.752, rel=0.02)
    assert tokens_per_cycle([((0,), 0), ((1,), 5)], (True, True), [None, 0.8]) == run_of(0.8, 5)


# What rows say of one another


def row(run: str, ms: float, tokens: float = 1.0, rate=None, size=1, **more) -> dict:
    return {
        "run": run,
        "batch_size": size,
        "temperature": 0.0,
        "sampling": {},
        "acceptance_set": rate,
        "ms_per_token": ms,
        "ms_per_cycle": ms * tokens,
        "tokens_per_cycle": tokens,
    } | more


def turns_row(ms: float, rate: float = 0.8, size: int = 1) -> dict:
    calls = dict(acceptance=[rate, rate], calls_per_cycle=[1.0, 1.0])
    return row("a+b@1,1", ms, 5 / 3, rate, size, **calls)


ENTRY = {
    "run": "a+b@1,1",
    "status": "done",
    "turns": {"turns": [[[0], 1], [[1], 1]], "scores": [True, True]},
}


def test_ratios_are_of_the_same_batch_size():
    rows = [row("a", 4.0), row("b", 2.0), row("a+b", 6.3), turns_row(3.6), turns_row(9.0, size=8)]
    rows.append(row("a/b@5", 2.0, rate=0.8, acceptance=[None, 0.8], calls_per_cycle=[1.0, 5.0]))
    complete({"results": rows, "configurations": [ENTRY]})
    assert rows[2]["ratio_to_members_alone"] == pytest.approx(6.3 / 6)
    assert rows[3]["speed_over_plain"] == pytest.approx(6.3 / 3.6)
    assert rows[3]["speed_over_alone"] == pytest.approx({"a": 4 / 3.6, "b": 2 / 3.6})
    assert rows[4]["speed_over_plain"] is None
    assert rows[5]["speed_over_plain"] == 2.0, "a target alone is its own plain ensemble"
    theory = rows[3]["theory"]
    assert theory["tokens_per_cycle"] == pytest.approx(2 / 1.2)
    assert theory["speed_over_plain"] == pytest.approx(2 / 1.2)
    assert rows[5]["theory"]["cost_ratio"] == pytest.approx(4 / (4 + 5 * 2))
    assert theory["cycle_ms_from"] == "models alone"
    assert rows[0]["theory"] is None and rows[0]["graph_ms"] is None


def test_what_is_not_in_graphs_is_overhead():
    # The window is one token. The first turn has 2 tokens a request, and the other's reading has 2
    # as well.
    turn = {"reading": {"1": 9.0, "2": 2.0, "4": 9.0}, "passes": {}, "passes_per_replay": 1}
    graphs = {"primary": {"1": 1.0, "2": 3.0, "4": 5.0}, "turns": [turn]}
    rows = [row("a+b", 6.0), turns_row(3.6), turns_row(9.0, size=4)]
    complete({"results": rows, "configurations": [ENTRY | {"graph_ms": graphs}]})
    assert rows[1]["graph_ms"]["sum"] == 5.0
    assert rows[1]["overhead_ms"] == pytest.approx(3.6 * 5 / 3 - 5)
    assert rows[1]["overhead_share"] == pytest.approx(1 / 6)
    assert rows[1]["theory"]["cycle_ms_from"] == "graphs"
    assert rows[1]["theory"]["speed_over_plain"] == pytest.approx(2 / 1.2 * 6 / 5)
    assert rows[2]["overhead_ms"] is None, "no graph is that large"
    passes = {"reading": {"1": 9.0, "4": 1.0}, "passes": {"2": 0.4}, "passes_per_replay": 1}
    for per_replay, spent in ((1, 1.6), (4, 0.4)):
        entry = {"run": "a+b@1,5", "turns": {"turns": [[[0], 1], [[1], 5]], "scores": [True, True]}}
        times = {"primary": {"6": 2.0}, "turns": [passes | {"passes_per_replay": per_replay}]}
        more = dict(acceptance=[0.8, 0.8], calls_per_cycle=[1.0, 5.0])
        rows = [row("a+b@1,5", 1.0, 3.7, 0.8, **more)]
        complete({"results": rows, "configurations": [entry | {"graph_ms": times}]})
        assert rows[0]["graph_ms"]["sum"] == pytest.approx(2 + 1 + spent)


def test_requests_of_one_kind_are_compared():
    graphs = {"primary": {"2": 3.0}, "turns": [{"reading": {"2": 2.0}, "passes": {}}]}
    kinds = [{}, {"top_p": 0.9}, {"presence_penalty": 0.5}]
    plain = [row("a+b", ms, sampling=kind) for ms, kind in zip((6.0, 7.0, 8.0), kinds, strict=True)]
    turns = [turns_row(4.0) | {"sampling": kind} for kind in kinds]
    complete({"results": plain + turns, "configurations": [ENTRY | {"graph_ms": graphs}]})
    assert [r["speed_over_plain"] for r in turns] == [1.5, 1.75, 2.0]
    # The others' turns run in other graphs, or without graphs.
    assert [r["graph_ms"] and r["graph_ms"]["sum"] for r in turns] == [5.0, None, None]
    assert plot.of_one_kind(turns) == turns[:1]


class Desc(SimpleNamespace):
    """The part of a graph's description that the code reads."""

    __hash__ = object.__hash__


def desc(num_reqs: int, length: int) -> Desc:
    return Desc(num_reqs=num_reqs, num_tokens=num_reqs * length, uniform_token_count=length)


def test_graphs_are_timed_for_the_batch_that_runs_in_them(monkeypatch):
    sizes = [(8, 2), (1, 2), (4, 2), (2, 3), (4, 3)]
    manager = SimpleNamespace(graphs={desc(*size): size for size in sizes})
    monkeypatch.setattr(bench_worker, "graph_ms", lambda size: float(size[0]))
    assert bench_worker.times(manager, 3) == {8: 4.0, 12: 4.0}
    assert bench_worker.times(manager, 5) == {16: 8.0}
    assert bench_worker.times(manager, 9) == {}
    decisions = {
        ("decide", turn, kind): SimpleNamespace(graphs={desc(8, 1): (turn + 1 + 10 * kind, 1)})
        for turn in range(3)
        for kind in Processing
    }
    readings = {("read", turn, 3): manager for turn in (1, 2)} | {("read", 1, 2): None}
    managers = decisions | readings | {("propose_more", 2, 4): manager}
    expected = {"reading": {16: 8.0 + 1 + 2}, "passes": {}, "passes_per_replay": 0}
    assert bench_worker.turn_times(managers, 1, 5) == expected
    expected = {"reading": {16: 8.0 + 3}, "passes": {16: 8.0}, "passes_per_replay": 4}
    assert bench_worker.turn_times(managers, 2, 5) == expected


def test_nothing_is_proposed_while_graphs_are_timed(monkeypatch):
    gammas, seen = torch.tensor([1, 1, 5]), []
    manager = SimpleNamespace(graphs={desc(1, 9): None})
    managers = {
        ("decide", 0, Processing.TEMPERATURE): manager,
        ("decide", 1, Processing.TEMPERATURE): manager,
        ("decide", 2, Processing.TEMPERATURE): manager,
        ("read", 1, 6): manager,
        ("read", 2, 6): manager,
        ("propose_more", 1, 4): manager,
        ("propose_more", 2, 4): manager,
    }
    worker = bench_worker.BenchWorker()
    worker.model_runner = SimpleNamespace(
        cudagraph_manager=manager,
        turns=(),
        speculator=SimpleNamespace(
            gammas=SimpleNamespace(on_device=gammas),
            graphs=SimpleNamespace(managers=managers),
            turns=range(3),
        ),
    )
    monkeypatch.setattr(bench_worker, "graph_ms", lambda _: seen.append(gammas.tolist()) or 1.0)
    found = worker.bench_graph_times(1)
    assert found["primary"] == {9: 1.0}
    expected = {"reading": {9: 3.0}, "passes": {9: 1.0}, "passes_per_replay": 4}
    assert found["turns"] == [expected, expected | {"reading": {9: 2.0}}]
    assert seen[1:] == [[0, 0, 0]] * 7
    assert gammas.tolist() == [1, 1, 5]


def test_every_operation_of_a_cycle_is_timed():
    found = dict(bench_kernels.operations([1, 2], 3, 50, torch.device("cpu")))
    assert {"load", "begin_cycle", "settle", "end_cycle"} < set(found)
    assert "combine contrastive raw-logits" in found
    for calls in found.values():
        assert list(calls) == ["torch"], "kernels would be interpreted here"
        assert bench_kernels.host_us(calls["torch"]) > 0


def test_a_trace_is_written(tmp_path):
    worker, path = bench_worker.BenchWorker(), tmp_path / "run.json.gz"
    worker.bench_trace(None)
    torch.ones(2).cumsum(0)
    worker.bench_trace(str(path))
    names = {event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"]}
    assert "aten::cumsum" in names


def test_times_of_graphs_are_merged():
    def times(ms):
        turn = {"reading": {ms: ms}, "passes": {}, "passes_per_replay": 4}
        return {"primary": {ms: ms}, "turns": [turn]}

    assert merged(None, None) is None
    assert merged(None, times(1)) == merged(times(1), None) == times(1)
    both = {"reading": {1: 1, 2: 2}, "passes": {}, "passes_per_replay": 4}
    assert merged(times(1), times(2)) == {"primary": {1: 1, 2: 2}, "turns": [both]}


def test_targets_take_the_best_of_their_runs():
    rows = [row("a+b", 6.0), turns_row(4.0), row("x", 2.0, rate=0.8), turns_row(1.0, size=8)]
    complete({"results": rows, "configurations": [ENTRY]})
    target = Target("t", ("a+b@1,1", "none"), "speed_over_plain", 1.4, 0.8)
    judged = target.judge(rows)
    assert (judged["reached_value"], judged["reached"], judged["run"]) == (1.5, True, "a+b@1,1")
    over = Target("t", ("a+b@1,1",), "speed_over:x", 1.0, 0.8).judge(rows)
    assert (over["reached_value"], over["reached"]) == (0.5, False)
    assert Target("t", ("a+b@1,1",), "overhead_share", 0.05, 0.8).judge(rows)["reached"] is None
    low = Target("t", ("a+b@1,1",), "ms_per_token", 4.5, 0.8, at_most=True).judge(rows)
    assert low["reached"] is True


# The order of a run


PLANS = "--runs llama-tiny llama-tiny+llama-tiny --batch-sizes 1"


@pytest.fixture
def measured(monkeypatch) -> Iterator[list[str]]:
    """Runs that were measured; the second one fails the first time."""

    def lines(run):
        yield {"engine": {"device": "CPU", "versions": {"vllm": "1"}, "turns": None}}
        yield {"row": row(run, 1.0)}
        if len(seen) == 2:
            yield {"error": "RuntimeError: out of memory"}

    class Engine(nullcontext):
        def __init__(self, command, request, timeout, root):
            self.run = request["plan"]["run"]
            seen.append(self.run)

        def __enter__(self):
            return self

        def lines(self):
            return lines(self.run)

        def end(self):
            ended.append(self.run)

    seen, ended = [], []
    monkeypatch.setattr(bench_decode, "EngineProcess", Engine)
    yield seen
    assert ended == seen


def run_main(monkeypatch, capsys, line: str) -> dict:
    monkeypatch.setattr("sys.argv", ["bench_decode.py", *line.split()])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    bench_decode.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_broken_run_is_recorded_and_measured_again(measured, monkeypatch, capsys, tmp_path):
    out = tmp_path / "result.json"
    document = run_main(monkeypatch, capsys, f"{PLANS} --out {out}")
    assert document == json.loads(out.read_text())
    assert [entry["status"] for entry in document["configurations"]] == ["done", "failed"]
    assert document["configurations"][1]["error"] == "RuntimeError: out of memory"
    assert len(document["results"]) == 2 and document["device"] == "CPU"

    document = run_main(monkeypatch, capsys, f"{PLANS} --out {out} --resume")
    assert measured == ["llama-tiny", "llama-tiny+llama-tiny", "llama-tiny+llama-tiny"]
    assert [entry["status"] for entry in document["configurations"]] == ["done", "done"]
    assert [entry["ratio_to_members_alone"] for entry in document["results"][1:]] == [0.5]
    with pytest.raises(SystemExit, match="measured with other num_tokens"):
        Document(parse_args(f"{PLANS} --out {out} --resume --num-tokens 9".split()))


def test_no_engine_is_started_after_the_time_limit(measured, monkeypatch, capsys):
    monkeypatch.setattr("time.monotonic", iter(range(0, 1000, 10)).__next__)
    document = run_main(monkeypatch, capsys, f"{PLANS} --time-limit 15")
    assert measured == ["llama-tiny"]
    assert [entry["status"] for entry in document["configurations"]] == ["done", "skipped"]


def test_a_process_that_dies_leaves_its_rows(monkeypatch, tmp_path):
    (tmp_path / "bench_engine.py").write_text(
        "import os, sys\n"
        "with open(sys.argv[2], 'a') as file:\n"
        '    file.write(\'{"row": {"run": "a"}}\\n\')\n'
        "os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(bench_decode, "ENGINE", [sys.executable, tmp_path / "bench_engine.py"])
    args = parse_args(PLANS.split())
    assert lines_of(args, tmp_path) == [
        {"row": {"run": "a"}},
        {"error": "the engine's process ended with -9"},
    ]


def test_some_runs_of_a_preset(capsys):
    runs = [PRESETS["design"][0][at].run for at in (1, 2)]
    args = parse_args(["--preset", "design", "--runs", *reversed(runs), "--batch-sizes", "1"])
    assert [plan.run for plan in plans_of(args)] == runs
    assert plans_of(args)[1].acceptances
    with pytest.raises(SystemExit):
        parse_args(["--preset", "design", "--runs", "a+b"])
    assert "no 'a+b'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--engines-at-once 0", "--sampling [1]", "--engine-args 1"])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parse_args([*PLANS.split(), *option.split()])
    assert option.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_process_that_hangs_is_ended(monkeypatch, tmp_path):
    (tmp_path / "bench_engine.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(bench_decode, "ENGINE", [sys.executable, tmp_path / "bench_engine.py"])
    args = parse_args([*PLANS.split(), "--engine-timeout", "0.5"])
    assert lines_of(args, tmp_path) == [{"error": "took more than 0.5 s"}]


def lines_of(args, tmp_path: Path) -> list[dict]:
    with bench_decode.engine_process(plans_of(args)[0], args, tmp_path) as engine:
        return list(engine.lines())


def test_one_engine_measures_after_all_have_started(monkeypatch, capfd, tmp_path):
    """This holds also if an engine fails as it starts."""
    log = tmp_path / "log"
    (tmp_path / "bench_engine.py").write_text(
        "import json, sys, time\n"
        "run = json.load(open(sys.argv[1]))['plan']['run']\n"
        f"log = open({str(log)!r}, 'a')\n"
        "def say(what, **line):\n"
        "    print(what, run, file=log, flush=True)\n"
        "    print(json.dumps(line), file=open(sys.argv[2], 'a'))\n"
        "if run == 'llama-tiny':\n"
        "    time.sleep(0.5)\n"
        "if run == 'llama-7b':\n"
        "    say('broken', error='RuntimeError: too large')\n"
        "    sys.exit(1)\n"
        "say('started', engine={'device': 'CPU', 'versions': {}})\n"
        "sys.stdin.readline()\n"
        "say('measures', graph_ms=None)\n"
        "time.sleep(0.3)\n"
        "say('done', graph_ms=None)\n"
    )
    monkeypatch.setattr(bench_decode, "ENGINE", [sys.executable, tmp_path / "bench_engine.py"])
    runs = ["llama-tiny", "llama-7b", "llama-68m", "llama-tiny+llama-tiny"]
    line = f"--runs {' '.join(runs)} --engines-at-once 3"
    document = run_main(monkeypatch, capfd, line)
    status = ["done", "failed", "done", "done"]
    assert [entry["status"] for entry in document["configurations"]] == status
    first, later = log.read_text().splitlines()[:3], log.read_text().splitlines()[3:]
    assert sorted(first) == ["broken llama-7b", "started llama-68m", "started llama-tiny"]
    assert later == [
        *("measures llama-tiny", "done llama-tiny", "measures llama-68m", "done llama-68m"),
        *(f"{what} llama-tiny+llama-tiny" for what in ("started", "measures", "done")),
    ]


def test_shapes_have_a_common_vocabulary():
    families = [
        ("llama-7b", "llama-68m"),
        ("llama-8b", "llama-1b"),
        ("qwen-1.5b", "qwen-3b"),
        ("llama-tiny",),
    ]
    for family in families:
        assert len({SHAPES[name]["vocab_size"] for name in family}) == 1
    assert {name for family in families for name in family} == set(SHAPES)


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_biases"),
    [
        ("llama-7b", 6_738_415_616, 0),
        ("llama-68m", 68_030_208, 0),
        ("llama-8b", 8_030_261_248, 0),
        ("llama-1b", 1_235_814_400, 0),
        # Query, key and value have biases: 28 * (1536 + 2 * 256) and 36 * (2048 + 2 * 256).
        ("qwen-1.5b", 1_543_714_304, 57_344),
        ("qwen-3b", 3_085_938_688, 92_160),
    ],
)
def test_shapes_have_the_public_models_parameters(name, num_parameters, num_biases):
    assert Shape.of(SHAPES[name]).num_parameters == num_parameters - num_biases


def test_shapes_have_the_public_models_positions():
    for name, factor in (("llama-8b", 8.0), ("llama-1b", 32.0), ("qwen-3b", None)):
        rope = model_config(make_shape(name, arguments.root), "model", {}).hf_config.rope_parameters
        assert rope["rope_theta"] == (1e6 if factor is None else 5e5)
        assert rope.get("factor") == factor


# Kinds of requests


def test_kinds_replace_temperatures_and_sampling():
    args = Namespace(requests=None, temperature=[0.0, 1.0], sampling=[{}, {"top_p": 0.9}])
    assert kinds.requests_of(args) == [
        *({"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.9}),
        *({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}),
    ]
    args.requests, args.num_tokens = "all", 96
    found = kinds.requests_of(args)
    assert found[: len(kinds.BASIC)] == kinds.BASIC
    assert [kind["min_tokens"] for kind in found if "min_tokens" in kind] == [144]
    names = [kinds.name_of(k["temperature"], but_temperature(k)) for k in found]
    assert len(set(names)) == len(names)
    assert names[3] == "temperature 0, repetition_penalty 1.05"


def but_temperature(kind: dict) -> dict:
    return {name: value for name, value in kind.items() if name != "temperature"}


@pytest.mark.parametrize("kind", kinds.KINDS["all"], ids=lambda kind: kinds.name_of(0, kind))
def test_kinds_are_sampling_params(kind):
    kind = json.loads(json.dumps(kind | ({"min_tokens": 3} if "min_tokens" in kind else {})))
    params = sampling_params(kind, seed=1, max_tokens=9)
    assert (params.ignore_eos, params.seed, params.max_tokens) == (True, 1, 9)
    if "logit_bias" in kind:
        assert params.logit_bias == {100: 2.0, 200: -2.0}
    if "structured_outputs" in kind:
        assert params.structured_outputs.json == kinds.ENDLESS


def test_the_preset_of_requests_measures_all_kinds(capsys):
    assert parse_args(["--preset", "requests"]).requests == "all"
    assert parse_args("--preset requests --requests basic".split()).requests == "basic"
    with pytest.raises(SystemExit):
        parse_args("--preset requests --requests all --temperature 1".split())
    assert "error: --requests" in capsys.readouterr().err
    found = arguments("llama-7b/llama-68m@5", requests="basic")
    assert found["speculative_config"]["draft_sample_method"] == "probabilistic"


def test_requests_that_an_engine_refuses_are_left_out():
    def add_request(request_id, prompt, params):
        if params.logit_bias:
            raise ValueError("no bias")
        added.append(request_id)

    engine, added, aborted = object.__new__(BenchEngine), [], []
    engine.run, engine.plan = Run.parse("llama-7b/llama-68m@5"), Plan("llama-7b/llama-68m@5")
    engine.args = Namespace(**SETTINGS)
    engine.args.sampling = [{}, {"logit_bias": {"5": 1.0}}, {"bad_words": ["x"]}, {"top_p": 2.0}]
    engine.prompts, engine.seeds, engine.refused = [[1]], count(), []
    engine.engine = SimpleNamespace(add_request=add_request, abort_request=aborted.extend)
    engine.cell = lambda asked, acceptance, batch_size: (asked, batch_size)
    assert list(engine.cells()) == [
        ({"temperature": 0.0}, size) for size in engine.plan.batch_sizes
    ]
    assert added == aborted == ["tried"]
    why = [entry["why"] for entry in engine.refused]
    assert why[0] == "no bias" and "tokenizer" in why[1] and "top_p" in why[2]


def test_speeds_are_compared_with_the_bare_request():
    asked = [{}, {"logprobs": 5}]
    plain = [row("a+b", ms, sampling=kind) for ms, kind in zip((6.0, 6.0), asked, strict=True)]
    turns = [turns_row(ms) | {"sampling": k} for ms, k in zip((4.0, 8.0), asked, strict=True)]
    large = turns_row(1.0, size=8)
    complete({"results": [*plain, *turns, large], "configurations": [ENTRY]})
    assert [r["share_of_bare_speed"] for r in (*turns, large)] == [1.0, 0.5, None]
    assert "share_of_bare_speed" not in plain[0]
    header, bare, logprobs = requests_table([*plain, *turns]).splitlines()
    assert header.split() == ["batch", "1", "a+b@1,1", "a=0.8"]
    assert bare.split()[-2:] == ["1.50", "(1.00)"]
    assert logprobs.split()[-2:] == ["0.75", "(0.50)"] and "temperature 0, logprobs 5" in logprobs
    assert requests_table([*plain[:1], *turns[:1]]) == ""
