"""Checks of a configuration that need neither a data set nor vLLM.

Both entry points use this module. Each check raises ConfigError with one line that begins with the
key.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

# Both torch and numpy take seeds below this limit; each example adds its index to the seed.
MAX_SEED = 2**31


def check_known(plain: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that there are these keys, and no others."""
    for key in plain:
        if key not in known:
            raise ConfigError(f"{key}: unknown key; known are {', '.join(known)}")
    for key in known:
        if key not in plain:
            raise ConfigError(f"{key}: the key is missing; see configs/")


def check_groups(plain: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Check that these keys hold groups; list an outer group before the groups inside it."""
    for key in keys:
        if not isinstance(group := value_of(plain, key), dict):
            raise ConfigError(f"{key}: {group!r} is not a group of keys; see configs/")


def check_flags(plain: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        # Hydra reads a word such as 'no' as a string, which Python would count as true.
        if not isinstance(value := value_of(plain, key), bool):
            raise ConfigError(f"{key}: {value!r} must be true or false")


def check_path(plain: Mapping[str, Any], key: str) -> None:
    if not isinstance(plain[key], str) or not plain[key]:
        raise ConfigError(f"{key}: {plain[key]!r} must be a path")


def check_seed(seed: object) -> None:
    if type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise ConfigError(f"seed: {seed!r} must be an integer from 0 to {MAX_SEED - 1}")


def check_writable(folder: Path) -> None:
    """Check that the run's own folder can be written: it exists, or it can be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"save_path: '{folder}' cannot be made, '{nearest}' is no folder that can be written; "
            "choose another"
        )


def value_of(plain: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part)
    return value
