"""The README is short, and its links work; the site of docs/ has a check of its own.

`scripts/docs.sh` builds the site strictly. The README is not part of the site.
"""

import re
from pathlib import Path

import pytest

from repository import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
MAX_README_BYTES = 12_000

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src|srcset)=\"([^\"]+)\"")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """The targets of a page's links and pictures that are files of this repository."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = (first or second for first, second in LINK.findall(text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """The ids that code hosts and the site give to a page's headings."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_one_screen_and_a_few_tables() -> None:
    assert len(README.read_bytes()) <= MAX_README_BYTES


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, and there is no such file"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    """`benchmarks/results/...` and similar files, which the site cannot link to."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:benchmarks|scripts|tests|configs|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"


def test_every_page_is_in_the_readme_or_the_reference() -> None:
    named = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    pages = {page for page in DOCS if page.parent.name != "api" and page.name != "index.md"}
    assert pages <= named
