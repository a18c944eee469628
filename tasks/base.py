"""What a task is: its examples, how a completion is cut, and how it is scored.

Knows no model, no engine, no file of a run, and no single data set. A task never generates.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

NAMED_SIZES = {"tiny": 5, "small": 200, "full": None}


@dataclass(frozen=True)
class Example:
    """One problem of a data set, with everything that its score needs.

    `prompt` is plain text and what `samples.jsonl` shows. Where `messages` is not empty, the model
    is given these chat turns (`{"role", "content"}`) through its chat template instead. The
    reference stands in the example, never in a list beside it, so that no re-ordering or selection
    can part the two.
    """

    index: int
    task_id: str
    prompt: str
    reference: Any
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set with its scoring. Subclasses add options of their own as dataclass fields.

    Every task accepts the options below, so that one configuration serves all of them; a task for
    which an option has no meaning ignores it.

    use_fewshot: put worked examples before each problem.
    chat: give the problem as chat messages instead of plain text.
    execute_code: allow the score to run generated code.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # the name under which `aggregate` is reported, such as "pass@1"
    max_tokens: ClassVar[int]  # used where the configuration sets no limit

    use_fewshot: bool = False
    chat: bool = False
    execute_code: bool = False

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which generation ends; they are not part of the completion."""
        return ()

    @abstractmethod
    def examples(self) -> list[Example]:
        """All examples in the order of the data set; `index` is the position in that order."""

    @abstractmethod
    def postprocess(self, example: Example, text: str) -> str:
        """The completion as it is kept and scored, from the text that the model generated.

        Applying it to its own result changes nothing where `chat` is false, whether or not the
        engine has already cut `text` at a stop string.
        """

    @abstractmethod
    def score(self, example: Example, completion: str) -> float | None:
        """The score of a postprocessed completion, in [0, 1]; None where it was not evaluated.

        May be called from several threads at once.
        """

    def aggregate(self, scores: Iterable[float | None]) -> float | None:
        """The mean of the scores that were evaluated; None where none was."""
        evaluated = [score for score in scores if score is not None]
        return sum(evaluated) / len(evaluated) if evaluated else None


def truncate_at_stop(text: str, stop: Iterable[str]) -> str:
    """`text` up to the first place where any of the strings in `stop` begins."""
    found = [position for position in map(text.find, stop) if position >= 0]
    return text[: min(found, default=len(text))]


def select(examples: Sequence[Example], size: str | int) -> list[Example]:
    """The first examples, in order: `tiny` (5), `small` (200), `full`, or a number of at least 1.

    A size beyond the set gives the whole set.

    Raises:
        ValueError: `size` is none of these.
    """
    if isinstance(size, str) and size in NAMED_SIZES:
        return list(examples[: NAMED_SIZES[size]])
    # A bool is an int in Python, but `dataset.size=true` is a mistake.
    if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
        return list(examples[:size])
    known = ", ".join(NAMED_SIZES)
    raise ValueError(f"dataset.size={size!r} is not a size: use {known}, or an integer >= 1")
