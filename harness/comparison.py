"""A plain ensemble and the same ensemble by turns: two runs that differ in who proposes.

This module knows in which keys the two runs differ. `reports.side_by_side` makes their table.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from harness.errors import ConfigError
from repository import ROOT
from tasks.execution import find_missing_protections

BY_TURNS = {"ensemble": "ensemble_chef", "cd": "cd_chef"}
DEFAULTS = {
    "method": "ensemble",
    "dataset.name": "humaneval",
    "dataset.size": "20",
    # Some completions never end, and waiting for the last one takes longer than all others.
    "method.generate.max_tokens": "128",
}
FOLDER = "outputs/side-by-side/%Y-%m-%d_%H-%M-%S"
EXECUTE_CODE = "evaluate.execute_code"


def make_configs(arguments: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The configurations of the plain ensemble and of the same ensemble by turns.

    By default generated code is executed if the platform can confine it. The caller may decide
    otherwise.

    Args:
        arguments: `key=value`, with the keys of `main_dataset.py`, for both runs. `method` is the
            plain ensemble's. `save_path` is the folder that holds one folder for each run.

    Raises:
        ConfigError: an argument does not have this form, or the method has no turns.
        HydraException: a key does not exist.
    """
    keys = DEFAULTS | _parse(arguments)
    method = keys.pop("method")
    folder = Path(keys.pop("save_path", time.strftime(FOLDER))).expanduser()
    if method not in BY_TURNS:
        choices = ", ".join(BY_TURNS)
        raise ConfigError(
            f"method: '{method}' cannot be compared by turns; choose one of {choices}"
        )
    if EXECUTE_CODE not in keys:
        keys[EXECUTE_CODE] = "false" if find_missing_protections() else "true"
    overrides = [f"{key}={value}" for key, value in keys.items()]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return tuple(_config(name, overrides, folder) for name in (method, BY_TURNS[method]))


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


def _config(method: str, overrides: Sequence[str], folder: Path) -> DictConfig:
    config = compose("default", [*overrides, f"method={method}"])
    config.save_path = str(folder / method)
    return config
