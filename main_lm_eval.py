"""Runs lm-evaluation-harness tasks: `python main_lm_eval.py method=cd_chef tasks=[arc_easy]`.

Hydra reads `configs/lm_eval.yaml`; `harness.lm_eval_run` does the work.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from harness.command import call
from harness.errors import REPORTED, ConfigError
from harness.lm_eval_run import run
from repository import ROOT


@hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="lm_eval")
def run_job(config: DictConfig) -> None:
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigError("--multirun: sweeps are main_dataset.py's; call this once a run")
        run(config, config.save_path)
    except REPORTED as error:
        # Exit here and not in `call`: Hydra adds its own lines to an exception that passes through
        # it.
        sys.exit(f"error: {error}")


def main() -> None:
    call(run_job, "nothing is kept")


if __name__ == "__main__":
    main()
