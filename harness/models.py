"""What a model name means: a path, a folder under MODEL_PATH, or an id on the hub."""

import os
from pathlib import Path

from harness.errors import ConfigError


REPO_ROOT = Path(__file__).parent.parent


def model_root() -> Path:
    """The root of model folders: MODEL_PATH (environment or `.env`), by default `models`.

    A relative path counts from the repository's root, wherever a command is called.
    """
    return REPO_ROOT / Path(os.environ.get("MODEL_PATH") or "models").expanduser()


def resolve_model(name: object, key: str) -> str:
    """A name that vLLM and transformers can load.

    In this order: an existing path, a folder under MODEL_PATH, a hub id.

    Raises:
        ConfigError: the name is none of these; says where it looked. `key` is the
            configuration key that the name came from.
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
    if not (path / "config.json").is_file():
        raise ConfigError(f"{key}: '{path}' is not a model folder; it has no config.json")
    return str(path)


def _hub_problem(name: str) -> str | None:
    """Why the hub has no such model, as far as can be known here; None where it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "config.json")
    except HFValidationError:
        return "not a valid id there"
    except LocalEntryNotFoundError:
        return "not in its cache, and it cannot be reached"
    except Exception as error:  # the client raises whatever its transport raises
        return f"{type(error).__name__} for it there"
    return None
