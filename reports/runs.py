"""Reads run directories, and finds the plain ensemble of each run.

This module knows the files of a run and what makes two runs comparable. It computes no statistics.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.errors import ConfigError, one_line
from harness.results import KEYS_WITHOUT_EFFECT, flatten
from tasks import TASKS

# A directory with any of these is a run. A job that ended early has the last two at most.
RUN_FILES = ("config.yaml", "samples.jsonl", "summary.json", "failure.json", "job.json")
# Configuration keys in which a run may differ from its plain ensemble:
# - who proposes,
# - the memory that is set aside,
# - how scores are made,
# - keys that do not belong to the method.
UNMATCHED_KEYS = {
    *KEYS_WITHOUT_EFFECT,
    "method.name",
    "method.draft_model",
    "method.gamma",
    "method.max_gamma",
    "method.turn_order",
    "method.llm.speculative_config",
    "method.llm.gpu_memory_utilization",
    "method.llm.kv_cache_memory_bytes",
    "seed",
}
UNMATCHED_GROUPS = ("evaluate.", "method.llm.speculative_config.")
# Fields of the summary that must be equal if both runs have one: speeds on other machines or builds
# are not comparable.
SAME_IN_SUMMARY = ("device", "versions")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Args:
        path: of the directory.
        name: the name in reports, which is the path below the results.
        config: the resolved configuration; empty if the run failed before it wrote one.
        summary: of a finished run, else None.
        scores: of the samples that are there, by example index; None if not evaluated.
        is_graded: whether the task gives several scores a sample, such as ROUGE. Such scores never
            count right answers, even if all of them are 0 or 1.
        overrides: the command line of a failed job of a sweep.
        error: one line, why the run failed or cannot be read; else None.
        unreadable: whether a file of the run cannot be read.
    """

    path: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    scores: Mapping[int, float | None] = field(default_factory=dict)
    is_graded: bool = False
    overrides: Sequence[str] = ()
    error: str | None = None
    unreadable: bool = False

    @property
    def status(self) -> str:
        if self.unreadable:
            return "unreadable"
        if self.summary is not None:
            return "finished"
        return "unfinished" if self.error is None else "failed"

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The configuration by dotted key, without null values and other tasks' keys."""
        flat = set_values(self.config)
        task = flat.get("dataset.name")
        # Only a user's own class knows its task name, and it may have inherited the name.
        if task not in TASKS:
            return flat
        own = f"task.{task}."
        return {k: v for k, v in flat.items() if not k.startswith("task.") or k.startswith(own)}

    @property
    def num_parts(self) -> int | None:
        """In how many parts a finished run was generated: more than one if it was continued."""
        return None if self.summary is None else self.summary.get("parts", 1)

    @property
    def method(self) -> str:
        return self.flat["method.name"]

    @property
    def family(self) -> str:
        """The method whose distribution this run draws from: cd, ensemble or large_model."""
        if self.method == "sd":
            return "large_model"
        return self.method.removesuffix("_sd").removesuffix("_chef")

    @property
    def is_plain(self) -> bool:
        proposers = ("method.draft_model", "method.llm.speculative_config")
        proposed = any(key == p or key.startswith(f"{p}.") for key in self.flat for p in proposers)
        return self.method == self.family and not proposed

    @property
    def members(self) -> list[str]:
        """Names of the models whose distributions decide, in the user's order."""
        method = self.config["method"]
        extra = method.get("amateur_model") or method.get("extra_model") or []
        others = [extra] if isinstance(extra, (str, Mapping)) else extra
        # A mapping says how a member is loaded, and names it.
        names = [other if isinstance(other, str) else other["model"] for other in others]
        return [method["model"], *names]

    @property
    def temperature(self) -> float:
        """The configured temperature; if unset, vLLM's default, 1."""
        return self.flat.get("method.generate.temperature", 1)


def set_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """The values by dotted key, without null values."""
    return {key: value for key, value in flatten(group).items() if value not in (None, {})}


def find_runs(directory: Path) -> list[Run]:
    """All runs at any depth below `directory`, in the order of their paths.

    `directory` itself may be a run.

    Raises:
        ConfigError: `directory` is not a directory, or it has no run in it.
    """
    if not directory.is_dir():
        raise ConfigError(f"'{directory}' is not a directory; give one that holds runs")
    found = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if not set(RUN_FILES).isdisjoint(files):
            run = read_run(Path(folder), os.path.relpath(folder, directory))
            # A folder with neither is not one of our runs. It may be of the evaluation harness.
            if run.error or run.config:
                found.append(run)
    if not found:
        raise ConfigError(
            f"no results in '{directory}': no folder below it holds {', '.join(RUN_FILES)}"
        )
    return found


