"""Throughput and latency under load: a plain ensemble, the same by turns, and stock vLLM.

    python benchmarks/bench_load.py --preset two-7b --out load.json --time-limit 400
    python benchmarks/bench_load.py --preset two-7b --out load.json --resume     # the rest
    python benchmarks/bench_load.py --members llama-7b,llama-7b --gamma 1,1 --outside llama-68m \
        --in-flight 32 --rates 0.5 0.9
    python benchmarks/bench_load.py --preset smoke          # without a GPU

Requests of mixed lengths keep coming: in closed loops, or as Poisson arrivals at a share of the
plain ensemble's capacity. Every run has its own engine and its own process, and sees the same
requests. `docs/benchmarks.md` has the method and every field. The output ends with a table and a
line of JSON. `--out FILE` saves this JSON after each measured load.
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

from benchmarks import documents, loads
from benchmarks.options import add_shared, check_models, check_shared, json_object
from benchmarks.plans import GRAMMAR, LOADS, Plan, Run
from benchmarks.processes import EngineProcess, measure_all
from benchmarks.shapes import SHAPES
from benchmarks.tables import load_table

ENGINE = [sys.executable, "-m", "benchmarks.load_engine"]
DUMMY_ACCEPTANCE = 0.8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=GRAMMAR)
    add = parser.add_argument
    add("--preset", choices=LOADS, help="the runs")
    add("--runs", nargs="+", help="the runs by name; with --preset or --members: these of them")
    add("--members", type=names, metavar="A,B", help="the runs of this ensemble, instead")
    add("--gamma", type=numbers, default=(), metavar="1,1", help="of the members' turns")
    add("--alpha", type=float, help="of a contrastive ensemble; default: weighted")
    add("--outside", metavar="C", help="a model that has no say and proposes")
    add("--outside-gamma", type=int, default=5)
    add("--in-flight", nargs="*", type=int, help="of closed loops; default: 8 32 128")
    add("--rates", nargs="*", type=float, help="shares of the capacity; default: 0.5 0.9")
    add("--capacity", type=float, help="requests/s; default: the plain ensemble's largest loop")
    add("--num-requests", type=int, help="of a load, at least; default: 192")
    add("--prompt-len", nargs=2, type=int, metavar=("MIN", "MAX"), help="default: 32 512")
    add("--output-len", nargs=2, type=int, metavar=("MIN", "MAX"), help="default: 32 256")
    add("--seed", type=int, default=0, help="of lengths, prompts, arrivals and samples")
    add(
        "--acceptance",
        type=float,
        help=f"set synthetically; default: {DUMMY_ACCEPTANCE} for dummy models, else their own",
    )
    add("--temperature", type=float, default=0.0)
    add("--sampling", type=json_object, default={}, metavar="JSON", help="more of SamplingParams")
    add("--max-num-batched-tokens", type=int, default=2560)
    add_shared(parser, kv_cache="what the requests need, or what is free")
    args = parser.parse_args(argv)
    set_defaults(args)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def set_defaults(args: argparse.Namespace) -> None:
    is_smoke = args.preset == "smoke"
    defaults = {
        "in_flight": ([2, 4], [8, 32, 128]),
        "rates": ([0.5], [0.5, 0.9]),
        "num_requests": (6, 192),
        "prompt_len": ([4, 24], [32, 512]),
        "output_len": ([4, 12], [32, 256]),
    }
    for name, (of_smoke, of_others) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, of_smoke if is_smoke else of_others)
    if is_smoke:
        args.dtype, args.enforce_eager = "float32", True


def check(args: argparse.Namespace) -> None:
    """Raises ValueError with one line that begins with the option."""
    if args.preset and args.members:
        raise ValueError("--members: the preset has its own; leave one of them out")
    runs = runs_of(args)
    if not runs:
        raise ValueError("--runs: none are given; see --preset, --members and --runs")
    try:
        check_models(runs, args.models)
    except ValueError as error:
        raise ValueError(f"--runs: {error}") from error
    check_shared(args)
    if args.num_requests < 1:
        raise ValueError("--num-requests: must be 1 or more")
    for name in ("prompt_len", "output_len"):
        least, most = getattr(args, name)
        if not 1 <= least <= most:
            raise ValueError(f"--{name.replace('_', '-')}: {least} {most} is no range from 1 up")
    if min([1, *args.in_flight]) < 1 or min([1.0, *args.rates]) <= 0:
        raise ValueError("--in-flight, --rates: must be above 0")
    if not args.in_flight and not args.rates:
        raise ValueError("--in-flight: there is no load without it and without --rates")
    is_known = args.capacity or (args.in_flight and loads.is_plain(runs[0]))
    if args.rates and not is_known:
        raise ValueError("--rates: need --capacity, or --in-flight and a plain ensemble first")


def runs_of(args: argparse.Namespace) -> list[str]:
    if not args.preset and not args.members:
        return args.runs or []
    known = LOADS[args.preset] if args.preset else runs_of_members(args)
    for run in args.runs or []:
        if run not in known:
            raise ValueError(f"--runs: there is no '{run}', but {', '.join(known)}")
    return [run for run in known if not args.runs or run in args.runs]


def runs_of_members(args: argparse.Namespace) -> list[str]:
    """The plain ensemble, the same by turns, and stock vLLM with the first member."""
    first, *others = args.members
    if not others:
        raise ValueError("--members: an ensemble has two or more")
    prefix = "" if args.alpha is None else f"cd{args.alpha:g}:"
    plain = prefix + "+".join(args.members)
    gammas = args.gamma or (1,) * len(args.members)
    turns, drafting = ",".join(map(str, gammas)), args.outside_gamma
    runs = [plain, f"{plain}@{turns}"]
    drafter = args.outside
    if args.outside:
        runs.append(f"{plain}+{args.outside}:0@{turns},{drafting}")
    elif others[-1] != first:
        drafter, drafting = others[-1], gammas[-1]
    return [*runs, first, *([f"{first}/{drafter}@{drafting}"] if drafter else [])]


def plan_of(run: str, args: argparse.Namespace) -> Plan:
    rate, parsed = args.acceptance, Run.parse(run)
    if rate is None and parsed.members[0] in SHAPES:
        rate = DUMMY_ACCEPTANCE
    rates = () if rate is None or parsed.policy is None else (rate,)
    return Plan(run, rates, tuple(args.in_flight))


class Document(documents.Document):
    """The rows with their ratios."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__("bench_load", args)

    def complete(self) -> None:
        loads.complete(self.content["results"])


def engine_process(
    run: str, args: argparse.Namespace, document: Document, root: Path
) -> EngineProcess:
    def capacity() -> str:
        return json.dumps(args.capacity or loads.capacity_of(document.content["results"]))

    request = {"plan": asdict(plan_of(run, args)), "args": vars(args)}
    return EngineProcess(ENGINE, request, args.engine_timeout, root, capacity)


def shown(row: dict[str, Any]) -> str:
    over = row["over_plain"]
    speed = f", {over['tokens_per_s']:.2f} x plain" if over else ""
    return (
        f"{row['run']} {loads.load_of(row)}: {row['tokens_per_s']:.0f} tokens/s{speed}, "
        f"first token {row['ttft_ms']['p50']:.1f} ms, further tokens {row['tpot_ms']['p50']:.2f} ms"
    )


def main() -> None:
    args = parse_args()
    document = Document(args)
    measure_all(
        runs_of(args),
        args,
        document,
        lambda run, root: engine_process(run, args, document, root),
        shown,
    )
    print(load_table(document.content["results"]))
    print(json.dumps(document.content))


if __name__ == "__main__":
    main()
