"""The figures of a study: speed-up, score against speed, acceptance by position.

This module draws records (`records.make_records`), each figure in a light and a dark variant. It
computes only means over the configurations that share a bar or a line.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reports.records import METHOD_ORDER

Record = Mapping[str, Any]
# Foreground, faint lines, background: GitHub's, because most readers see the pictures there.
THEMES = {"light": ("#1f2328", "#d1d9e0", "#ffffff"), "dark": ("#f0f6fc", "#3d444d", "#0d1117")}
# The colours of Okabe and Ito, which colour-blind readers can tell apart, and two of our own at the
# end. Ours are darker or lighter than the colours that they resemble. All are legible on both
# backgrounds.
COLORS = {
    "sd": "#999999",
    "cd": "#56B4E9",
    "cd_sd": "#0072B2",
    "cd_chef": "#009E73",
    "ensemble": "#E69F00",
    "ensemble_sd": "#D55E00",
    "ensemble_chef": "#CC79A7",
    "cd + draft": "#9D7FE0",
    "ensemble + draft": "#8C6D31",
}
MARKERS = "osD^vPX<>*"
LINES = ("-", "--", ":", "-.")
WIDTH = 8.0  # inches: the width of a README's column; fonts have their true size there
MAX_HEIGHT = 9.0  # inches of all panels, so that a figure fits a page
MAX_PANELS = 8
MAX_NAME = 28


def draw_all(records: Sequence[Record], directory: Path) -> dict[str, str]:
    """Write every figure that has data, as NAME_light.svg and NAME_dark.svg.

    Returns the captions by name.
    """
    captions = {}
    for theme, (foreground, *_) in THEMES.items():
        # Figures are saved inside this context too, because matplotlib makes the ticks only then.
        with matplotlib.rc_context(settings(theme)):
            for name, (draw, caption) in FIGURES.items():
                figure = draw(records, foreground)
                if figure is not None:
                    # Without a date the same results make the same file.
                    figure.savefig(directory / f"{name}_{theme}.svg", metadata={"Date": None})
                    captions[name] = caption
    return captions


def settings(theme: str) -> dict[str, Any]:
    """matplotlib's settings by name."""
    foreground, faint, background = THEMES[theme]
    return {
        "text.color": foreground,
        "axes.labelcolor": foreground,
        "axes.edgecolor": foreground,
        "xtick.color": foreground,
        "ytick.color": foreground,
        "grid.color": faint,
        "axes.facecolor": background,
        "figure.facecolor": background,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.hashsalt": "reports",
        "text.parse_math": False,  # a name may hold a dollar sign
    }


def speed_up(records: Sequence[Record], foreground: str) -> Figure | None:
    """A bar per data set and method: the mean of its configurations, with their range."""
    records = [r for r in records if r["speed_up"] is not None and not r["plain"]]
    panels = _split(records, "members")
    if not panels:
        return None
    num_bars = max(len(_groups(p, "dataset", "method")) for p in panels.values())
    columns = 2 if num_bars <= 6 or len(panels) > 3 else 1
    figure, axes = _panels(panels, columns)
    for axis, panel in zip(axes, panels.values(), strict=True):
        _draw_bars(axis, panel, foreground, is_narrow=num_bars * columns > 16)
        axis.set_ylabel("speed-up")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    plain = Line2D([], [], color=foreground, linestyle="--", linewidth=1, label="plain ensemble")
    _legend(figure, [*_method_handles(records, foreground), plain])
    return figure


