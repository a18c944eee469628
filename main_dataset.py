"""Runs a decoding method over a data set: `python main_dataset.py method=cd`.

Thin: Hydra reads `configs/`, `harness.run` does the work.
"""

import os
import sys
from pathlib import Path

# Errors of the configuration are shown by `main` in one line; Hydra's own handler, which cuts
# the traceback of all others, is left out of the way.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.errors import ConfigError, one_line
from harness.run import run
from harness.sweep import run_job as run_sweep_job

ROOT = Path(__file__).resolve().parent
FOLDER = "save_path"


@hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="default")
def run_job(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        if hydra_config.mode == RunMode.MULTIRUN:
            # In a process of its own: it leaves nothing behind, and cannot stop the others.
            run_sweep_job(config, hydra_config.runtime.output_dir, hydra_config.overrides.task)
        else:
            run(config, config.save_path)
    except ConfigError as error:
        # Here and not in `main`: Hydra adds lines of its own to an exception that passes it.
        sys.exit(f"error: {error}")


def with_sweep_folder(arguments: list[str]) -> list[str]:
    """In a sweep `save_path` is the folder of all jobs, which Hydra has a name of its own for."""
    folders = [value for name, _, value in (a.partition("=") for a in arguments) if name == FOLDER]
    if not folders or not {"-m", "--multirun"} & set(arguments):
        return arguments
    return [*arguments, f"hydra.sweep.dir={folders[-1]}"]


def main() -> None:
    # Before anything is imported that reads the environment; torch, vLLM and the hub's client do.
    load_dotenv(ROOT / ".env")
    sys.argv[1:] = with_sweep_folder(sys.argv[1:])
    try:
        run_job()
    except MissingConfigException as error:
        options = [option for option in error.options or () if not option.startswith("_")]
        key, _, name = str(error.missing_cfg_file).rpartition("/")
        sys.exit(f"error: {key}: there is no '{name}'; choose one of {', '.join(options)}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted; the run directory keeps the finished samples", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
