"""What each operation of a cycle costs: Triton kernels and their torch namesakes, side by side.

    python benchmarks/bench_kernels.py --out kernels.json        # on a GPU; on a CPU torch alone

`host_us` is the time until a call returns. `graph_us` is the time of a call inside a CUDA graph, as
in a step that only decodes. `combine` is the ensemble's arithmetic over the vocabulary. The last
line of the output is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm.chef.ops import eager, fused
from vllm.chef.state import ProposalState, SlotStates, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.turns import chef_turns
from vllm.ensemble_decode import ops as combining
from vllm.ensemble_decode.functions import make_function

MAX_NUM_REQS, MAX_MODEL_LEN = 256, 2048
NUM_CALLS, NUM_REPLAYS = 20, 50


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for num_reqs in args.num_reqs:
        for name, calls in operations(args.gammas, num_reqs, args.vocab_size, device):
            row = {"operation": name, "num_reqs": num_reqs}
            for kind, call in calls.items():
                row[kind] = {"host_us": host_us(call), "graph_us": graph_us(call)}
            rows.append(row)
            print(shown(row), flush=True)
    document = {
        "benchmark": "bench_kernels",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__},
        "settings": {"gammas": args.gammas, "vocab_size": args.vocab_size},
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-reqs", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--gammas", nargs="+", type=int, default=[1, 5], help="one per member")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if max(args.num_reqs) > MAX_NUM_REQS or min(args.num_reqs) < 1:
        parser.error(f"--num-reqs: must be between 1 and {MAX_NUM_REQS}")
    if 1 not in args.gammas or len(args.gammas) < 2 or min(args.gammas) < 1:
        parser.error("--gammas: two or more, all at least 1 and one of them 1")
    return args


def operations(
    gammas: Sequence[int], num_reqs: int, vocab_size: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(name, `{"torch": call, "triton": call}`). On a CPU there is no "triton"."""
    kinds = {"torch": eager, "triton": fused}
    if device.type == "cpu":
        del kinds["triton"]
    calls = {
        kind: of_cycle(ops, gammas, num_reqs, vocab_size, device) for kind, ops in kinds.items()
    }
    for name in calls["torch"]:
        yield name, {kind: found[name] for kind, found in calls.items()}
    num_columns = sum(gammas)
    members = torch.randn(
        len(gammas), num_reqs * num_columns, vocab_size, dtype=torch.bfloat16, device=device
    )
    for name, target in (("contrastive", "raw-logits"), ("weighted", "probs")):
        function = make_function(name, len(gammas), {})
        yield (
            f"combine {name} {target}",
            {
                kind: partial(ops.combine, function, members, target == "probs")
                for kind, ops in {"torch": combining.eager, "triton": combining.fused}.items()
                if kind in kinds
            },
        )


def of_cycle(
    ops: ModuleType, gammas: Sequence[int], num_reqs: int, vocab_size: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """The calls by name, for requests that all decode with a full window."""
    turns = chef_turns(gammas, list(range(len(gammas), 0, -1)), [True] * len(gammas))
    last, window = len(turns) - 1, turns.window
    state = ProposalState(turns, MAX_NUM_REQS, MAX_MODEL_LEN, 8, torch.bfloat16, device)
    stats, all_cycle = TurnStats(turns, device), make_cycle(state, MAX_NUM_REQS)
    state.lengths[:, 1:] = torch.tensor(turns.max_gammas[1:], device=device)
    by_slot = torch.ones(MAX_NUM_REQS, dtype=torch.int32, device=device)
    ones = by_slot.float()
    states = SlotStates(by_slot, ones, by_slot.long(), by_slot * 8, ones, 0 * ones)
    slots = torch.arange(num_reqs, dtype=torch.int32, device=device)
    cycle = ops.load(all_cycle, slots, states)
    starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * (window + 1)
    seq_lens = torch.full((num_reqs,), 500, dtype=torch.int32, device=device)
    num_tokens = num_reqs * turns.num_read(last, window + 1)
    query_start_loc = torch.arange(num_reqs + 1, dtype=torch.int32, device=device)
    query_start_loc *= num_tokens // num_reqs
    ids = torch.ones(num_tokens, dtype=torch.int32, device=device)
    positions = torch.ones(num_tokens, dtype=torch.int64, device=device)
    all_token_ids = torch.ones(MAX_NUM_REQS, MAX_MODEL_LEN, dtype=torch.int32, device=device)
    turn_gammas = torch.tensor(turns.gammas(window), device=device)
    calls = torch.tensor(turns.num_calls(turns.gammas(window)), device=device)
    tokens = torch.ones(num_reqs, dtype=torch.int64, device=device)
    segments = range(turns.num_decidable(last))
    num_columns = turns.max_tokens(segments) + 1
    sampled = torch.ones(num_reqs, num_columns, dtype=torch.int64, device=device)
    num_sampled = torch.full((num_reqs,), 2, dtype=torch.int32, device=device)
    ops.begin_cycle(state, cycle, starts, starts, seq_lens, ids)
    read_start = cycle.step_start.clone()
    columns = torch.arange(num_reqs * num_columns, device=device).view(num_reqs, num_columns)
    logits = torch.randn(len(columns.flatten()), vocab_size, dtype=torch.bfloat16, device=device)
    proposers = [turns[turn].members[0] for turn in turns.in_window[: segments.stop]]
    segment = columns % num_columns % len(segments)
    return {
        "load": lambda: ops.load(all_cycle, slots, states),
        "begin_cycle": lambda: ops.begin_cycle(state, cycle, starts, starts, seq_lens, ids),
        "candidates": lambda: ops.candidates(state, cycle, segments, num_columns),
        "gather_scores": lambda: ops.gather_scores(
            cycle,
            [logits] * len(gammas),
            [columns] * len(gammas),
            segment,
            proposers,
            torch.float32,
            scales=True,
        ),
        "settle": lambda: ops.settle(state, cycle, sampled, num_sampled, segments, False),
        "last_scored": lambda: ops.last_scored(cycle),
        "append": lambda: ops.append(state, cycle, last, turn_gammas, tokens),
        "prepare_tokens": lambda: ops.prepare_tokens(
            state, cycle, all_token_ids, query_start_loc, ids, positions, seq_lens
        ),
        "place_scores": lambda: ops.place_scores(
            state, cycle, last, turns.num_unscored(last), query_start_loc, read_start
        ),
        "prepare_token": lambda: ops.prepare_token(
            state, cycle, all_token_ids, ids[:num_reqs], positions[:num_reqs], seq_lens
        ),
        "place_score": lambda: ops.place_score(state, cycle, last, turn_gammas),
        "outputs": lambda: ops.outputs(cycle, window + 1),
        "end_cycle": lambda: ops.end_cycle(state, cycle, stats, calls),
    }


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds until a call returns, the mean of many calls."""
    call(), synchronize()
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    seconds = time.perf_counter() - start
    synchronize()
    return 1e6 * seconds / NUM_CALLS


def graph_us(call: Callable[[], Any]) -> float | None:
    """Microseconds of a call in a CUDA graph of many calls; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(NUM_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / (NUM_CALLS * NUM_REPLAYS)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shown(row: dict[str, Any]) -> str:
    parts = [f"{row['operation']} x {row['num_reqs']}:"]
    for kind in ("torch", "triton"):
        if kind in row:
            graph = row[kind]["graph_us"]
            in_graph = "" if graph is None else f", {graph:.1f} in a graph"
            parts.append(f"{kind} {row[kind]['host_us']:.1f} us{in_graph};")
    return " ".join(parts)


if __name__ == "__main__":
    main()