def score_against_speed(records: Sequence[Record], foreground: str) -> Figure | None:
    """A point per run, with the interval of its score; a panel per data set."""
    records = [r for r in records if None not in (r["score"], r["tokens_per_second"])]
    panels = _split(records, "dataset")
    if not panels:
        return None
    datasets = list(dict.fromkeys(record["dataset"] for record in records))
    figure, axes = _panels(panels, 2, height=2.9)
    for axis, panel in zip(axes, panels.values(), strict=True):
        marker = MARKERS[datasets.index(panel[0]["dataset"]) % len(MARKERS)]
        for record in panel:
            color = COLORS.get(record["method"], foreground)
            speed, score = record["tokens_per_second"], record["score"]
            if record["score_interval"]:
                low, high = record["score_low"], record["score_high"]
                axis.plot([speed, speed], [low, high], color=color, linewidth=1.2)
            axis.plot(speed, score, marker, color=color, markersize=7, markeredgecolor=foreground,
                      markeredgewidth=0.6, alpha=0.9)  # fmt: skip
        axis.set_xlabel("tokens/s")
        axis.set_ylabel(panel[0]["metric"] or "score")
        axis.set_xlim(0, 1.08 * max(record["tokens_per_second"] for record in panel) or 1)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    _legend(figure, _method_handles(records, foreground))
    return figure


