"""What reports say of each run: its settings by column and its results as numbers.

This module knows how results follow from a run's files and from its plain ensembles. It shows
nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports import statistics
from reports.runs import Run, matching_key, plain_runs

METHOD_ORDER = (
    "large_model",
    "sd",
    "cd",
    "cd + draft",
    "cd_sd",
    "cd_chef",
    "ensemble",
    "ensemble + draft",
    "ensemble_sd",
    "ensemble_chef",
)
# Configuration keys that have their own columns, or that say nothing about a result.
LEFT_OUT = {
    "method.name",
    "method.model",
    "method.amateur_model",
    "method.extra_model",
    "dataset.name",
    "save_path",
    "verbose",
}
SHORTER = {
    "method.generate.temperature": "temperature",
    "method.llm.ensemble_fn": "ensemble_fn",
    "method.llm.ensemble_target": "ensemble_target",
}
MODEL_KEYS = ("method.draft_model", "method.llm.speculative_config.model")
# The values that were resolved when the run ended; they say more than the configuration.
RESOLVED = ("gamma", "max_gamma", "turn_order")


def make_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One record per run that has a configuration, in a fixed order.

    A record holds `settings` (what was run, by column name) and the results by name. A missing
    result is None.
    """
    known = sorted((run for run in runs if run.config), key=_sort_key)
    names = short_names(name for run in known for name in _models(run))
    return [_record(run, known, names) for run in known]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path or hub id; the whole name if two last parts are the same."""
    names = set(names)
    last = {name: name.rstrip("/").rpartition("/")[2] for name in names}
    short_forms = list(last.values())
    return {name: short if short_forms.count(short) == 1 else name for name, short in last.items()}


def method_label(run: Run) -> str:
    drafted = run.method in ("cd", "ensemble") and not run.is_plain
    return f"{run.method} + draft" if drafted else run.method


def speed_up(run: Run, baselines: Sequence[Run]) -> float | None:
    """Speed of a finished run over the mean speed of `baselines`; None without a baseline."""
    speeds = [plain.summary["tokens_per_second"] for plain in baselines]
    if run.summary is None or not sum(speeds):
        return None
    return run.summary["tokens_per_second"] * len(speeds) / sum(speeds)


def _record(run: Run, runs: Sequence[Run], names: Mapping[str, str]) -> dict[str, Any]:
    summary = run.summary or {}
    scores = [score for score in run.scores.values() if score is not None]
    score = sum(scores) / len(scores) if scores else None
    interval = statistics.score_interval(scores, run.is_graded)
    if run.summary is not None:
        recorded = summary.get("score")
        # The interval is for the mean of the samples' scores. The run's score may be another one.
        if None in (score, recorded) or abs(score - recorded) > 1e-6:
            interval = None
        score = recorded
    low, high, kind = interval or (None, None, None)
    baselines = [plain for plain in plain_runs(run, runs) if plain.summary is not None]
    ratio = speed_up(run, baselines)
    return {
        "run": run.name,
        "status": run.status,
        "settings": _settings(run, names),
        "method": method_label(run),
        "members": [names[member] for member in run.members],
        "proposers": _proposers(run, names),
        "dataset": run.flat["dataset.name"],
        "temperature": run.temperature,
        "batch_size": run.flat.get("batch_size"),
        "device": summary.get("device"),
        "plain": run.is_plain,
        "n": summary.get("num_samples", len(run.scores)),
        "metric": summary.get("metric"),
        "score": score,
        "score_low": low,
        "score_high": high,
        "score_interval": kind,
        "scores": summary.get("scores") or {},
        "tokens_per_second": summary.get("tokens_per_second"),
        "parts": run.num_parts,
        "speed_up": ratio,
        # The largest number of parts among the runs that the speed-up uses.
        "speed_up_parts": ratio and max(r.num_parts for r in [run, *baselines]),
        "tokens_per_cycle": summary.get("tokens_per_cycle"),
        "acceptance": summary.get("acceptance"),
        "acceptance_by_position": summary.get("acceptance_by_position"),
    }


def _settings(run: Run, names: Mapping[str, str]) -> dict[str, Any]:
    settings = {
        "data set": run.flat["dataset.name"],
        "method": method_label(run),
        "members": " + ".join(names[member] for member in run.members),
    }
    for key, value in run.flat.items():
        if key not in LEFT_OUT:
            settings[_column(key)] = names[value] if key in MODEL_KEYS else value
    settings["temperature"] = run.temperature
    if run.is_plain:
        settings.pop("gamma", None)  # for a draft model, and this run has none
    summary = run.summary or {}
    settings |= {key: summary[key] for key in RESOLVED if summary.get(key) is not None}
    if settings.get("gamma") != "auto":
        settings.pop("max_gamma", None)
    settings["device"] = summary.get("device")
    versions = summary.get("versions") or {}
    settings["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items()) or None
    return settings


def _proposers(run: Run, names: Mapping[str, str]) -> list[str]:
    """Which model each entry of `acceptance` belongs to."""
    if run.is_plain:
        return []
    if run.method in ("sd", "cd", "ensemble"):
        drafts = [names[run.flat[key]] for key in MODEL_KEYS if key in run.flat]
        return drafts or ["draft"]
    return [names[member] for member in run.members]


def _models(run: Run) -> list[str]:
    return [*run.members, *(run.flat[key] for key in MODEL_KEYS if key in run.flat)]


def _column(key: str) -> str:
    return SHORTER.get(key, key.removeprefix("method."))


def _sort_key(run: Run) -> tuple:
    key = {k: v for k, v in matching_key(run).items() if not k.startswith("dataset.")}
    shared = sorted((k, _sortable(v)) for k, v in key.items())
    gamma = run.flat.get("method.gamma", 0)
    gammas = gamma if isinstance(gamma, list) else [gamma]
    label = method_label(run)
    place = METHOD_ORDER.index(label) if label in METHOD_ORDER else len(METHOD_ORDER)
    data = (run.flat["dataset.name"], run.members[0], run.family, run.members)
    settings = (run.temperature, shared, (place, label), gammas, run.flat.get("seed", 0))
    return _sortable((*data, *settings, run.name))


def _sortable(value: Any) -> tuple:
    """A key that sorts values of any types: null, numbers, text, lists, all others."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return (1, value)
    if isinstance(value, str):
        return (2, value)
    if isinstance(value, list | tuple):
        return (3, [_sortable(item) for item in value])
    return (4, json.dumps(value, sort_keys=True, default=str))
