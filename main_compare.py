"""Runs an ensemble plain and by turns, and ends with one table: `python main_compare.py`.

The keys are those of `main_dataset.py` and apply to both runs; `method` is `ensemble` or `cd`.
`harness.comparison` makes the configurations of the runs; `reports.side_by_side` makes the table.
"""

import logging
import shlex
import sys
from pathlib import Path

from harness.command import call
from harness.comparison import make_configs
from harness.engine import forget_closed_engines
from harness.errors import REPORTED
from harness.run import run

CPU_NOTE = (
    "On a CPU, turns can be slower than the plain ensemble, above all with method=cd and all "
    "requests at once."
)


def compare() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        configs = make_configs(sys.argv[1:])
        folders = [Path(config.save_path) for config in configs]
        try:
            for number, config in enumerate(configs, start=1):
                print(f"[{number} of 2] method={config.method.name}", flush=True)
                run(config, config.save_path)
                forget_closed_engines()
        except KeyboardInterrupt:
            _say_how_to_continue(folders[0].parent)
            raise
        # Imported after the runs: pandas and scipy take seconds to import.
        from reports.runs import read_run
        from reports.side_by_side import side_by_side

        plain, turns = (read_run(folder, str(folder)) for folder in folders)
        print("", side_by_side(plain, turns), sep="\n")
        if plain.summary["device"] == "cpu":
            print("", CPU_NOTE, sep="\n")
    except REPORTED as error:
        sys.exit(f"error: {error}")


def _say_how_to_continue(folder: Path) -> None:
    given = [argument for argument in sys.argv[1:] if not argument.startswith("save_path=")]
    command = shlex.join(["python", "main_compare.py", *given, f"save_path={folder}"])
    print(f"the comparison has not ended; this continues it: {command}", file=sys.stderr)


if __name__ == "__main__":
    call(compare, "the folders keep the finished samples")
