"""Random requests against a server of turns; each greedy answer is held against the plain ensemble.

    python scripts/soak.py [key=value ...] [-- arguments of `vllm serve`]
    python scripts/soak.py method=ensemble_chef method.model=EXPERT method.extra_model=OTHER
    python scripts/soak.py method=cd_chef duration_s=7200 tolerance=0.05 -- --max-num-seqs 32

The keys are those of `scripts/serve.py`, and those of `configs/soak.yaml`. The script ends with
status 0 only if nothing was wrong.
"""

import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.command import call
from harness.errors import REPORTED
from scripts.serve import split
from soak.run import Soak
from soak.settings import HOST, make_plan


def soak() -> None:
    # The checks set variables for their own process. The servers get those of before.
    environment = dict(os.environ)
    try:
        port = free_port()
        run = Soak(make_plan(*split(sys.argv[1:]), port), port, environment)
        tally = run.run()
    except REPORTED as error:
        sys.exit(f"error: {error}")
    print(tally.table())
    print(f"all numbers are in {run.folder / 'result.json'}")
    for fault in tally.faults:
        print(f"fault: {fault}")
    if tally.faults:
        sys.exit(1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
    else:
        call(soak, "the servers have been ended")
