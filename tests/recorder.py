"""Keeps the names of tests that pass (`--record`), for scripts/compatibility.py."""

import json
from pathlib import Path

import pytest
import torch


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        metavar="FILE",
        type=Path,
        help="keep the names of tests that pass, for scripts/compatibility.py",
    )


def start(config: pytest.Config) -> None:
    # With pytest-xdist, the main process gets the reports of all workers.
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


class Recorder:
    """Adds the tests that pass to a JSON file: by name, where they ran. A failure removes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        if report.failed:
            self.outcomes[name] = False
        elif report.when == "call" and report.passed:
            self.outcomes.setdefault(name, True)

    def pytest_sessionfinish(self) -> None:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        where = "GPU" if torch.cuda.is_available() else "CPU"
        self.path.write_text(merged(known, self.outcomes, where))


def merged(known: dict[str, list[str]], outcomes: dict[str, bool], where: str) -> str:
    """The file's new text."""
    for name, has_passed in outcomes.items():
        places = {*known.get(name, ())} - {where} | ({where} if has_passed else set())
        known[name] = sorted(places)
    return text_of({name: places for name, places in known.items() if places})


def text_of(record: dict[str, list[str]]) -> str:
    """A record as the file has it: one test a line, in the order of their names."""
    lines = [f"{json.dumps(name)}: {json.dumps(record[name])}" for name in sorted(record)]
    return "{\n" + ",\n".join(lines) + "\n}\n"
