"""Servers of tests: real processes, started by `scripts/serve.py`."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from repository import ROOT

# One server takes about a minute of one core, most of it for imports. Tests of other files may run
# beside it.
START_S, END_S = 600, 60
# vLLM binds the threads of every engine to the same cores.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SERVER_ARGS = ("--host", "127.0.0.1", "--gpu-memory-utilization", "0.05")


@contextlib.contextmanager
def serving(servers: Mapping[str, tuple[Sequence[str], Sequence[str]]], folder: Path) -> Iterator:
    """The URLs of servers by name, once all of them answer.

    Args:
        servers: by name, the keys of `scripts/serve.py` and the arguments of vLLM's server.
        folder: for their logs.
    """
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(starting(name, keys, server_args, folder / f"{name}.log"))
            for name, (keys, server_args) in servers.items()
        ]
        for server in started:
            server.wait_until_it_answers()
        yield {server.name: server.url for server in started}


class Server:
    def __init__(self, name: str, url: str, log: Path, process: subprocess.Popen) -> None:
        self.name, self.url, self.log, self.process = name, url, log, process

    def wait_until_it_answers(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.last_words()
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(self.last_words())

    def last_words(self) -> str:
        return self.log.read_text()[-4000:]


@contextlib.contextmanager
def starting(
    name: str, keys: Sequence[str], server_args: Sequence[str], log: Path
) -> Iterator[Server]:
    """A server that has been started. It is ended at last."""
    port = free_port()
    words = [*keys, "--", *SERVER_ARGS, "--port", str(port), *server_args]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/serve.py"), *words],
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT},
        )
    try:
        yield Server(name, f"http://127.0.0.1:{port}", log, process)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
