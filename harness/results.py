"""The run directory: the resolved configuration, `samples.jsonl` and `summary.json`.

Knows the form of the files; computes no score.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError


class RunDirectory:
    """A directory that one run writes and nothing else does.

    Raises (on construction and by `create`): ConfigError, if a run is there already or the
    directory cannot be made. Nothing is written before `create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples = self.path / "samples.jsonl"
        if self.samples.exists():
            raise self._taken()
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(
                f"save_path: '{self.path}' cannot be made, '{nearest}' is no folder that can be "
                "written; choose another"
            )

    def create(self, config_yaml: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self.samples.touch(exist_ok=False)
        except FileExistsError:  # by another run, since this one was constructed
            raise self._taken() from None
        self._write("config.yaml", config_yaml)

    def append_sample(self, sample: Mapping[str, Any]) -> None:
        """One line, on disk before the next: a run that dies keeps what it had."""
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(_line(sample))

    def read_samples(self) -> list[dict[str, Any]]:
        """All samples, in the order of the data set."""
        with self.samples.open(encoding="utf-8") as file:
            return sorted((json.loads(line) for line in file), key=lambda s: s["index"])

    def write_scores(self, samples: list[dict[str, Any]]) -> None:
        """Replace the samples by the scored ones, at once or not at all."""
        self._write("samples.jsonl", "".join(map(_line, samples)))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"save_path: '{self.path}' already holds a run; choose another or remove it"
        )

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def _line(sample: Mapping[str, Any]) -> str:
    # In ASCII: a model's text may hold what UTF-8 cannot, and what other readers take for the end
    # of a line.
    return json.dumps(sample) + "\n"


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns, for the end of a run."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
