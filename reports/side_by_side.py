"""A plain ensemble and the same ensemble by turns, in one table.

This module takes two runs as they are on disk. It starts no run: `main_compare.py` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import ConfigError
from harness.proposals import rows as proposal_rows
from reports.paired import Comparison, compare
from reports.records import short_names, speed_up
from reports.runs import Run
from reports.tables import CONTINUED, number


def side_by_side(plain: Run, turns: Run) -> str:
    """The table of two finished runs, with notes below it.

    Raises:
        ConfigError: a run is not finished, or the two have no sample in common.
    """
    for run in (plain, turns):
        if run.summary is None:
            raise ConfigError(f"'{run.path}' is {run.status}: {run.error or 'it has no summary'}")
    comparison = compare(turns, plain)
    parts = [_heading(plain), _aligned(_rows(plain, turns, comparison)), *_notes(comparison)]
    return "\n\n".join(parts)


def _heading(run: Run) -> str:
    names = short_names(run.members)
    members = " + ".join(names[member] for member in run.members)
    batch_size = run.flat.get("batch_size")
    in_flight = "all requests at once" if batch_size is None else f"batch size {batch_size}"
    data = f"{run.flat['dataset.name']} ({run.summary['num_samples']} samples)"
    parts = [data, in_flight, f"temperature {run.temperature}"]
    if (max_tokens := run.flat.get("method.generate.max_tokens")) is not None:
        parts.append(f"at most {max_tokens} tokens")
    return f"{members}: {', '.join([*parts, run.summary['device']])}"


def _rows(plain: Run, turns: Run, comparison: Comparison) -> list[Sequence[str]]:
    """Each row is a name, then a cell for each run or one cell for both."""
    continued = any(run.num_parts > 1 for run in (plain, turns))
    ratio = number(speed_up(turns, [plain]), 2) + CONTINUED * continued
    results = [_results(run.summary) for run in (plain, turns)]
    names = dict.fromkeys(name for of_run in results for name in of_run)
    return [
        ("", "plain", "by turns"),
        ("method", plain.method, turns.method),
        ("same completions", _equal(comparison)),
        *((name, *(of_run.get(name, "") for of_run in results)) for name in names),
        ("ratio of speeds", "", ratio),
        ("files of plain", str(plain.path)),
        ("files of turns", str(turns.path)),
    ]


def _results(summary: Mapping[str, Any]) -> dict[str, str]:
    score = summary["score"]
    proposals = proposal_rows(summary)
    proposals.pop("calls", None)
    return {
        summary["metric"]: "not evaluated" if score is None else f"{score:.3f}",
        **proposals,
        "tokens/s": f"{summary['tokens_per_second']:.2f}",
    }


def _equal(comparison: Comparison) -> str:
    if comparison.divergences is None:
        why = ", ".join(comparison.differing) or "temperature above 0"
        return f"not compared ({why})"
    return f"{comparison.num_both - len(comparison.divergences)} of {comparison.num_both}"


def _notes(comparison: Comparison) -> list[str]:
    turns, plain = comparison.a, comparison.b
    notes = []
    if comparison.divergences:
        notes.append(
            "Completions differ. Rounding can cause this. The next command shows where they "
            "differ, and the margins there:\n"
            f"python scripts/report.py --paired {turns.path} {plain.path}"
        )
    if any(run.num_parts > 1 for run in (turns, plain)):
        notes.append(
            f"{CONTINUED} A run was stopped and continued. Requests that were in flight then were "
            "begun twice."
        )
    return notes


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart. A cell for both runs may be longer than its column."""
    widths = [max(len(row[0]) for row in rows)]
    widths += [max(len(row[i]) for row in rows if len(row) == 3) for i in (1, 2)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
