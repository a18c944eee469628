"""What a model name means: a path, a folder under MODEL_PATH, or an id on the hub.

This module reads a model's config.json, not its weights.
"""

import json
from pathlib import Path

from harness.errors import ConfigError
from repository import model_root


def resolve_model(name: object, key: str) -> str:
    """A name that vLLM and transformers can load.

    The function looks for an existing path, then a folder under MODEL_PATH, then a hub id.

    Args:
        key: the configuration key that the name came from.

    Raises:
        ConfigError: the name is none of these; the error says where the function looked.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{key}: {name!r} is not a model; give a path, a folder or a hub id")
    path = Path(name).expanduser()
    if path.exists():
        return _checked_folder(path, key)
    below_root = model_root() / name
    if below_root.exists():
        return _checked_folder(below_root, key)
    problem = _hub_problem(name)
    if problem is None:
        return name
    raise ConfigError(
        f"{key}: no model '{name}': looked for the path '{path}', for the folder '{below_root}' "
        f"(under MODEL_PATH) and on the hub ({problem}); prepare_models.py makes the default models"
    )


def _checked_folder(path: Path, key: str) -> str:
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{key}: '{path}' is not a model folder; it has no config.json")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}: '{file}' is not JSON ({error}); mend it") from error
    return str(path)


def _hub_problem(name: str) -> str | None:
    """Why the hub has no such model, as far as this machine can tell; None if the hub has it."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        # One question only: a download keeps retrying when the hub cannot be reached.
        return None if file_exists(name, "config.json") else "it has no such model"
    except HFValidationError:
        return "not a valid id there"
    except Exception as error:  # the client raises whatever its transport raises
        return f"not in its cache, and asking for it failed with {type(error).__name__}"
