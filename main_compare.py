"""Runs an ensemble plain and by turns, and ends with one table: `python main_compare.py`.

Keys are those of `main_dataset.py`, for both runs; `method` is `ensemble` or `cd`. Thin:
`harness.comparison` runs, `reports.side_by_side` makes the table.
"""

import shlex
import sys
from pathlib import Path

from harness import comparison
from harness.command import call
from harness.errors import ConfigError

CPU_NOTE = (
    "On a CPU turns can lose: contrastive decoding by turns (method=cd) had 0.8 of the plain speed "
    "with all requests at once."
)


def compare() -> None:
    try:
        jobs = comparison.make_jobs(sys.argv[1:])
        for number, job in enumerate(jobs, start=1):
            print(f"[{number} of 2] method={job.folder.name}", flush=True)
            if status := comparison.run(job):
                _say_how_to_continue(job.folder.parent)
                sys.exit(status)
        # After the runs: pandas and scipy take seconds.
        from reports.runs import read_run
        from reports.side_by_side import side_by_side

        plain, turns = (read_run(job.folder, str(job.folder)) for job in jobs)
        print("", side_by_side(plain, turns), sep="\n")
        if plain.summary["device"] == "cpu":
            print("", CPU_NOTE, sep="\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")


def _say_how_to_continue(folder: Path) -> None:
    given = [argument for argument in sys.argv[1:] if not argument.startswith("save_path=")]
    command = shlex.join(["python", "main_compare.py", *given, f"save_path={folder}"])
    print(f"the comparison has not ended; this continues it: {command}", file=sys.stderr)


if __name__ == "__main__":
    call(compare, "the folders keep the finished samples")