def read_run(path: Path, name: str | None = None) -> Run:
    """The run in `path`. If a file cannot be read, the run's `error` says so.

    So one damaged run does not hide the others.
    """
    name = path.resolve().name if name in (None, ".") else name
    try:
        config = _read_config(path / "config.yaml")
        summary = _read_json(path / "summary.json")
        failure = _read_json(path / "failure.json") or {}
        job = _read_json(path / "job.json")
        if config and summary is not None:
            _check_summary(summary, path / "summary.json")
        scores, is_graded = {}, "scores" in (summary or {})
        for sample in iterate_samples(path):
            scores[sample["index"]] = sample.get("score")
            is_graded |= "scores" in sample
    except (ValueError, OSError) as error:
        return Run(path, name, error=one_line(error), unreadable=True)
    error = None if summary is not None else failure.get("error")
    if error is None and not (path / "config.yaml").exists():
        if job and not scores:
            error = "has not begun to generate, or was killed before; see log.txt"
            return Run(path, name, overrides=job.get("overrides", ()), error=error)
        return Run(path, name, error="config.yaml is missing", unreadable=True)
    overrides = failure.get("overrides", ())
    return Run(path, name, config, summary, scores, is_graded, overrides, error)


def iterate_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a run, in the order of the file; none if there is no file.

    The last line may be incomplete, because a run died or is still writing. It is then left out.

    Raises:
        ConfigError: another line is not JSON, or a line is JSON but not a sample.
    """
    file = path / "samples.jsonl"
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        torn = None
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise ConfigError(f"'{file}': line {torn} is not JSON; remove it")
            try:
                sample = json.loads(line)
            except json.JSONDecodeError:
                torn = number
                continue
            if not _is_sample(sample):
                raise ConfigError(f"'{file}': line {number} is no sample of a run; remove it")
            yield sample


def matching_key(run: Run) -> dict[str, Any]:
    """The values that are equal for two runs of the same ensemble and data."""
    key = {
        name: value
        for name, value in run.flat.items()
        if name not in UNMATCHED_KEYS and not name.startswith(UNMATCHED_GROUPS)
    }
    # One other model may be written as a name or as a list.
    key.pop("method.extra_model", None)
    return {**key, "family": run.family, "members": run.members}


def differing_keys(a: Run, b: Run) -> list[str]:
    """The configuration keys in which the runs are not comparable; none if they are comparable."""
    first, second = matching_key(a), matching_key(b)
    return sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))


def plain_runs(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs of the plain ensemble that `run` is compared with; nobody proposes in them.

    They have the same members, function, data and sampling parameters. For a plain run, the list
    includes the run itself.
    """
    if not run.config:
        return []
    return [
        other
        for other in runs
        if other.config and other.is_plain and _same_place(run, other)
        if not differing_keys(run, other)
    ]


def _same_place(a: Run, b: Run) -> bool:
    if a.summary is None or b.summary is None:
        return True
    return all(a.summary.get(key) == b.summary.get(key) for key in SAME_IN_SUMMARY)


def _is_sample(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and type(content.get("index")) is int
        and isinstance(content.get("task_id"), str)
        and isinstance(content.get("token_ids"), list)
        and (content.get("score") is None or _is_number(content["score"]))
    )


def _check_summary(summary: Mapping[str, Any], path: Path) -> None:
    if not _is_number(summary.get("tokens_per_second")):
        raise ConfigError(f"'{path}' has no number at tokens_per_second; remove it")
    if summary.get("score") is not None and not _is_number(summary["score"]):
        raise ConfigError(f"'{path}' has neither a number nor null at score; remove it")
    if type(summary.get("parts", 1)) is not int:
        raise ConfigError(f"'{path}' has no integer at parts; remove it")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise ConfigError(f"'{path}' is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' does not hold a JSON object")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # from YAML or OmegaConf, whose errors share no base class
        raise ConfigError(f"'{path}' cannot be read: {one_line(error)}") from error
    flat = set_values(config) if isinstance(config, dict) else {}
    # Without these keys it is not a configuration of ours.
    is_ours = {"method.name", "method.model", "dataset.name"} <= flat.keys()
    return config if is_ours else {}
