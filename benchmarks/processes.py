"""One process per engine, started together and measured one after another.

This module knows the lines that such a process writes. It knows neither cells nor ratios.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Self

from benchmarks.documents import Document
from repository import search_path

POLL_S = 0.2


class EngineProcess:
    """An engine in a process of its own, which starts at once.

    The end of the process frees all its memory, and an error in it breaks no other run. The process
    begins to measure when the caller asks for its second line.

    Args:
        command: the program. It gets two paths as arguments: of its request, and of its lines.
        request: what it reads, as JSON.
        timeout: seconds to start, and to measure.
        root: a folder for its files.
        message: makes the line that tells the process to measure. It is called at that time.
    """

    def __init__(
        self,
        command: Sequence[str],
        request: dict[str, Any],
        timeout: float,
        root: Path,
        message: Callable[[], str] = str,
    ) -> None:
        self.timeout, self.message = timeout, message
        folder = Path(tempfile.mkdtemp(dir=root))
        file, self.path = folder / "request.json", folder / "lines.jsonl"
        file.write_text(json.dumps(request, default=str))
        self.path.touch()
        # vLLM writes to the standard output, which is for the document. The process gets its own
        # session, so that vLLM's further processes end with it.
        self.process = subprocess.Popen(
            [*command, str(file), str(self.path)],
            env={**os.environ, "PYTHONPATH": search_path()},
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if not self.process.stdin.closed:
            # Kill the group even if the process has ended: its child processes may still run.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()  # closes its input

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines that the process writes, as they come.

        The first line is `engine`. It comes when the engine is ready. The process measures only
        after the caller has taken this line. An `error` is always the last line.
        """
        deadline, rest = time.monotonic() + self.timeout, ""
        with self.path.open() as file:
            while True:
                ended = self.process.poll() is not None
                *whole, rest = (rest + file.read()).split("\n")
                for content in map(json.loads, whole):
                    yield content
                    if "error" in content:
                        return
                    if "engine" in content:
                        self._let_it_measure()
                        deadline = time.monotonic() + self.timeout
                if ended:
                    break
                if time.monotonic() > deadline:
                    yield {"error": f"took more than {self.timeout:g} s"}
                    return
                time.sleep(POLL_S)
        if self.process.returncode:
            yield {"error": f"the engine's process ended with {self.process.returncode}"}

    def _let_it_measure(self) -> None:
        with suppress(BrokenPipeError):  # if the process has died, the next poll finds that
            self.process.stdin.write(f"{self.message()}\n".encode())
            self.process.stdin.flush()


def measure_all(
    runs: Sequence[str],
    args: Namespace,
    document: Document,
    start: Callable[[str, Path], EngineProcess],
    shown: Callable[[dict[str, Any]], str],
) -> None:
    """Measure the runs that the document lacks, and save it.

    Args:
        args: `engines_at_once` and `time_limit` are read here.
        start: starts the process of a run, whose files go below the path.
        shown: what is printed of a row.
    """
    # A plain `kill` must end the engines' processes as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = time.monotonic()
    left = [run for run in runs if not document.is_done(run)]
    with tempfile.TemporaryDirectory() as root:
        for first in range(0, len(left), args.engines_at_once):
            group = left[first : first + args.engines_at_once]
            if args.time_limit and time.monotonic() - started > args.time_limit:
                for run in group:
                    document.skip(run, f"after {args.time_limit:g} s")
                continue
            measure_group(group, Path(root), document, start, shown)
    document.save()


def measure_group(
    runs: Sequence[str],
    root: Path,
    document: Document,
    start: Callable[[str, Path], EngineProcess],
    shown: Callable[[dict[str, Any]], str],
) -> None:
    """Start the engines of all runs. When all are ready, measure one after another."""
    with ExitStack() as stack:
        engines = [stack.enter_context(start(run, root)) for run in runs]
        lines = [engine.lines() for engine in engines]
        silent = {"error": "the engine's process ended without a word"}
        firsts = [next(of_engine, silent) for of_engine in lines]
        for run, engine, first, others in zip(runs, engines, firsts, lines, strict=True):
            record(run, chain([first], others), document, shown)
            engine.end()  # frees its memory before the next engine is measured


def record(
    run: str,
    lines: Iterator[dict[str, Any]],
    document: Document,
    shown: Callable[[dict[str, Any]], str],
) -> None:
    entry, started = document.start(run), time.monotonic()
    for content in lines:
        if "engine" in content:
            document.describe(entry, content["engine"])
        elif "row" in content:
            document.content["results"].append(content["row"])
            document.save()
            print(shown(content["row"]), flush=True)
        elif "error" in content:
            entry |= {"status": "failed", "error": content["error"]}
            print(f"{run}: {content['error']}", flush=True)
        else:
            entry |= content
            for asked in content.get("refused", []):
                print(f"{run}: refuses {json.dumps(asked)}", flush=True)
    if entry["status"] == "running":
        entry["status"] = "done"
    entry["seconds"] = round(time.monotonic() - started, 1)
    document.save()
