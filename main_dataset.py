"""Runs a decoding method over a data set: `python main_dataset.py method=cd`.

Hydra reads `configs/`; `harness.run` does the work.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.command import call
from harness.errors import REPORTED, one_line
from harness.run import run
from harness.sweep import ListJobs, list_jobs
from harness.sweep import run_job as run_sweep_job
from repository import ROOT, search_path

FOLDER = "save_path"


@hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="default")
def run_job(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        if hydra_config.mode == RunMode.MULTIRUN:
            # Each job has its own process: it leaves nothing behind and cannot stop the others.
            run_sweep_job(config, hydra_config.runtime.output_dir, hydra_config.overrides.task)
        else:
            run(config, config.save_path)
    except REPORTED as error:
        # Exit here and not in `call`: Hydra adds its own lines to an exception that passes through
        # it.
        sys.exit(f"error: {error}")


def is_sweep(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def with_sweep_folder(arguments: list[str]) -> list[str]:
    """In a sweep `save_path` is the folder of all jobs; Hydra calls it `hydra.sweep.dir`."""
    made = []
    for argument in arguments:
        made.append(argument)
        name, _, value = argument.partition("=")
        if name == FOLDER and is_sweep(arguments):
            made.append(f"hydra.sweep.dir={os.path.expanduser(value)}")
    return made


def main() -> None:
    if not is_sweep(sys.argv[1:]):
        call(run_job, "the run directory keeps the finished samples")
        return
    sys.argv[1:] = with_sweep_folder(sys.argv[1:])
    # Launchers start processes that must find this file by its name alone.
    os.environ["PYTHONPATH"] = search_path()
    try:
        call(run_job, "every job keeps its finished samples")
    except Exception as error:  # a launcher's own error, such as a job that the cluster killed
        if not hasattr(ListJobs, "start"):
            raise  # no job was made yet
        print(f"error: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        list_jobs(ListJobs.sweep_dir, ListJobs.start)
        sys.exit(1)


if __name__ == "__main__":
    main()
