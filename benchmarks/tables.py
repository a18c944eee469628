"""Tables of a benchmark's rows, as text.

This module knows rows as plain data. It computes no ratio.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.kinds import name_of
from benchmarks.loads import load_of

Row = Mapping[str, Any]

TIME_NAMES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms"}
KINDS_OF_TIME = ("mean", "p50", "p99")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as aligned columns. The first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def requests_table(rows: Sequence[Row]) -> str:
    """Speeds over the plain ensemble by kind of request. Empty if there is only one kind.

    A cell has the speed at each batch size. In brackets is this speed over the bare request's.
    """
    rows = [row for row in rows if row.get("speed_over_plain")]
    columns = list(dict.fromkeys((row["run"], row["acceptance_set"]) for row in rows))
    sizes = sorted({row["batch_size"] for row in rows})
    cells: dict[str, dict[Any, str]] = {}
    for row in rows:
        kind = cells.setdefault(name_of(row["temperature"], row["sampling"]), {})
        kind[row["run"], row["acceptance_set"], row["batch_size"]] = with_share(row)
    if len(cells) < 2:
        return ""
    header = [f"batch {', '.join(map(str, sizes))}"]
    header += [run if rate is None else f"{run} a={rate:g}" for run, rate in columns]
    lines = [header]
    for name, kind in cells.items():
        lines.append([name, *(", ".join(kind.get((*c, s), "-") for s in sizes) for c in columns)])
    return aligned(lines)


def with_share(row: Row) -> str:
    share = row["share_of_bare_speed"]
    return f"{row['speed_over_plain']:.2f}" + (f" ({share:.2f})" if share else "")


def load_table(rows: Sequence[Row]) -> str:
    """Throughput and latencies by load and run. In brackets are ratios to the plain ensemble."""
    lines = [["load", "run", "tokens/s", *(f"{n} {k}" for n in TIME_NAMES for k in KINDS_OF_TIME)]]
    for load in dict.fromkeys(map(load_of, rows)):
        for row in rows:
            if load_of(row) == load:
                lines.append([str(load), row["run"], *_cells(row)])
    note = "In brackets: how many times as good as the plain ensemble under the same load."
    return f"{aligned(lines)}\nTTFT and TPOT in ms. {note}"


def _cells(row: Row) -> list[str]:
    over = row["over_plain"] or {}
    cells = [f"{row['tokens_per_s']:.0f}" + _ratio(over.get("tokens_per_s"))]
    for name in TIME_NAMES.values():
        times, ratios = row[name] or {}, over.get(name) or {}
        for kind in KINDS_OF_TIME:
            value = f"{times[kind]:.1f}" if times else "-"
            cells.append(value + _ratio(ratios.get(kind)))
    return cells


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"
