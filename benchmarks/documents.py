"""The one JSON document that a benchmark writes, and how an unfinished one is continued.

This module knows the fields that all benchmarks of engines share. It knows no engine and no ratio.
"""

import json
import os
import subprocess
from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from repository import ROOT

# Settings that do not change what is measured. All others must be the same in a resumed run.
OF_THE_CALL = {
    "out",
    "trace",
    "resume",
    "time_limit",
    "engine_timeout",
    "engines_at_once",
    "preset",
    "runs",
}


class Document:
    """The document, which is saved to disk after every cell.

    Args:
        benchmark: the name of the program.
        args: its command line; `out` and `resume` are read here.
    """

    def __init__(self, benchmark: str, args: Namespace) -> None:
        self.out = args.out
        self.content = {
            "benchmark": benchmark,
            "date": now(),
            "device": None,
            "versions": None,
            "settings": settings_of(args),
            "configurations": [],
            "results": [],
        }
        if args.resume and args.out.exists():
            self._resume(json.loads(args.out.read_text()))

    def complete(self) -> None:
        """Add what can be computed from the rows so far."""

    def _resume(self, old: dict[str, Any]) -> None:
        if old["settings"] != self.content["settings"]:
            changed = sorted(
                key
                for key, value in self.content["settings"].items()
                if old["settings"].get(key) != value
            )
            raise SystemExit(f"--resume: {self.out} was measured with other {', '.join(changed)}")
        done = [entry for entry in old["configurations"] if entry["status"] == "done"]
        runs = {entry["run"] for entry in done}
        rows = [row for row in old["results"] if row["run"] in runs]
        self.content = old | {"configurations": done, "results": rows}

    def is_done(self, run: str) -> bool:
        return any(entry["run"] == run for entry in self.content["configurations"])

    def start(self, run: str) -> dict[str, Any]:
        entry = {"run": run, "status": "running", "date": now(), "commit": commit()}
        self.content["configurations"].append(entry)
        return entry

    def skip(self, run: str, why: str) -> None:
        self.content["configurations"].append({"run": run, "status": "skipped", "error": why})

    def describe(self, entry: dict[str, Any], engine: dict[str, Any]) -> None:
        """Record what an engine reports. Device and versions must be the same for all engines."""
        where = {key: engine.pop(key) for key in ("device", "versions")}
        for key, value in where.items():
            if self.content[key] not in (None, value):
                raise SystemExit(f"{key}: {value}, but {self.out} has {self.content[key]}")
            self.content[key] = value
        entry |= engine

    def save(self) -> None:
        self.complete()
        if self.out:
            # The file on disk is always whole, even if the process is killed.
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=2) + "\n")
            os.replace(part, self.out)


def settings_of(args: Namespace) -> dict[str, Any]:
    """The settings as they look after a round trip through JSON."""
    settings = {key: value for key, value in vars(args).items() if key not in OF_THE_CALL}
    return json.loads(json.dumps(settings | {"models": None}, default=str))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of this checkout. A `+` behind it marks changed files. None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
