"""What a task is: its examples, how a completion is cut, and how it is scored.

A task never generates. This module knows no model, no engine, no file of a run, and no single data
set.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

NAMED_SIZES = {"tiny": 5, "small": 200, "full": None}


@dataclass(frozen=True)
class Example:
    """One problem of a data set, with everything that its score needs.

    `prompt` is plain text, and `samples.jsonl` shows it. If `messages` is not empty, the model is
    given these chat turns (`{"role", "content"}`) through its chat template instead. The reference
    is a field of the example and not a separate list, so that no re-ordering or selection can
    separate the two.
    """

    index: int
    task_id: str
    prompt: str
    reference: Any
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set with its scoring. Subclasses add their own options as dataclass fields.

    Every task accepts the options below, so that one configuration serves all tasks. A task ignores
    an option that has no meaning for it. A bad option, or data that cannot be read, raises a
    `ValueError` of one line that begins with the configuration's key.

    path: a local copy of the data set (`tasks.loading`); None: below DATASET_PATH, else the hub.
    use_fewshot: put worked examples before each problem.
    chat: give the problem as chat messages instead of plain text.
    execute_code: allow the score to run generated code.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # reported name of `aggregate`, such as "pass@1"
    max_tokens: ClassVar[int]  # used if the configuration sets no limit

    path: str | None = None
    use_fewshot: bool = False
    chat: bool = False
    execute_code: bool = False

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which generation ends; they are not part of the completion."""
        return ()

    @abstractmethod
    def examples(self) -> list[Example]:
        """All examples in the order of the data set; an example's `index` is its place there.

        Raises:
            ValueError: the data set cannot be read.
        """

    def choices(self, example: Example) -> tuple[str, ...]:
        """Continuations of the prompt to choose from; empty if the answer is generated.

        If there are choices, nothing is generated. The completion is the likeliest choice, by its
        log-probability after the prompt. In a chat the choices are beginnings of the reply. Each
        choice is tokenized together with the prompt. The results may differ in the last token
        only, and there they must differ.
        """
        return ()

    @abstractmethod
    def postprocess(self, example: Example, text: str) -> str:
        """The completion as it is kept and scored, from the text that the model generated.

        If `chat` is false, a second call on the result changes nothing. So it does not matter
        whether the engine has already cut `text` at a stop string.
        """

    @abstractmethod
    def score(self, example: Example, completion: str) -> float | Mapping[str, float] | None:
        """The score of a postprocessed completion, in [0, 1]; None if it was not evaluated.

        A mapping gives several metrics by name, each in [0, 1]. It must contain the metric named
        `metric`, whose value is the score of the sample. The other values are reported beside it.

        Several threads may call this at once.
        """

    def aggregate(self, scores: Iterable[float | None]) -> float | None:
        """The mean of the evaluated scores; None if no score was evaluated."""
        evaluated = [score for score in scores if score is not None]
        return sum(evaluated) / len(evaluated) if evaluated else None


def truncate_at_stop(text: str, stop: Iterable[str]) -> str:
    """`text` up to the first place where any of the strings in `stop` begins."""
    found = [position for position in map(text.find, stop) if position >= 0]
    return text[: min(found, default=len(text))]


def chat_messages(
    worked: Iterable[tuple[str, str]],  # (request, reply)
    request: str,
) -> tuple[dict[str, str], ...]:
    """The turns of a chat in which `request` follows worked examples."""
    turns = []
    for earlier_request, reply in worked:
        turns.append({"role": "user", "content": earlier_request})
        turns.append({"role": "assistant", "content": reply})
    return (*turns, {"role": "user", "content": request})


def check_at_least(key: str, value: object, least: int) -> None:
    """Raise a ValueError unless `value`, given for the key `key`, is an integer >= `least`."""
    if not _is_int(value) or value < least:
        raise ValueError(f"{key}: {value!r} must be an integer of at least {least}")


def check_num_fewshot(task: str, num_fewshot: int, num_rows: int, place: str) -> None:
    """Raise a ValueError if the `num_rows` of `place` are fewer than `num_fewshot`."""
    if num_rows < num_fewshot:
        raise ValueError(
            f"task.{task}.num_fewshot: {num_fewshot} are more than the {num_rows} rows of {place}"
        )


def select(
    examples: Sequence[Example],
    size: str | int,
    seed: int | None = None,
    indices: Sequence[int] | None = None,
) -> list[Example]:
    """The examples that a run uses, each with its reference.

    size: the first examples, in order: `tiny` (5), `small` (200), `full`, or a number of at least
        1. A size beyond the set gives the whole set.
    seed: shuffles the set before it is cut. Each example gets one draw of
        `random.Random(seed).random()`, in order, and the set is sorted by these draws. All versions
        of Python give the same draws. The examples of a smaller size are the first ones of a larger
        size.
    indices: positions in `examples`, counted from 0. They are used instead of the size, in the
        given order. They exclude a seed.

    Raises:
        ValueError: the size, seed or list of positions is not valid.
    """
    count = _count(size)
    if seed is not None:
        _check_seed(seed, indices)
    if indices is not None:
        return [examples[index] for index in _checked_indices(indices, len(examples))]
    return _shuffled(examples, seed)[:count]


def _count(size: str | int) -> int | None:
    if isinstance(size, str) and size in NAMED_SIZES:
        return NAMED_SIZES[size]
    if _is_int(size) and size >= 1:
        return size
    known = ", ".join(NAMED_SIZES)
    raise ValueError(f"dataset.size={size!r} is not a size: use {known}, or an integer >= 1")


def _check_seed(seed: int, indices: Sequence[int] | None) -> None:
    if not _is_int(seed) or seed < 0:
        raise ValueError(f"dataset.seed={seed!r} is not a seed: use null, or an integer >= 0")
    if indices is not None:
        raise ValueError("dataset.seed: dataset.indices fixes the order; leave one of them null")


def _checked_indices(indices: Sequence[int], num_examples: int) -> Sequence[int]:
    if not isinstance(indices, Sequence) or isinstance(indices, str) or not indices:
        raise ValueError(
            f"dataset.indices={indices!r} is not a list of positions: use null, or a list like "
            "[0,3,7]"
        )
    seen = set()
    for index in indices:
        if not _is_int(index) or not 0 <= index < num_examples:
            raise ValueError(
                f"dataset.indices: {index!r} is not a position in the data set: use integers from "
                f"0 to {num_examples - 1}"
            )
        if index in seen:
            raise ValueError(f"dataset.indices: {index} stands there twice")
        seen.add(index)
    return indices


def _shuffled(examples: Sequence[Example], seed: int | None) -> list[Example]:
    if seed is None:
        return list(examples)
    # Not `shuffle` or `sample`: Python may change how these two use the draws.
    generator = random.Random(seed)
    keys = [generator.random() for _ in examples]
    return [examples[i] for i in sorted(range(len(examples)), key=keys.__getitem__)]


def _is_int(value: object) -> bool:
    # A bool is an int in Python, but `dataset.size=true` is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)
