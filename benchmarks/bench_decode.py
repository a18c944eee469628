"""What a decoded token costs: models alone, ensembles, and members that take turns, side by side.

    python benchmarks/bench_decode.py --preset design --out result.json --time-limit 500
    python benchmarks/bench_decode.py --preset design --out result.json --resume
    python benchmarks/bench_decode.py --runs llama-7b+llama-68m cd0.1:llama-7b+llama-68m@1,5 \
        --acceptance 0.8 0.6 --batch-sizes 1 8
    python benchmarks/bench_decode.py --preset smoke        # without a GPU

Every run has its own engine and its own process. While a run is measured, the engines of all other
runs wait. `docs/benchmarks.md` has the grammar of runs, the method and every field. The last line
of the output is JSON. `--out FILE` saves this JSON after each measured cell.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Self

if __name__ == "__main__" and not __package__:
    # Started by its path, Python looks for modules beside this file; they are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.plans import GRAMMAR, PRESETS, Plan, Run, Target
from benchmarks.ratios import complete
from benchmarks.shapes import SHAPES
from repository import ROOT, search_path

ENGINE = [sys.executable, "-m", "benchmarks.bench_engine"]
DEFAULT_RUNS = ["llama-7b", "llama-7b+llama-7b"]
# Settings that do not change what is measured. All others must be the same in a resumed run.
OF_THE_CALL = {
    "out",
    "trace",
    "resume",
    "time_limit",
    "engine_timeout",
    "engines_at_once",
    "preset",
    "runs",
}
POLL_S = 0.2


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=GRAMMAR)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the runs, their targets, and settings that fit")
    add("--runs", nargs="+", help="with --preset: these of its runs only")
    add("--batch-sizes", nargs="+", type=int)
    add(
        "--acceptance",
        nargs="+",
        type=float,
        default=[],
        metavar="A",
        help="set synthetically; the first at all batch sizes; none: as the models have it",
    )
    add(
        "--sweep-batch-sizes",
        nargs="+",
        type=int,
        default=[1],
        help="batch sizes of the acceptances after the first",
    )
    add("--temperature", nargs="+", type=float, default=[0.0])
    add(
        "--sampling",
        nargs="+",
        type=json_object,
        default=[{}],
        metavar="JSON",
        help='more of vLLM\'s SamplingParams, each measured, such as {} {"top_p": 0.9}',
    )
    add("--prompt-len", type=int, default=64)
    add("--num-tokens", type=int, default=128, help="to decode, per request")
    add("--skip", type=int, default=4, help="steps of a batch before the clock runs")
    add("--repeats", type=int, default=3, help="batches per cell, at least")
    add("--min-cycles", type=int, help="of all requests of a cell together, at least")
    add("--cell-seconds", type=float, default=15, help="after which no batch is added for those")
    add("--target", default="probs", help="ensemble_target of weighted ensembles")
    add("--dtype", default="bfloat16")
    add("--enforce-eager", action="store_true")
    add("--kv-cache-gib", type=float, help="default: what no preemption needs")
    add("--engine-args", type=json_object, default={}, metavar="JSON", help="of vLLM's EngineArgs")
    add("--models", type=Path, default=ROOT / "models", help="folder of real members")
    add("--prompts", type=Path, help="JSON lines with `prompt`; default: HumanEval's")
    add("--trace", type=Path, metavar="FOLDER", help="write a Chrome trace of each run as well")
    add("--out", type=Path)
    add("--resume", action="store_true", help="keep what --out has, and measure the rest")
    add("--time-limit", type=float, help="seconds after which no engine is started any more")
    add("--engine-timeout", type=float, default=600, help="seconds to start, and to measure")
    add(
        "--engines-at-once",
        type=int,
        default=1,
        metavar="N",
        help="start N engines together, then measure one by one; all need memory meanwhile",
    )
    args = parser.parse_args(argv)
    if args.preset and args.runs:
        known = [plan.run for plan in PRESETS[args.preset][0]]
        for run in args.runs:
            if run not in known:
                parser.error(f"--runs: the preset has no '{run}', but {', '.join(known)}")
    if args.engines_at_once < 1:
        parser.error("--engines-at-once: must be 1 or more")
    if args.resume and not args.out:
        parser.error("--resume: needs the --out of the run that it goes on with")
    if args.preset == "smoke":
        args.dtype, args.enforce_eager = "float32", True
        args.num_tokens, args.repeats = 32, 2
    if args.min_cycles is None:
        args.min_cycles = {"design": 1000, "smoke": 60}.get(args.preset, 200)
    try:
        check_models(plans_of(args), args.models)
    except ValueError as error:
        parser.error(f"--runs: {error}")
    return args


def json_object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """What to run; the batch sizes of the command line replace a preset's."""
    if args.preset:
        plans = [p for p in PRESETS[args.preset][0] if not args.runs or p.run in args.runs]
        if not args.batch_sizes:
            return plans
        return [Plan(p.run, p.acceptances, tuple(args.batch_sizes)) for p in plans]
    sizes = tuple(args.batch_sizes or (1, 8))
    rates, sweep = tuple(args.acceptance), tuple(args.sweep_batch_sizes)
    return [
        Plan(run, rates if Run.parse(run).policy else (), sizes, sweep)
        for run in args.runs or DEFAULT_RUNS
    ]


