"""Pictures of `bench_decode.py`'s results: speed over the plain ensemble.

    python benchmarks/plot.py benchmarks/results/RESULT.json --folder docs/pictures

There is one picture by acceptance (at one batch size), and one by batch size (at each run's first
acceptance). Points are measurements. Lines are what theory expects from the measured costs. If
there are several kinds of requests, the first kind is drawn. Each picture has a light and a dark
variant.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

if __name__ == "__main__" and not __package__:
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.plans import Run
from benchmarks.ratios import expected_tokens, turns_of

Row = dict[str, Any]

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#8c959f", "grid": "#e4e7eb"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#7d8590", "grid": "#272d35"},
}
# Okabe and Ito's colours, for readers with any colour vision; lighter on dark where needed.
COLOURS = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#a0518a", "#8a6d00", "#4a4a4a", "#7a3b00"],
    "dark": ["#56b4e9", "#f0803c", "#2fc89a", "#d99ac0", "#e0c341", "#b8b8b8", "#c08a5a"],
}
MARKERS = "osD^vPX"
WIDTH, HEIGHT = 7.2, 4.6  # inches
# Acceptances of a theoretical curve.
GRID = [step / 40 for step in range(20, 41)]


def label(run: Run) -> str:
    """The name for readers: `2 x 7b + 68m, gamma 1, 5`."""
    names = []
    for model in dict.fromkeys(run.members):
        times = run.members.count(model)
        name = model.removeprefix("llama-").removeprefix("smollm2-")
        names.append(f"{times} \u00d7 {name}" if times > 1 else name)
    text = " + ".join(names)
    if run.alpha is not None:
        text += ", contrastive"
    if run.proposer:
        return f"{text}, {run.proposer.removeprefix('llama-')} proposes {run.gammas[0]} (stock)"
    if run.policy == "sd":
        return f"{text}, the last proposes {run.gammas[0]}"
    gammas = ", ".join(map(str, run.gammas))
    return f"{text}, gamma {'auto, at most ' if run.is_adaptive else ''}{gammas}"


def is_drawn(row: Row, runs: Sequence[str]) -> bool:
    """Whether to draw the row: its run is in `runs`, or has two members with a say if it is empty.

    A row without a speed over the plain ensemble is never drawn.
    """
    if not row.get("speed_over_plain"):
        return False
    run = Run.parse(row["run"])
    return row["run"] in runs if runs else len(run.counted) > 1 and run.alpha != 0


def of_one_kind(rows: Sequence[Row]) -> list[Row]:
    """The rows with the temperature and the sampling parameters of the first row."""
    kinds = [(row["temperature"], row["sampling"]) for row in rows]
    return [row for row, kind in zip(rows, kinds, strict=True) if kind == kinds[0]]


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row)
    return found


def shown_acceptance(row: Row) -> float:
    """The mean acceptance of the members that propose."""
    rates = [rate for rate in row["acceptance"] if rate is not None]
    return sum(rates) / len(rates)


def curve(row: Row, engine: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Acceptances, and the speeds that theory expects at them from this row's costs."""
    ratio = (row["theory"] or {}).get("cost_ratio")
    run, turns = Run.parse(row["run"]), turns_of(engine)
    if ratio is None or run.is_adaptive or (turns is None and run.policy != "draft_model"):
        return None
    speeds = []
    for rate in GRID:
        rates = [None if known is None else rate for known in row["acceptance"]]
        speeds.append(ratio * (expected_tokens(run, turns, rates) or float("nan")))
    return GRID, speeds


def by_acceptance(
    axes: Axes, document: dict[str, Any], colours: Sequence[str], batch_size: int
) -> None:
    engines = {entry["run"]: entry for entry in document["configurations"]}
    rows = [row for row in document["results"] if row["batch_size"] == batch_size]
    for at, (name, points) in enumerate(series(rows).items()):
        style = {"color": colours[at % len(colours)]}
        expectation = curve(points[0], engines.get(name, {}))
        if expectation:
            axes.plot(*expectation, linewidth=1.3, alpha=0.75, **style)
        axes.plot(
            [shown_acceptance(row) for row in points],
            [row["speed_over_plain"] for row in points],
            MARKERS[at % len(MARKERS)],
            label=label(Run.parse(name)),
            markersize=7,
            # Keeps points apart that lie on top of one another.
            markeredgecolor=axes.get_facecolor(),
            **style,
        )
    axes.set_xlabel(f"acceptance of a proposed token (batch {batch_size})")


