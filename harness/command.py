"""What the entries do around Hydra: the environment before, and errors in one line after."""

import os
import signal
import sys
from collections.abc import Callable

# Errors of the configuration are shown by `call` in one line; Hydra's own handler, which cuts the
# traceback of all others, is left out of the way.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

from dotenv import load_dotenv
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from harness.errors import one_line
from repository import ROOT


def call(job: Callable[[], None], interrupted: str) -> None:
    """Run a function that `hydra.main` has wrapped.

    Args:
        interrupted: what Ctrl-C leaves, to be said.
    """
    # Before anything is imported that reads the environment; torch, vLLM and the hub's client do.
    load_dotenv(ROOT / ".env")
    # What a cluster or a user stops ends as with Ctrl-C: nothing is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job()
    except MissingConfigException as error:
        options = [option for option in error.options or () if not option.startswith("_")]
        key, _, name = str(error.missing_cfg_file).rpartition("/")
        sys.exit(f"error: {key}: there is no '{name}'; choose one of {', '.join(options)}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
