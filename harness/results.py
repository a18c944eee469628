"""The run directory: configuration, `samples.jsonl` and `summary.json`; how a run is continued.

This module knows the form of the files. It computes no score.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.checks import check_writable
from harness.errors import ConfigError, RunError, one_line
from harness.proposals import Counts

# Keys that do not change any result: the parts of a run may differ in them.
KEYS_WITHOUT_EFFECT = ("save_path", "verbose")


class Progress(NamedTuple):
    """In how many parts a run was generated so far, and the counts of its proposed tokens."""

    parts: int = 0
    counts: Counts = {}


class RunDirectory:
    """A directory that one run writes and nothing else does.

    If the directory already holds a run of the same configuration, this run continues it. Nothing
    is written before `open`.

    Args:
        path: of the directory.
        config: the resolved configuration of the run.

    Raises:
        ConfigError: on construction and by `open`, if the directory
            - cannot be made,
            - holds a run of another configuration, or
            - is being written by another process.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.samples = self.path / "samples.jsonl"
        self._config = config
        self._file: IO[bytes] | None = None
        self._check_config()
        self._check_free()
        self._num_bytes = self._size()
        check_writable(self.path)

    def open(self) -> None:
        """Make the directory, and remove a line that a killed run left unfinished."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = self.samples.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"save_path: {one_line(error)}; choose another") from error
        self._lock(self._file)
        if self._size() != self._num_bytes:  # another run has written since construction
            raise self._taken()
        self._check_config()
        self._file.truncate(len(b"".join(self._whole_lines())))
        if not (self.path / "config.yaml").exists():
            self._write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(self._config))))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append_sample(self, sample: Mapping[str, Any]) -> None:
        """Write one line to disk before the next: a run that dies keeps what it had.

        Raises:
            RunError: the line cannot be written. Then no part of it is in the file.
        """
        size = self._size()
        left = memoryview(_line(sample).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(size)
            raise _not_written(self.samples, error) from error

    def read_samples(self) -> list[dict[str, Any]]:
        """All whole samples, in the order of the data set.

        Raises:
            ConfigError: a line is not one of ours.
        """
        samples = []
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                samples.append(json.loads(line))
                samples[-1]["index"], samples[-1]["prompt"], samples[-1]["elapsed_s"]
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"save_path: line {number} of '{self.samples}' is damaged; remove it"
                ) from error
        return sorted(samples, key=lambda sample: sample["index"])

    def write_scores(self, samples: list[dict[str, Any]]) -> None:
        """Replace the samples by the scored ones, all of them or none."""
        self._write("samples.jsonl", "".join(map(_line, samples)))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, which a run writes last; None if it is not written yet."""
        return self._read_json("summary.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def read_progress(self) -> Progress:
        """The progress that was last written."""
        return Progress(**(self._read_json(".progress.json") or {}))

    def write_progress(self, progress: "Progress") -> None:
        self._write(".progress.json", json.dumps(progress._asdict()))

    def _whole_lines(self) -> list[bytes]:
        if not self.samples.exists():
            return []
        lines = self.samples.read_bytes().splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _check_free(self) -> None:
        if self.samples.exists():
            with self.samples.open("rb") as file:
                self._lock(file)

    def _lock(self, file: IO[bytes]) -> None:
        """Lock the file until it is closed."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None

    def _size(self) -> int:
        return self.samples.stat().st_size if self.samples.exists() else 0

    def _check_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            if self._size():
                raise ConfigError(
                    f"save_path: '{self.path}' holds samples but no config.yaml, so their run is "
                    "unknown; choose another folder, or remove this one"
                )
            return
        try:
            there = OmegaConf.to_container(OmegaConf.load(file))
        except (YAMLError, OmegaConfBaseException, OSError) as error:
            raise ConfigError(f"save_path: cannot read '{file}': {one_line(error)}") from error
        if differences := _differences(there, self._config):
            raise ConfigError(
                f"save_path: '{self.path}' holds a run that differs in {', '.join(differences)}; "
                "choose another folder, or give the same values to continue it"
            )

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"save_path: another process writes '{self.path}'; wait for it or choose another"
        )

    def _read_json(self, name: str) -> Any:
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"save_path: '{file}' is damaged; remove it") from error

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _not_written(self.path / name, error) from error


def _not_written(file: Path, error: OSError) -> RunError:
    why = error.strerror or error
    return RunError(
        f"save_path: '{file}' cannot be written ({why}); what was written before is kept, and the "
        "same command continues the run"
    )


def _differences(there: Any, here: Any) -> list[str]:
    there, here = flatten(there), flatten(here)
    return [
        f"{key} ({there.get(key, 'not set')} there, {here.get(key, 'not set')} here)"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key) and key not in KEYS_WITHOUT_EFFECT
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted key; an empty group counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        is_group = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat


def _line(sample: Mapping[str, Any]) -> str:
    # ASCII only: a model's text may hold characters that UTF-8 cannot encode, or that other readers
    # take for the end of a line.
    return json.dumps(sample) + "\n"


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns, for the end of a run."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
