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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import documents
from benchmarks.kinds import KINDS, name_of
from benchmarks.options import add_shared, check_models, check_shared, json_object
from benchmarks.plans import GRAMMAR, MIN_CYCLES, PRESETS, Plan, Run, Target
from benchmarks.processes import EngineProcess, measure_all
from benchmarks.ratios import complete
from benchmarks.tables import requests_table

ENGINE = [sys.executable, "-m", "benchmarks.bench_engine"]
DEFAULT_RUNS = ["llama-7b", "llama-7b+llama-7b"]


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
        "--requests",
        choices=KINDS,
        help="sets of requests in place of --temperature and --sampling; the preset `requests` "
        "has `all`",
    )
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
    add("--trace", type=Path, metavar="FOLDER", help="write a Chrome trace of each run as well")
    add_shared(parser, kv_cache="what no preemption needs")
    args = parser.parse_args(argv)
    if args.preset and args.runs:
        known = [plan.run for plan in PRESETS[args.preset][0]]
        for run in args.runs:
            if run not in known:
                parser.error(f"--runs: the preset has no '{run}', but {', '.join(known)}")
    try:
        check_shared(args)
    except ValueError as error:
        parser.error(str(error))
    if args.preset == "smoke":
        args.dtype, args.enforce_eager = "float32", True
        args.num_tokens, args.repeats = 32, 2
    if args.min_cycles is None:
        args.min_cycles = MIN_CYCLES.get(args.preset, 200)
    if args.requests and (args.temperature != [0.0] or args.sampling != [{}]):
        parser.error("--requests: brings its own --temperature and --sampling; leave them out")
    if args.preset == "requests" and not args.requests:
        args.requests = "all"
    try:
        check_models((plan.run for plan in plans_of(args)), args.models)
    except ValueError as error:
        parser.error(f"--runs: {error}")
    return args


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


class Document(documents.Document):
    """The rows with their ratios, and what became of the targets."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.targets = targets_of(args)
        super().__init__("bench_decode", args)

    def complete(self) -> None:
        complete(self.content)
        self.content["targets"] = [t.judge(self.content["results"]) for t in self.targets]


def engine_process(plan: Plan, args: argparse.Namespace, root: Path) -> EngineProcess:
    request = {"plan": asdict(plan), "args": vars(args)}
    return EngineProcess(ENGINE, request, args.engine_timeout, root)


def shown(row: dict[str, Any]) -> str:
    rate = "" if row["acceptance_set"] is None else f" a={row['acceptance_set']}"
    speed = row.get("speed_over_plain")
    is_bare = row["temperature"] == 0 and not row["sampling"]
    asked = "" if is_bare else f" ({name_of(row['temperature'], row['sampling'])})"
    return (
        f"{row['run']}{rate}{asked} batch {row['batch_size']}: "
        f"{row['ms_per_token']:.3f} ms per token, {row['ms_per_cycle']:.3f} per cycle, "
        f"{row['tokens_per_cycle']:.3f} tokens per cycle"
        + (f", {speed:.2f} x plain" if speed else "")
    )


def main() -> None:
    args = parse_args()
    plans, document = {plan.run: plan for plan in plans_of(args)}, Document(args)
    measure_all(
        list(plans),
        args,
        document,
        lambda run, root: engine_process(plans[run], args, root),
        shown,
    )
    if text := requests_table(document.content["results"]):
        print(text)
    print(json.dumps(document.content))


if __name__ == "__main__":
    main()