def acceptance_by_position(records: Sequence[Record], foreground: str) -> Figure | None:
    """A line per method and member that proposes: the mean of its configurations."""
    records = [r for r in records if r["acceptance_by_position"] and _lines([r])]
    panels = _split(records, "dataset", "members")
    if not panels:
        return None
    known = {line[:3]: None for line in _lines(records)}  # by method, then by place
    handles = [_line_handle(*line, foreground) for line in known]
    figure, axes = _panels(panels, 2, legend_rows=-(-len(handles) // 3))
    longest = max(len(line) for p in panels.values() for *_, line in _lines(p))
    for axis, panel in zip(axes, panels.values(), strict=True):
        lines = _lines(panel)
        for order, (method, rank, _, line) in enumerate(lines):
            # Each line is thinner than the last, so that lines on top of one another stay visible.
            style = _line_style(method, rank, foreground, size=7.5 - 3.5 * order / len(lines))
            axis.plot(range(1, len(line) + 1), line, clip_on=False, **style)
        axis.set(xlim=(0.75, longest + 0.25), ylim=(0, 1), ylabel="accepted")
        axis.set_xticks(range(1, longest + 1, -(-longest // 8)))
    figure.supxlabel("position in what a member proposes in its turn", fontsize="medium")
    _legend(figure, handles, columns=3)
    return figure


FIGURES = {
    "speed_up": (
        speed_up,
        "Speed-up over the plain ensemble of the same members and data set. A bar is the mean over "
        "configurations (gamma, alpha and the like). The line on the bar is their range. A star "
        "marks a bar that uses a run that was continued.",
    ),
    "score_against_speed": (
        score_against_speed,
        "Score against speed. Each point is a run, with the 95% interval of its score.",
    ),
    "acceptance_by_position": (
        acceptance_by_position,
        "Share of judged proposals that were accepted, by position in a proposal. A line is the "
        "mean over the configurations that have this position.",
    ),
}


def _groups(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return dict(groups)


def _split(records: Sequence[Record], *keys: str) -> dict[str, list[Record]]:
    """The records of each panel, by its title.

    The panels differ in `keys`. They also differ in temperature, batch size and device where these
    vary, because no mean may mix them.
    """
    for key in ("temperature", "batch_size", "device"):
        if len({record[key] for record in records}) > 1:
            keys = (*keys, key)
    panels = defaultdict(list)
    for record in records:
        panels[", ".join(_title(key, record[key]) for key in keys)].append(record)
    return dict(list(panels.items())[:MAX_PANELS])


def _title(key: str, value: Any) -> str:
    if key == "members":
        return " + ".join(map(_short, value))
    # A no-break space keeps key and value on one line.
    return value if key == "dataset" else f"{key.replace('_', ' ')}\u00a0{value}"


def _panels(
    titles: Iterable[str], columns: int, height: float = 2.6, legend_rows: int = 2
) -> tuple[Figure, list[Axes]]:
    titles = list(titles)
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    total = min(rows * height, MAX_HEIGHT) + 0.2 * legend_rows
    figure = Figure(figsize=(WIDTH, total), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(textwrap.fill(title, 84 // columns, break_on_hyphens=False))
    for axis in axes[len(titles) :]:
        axis.remove()
    return figure, axes[: len(titles)]


def _draw_bars(axis: Axes, panel: Sequence[Record], foreground: str, is_narrow: bool) -> None:
    datasets = list(dict.fromkeys(record["dataset"] for record in panel))
    methods = _methods(panel)
    width = min(0.8 / len(methods), 0.25)
    for (dataset, method), records in _groups(panel, "dataset", "method").items():
        offset = (methods.index(method) - (len(methods) - 1) / 2) * width
        x = datasets.index(dataset) + offset
        values = [record["speed_up"] for record in records]
        mean, low, high = np.mean(values), min(values), max(values)
        star = "*" if any(record["speed_up_parts"] > 1 for record in records) else ""
        color = COLORS.get(method, foreground)
        axis.bar(x, mean, width * 0.92, color=color)
        if high > low:
            axis.plot([x, x], [low, high], color=foreground, linewidth=1.2)
        # The number stands at the foot of the bar, because few ranges reach down to it.
        axis.annotate(f"{mean:.2f}{star}", (x, 0), xytext=(0, 4), textcoords="offset points",
                      ha="center", fontsize=8.5, color=_legible_on(color),
                      rotation=90 if is_narrow else 0)  # fmt: skip
    axis.axhline(1, color=foreground, linewidth=1, linestyle="--")
    axis.set_xticks(range(len(datasets)), datasets)
    axis.set_xlim(-0.6, len(datasets) - 0.4)
    axis.grid(visible=False, axis="x")


def _lines(panel: Sequence[Record]) -> list[tuple[str, int, str, list[float]]]:
    """For each line: method, the member's place and name, and the mean acceptance by position."""
    collected = defaultdict(list)
    for record in panel:
        shares = record["acceptance_by_position"]
        by_member = shares if isinstance(shares[0], list) else [shares]
        for rank, (name, line) in enumerate(zip(record["proposers"], by_member, strict=False)):
            collected[record["method"], rank, name].append(line)
    lines = []
    for key, of_configurations in collected.items():
        columns = (
            [s for s in shares if s is not None] for shares in zip_longest(*of_configurations)
        )
        # If no token was judged at a position, no later position has one.
        means = [float(np.mean(column)) for column in takewhile(bool, columns)]
        if means:
            lines.append((*key, means))
    methods = _methods(panel)
    return sorted(lines, key=lambda line: (methods.index(line[0]), line[1]))


def _line_style(method: str, rank: int, foreground: str, size: float = 6.0) -> dict[str, Any]:
    """A method has a colour; a member's place has dashes and a marker."""
    return {
        "color": COLORS.get(method, foreground),
        "linestyle": LINES[rank % len(LINES)],
        "linewidth": size / 2.5,
        "marker": MARKERS[rank % len(MARKERS)],
        "markersize": size,
    }


def _line_handle(method: str, rank: int, name: str, foreground: str) -> Line2D:
    style = _line_style(method, rank, foreground)
    return Line2D([], [], label=f"{method}: {_short(name)}", **style)


def _legible_on(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.42 else "#ffffff"


def _methods(records: Iterable[Record]) -> list[str]:
    present = {record["method"] for record in records}
    return [name for name in METHOD_ORDER if name in present] + sorted(present - {*METHOD_ORDER})


def _method_handles(records: Iterable[Record], foreground: str) -> list[Line2D]:
    return [
        Line2D([], [], marker="s", linestyle="", markersize=8, label=method,
               color=COLORS.get(method, foreground))
        for method in _methods(records)
    ]  # fmt: skip


def _legend(figure: Figure, handles: Sequence[Line2D], columns: int = 5) -> None:
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), columns),
        handletextpad=0.5,
        columnspacing=1.2,
    )


def _short(name: str) -> str:
    """A name of limited length. Its middle is left out, because models differ at both ends."""
    if len(name) <= MAX_NAME:
        return name
    half = MAX_NAME // 2
    return f"{name[: half - 1]}\u2026{name[-half:]}"
