"""Runs a server's command, and ends it in bounded time: `python supervisor.py SECONDS COMMAND ...`.

vLLM's server (0.32) leaves three things to its parent:

- After its engine has died, it ends with status 0.
- If a client still reads a stream when the server must stop, it may wait for this client forever.
- Processes of its engine may live on.

Only the standard library is imported, because this process lives as long as the server.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

LEFT_S = 10
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """A server in a process group of its own.

    Args:
        command: the server's.
        seconds: how long the server may take to end once it is asked to.
    """

    def __init__(self, command: Sequence[str], seconds: int) -> None:
        self.seconds = seconds
        self.is_asked = self.is_killed = False
        # A signal that arrives before the handlers are there would leave the server alone.
        handled = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        self.server = subprocess.Popen(command, start_new_session=True, preexec_fn=_begin)
        for number in handled:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, self._kill)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)

    def run(self) -> int:
        """Wait for the server. Returns the status to exit with: 0 only if it was asked to end."""
        status = self.server.wait()
        signal.alarm(0)
        self._end_others()
        if self.is_killed:
            return _told(f"the server did not end within {self.seconds} s and was killed", 1)
        if status < 0:
            name = signal.Signals(-status).name
            if self.is_asked:
                return 128 - status
            return _told(f"the server was ended by {name}", 128 - status)
        if status == 0 and not self.is_asked:
            return _told("the server ended by itself; the lines above say why", 1)
        return status

    def _ask(self, number: int, _: object) -> None:
        if self.is_asked:  # the user does not want to wait
            self._kill()
            return
        self.is_asked = True
        signal.alarm(self.seconds)
        self.server.send_signal(signal.SIGTERM)

    def _kill(self, *_: object) -> None:
        self.is_killed = True
        self._signal_group(signal.SIGKILL)

    def _end_others(self) -> None:
        """Wait for processes that the server has started, then kill them."""
        end = time.monotonic() + LEFT_S
        while time.monotonic() < end and self._signal_group(0):
            time.sleep(0.1)
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> bool:
        """Whether there is a process that got the signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, number)
            return True
        return False


def _begin() -> None:
    """In the server's process, before it becomes the server."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    if sys.platform == "linux":
        # Nobody else would end the server if this process were killed. The server then ends its
        # engine, which does not notice the end of the server itself.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _told(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(Supervisor(sys.argv[2:], int(sys.argv[1])).run())
