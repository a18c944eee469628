"""What the entry points do around Hydra: they set the environment and show errors in one line."""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# `call` shows configuration errors in one line. Hydra's own handler cuts the traceback of all other
# errors, so it is switched off.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from harness.errors import one_line
from repository import read_env


def call(job: Callable[[], None], interrupted: str) -> None:
    """Run a function that `hydra.main` has wrapped.

    Args:
        interrupted: what stays on disk after Ctrl-C; it is printed then.
    """
    # torch, vLLM and the hub's client read the environment when they are imported, so this comes
    # first.
    read_env()
    # A cluster or a user may stop the run with SIGTERM. It then ends as with Ctrl-C, so that no
    # process is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lines: list[object] = []
    # What is registered first is called last.
    atexit.register(_end_here, lines)
    try:
        job()
    except MissingConfigException as error:
        options = [option for option in error.options or () if not option.startswith("_")]
        key, _, name = str(error.missing_cfg_file).rpartition("/")
        sys.exit(f"error: {key}: there is no '{name}'; choose one of {', '.join(options)}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")
    except AssertionError as error:
        # Hydra asserts what it makes of some words, such as `+=`.
        *_, last = traceback.extract_tb(error.__traceback__)
        if Path(hydra.__file__).parent not in Path(last.filename).parents:
            raise
        sys.exit(f"error: {' '.join(sys.argv[1:])}: Hydra cannot read this; write KEY=VALUE")
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:
        lines.append(error.code)
        raise


def _end_here(lines: list[object]) -> None:
    """Keep the line that Python has just printed the last one.

    If an engine has failed, triton would list on some thirty lines what is left of it while Python
    destroys its modules.
    """
    if any(isinstance(line, str) for line in lines):
        sys.stdout.flush()
        os._exit(1)
