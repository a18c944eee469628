"""The facts about vLLM on the page docs/upstream.md, each with the name of its test.

This module reads the page. It knows no vLLM.
"""

import re
from typing import NamedTuple

from repository import ROOT

# | fact | in | test |
ROW = re.compile(r"^\| (.+) \| (.+) \| `(test_\w+)` \|$", re.MULTILINE)


class Fact(NamedTuple):
    """One row.

    Args:
        text: what the test shows when it fails.
        files: the files whose code relies on the fact.
        test: the name of the test.
    """

    text: str
    files: tuple[str, ...]
    test: str


def read_facts(page: str) -> list[Fact]:
    """The rows of all tables of facts."""
    return [
        Fact(text, tuple(re.findall(r"`([^`]+)`", files)), test)
        for text, files, test in ROW.findall(page)
    ]


FACTS = read_facts((ROOT / "docs/upstream.md").read_text(encoding="utf-8"))
