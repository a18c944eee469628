"""Runs a decoding method over a data set: `python main_dataset.py method=cd`.

Thin: Hydra reads `configs/`, `harness.run` does the work.
"""

import logging
import os
import sys

# Errors of the configuration are shown by `main` in one line; Hydra's own handler, which cuts
# the traceback of all others, is left out of the way.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.errors import ConfigError, one_line
from harness.run import run

logger = logging.getLogger("main_dataset")


@hydra.main(version_base="1.3", config_path="configs", config_name="default")
def run_job(config: DictConfig) -> None:
    run(config, HydraConfig.get().runtime.output_dir)


def main() -> None:
    load_dotenv()
    try:
        run_job()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except MissingConfigException as error:
        options = [option for option in error.options or () if not option.startswith("_")]
        choose = f"; choose one of {', '.join(options)}" if options else ""
        sys.exit(f"error: {one_line(error).split(' Available options')[0]}{choose}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
