"""The benchmark under load without an engine: requests, arrivals, times, ratios, the runs."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench_load, load_engine, loads
from benchmarks.bench_load import parse_args, plan_of, runs_of
from benchmarks.load_engine import (
    closed_loop,
    kv_cache_bytes,
    load_arguments,
    make_prompts,
    max_num_seqs,
    open_loop,
    trace_of,
)
from benchmarks.loads import Lengths, Load, Timing
from benchmarks.plans import LOADS, Run
from benchmarks.tables import load_table

TWO_7B = "--members llama-7b,llama-7b --outside llama-68m"


# What requests are like, and when they come


def test_every_load_has_the_first_of_the_same_requests():
    lengths = loads.make_lengths(300, (32, 512), (32, 256), seed=0)
    assert lengths[:192] == loads.make_lengths(192, (32, 512), (32, 256), seed=0)
    assert lengths != loads.make_lengths(300, (32, 512), (32, 256), seed=1)
    assert {32 <= x.prompt <= 512 and 32 <= x.output <= 256 for x in lengths} == {True}
    assert loads.make_lengths(2, (5, 5), (7, 7), seed=3) == [Lengths(5, 7)] * 2


def test_a_closed_loop_has_three_requests_for_each_place():
    args = parse_args(TWO_7B.split())
    assert [load.num_requests(192) for load in loads.loads_of([8, 128], [0.5])] == [192, 384, 192]
    assert len(trace_of(args)) == 384
    args.in_flight = []
    assert len(trace_of(args)) == 192


def test_arrivals_at_another_rate_are_the_same_ones_stretched():
    arrivals = loads.make_arrivals(1000, 4.0, seed=0)
    assert arrivals == sorted(arrivals) and arrivals[0] > 0
    assert arrivals[-1] == pytest.approx(250, rel=0.1), "4 a second"
    assert loads.make_arrivals(1000, 2.0, seed=0) == [2 * at for at in arrivals]


def test_prompts_have_their_lengths():
    args = Namespace(seed=0, prompts=None)
    lengths = [Lengths(3, 1), Lengths(600, 1)]
    random = make_prompts(lengths, args, None)
    assert [len(prompt) for prompt in random] == [3, 600]
    assert random == make_prompts(lengths, args, None)
    assert set(random[1]) <= set(load_engine.RANDOM_TOKENS)


def test_prompts_of_texts_end_where_a_text_ends(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("abc", "defg")))
    tokenizer = SimpleNamespace(encode=list)
    lengths = [Lengths(2, 1), Lengths(6, 1), Lengths(9, 1)]
    found = make_prompts(lengths, Namespace(prompts=file), tokenizer)
    assert ["".join(prompt) for prompt in found] == ["bc", "bcdefg", "bcdefgabc"]


# Times


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 10), (50, 25), (75, 32.5), (99, 39.7), (100, 40)]
)
def test_percentiles_are_interpolated(percent, expected):
    assert loads.percentile([40, 10, 30, 20], percent) == pytest.approx(expected)
    assert loads.percentile([7.0], percent) == 7.0


def test_summary_counts_from_the_due_time():
    # The second was due at 1, had its first two tokens at 3, and the other two at 5.
    timings = [Timing(0.0), Timing(1.0), Timing(2.0)]
    for timing, outputs in zip(
        timings, [[(1, 1.0), (1, 2.0)], [(2, 3.0), (2, 5.0)], [(1, 4.0)]], strict=True
    ):
        for output in outputs:
            timing.add(*output)
    found = loads.summary(timings)
    assert (found["num_requests"], found["num_tokens"], found["seconds"]) == (3, 7, 5.0)
    assert (found["tokens_per_s"], found["requests_per_s"]) == (1.4, 0.6)
    assert found["mean_in_flight"] == pytest.approx((2 + 4 + 2) / 5)
    assert found["ttft_ms"] == pytest.approx({"mean": 5000 / 3, "p50": 2000, "p99": 2000})
    # The third has no further token.
    assert found["tpot_ms"]["mean"] == pytest.approx(1000 * (1 + 2 / 3) / 2)
    assert found["latency_ms"]["p99"] == pytest.approx(3960)
    single = Timing(0.0)
    single.add(1, 1.0)
    assert loads.summary([single])["tpot_ms"] is None


def test_acceptance_of_turns_and_of_stock_speculation():
    turns = {
        "num_cycles": 10,
        "num_tokens": 15,
        "num_judged": [[4], [5, 3]],
        "num_accepted": [[2], [3, 1]],
        "num_calls": [10, 20],
    }
    found = loads.proposal_counts(turns, Run.parse("a+b@1,2"))
    assert found == {"tokens_per_cycle": 1.5, "acceptance": [0.5, 0.5]}
    stock = {"num_cycles": 10, "num_tokens": 14, "num_judged": [8, 2], "num_accepted": [2, 2]}
    found = loads.proposal_counts(stock, Run.parse("a/b@2"))
    assert found == {"tokens_per_cycle": 1.4, "acceptance": [None, 0.4]}
    assert loads.proposal_counts({}, Run.parse("a+b")) == {}


# Who sends when


class FakeTime:
    """A clock for coroutines: `sleep` wakes them in the order of their times, at once."""

    def __init__(self) -> None:
        self.now, self.sleepers = 0.0, []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        wakes, future = self.now + seconds, asyncio.get_running_loop().create_future()
        self.sleepers.append((wakes, len(self.sleepers), future))
        await future

    async def run(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        while not task.done():
            for _ in range(20):  # everybody goes on until all sleep
                await REAL_SLEEP(0)
            if self.sleepers:
                first = min(self.sleepers)
                self.sleepers.remove(first)
                self.now = max(self.now, first[0])
                first[2].set_result(None)
        return task.result()


REAL_SLEEP = asyncio.sleep


def test_a_closed_loop_sends_when_a_place_is_free():
    time, sent = FakeTime(), []

    async def send(index: int, due: float) -> Timing:
        sent.append((index, due))
        await time.sleep([3.0, 1.0, 1.0, 5.0][index])
        return Timing(due, last=time.now)

    timings = asyncio.run(time.run(closed_loop(send, 4, 2, time.clock)))
    assert sent == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0)]
    assert sorted(timing.last for timing in timings) == [1.0, 2.0, 3.0, 7.0]


def test_an_open_loop_waits_for_nobody(monkeypatch):
    time, sent = FakeTime(), []
    monkeypatch.setattr(load_engine.asyncio, "sleep", time.sleep)

    async def send(index: int, due: float) -> Timing:
        sent.append((index, due, time.now))
        await time.sleep(100.0)
        return Timing(due)

    timings = asyncio.run(time.run(open_loop(send, [0.5, 0.75, 4.0], time.clock)))
    assert sent == [(0, 0.5, 0.5), (1, 0.75, 0.75), (2, 4.0, 4.0)]
    assert [timing.due for timing in timings] == [0.5, 0.75, 4.0]


class FakeEngine:
    """Gives every request the tokens asked for, two at a time."""

    def __init__(self) -> None:
        self.params, self.calls = [], []

    async def generate(self, prompt, params, request_id):
        self.params.append(params)
        left = params.max_tokens
        while left:
            length = min(2, left)
            left -= length
            completion = SimpleNamespace(token_ids=[5] * length, spec_decode_metrics=None)
            yield SimpleNamespace(outputs=[completion], finished=not left)

    async def collective_rpc(self, name):
        self.calls.append(name)
        counts = {"num_judged": [[2], [2]], "num_accepted": [[1], [2]], "num_calls": [1, 1]}
        return [{"num_cycles": 2, "num_tokens": 3, **counts}]


def test_cells_of_an_engine():
    args = parse_args("--preset smoke".split())
    engine = FakeEngine()
    run = "llama-tiny+llama-tiny@1,1"
    loaded = load_engine.LoadEngine(plan_of(run, args), args, engine)

    async def rows() -> list[dict]:
        return [row async for row in loaded.cells(capacity=1000.0)]

    found = asyncio.run(rows())
    assert [loads.load_of(row) for row in found] == [Load(2), Load(4), Load(rate=0.5)]
    assert [row["num_requests"] for row in found] == [6, 12, 6]
    assert [row["requests_per_s_offered"] for row in found] == [None, None, 500.0]
    wanted = [sum(x.output for x in trace_of(args)[:number]) for number in (6, 12, 6)]
    assert [row["num_tokens"] for row in found] == wanted
    assert found[0]["tokens_per_cycle"] == 1.5 and found[0]["acceptance_set"] == 0.8
    assert engine.calls == ["reset_turn_stats", "turn_stats"] * 3
    measured = engine.params[-6:]
    assert sorted(params.seed for params in measured) == list(range(6))


def test_other_runs_need_the_capacity():
    args = parse_args("--preset smoke".split())
    plain = {"load": "closed", "in_flight": 4, "run": "a+b", "requests_per_s": 3.0}
    fuller = plain | {"in_flight": 8, "requests_per_s": 5.0}
    others = plain | {"in_flight": 9, "run": "a"}, plain | {"load": "poisson", "in_flight": None}
    assert loads.capacity_of([plain, fuller, *others]) == 5.0
    assert loads.capacity_of([others[0]]) is None
    loaded = load_engine.LoadEngine(plan_of("llama-tiny", args), args, FakeEngine())

    async def rows() -> list[dict]:
        return [row async for row in loaded.cells(capacity=None)]

    with pytest.raises(RuntimeError, match="no capacity"):
        asyncio.run(rows())


# What an engine is started with


def arguments(run: str, root: Path, line: str = TWO_7B) -> dict:
    args = parse_args(line.split())
    return load_arguments(plan_of(run, args), args, root)


def test_engine_arguments_of_a_load(tmp_path):
    found = arguments("llama-7b+llama-7b@1,1", tmp_path)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (128, 2560)
    assert found["max_model_len"] == 512 + 256 + 4 * 3
    assert found["enable_prefix_caching"] is False
    rates = found["speculative_config"]["synthetic_acceptance_rates"]
    assert rates == [0.8]
    stock = arguments("llama-7b/llama-68m@5", tmp_path)
    assert stock["speculative_config"]["num_speculative_tokens"] == 5
    assert stock["per_request_spec_decode_metrics"] == "detailed", "for its acceptance"
    assert "speculative_config" not in arguments("llama-7b", tmp_path)
    fewer = arguments("llama-7b", tmp_path, f"{TWO_7B} --in-flight 8 --rates")
    assert fewer["max_num_seqs"] == 8


def test_the_kv_cache_is_what_requests_need_or_what_is_free(monkeypatch, tmp_path):
    from vllm.platforms import current_platform

    args = parse_args([*TWO_7B.split(), *"--in-flight 2 --rates --num-requests 3".split()])
    run = Run.parse("llama-7b")
    folders = load_engine.model_folders(run, args, tmp_path)
    totals = sorted(x.prompt + x.output for x in trace_of(args))[-2:]
    per_token = 2 * 32 * 4096 * 2
    found = kv_cache_bytes(run, args, folders)
    assert sum(totals) * per_token <= found <= (sum(totals) + 2 * 256) * per_token

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    monkeypatch.setattr(
        type(current_platform), "get_device_total_memory", lambda *_: 15.4 * 2**30, raising=False
    )
    weights = 2 * 6_738_415_616
    assert kv_cache_bytes(run, args, folders) == int(0.85 * 15.4 * 2**30) - weights
    args.engines_at_once = 2
    with pytest.raises(ValueError, match="--engines-at-once"):
        kv_cache_bytes(run, args, folders)
    args.kv_cache_gib = 1.5
    assert kv_cache_bytes(run, args, folders) == 3 * 2**29


# The command line


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        (TWO_7B, LOADS["two-7b"]),
        ("--preset two-7b", LOADS["two-7b"]),
        ("--members llama-7b,llama-68m --alpha 0.1 --gamma 1,5", LOADS["7b-68m"]),
        ("--members llama-7b,llama-7b,llama-7b", LOADS["three-7b"]),
        ("--preset two-7b --runs llama-7b --capacity 9", ["llama-7b"]),
        ("--runs llama-7b+llama-7b llama-7b", ["llama-7b+llama-7b", "llama-7b"]),
    ],
)
def test_runs_of_a_command_line(line, runs):
    assert runs_of(parse_args(line.split())) == runs


def test_acceptance_is_set_for_dummy_models():
    args = parse_args(["--preset", "two-7b"])
    rates = [plan_of(run, args).acceptances for run in LOADS["two-7b"]]
    assert rates == [(), (0.8,), (0.8,), (), (0.8,)]
    assert plan_of("expert+amateur@1,1", args).acceptances == ()
    args.acceptance = 0.9
    assert plan_of("expert+amateur@1,1", args).acceptances == (0.9,)
    args.in_flight = []
    assert max_num_seqs(args) == 128


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--members llama-7b",
        "--members llama-7b,none",
        "--members llama-7b,llama-7b --preset smoke",
        "--preset smoke --runs x",
        "--preset smoke --runs llama-tiny",  # its rates need a capacity
        "--preset smoke --in-flight",
        "--preset smoke --in-flight --rates",
        "--preset smoke --in-flight 0",
        "--preset smoke --prompt-len 9 3",
        "--preset smoke --num-requests 0",
        "--preset smoke --resume",
        "--members llama-7b,llama-7b --gamma 1,1,1",
    ],
)
def test_bad_command_lines_say_what_is_wrong(line, capsys):
    with pytest.raises(SystemExit):
        parse_args(line.split())
    assert "error: --" in capsys.readouterr().err.splitlines()[-1]


# What rows say of one another


def row(run: str, tokens_per_s: float, ms: float, load: Load = Load(32)) -> dict:  # noqa: B008
    times = dict.fromkeys(("mean", "p50", "p99"), ms)
    return {
        "run": run,
        "load": load.kind,
        "in_flight": load.in_flight,
        "rate": load.rate,
        "tokens_per_s": tokens_per_s,
        "requests_per_s": tokens_per_s / 100,
        **dict.fromkeys(loads.TIMES, times),
    }


def test_ratios_are_to_the_plain_ensemble_under_the_same_load():
    rows = [
        row("a+b", 100, 8.0),
        row("a+b@1,1", 150, 4.0),
        row("a", 300, 2.0),
        row("cd0.1:a+b", 50, 16.0),
        row("cd0.1:a+b@1,1", 100, 8.0),
        row("a+b@1,1", 9, 9.0, Load(rate=0.5)),
    ]
    loads.complete(rows)
    assert [r["over_plain"] and r["over_plain"]["tokens_per_s"] for r in rows] == [
        *(None, 1.5, 3.0),
        *(None, 2.0),
        None,
    ]
    assert rows[1]["over_plain"]["ttft_ms"] == {"mean": 2.0, "p50": 2.0, "p99": 2.0}
    assert rows[1]["over_plain"]["requests_per_s"] == 1.5


def test_the_table_has_ratios_in_brackets():
    rows = [row("a+b", 100, 8.0), row("a+b", 90, 9.0, Load(rate=0.5)), row("a+b@1,1", 150, 4.0)]
    rows[0]["tpot_ms"] = None
    loads.complete(rows)
    header, *lines, note = load_table(rows).splitlines()
    assert header.split()[:3] == ["load", "run", "tokens/s"]
    assert [line.split()[:5] for line in lines] == [
        ["32", "in", "flight", "a+b", "100"],
        ["32", "in", "flight", "a+b@1,1", "150"],
        ["arrivals", "at", "0.5", "of", "capacity"],
    ]
    assert "150 (1.50)" in lines[1]
    assert "4.0 (2.00)" in lines[1] and "plain ensemble" in note


# The order of a run


def test_other_runs_get_the_capacity_of_the_plain_ensemble(monkeypatch, capfd, tmp_path):
    log, out = tmp_path / "log", tmp_path / "result.json"
    line = json.dumps(row("llama-tiny+llama-tiny", 500, 1.0, Load(4)))
    (tmp_path / "load_engine.py").write_text(
        "import json, sys\n"
        "run = json.load(open(sys.argv[1]))['plan']['run']\n"
        "def say(**line):\n"
        "    print(json.dumps(line), file=open(sys.argv[2], 'a'))\n"
        "say(engine={'device': 'CPU', 'versions': {}})\n"
        f"print(run, sys.stdin.readline().strip(), file=open({str(log)!r}, 'a'))\n"
        f"say(row={{**json.loads({line!r}), 'run': run}})\n"
    )
    monkeypatch.setattr(bench_load, "ENGINE", [sys.executable, tmp_path / "load_engine.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    runs = LOADS["smoke"][:2]
    command = f"--preset smoke --runs {' '.join(runs)} --engines-at-once 2 --out {out}"
    monkeypatch.setattr("sys.argv", ["bench_load.py", *command.split()])
    bench_load.main()
    assert log.read_text().splitlines() == [f"{runs[0]} null", f"{runs[1]} 5.0"]
    document = json.loads(out.read_text())
    assert document == json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [entry["status"] for entry in document["configurations"]] == ["done", "done"]
    assert [r["over_plain"] is None for r in document["results"]] == [True, False]
