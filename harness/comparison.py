"""A plain ensemble and the same ensemble by turns: two runs, each in a process of its own.

Knows in which keys the two differ. The table of both is made by `reports.side_by_side`.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harness.command import ROOT
from harness.errors import ConfigError
from tasks.execution import find_missing_protections

BY_TURNS = {"ensemble": "ensemble_chef", "cd": "cd_chef"}
DEFAULTS = {"method": "ensemble", "dataset.name": "humaneval", "dataset.size": "20"}
FOLDER = "outputs/side-by-side/%Y-%m-%d_%H-%M-%S"
EXECUTE_CODE = "evaluate.execute_code"
# A terminal sends Ctrl-C to the run as well. Other signals are for this process alone, and are
# passed on after this time.
GRACE_S = 10


class Job(NamedTuple):
    """One of the two runs: its folder, and the command line of `main_dataset.py`."""

    folder: Path
    arguments: list[str]


def make_jobs(arguments: Sequence[str]) -> tuple[Job, Job]:
    """The plain ensemble, and the same by turns.

    Generated code is executed where the platform confines it, unless the caller decides.

    Args:
        arguments: `key=value`, keys of `main_dataset.py` for both runs. `method` is the plain
            ensemble's, `save_path` the folder of both runs.

    Raises:
        ConfigError: an argument is not of this form, or the method has no turns.
    """
    keys = DEFAULTS | _parse(arguments)
    method = keys.pop("method")
    folder = Path(keys.pop("save_path", time.strftime(FOLDER)))
    if method not in BY_TURNS:
        choices = ", ".join(BY_TURNS)
        raise ConfigError(
            f"method: '{method}' cannot be compared by turns; choose one of {choices}"
        )
    if EXECUTE_CODE not in keys:
        keys[EXECUTE_CODE] = "false" if find_missing_protections() else "true"
    return _job(folder, method, keys), _job(folder, BY_TURNS[method], keys)


def run(job: Job) -> int:
    """Run one of the two to its end; returns its exit status, 130 after Ctrl-C or SIGTERM."""
    command = [sys.executable, str(ROOT / "main_dataset.py"), *job.arguments]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(GRACE_S)
            process.terminate()
            return process.wait()


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    keys = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            raise ConfigError(
                f"'{argument}' is not of the form key=value; see configs/default.yaml"
            )
        keys[key] = value
    return keys


def _job(folder: Path, method: str, keys: dict[str, str]) -> Job:
    folder = folder / method
    # Hydra reads a value without quotes as more than text.
    path = "'" + str(folder).replace("'", "\\'") + "'"
    overrides = {**keys, "method": method, "save_path": path}
    return Job(folder, [f"{key}={value}" for key, value in overrides.items()])
