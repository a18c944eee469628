"""What became of proposed tokens: from counts to the fields of `summary.json` and lines on screen.

A proposed token is judged, and then accepted or not, unless one before it was not accepted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics


def of_turns(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of members that take turns.

    Args:
        stats: of a `ChefWorker`: num_cycles and num_tokens; by member num_calls; by member, and
            position in what it proposes in its turn, num_judged and num_accepted.
    """
    pairs = list(zip(stats["num_accepted"], stats["num_judged"], strict=True))
    return {
        "tokens_per_cycle": _ratio(stats["num_tokens"], stats["num_cycles"]),
        "calls": stats["num_calls"],
        "acceptance": [_ratio(sum(accepted), sum(judged)) for accepted, judged in pairs],
        "acceptance_by_position": [_ratios(accepted, judged) for accepted, judged in pairs],
    }


def of_draft_model(metrics: Sequence["RequestSpecDecodeMetrics"]) -> dict[str, Any]:
    """The fields of stock speculation, from vLLM's own counts; none where there are no counts."""
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
        # Each cycle ends with a token of the target's own.
        "tokens_per_cycle": _ratio(num_cycles + sum(accepted), num_cycles),
        "acceptance": _ratio(sum(accepted), sum(judged)),
        "acceptance_by_position": _ratios(accepted, judged),
    }


def rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Lines of the table at the end of a run, if tokens were proposed."""
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


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _ratios(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    return [_ratio(part, whole) for part, whole in zip(parts, wholes, strict=True)]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
