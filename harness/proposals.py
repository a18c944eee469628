"""How many proposed tokens were accepted: counts, fields of `summary.json`, and lines on screen.

A proposed token is judged only if all proposals before it in the turn were accepted. It is then
accepted or rejected.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

# The counts are empty if nothing is proposed. Otherwise they have these keys:
# - num_cycles, num_tokens: numbers,
# - num_judged, num_accepted: lists by position within the turn's proposal.
#
# If members take turns, the counts come from a `ChefWorker`. num_judged and num_accepted are then
# by member too, and there is num_calls by member.
Counts = dict[str, Any]


def count_drafts(metrics: Sequence["RequestSpecDecodeMetrics"]) -> Counts:
    """The counts of stock speculation, from vLLM's own; empty if there are none."""
    if not metrics:
        return {}
    num_positions = metrics[0].num_spec_tokens
    accepted, judged = [0] * num_positions, [0] * num_positions
    num_cycles = 0
    for num_accepted, num_drafted in _steps(metrics):
        num_cycles += 1
        for position in range(num_accepted):
            accepted[position] += 1
        for position in range(min(num_accepted + 1, num_drafted)):
            judged[position] += 1
    return {
        "num_cycles": num_cycles,
        # Each cycle ends with a token from the target itself.
        "num_tokens": num_cycles + sum(accepted),
        "num_judged": judged,
        "num_accepted": accepted,
    }


def add(first: Counts, second: Counts) -> Counts:
    """The counts of two parts of a run together."""
    if not first or not second:
        return first or second
    return {name: _sum(first[name], second[name]) for name in first}


def fields(counts: Counts) -> dict[str, Any]:
    """The fields of `summary.json`; none if nothing is proposed."""
    if not counts:
        return {}
    accepted, judged = counts["num_accepted"], counts["num_judged"]
    shares = {"tokens_per_cycle": _ratio(counts["num_tokens"], counts["num_cycles"])}
    if "num_calls" not in counts:
        shares["acceptance"] = _ratio(sum(accepted), sum(judged))
        shares["acceptance_by_position"] = _ratios(accepted, judged)
        return shares
    pairs = list(zip(accepted, judged, strict=True))
    return {
        **shares,
        "calls": counts["num_calls"],
        "acceptance": [_ratio(sum(accepted), sum(judged)) for accepted, judged in pairs],
        "acceptance_by_position": [_ratios(accepted, judged) for accepted, judged in pairs],
    }


def rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the table at the end of a run; none if nothing was proposed."""
    if "tokens_per_cycle" not in summary:
        return {}
    acceptance = summary["acceptance"]
    by_member = acceptance if isinstance(acceptance, list) else [acceptance]
    lines = {
        "acceptance": ", ".join(map(_shown, by_member)),
        "tokens a cycle": _shown(summary["tokens_per_cycle"]),
    }
    if "calls" in summary:
        lines["calls"] = ", ".join(map(str, summary["calls"]))
    return lines


def _steps(metrics: Iterable["RequestSpecDecodeMetrics"]) -> Iterable[tuple[int, int]]:
    for request in metrics:
        yield from zip(request.per_step_accepted, request.per_step_drafted, strict=True)


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, list):
        return [_sum(*pair) for pair in zip(first, second, strict=True)]
    return first + second


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _ratios(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    return [_ratio(part, whole) for part, whole in zip(parts, wholes, strict=True)]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