def by_batch_size(axes: Axes, document: dict[str, Any], colours: Sequence[str]) -> None:
    sizes: set[int] = set()
    for at, (name, rows) in enumerate(series(document["results"]).items()):
        rate = rows[0]["acceptance_set"]
        points = sorted(
            (row for row in rows if row["acceptance_set"] == rate),
            key=lambda row: row["batch_size"],
        )
        sizes |= {row["batch_size"] for row in points}
        style = {"color": colours[at % len(colours)]}
        text = label(Run.parse(name)) + ("" if rate is None else f", a = {rate:g}")
        axes.plot(
            [row["batch_size"] for row in points],
            [row["speed_over_plain"] for row in points],
            MARKERS[at % len(MARKERS)],
            label=text,
            markersize=7,
            # Keeps points apart that lie on top of one another.
            markeredgecolor=axes.get_facecolor(),
            **style,
        )
        expectation = [(row["theory"] or {}).get("speed_over_plain") for row in points]
        if all(expectation):
            axes.plot([row["batch_size"] for row in points], expectation, linewidth=1.3,
                      alpha=0.75, **style)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlabel("batch size")


def pictures(
    documents: Sequence[dict[str, Any]], runs: Sequence[str], batch_size: int | None
) -> Iterator[tuple[str, str, Any]]:
    """(name, theme, figure) of each picture, with the finished runs of all documents."""
    engines, rows = [], []
    for document in documents:
        done = [entry for entry in document["configurations"] if entry["status"] == "done"]
        names = {entry["run"] for entry in done}
        engines += done
        rows += [row for row in document["results"] if row["run"] in names and is_drawn(row, runs)]
    together = documents[0] | {"configurations": engines, "results": of_one_kind(rows)}
    if not together["results"]:
        raise SystemExit("nothing to draw: no row has speed_over_plain; run the plain ensembles")
    smallest = batch_size or min(row["batch_size"] for row in together["results"])
    drawings = {
        "speed_by_acceptance": lambda axes, colours: by_acceptance(
            axes, together, colours, smallest
        ),
        "speed_by_batch_size": lambda axes, colours: by_batch_size(axes, together, colours),
    }
    for name, draw in drawings.items():
        for theme, inks in THEMES.items():
            figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT), facecolor=inks["paper"])
            axes.set_facecolor(inks["paper"])
            draw(axes, COLOURS[theme])
            finish(axes, inks, document_line(together))
            yield name, theme, figure
            pyplot.close(figure)


def document_line(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['device']}, {document['settings']['dtype']}, {versions}"


def finish(axes: Axes, inks: dict[str, str], source: str) -> None:
    axes.axhline(1, color=inks["faint"], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_title("Speed over the plain ensemble", loc="left", color=inks["ink"], fontsize=12)
    axes.grid(color=inks["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=inks["ink"], length=0)
    axes.xaxis.label.set_color(inks["ink"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:g}\u00d7"))
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.07, 0.02),
        ncols=1 if len(labels) < 4 else 2,
        frameon=False,
        fontsize=8.5,
        labelcolor=inks["ink"],
        title="points: measured; lines: expected of the measured costs",
        title_fontproperties={"size": 8.5},
        alignment="left",
    )
    legend.get_title().set_color(inks["faint"])
    axes.figure.text(0.99, 0.955, source, ha="right", color=inks["faint"], fontsize=7.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--batch-size", type=int, help="of speed by acceptance; default: smallest")
    parser.add_argument("--runs", nargs="+", default=[], help="default: all of several members")
    parser.add_argument("--format", default="svg", choices=["svg", "png"])
    args = parser.parse_args()
    matplotlib.rcParams["svg.fonttype"] = "path"  # looks the same everywhere
    matplotlib.rcParams["svg.hashsalt"] = "speculative-ensemble"  # the same file again
    documents = [json.loads(path.read_text()) for path in args.results]
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, theme, figure in pictures(documents, args.runs, args.batch_size):
        path = args.folder / f"{name}_{theme}.{args.format}"
        metadata = {"Date": None} if args.format == "svg" else None
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15, metadata=metadata)
        print(path)


if __name__ == "__main__":
    main()
