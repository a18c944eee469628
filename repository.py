"""Where this repository is, its `.env`, and where its packages and models are found."""

import os
from pathlib import Path

from dotenv import load_dotenv

ROOT = Path(__file__).resolve().parent


def search_path() -> str:
    """PYTHONPATH for processes that are started in any folder."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def read_env() -> None:
    """Set the variables of `.env` that the environment does not set."""
    load_dotenv(ROOT / ".env")


def model_root() -> Path:
    """The root of model folders: MODEL_PATH, by default `models`.

    A relative path starts at the repository's root, wherever the command is called.
    """
    return ROOT / Path(os.environ.get("MODEL_PATH") or "models").expanduser()
