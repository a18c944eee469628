"""Tokens and passes per cycle, from the reference: the table of `docs/algorithm.md`.

    python benchmarks/simulate_turns.py

The proposals of each member are accepted independently, with given probabilities. This needs no GPU
and no weights. The last line of the output is JSON; `--out FILE` writes it too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from vllm.chef.reference import Chef
from vllm.chef.turns import Turn

# Gammas and acceptances in the order of the calls; the members that have a say (None: all).
CHEF = [
    ((1, 1), (0.5, 0.5), None),
    ((1, 1), (0.8, 0.8), None),
    ((1, 1), (0.9, 0.6), None),
    ((1, 1, 1), (0.8, 0.8, 0.8), None),
    ((1, 1, 1), (0.9, 0.5, 0.7), None),
    ((1, 1, 1, 1), (0.8, 0.8, 0.8, 0.8), None),
    ((1, 3), (0.9, 0.6), None),
    ((1, 5), (0.8, 0.8), None),
    ((1, 5), (0.9, 0.8), None),
    ((1, 1, 5), (0.8, 0.8, 0.8), (0, 1)),
]
# Number of members, gamma of the last, acceptances, the members that have a say (None: all).
SD = [(2, 5, (0.8, 0.8), None), (3, 5, (0.8, 0.8, 0.8), (0, 1))]


def simulate(
    turns: Sequence[Turn],
    rates: Sequence[float],  # [num_members] acceptance
    scorers: Sequence[int] | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    # There are two tokens. The ensemble always wants the first, and a member proposes it with the
    # probability `rate`.
    members = [lambda tokens, rate=rate: (rate, 1 - rate) for rate in rates]
    num_tokens, num_cycles, calls = 0, 0, [0] * len(members)
    for seed in range(args.sequences):
        chef = Chef(members, lambda _: (1.0, 0.0), turns, Random(seed), scorers)
        out = chef.generate((), args.num_tokens)
        num_tokens += len(out.tokens)
        num_cycles += out.cycles
        calls = [a + b for a, b in zip(calls, out.calls, strict=True)]
    return {
        "turns": [[list(turn.members), turn.gamma] for turn in turns],
        "acceptance": rates,
        "scorers": scorers,
        "tokens_per_cycle": round(num_tokens / num_cycles, 4),
        "passes_per_cycle": [round(count / num_cycles, 4) for count in calls],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=50, help="seeds 0, 1, ...")
    parser.add_argument("--num-tokens", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policies = [
        ([Turn((member,), gamma) for member, gamma in enumerate(gammas)], rates, scorers)
        for gammas, rates, scorers in CHEF
    ]
    policies += [
        ([Turn(tuple(range(size - 1)), 0), Turn((size - 1,), gamma)], rates, scorers)
        for size, gamma, rates, scorers in SD
    ]
    rows = []
    for turns, rates, scorers in policies:
        rows.append(simulate(turns, rates, scorers, args))
        print(rows[-1], flush=True)
    document = {
        "benchmark": "simulate_turns",
        "settings": {"sequences": args.sequences, "num_tokens": args.num_tokens},
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
