"""Where this repository is: what relative paths count from, and where its packages are found."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def search_path() -> str:
    """PYTHONPATH for processes that are started in any folder."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
