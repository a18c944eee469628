"""A server's processes: started, watched and ended in bounded time."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from harness.errors import RunError, shortened

# What the supervisor takes at most, after the time that it gives the server.
MORE_S = 30


class Process:
    """A server that has been started. Use it as a context: it is ended at last.

    Args:
        name: of the server, in messages.
        command: with the supervisor.
        environment: of the process.
        url: at which the server will answer.
        log: what the server prints.
        end_s: seconds that the supervisor gives the server to end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        url: str,
        log: Path,
        end_s: float,
    ) -> None:
        self.name, self.url, self.log, self.end_s = name, url, log, end_s
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=dict(environment)
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_alive():
            self.end()

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until_it_answers(self, seconds: float) -> None:
        """
        Raises:
            RunError: the server ends, or does not answer in this time.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.is_alive():
                raise RunError(f"the {self.name} server does not start: {self.last_line()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise RunError(
            f"the {self.name} server does not answer {seconds:g} s after its start; raise start_s, "
            f"or see {self.log}"
        )

    def end(self) -> str | None:
        """End the server. Returns what was wrong with that, in one line."""
        everything = psutil.Process(self.pid).children(recursive=True)
        self.process.terminate()
        try:
            status = self.process.wait(self.end_s + MORE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        _, left = psutil.wait_procs(everything, timeout=5)
        for process in left:
            process.kill()
        if left:
            return f"the {self.name} server left {len(left)} processes behind"
        if status != 0:
            return f"the {self.name} server ended with status {status}: {self.last_line()}"
        return None

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"{shortened(last)} (all in {self.log})"
