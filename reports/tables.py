"""The tables of a study: report.csv with everything that is known, report.md for readers.

This module knows how a record is shown. It reads no files and draws nothing.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reports.runs import Run, set_values
from reports.statistics import Interval

# The order of the columns: FIRST, then all that are not listed, then LAST.
CORE = ("data set", "method", "members")
FIRST = (
    *CORE,
    "draft_model",
    "alpha",
    "weights",
    "gamma",
    "max_gamma",
    "turn_order",
    "ensemble_fn",
    "ensemble_target",
    "temperature",
)
LAST = ("batch_size", "seed", "device", "versions")
# Known only when a run is over.
AT_THE_END = ("metric", "device", "versions")
RESULTS = ("tokens/s", "speed-up", "tokens/cycle", "acceptance")
# Marks a speed that covers more than one part of a run, or that is relative to such a speed.
CONTINUED = "*"
CONTINUED_NOTE = (
    f"\\{CONTINUED} This speed uses a run that was continued. It differs slightly from the speed "
    "of an unbroken run, because requests that were in flight at the break were begun twice."
)


def write_csv(runs: Sequence[Run], records: Sequence[Mapping[str, Any]], path: Any) -> None:
    """All runs, all columns: results first, then `config.*` and `summary.*` by dotted key."""
    by_name = {record["run"]: record for record in records}
    rows = []
    for run in runs:
        record = by_name.get(run.name, {})
        row = {"run": run.name, "status": run.status, "error": run.error}
        row |= {key: value for key, value in record.items() if key not in ("settings", "run")}
        row |= {f"config.{key}": value for key, value in run.flat.items()}
        row |= {f"summary.{key}": value for key, value in set_values(run.summary or {}).items()}
        if run.overrides:
            row["overrides"] = list(run.overrides)
        rows.append({key: _as_json(value) for key, value in row.items()})
    pd.DataFrame(rows).to_csv(path, index=False)


def report_text(
    runs: Sequence[Run], records: Sequence[Mapping[str, Any]], captions: Mapping[str, str]
) -> str:
    """The text of report.md: the tables, and the figures that `captions` names, in both themes."""
    statuses = Counter(run.status for run in runs)
    counts = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))
    parts = ["# Report", f"{len(runs)} runs: {counts}."]
    if records:
        parts += [study_table(records), _notes(records)]
    for name, caption in captions.items():
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{_picture(name, caption)}")
    if failed := failed_table(runs):
        parts.append(f"## Failed\n\n{failed}")
    return "\n\n".join(parts) + "\n"


def study_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line of what all runs have in common, then a table of what differs."""
    if not records:
        return ""
    settings = pd.DataFrame([record["settings"] for record in records], dtype=object)
    settings = settings[_ordered(settings.columns)].map(_shown)
    results = pd.DataFrame([_result_cells(record) for record in records], dtype=object).fillna("")
    results = results.loc[:, (results != "").any()]
    everything = pd.concat([settings.fillna(""), results], axis=1)
    values = {
        name: set(everything[name]) - ({""} if _may_be_blank(name) else set())
        for name in everything
        if name not in RESULTS and not name.startswith("score")
    }
    constant = [name for name in values if len(values[name]) == 1]
    if len(records) == 1:
        constant = [name for name in constant if name in settings and name not in CORE] + ["status"]
    lines = [f"{name}: {values[name].pop()}" for name in constant if name != "status"]
    parts = []
    if lines:
        parts.append("Common to all runs: " + "; ".join(_escape(line) for line in lines) + ".")
    table = everything.drop(columns=constant)
    if not table.columns.empty:
        parts.append(markdown(table, right=[c for c in results if c not in ("metric", "status")]))
    if any(_continued(record[key]) for record in records for key in ("parts", "speed_up_parts")):
        parts.append(CONTINUED_NOTE)
    return "\n\n".join(parts)


def _may_be_blank(name: str) -> bool:
    """Whether a run without a value in column `name` counts as equal to the others.

    Such a run is not over, or it has another task.
    """
    return name in AT_THE_END or name.startswith("task.")


def failed_table(runs: Sequence[Run]) -> str:
    failed = [run for run in runs if run.status in ("failed", "unreadable")]
    rows = [
        {
            "run": run.name,
            "status": run.status,
            "samples": len(run.scores),
            "error": run.error,
            "overrides": " ".join(run.overrides),
        }
        for run in failed
    ]
    return markdown(pd.DataFrame(rows), right=["samples"]) if rows else ""


def markdown(table: pd.DataFrame, right: Sequence[str] = ()) -> str:
    """A Markdown table of the cells' text, with the columns in `right` aligned to the right."""
    return table.map(_escape).to_markdown(
        index=False,
        disable_numparse=True,
        colalign=["right" if name in right else "left" for name in table],
    )


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Interval | None, digits: int) -> str:
    if value is None or interval is None:
        return number(value, digits)
    return f"{value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _notes(records: Sequence[Mapping[str, Any]]) -> str:
    kinds = defaultdict(set)
    for record in records:
        if record["score_interval"]:
            kinds[record["score_interval"]].add(record["dataset"])
    used = [f"{kind} ({', '.join(sorted(of))})" for kind, of in sorted(kinds.items())]
    intervals = f"95% intervals: {'; '.join(used)}. " if used else ""
    return (
        f"{intervals}Speed-up: the run's speed over the mean speed of the finished runs of the "
        "plain ensemble with the same members, data and settings. It is empty if there is no such "
        "run. Acceptance: one value per member, in the order of the members. The results of an "
        "unfinished run are those of its samples so far. Figures leave out some settings; "
        "report.csv has everything."
    )


def _continued(num_parts: int | None) -> str:
    return CONTINUED if (num_parts or 1) > 1 else ""


def _picture(name: str, caption: str) -> str:
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{name}_dark.svg">\n'
        f'  <img alt="{caption}" src="{name}_light.svg">\n'
        f"</picture>\n\n{caption}"
    )


def _result_cells(record: Mapping[str, Any]) -> dict[str, str]:
    interval = None
    if record["score_interval"]:
        interval = Interval(*(record[f"score_{p}"] for p in ("low", "high", "interval")))
    acceptance = record["acceptance"]
    by_member = acceptance if isinstance(acceptance, list) else [acceptance]
    return {
        "n": str(record["n"]),
        "metric": record["metric"] or "",
        "score [95% interval]": with_interval(record["score"], interval, 3),
        **{
            f"score: {name}": number(score, 3)
            for name, score in record["scores"].items()
            if name != record["metric"]
        },
        "tokens/s": number(record["tokens_per_second"], 1) + _continued(record["parts"]),
        "speed-up": number(record["speed_up"], 2) + _continued(record["speed_up_parts"]),
        "tokens/cycle": number(record["tokens_per_cycle"], 2),
        "acceptance": ", ".join(number(value, 2) or "-" for value in by_member)
        if acceptance is not None
        else "",
        "status": record["status"],
    }


def _ordered(columns: Iterable[str]) -> list[str]:
    middle = [name for name in columns if name not in (*FIRST, *LAST)]
    return [name for name in (*FIRST, *middle, *LAST) if name in set(columns)]


def _as_json(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _shown(value: Any) -> str:
    if value is None or value != value:  # pandas puts NaN if a record has no such key
        return ""
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)


def _escape(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
