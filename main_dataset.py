"""Runs a decoding method over a data set: `python main_dataset.py method=cd`.

Thin: Hydra reads `configs/`, `harness.run` does the work.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.command import ROOT, call
from harness.errors import ConfigError
from harness.run import run
from harness.sweep import run_job as run_sweep_job

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
        # Here and not in `call`: Hydra adds lines of its own to an exception that passes it.
        sys.exit(f"error: {error}")


def with_sweep_folder(arguments: list[str]) -> list[str]:
    """In a sweep `save_path` is the folder of all jobs, which Hydra has a name of its own for."""
    folders = [value for name, _, value in (a.partition("=") for a in arguments) if name == FOLDER]
    if not folders or not {"-m", "--multirun"} & set(arguments):
        return arguments
    return [*arguments, f"hydra.sweep.dir={folders[-1]}"]


def main() -> None:
    sys.argv[1:] = with_sweep_folder(sys.argv[1:])
    call(run_job, "the run directory keeps the finished samples")


if __name__ == "__main__":
    main()
