"""Loads of an engine: requests of mixed lengths, their arrivals, and statistics of their times.

This module knows plain data and plain numbers. It starts no engine.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.plans import Run

Row = dict[str, Any]

CLOSED, POISSON = "closed", "poisson"
# A closed loop has at least this many requests per place. Fewer are in flight at its ends. The ends
# must stay short beside the middle.
MIN_TURNOVER = 3
RATES = ("tokens_per_s", "requests_per_s")
TIMES = ("ttft_ms", "tpot_ms", "latency_ms")


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one request: those of its prompt, and those to decode."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Args:
        in_flight: requests in flight in a closed loop. None: Poisson arrivals.
        rate: Poisson arrivals, as a share of the capacity. None: a closed loop.
    """

    in_flight: int | None = None
    rate: float | None = None

    @property
    def kind(self) -> str:
        return POISSON if self.in_flight is None else CLOSED

    def num_requests(self, least: int) -> int:
        return least if self.in_flight is None else max(least, MIN_TURNOVER * self.in_flight)

    def __str__(self) -> str:
        if self.in_flight is None:
            return f"arrivals at {self.rate:g} of capacity"
        return f"{self.in_flight} in flight"


def loads_of(in_flight: Sequence[int], rates: Sequence[float]) -> list[Load]:
    """The loads in the order of measurement. Closed loops come first, to tell the capacity."""
    return [Load(in_flight=number) for number in in_flight] + [Load(rate=rate) for rate in rates]


@dataclass
class Timing:
    """The times of one request, in seconds by one clock.

    Args:
        due: when it was to be sent. If the sender was late, that time counts as well.
        first, last: when its first and its last output came.
        num_tokens: all tokens that it got.
    """

    due: float
    first: float = math.nan
    last: float = math.nan
    num_tokens: int = 0

    def add(self, num_tokens: int, now: float) -> None:
        if not self.num_tokens:
            self.first = now
        self.last = now
        self.num_tokens += num_tokens


def make_lengths(
    number: int, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> list[Lengths]:
    """Lengths drawn uniformly. A larger `number` adds lengths behind the same first ones."""
    draw = random.Random(seed)
    return [Lengths(draw.randint(*prompt), draw.randint(*output)) for _ in range(number)]


def make_arrivals(number: int, per_second: float, seed: int) -> list[float]:
    """Seconds from the start, of Poisson arrivals. Another rate stretches the same arrivals."""
    draw, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(number):
        now += draw.expovariate(1.0)
        arrivals.append(now / per_second)
    return arrivals


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile, interpolated linearly between the two nearest values as numpy does."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds, of values in seconds. None if there are no values."""
    if not values:
        return None
    times = [1000 * value for value in values]
    return {
        "mean": sum(times) / len(times),
        "p50": percentile(times, 50),
        "p99": percentile(times, 99),
    }


def summary(timings: Sequence[Timing]) -> Row:
    """Throughput and latencies, from the first request's due time to the last output."""
    start = min(timing.due for timing in timings)
    seconds = max(timing.last for timing in timings) - start
    num_tokens = sum(timing.num_tokens for timing in timings)
    waits = [timing.last - timing.due for timing in timings]
    return {
        "num_requests": len(timings),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "requests_per_s": len(timings) / seconds,
        "mean_in_flight": sum(waits) / seconds,
        "ttft_ms": spread([timing.first - timing.due for timing in timings]),
        # The time runs from the first output to the last, so it is divided by all tokens but one.
        "tpot_ms": spread(
            [
                (timing.last - timing.first) / (timing.num_tokens - 1)
                for timing in timings
                if timing.num_tokens > 1
            ]
        ),
        "latency_ms": spread(waits),
    }


def proposal_counts(counts: Mapping[str, Any], run: Run) -> Row:
    """Tokens per cycle, and acceptance by model with a draft model last. Empty without proposals.

    Args:
        counts: from `TurnStats`, or those of vLLM's own speculation from `harness.proposals`.
    """
    if not counts:
        return {}
    judged, accepted = counts["num_judged"], counts["num_accepted"]
    if "num_calls" not in counts:
        silent = [[]] * len(run.members)
        judged, accepted = [*silent, judged], [*silent, accepted]
    pairs = [(sum(a), sum(j)) for a, j in zip(accepted, judged, strict=True)]
    return {
        "tokens_per_cycle": counts["num_tokens"] / counts["num_cycles"],
        "acceptance": [a / j if j else None for a, j in pairs],
    }


# What rows say together


def is_plain(run: str) -> bool:
    parsed = Run.parse(run)
    return parsed.policy is None and len(parsed.members) > 1


def load_of(row: Row) -> Load:
    return Load(row["in_flight"], row["rate"])


def capacity_of(rows: Sequence[Row]) -> float | None:
    """Requests per second of the plain ensemble in its largest closed loop. None if it has none."""
    plain = [row for row in rows if row["load"] == CLOSED and is_plain(row["run"])]
    fullest = max(plain, key=lambda row: row["in_flight"], default=None)
    return fullest and fullest["requests_per_s"]


def complete(rows: Sequence[Row]) -> None:
    """Add `over_plain` to every row: its values against the plain ensemble's, at the same load."""
    for row in rows:
        plain = plain_of(row, rows)
        row["over_plain"] = None if plain is None or plain is row else over(row, plain)


def plain_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the plain ensemble with the same output and load.

    If there is none, it is the first plain ensemble's row with the same load.
    """
    found = [r for r in rows if is_plain(r["run"]) and load_of(r) == load_of(row)]
    key = Run.parse(row["run"]).plain_key
    same = [r for r in found if Run.parse(r["run"]).plain_key == key]
    return next(iter(same + found), None)


def over(row: Row, plain: Row) -> Row:
    """The run's rates over the plain ensemble's, and the plain ensemble's times over the run's."""
    found: Row = {name: row[name] / plain[name] for name in RATES}
    for name in TIMES:
        pair = row[name], plain[name]
        found[name] = None if None in pair else {k: pair[1][k] / pair[0][k] for k in pair[0]}
    return found