def targets_of(args: argparse.Namespace) -> list[Target]:
    return PRESETS[args.preset][1] if args.preset else []


def check_models(plans: Sequence[Plan], models: Path) -> None:
    """Refuse missing models, and runs that mix shapes with real models.

    A mixed run has no prompts: shapes have no tokenizer, and real models need real text.
    """
    for plan in plans:
        names = Run.parse(plan.run).models
        real = [name for name in names if name not in SHAPES]
        if 0 < len(real) < len(names):
            raise ValueError(f"'{plan.run}' mixes shapes ({', '.join(SHAPES)}) with other models")
        for name in real:
            if not (models / name / "config.json").exists():
                raise ValueError(
                    f"no model '{name}' in '{models}', and no such shape ({', '.join(SHAPES)}); "
                    "scripts/prepare_models.py makes the default models"
                )


class Document:
    """The one JSON document, which is saved to disk after every cell."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.targets = args.out, targets_of(args)
        self.content = {
            "benchmark": "bench_decode",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": None,
            "versions": None,
            "settings": settings_of(args),
            "configurations": [],
            "results": [],
            "targets": [],
        }
        if args.resume and args.out.exists():
            self._resume(json.loads(args.out.read_text()))

    def _resume(self, old: dict[str, Any]) -> None:
        if old["settings"] != self.content["settings"]:
            changed = sorted(
                key
                for key, value in self.content["settings"].items()
                if old["settings"].get(key) != value
            )
            raise SystemExit(f"--resume: {self.out} was measured with other {', '.join(changed)}")
        done = [entry for entry in old["configurations"] if entry["status"] == "done"]
        runs = {entry["run"] for entry in done}
        rows = [row for row in old["results"] if row["run"] in runs]
        self.content = old | {"configurations": done, "results": rows}

    def is_done(self, plan: Plan) -> bool:
        return any(entry["run"] == plan.run for entry in self.content["configurations"])

    def start(self, plan: Plan) -> dict[str, Any]:
        entry = {"run": plan.run, "status": "running"}
        self.content["configurations"].append(entry)
        return entry

    def describe(self, entry: dict[str, Any], engine: dict[str, Any]) -> None:
        """Record what an engine reports. Device and versions must be the same for all engines."""
        where = {key: engine.pop(key) for key in ("device", "versions")}
        for key, value in where.items():
            if self.content[key] not in (None, value):
                raise SystemExit(f"{key}: {value}, but {self.out} has {self.content[key]}")
            self.content[key] = value
        entry |= engine

    def save(self) -> None:
        complete(self.content)
        self.content["targets"] = [t.judge(self.content["results"]) for t in self.targets]
        if self.out:
            # The file on disk is always whole, even if the process is killed.
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=2) + "\n")
            os.replace(part, self.out)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as they look after a round trip through JSON."""
    settings = {key: value for key, value in vars(args).items() if key not in OF_THE_CALL}
    return json.loads(json.dumps(settings | {"models": None}, default=str))


