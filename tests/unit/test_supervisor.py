"""The process that runs a server: what it tells, and that nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repository import ROOT

# The server says that it runs, and which process it has started.
SERVER = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
{begin}
print(child.pid, flush=True)
{then}
"""
ENDS = "signal.signal(signal.SIGTERM, lambda *_: (child.kill(), child.wait(), sys.exit(0)))"
STAYS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
FOREVER = "while True: time.sleep(1)"
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from harness import supervisor"
RUN = "supervisor.LEFT_S = 1; sys.exit(supervisor.Supervisor(sys.argv[2:], int(sys.argv[1])).run())"


def start(begin: str, then: str, seconds: int = 1) -> tuple[subprocess.Popen, int]:
    """The supervisor, and the process that its server has started."""
    server = [sys.executable, "-c", SERVER.format(begin=begin, then=then)]
    command = [sys.executable, "-c", f"{START}; {RUN}", str(ROOT), str(seconds), *server]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid: int) -> None:
    end = time.monotonic() + 20
    while runs(pid):
        assert time.monotonic() < end, "a process lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("then", "status", "line"),
    [
        ("sys.exit(0)", 1, "error: the server ended by itself; the lines above say why\n"),
        ("sys.exit(3)", 3, ""),
        (
            "import os; os.kill(os.getpid(), signal.SIGKILL)",
            128 + 9,
            "error: the server was ended by SIGKILL\n",
        ),
    ],
)
def test_a_server_that_ends_by_itself_is_a_fault(then, status, line):
    process, child = start("", then)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (status, line)
    assert_ends(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_end_may_do_so(number):
    process, child = start(ENDS, FOREVER, seconds=20)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "")
    assert_ends(child)


def test_a_server_that_does_not_end_in_time_is_killed_with_all_its_processes():
    process, child = start(STAYS, FOREVER, seconds=1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert told == "error: the server did not end within 1 s and was killed\n"
    assert_ends(child)


def test_whoever_asks_twice_does_not_want_to_wait():
    process, child = start(STAYS, FOREVER, seconds=1000)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert_ends(child)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_the_server_ends_with_its_supervisor():
    process, child = start("", f"import os; print(os.getpid(), flush=True)\n{FOREVER}")
    server = int(process.stdout.readline())
    process.kill()
    process.wait(timeout=30)
    assert_ends(server)
    os.kill(child, signal.SIGKILL)  # vLLM's engine looks after its parent; this child does not