class EngineProcess:
    """`bench_engine.py` in a process of its own, which starts at once.

    The end of the process frees all its memory, and an error in it breaks no other run. The process
    begins to measure when the caller asks for its second line.
    """

    def __init__(self, plan: Plan, args: argparse.Namespace, root: Path) -> None:
        self.plan, self.timeout = plan, args.engine_timeout
        folder = Path(tempfile.mkdtemp(dir=root))
        request, self.path = folder / "request.json", folder / "lines.jsonl"
        request.write_text(json.dumps({"plan": asdict(plan), "args": vars(args)}, default=str))
        self.path.touch()
        # vLLM writes to the standard output, which is for the document. The process gets its own
        # session, so that vLLM's further processes end with it.
        self.process = subprocess.Popen(
            [*ENGINE, str(request), str(self.path)],
            env={**os.environ, "PYTHONPATH": search_path()},
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if not self.process.stdin.closed:
            # Kill the group even if the process has ended: its child processes may still run.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()  # closes its input

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines that the process writes, as they come.

        The first line is `engine`. It comes when the engine is ready. The process measures only
        after the caller has taken this line. An `error` is always the last line.
        """
        deadline, rest = time.monotonic() + self.timeout, ""
        with self.path.open() as file:
            while True:
                ended = self.process.poll() is not None
                *whole, rest = (rest + file.read()).split("\n")
                for content in map(json.loads, whole):
                    yield content
                    if "error" in content:
                        return
                    if "engine" in content:
                        self._let_it_measure()
                        deadline = time.monotonic() + self.timeout
                if ended:
                    break
                if time.monotonic() > deadline:
                    yield {"error": f"took more than {self.timeout:g} s"}
                    return
                time.sleep(POLL_S)
        if self.process.returncode:
            yield {"error": f"the engine's process ended with {self.process.returncode}"}

    def _let_it_measure(self) -> None:
        with suppress(BrokenPipeError):  # the process has died; the next poll finds that
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()


def run_plans(
    plans: Sequence[Plan], args: argparse.Namespace, document: Document, root: Path
) -> None:
    """Start the engines of all plans. When all are ready, measure one after another."""
    with ExitStack() as stack:
        engines = [stack.enter_context(EngineProcess(plan, args, root)) for plan in plans]
        lines = [engine.lines() for engine in engines]
        silent = {"error": "the engine's process ended without a word"}
        firsts = [next(of_engine, silent) for of_engine in lines]
        for engine, first, others in zip(engines, firsts, lines, strict=True):
            record(engine.plan, chain([first], others), document)
            engine.end()  # frees its memory before the next engine is measured


def record(plan: Plan, lines: Iterator[dict[str, Any]], document: Document) -> None:
    entry, started = document.start(plan), time.monotonic()
    entry["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    for content in lines:
        if "engine" in content:
            document.describe(entry, content["engine"])
        elif "graph_ms" in content:
            entry |= content
        elif "row" in content:
            document.content["results"].append(content["row"])
            document.save()
            print(shown(content["row"]), flush=True)
        else:
            entry |= {"status": "failed", "error": content["error"]}
            print(f"{plan.run}: {content['error']}", flush=True)
    if entry["status"] == "running":
        entry["status"] = "done"
    entry["seconds"] = round(time.monotonic() - started, 1)
    document.save()


def shown(row: dict[str, Any]) -> str:
    rate = "" if row["acceptance_set"] is None else f" a={row['acceptance_set']}"
    speed = row.get("speed_over_plain")
    asked = f" {json.dumps(row['sampling'])}" if row["sampling"] else ""
    return (
        f"{row['run']}{rate}{asked} batch {row['batch_size']}: "
        f"{row['ms_per_token']:.3f} ms per token, {row['ms_per_cycle']:.3f} per cycle, "
        f"{row['tokens_per_cycle']:.3f} tokens per cycle"
        + (f", {speed:.2f} x plain" if speed else "")
    )


def main() -> None:
    args = parse_args()
    # A plain `kill` must end the engine's process as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started, document = time.monotonic(), Document(args)
    left = [plan for plan in plans_of(args) if not document.is_done(plan)]
    with tempfile.TemporaryDirectory() as root:
        for first in range(0, len(left), args.engines_at_once):
            plans = left[first : first + args.engines_at_once]
            if args.time_limit and time.monotonic() - started > args.time_limit:
                for plan in plans:
                    entry = document.start(plan)
                    entry |= {"status": "skipped", "error": f"after {args.time_limit:g} s"}
                continue
            run_plans(plans, args, document, Path(root))
    document.save()
    print(json.dumps(document.content))


if __name__ == "__main__":
    main()
