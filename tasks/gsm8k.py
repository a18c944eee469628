"""GSM8K: word problems of grade school, scored by the number at the end of a solution.

This module knows which text states a result and what a number looks like. It does not judge the
steps of a solution.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

from tasks.base import (
    Example,
    Task,
    chat_messages,
    check_at_least,
    check_num_fewshot,
    truncate_at_stop,
)
from tasks.loading import DatasetSource, load_rows
from tasks.prompts.gsm8k import CHAT, INSTRUCTION, PROBLEM, SOLUTION

SOURCE = DatasetSource(
    hub_name="openai/gsm8k",
    config="main",
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    columns={"question": str, "answer": str},
)

# The start of the next problem, as our prompt or a model's habit writes it.
_STOP = ("\nProblem:", "\nQuestion:", "\nQ:")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(Task):
    """Exact match of the result; the reference of an example is the number as the data set has it.

    num_fewshot: worked examples, the first ones of the train split. With 5 examples, prompt and
        solution fit into 2048 tokens, the context of small draft models.
    """

    name: ClassVar[str] = "gsm8k"
    metric: ClassVar[str] = "accuracy"
    max_tokens: ClassVar[int] = 512

    num_fewshot: int = 5

    def __post_init__(self) -> None:
        check_at_least("task.gsm8k.num_fewshot", self.num_fewshot, 1)

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self.chat else _STOP

    def examples(self) -> list[Example]:
        worked = self._worked()
        return [
            Example(
                index=index,
                task_id=f"gsm8k/test/{index}",
                prompt=self._prompt(row["question"], worked),
                reference=_solution(row["answer"])[1],
                messages=self._messages(row["question"], worked),
            )
            for index, row in enumerate(load_rows(SOURCE, "test", self.path))
        ]

    def postprocess(self, example: Example, text: str) -> str:
        return text if self.chat else truncate_at_stop(text, _STOP)

    def score(self, example: Example, completion: str) -> float:
        """1.0 if the completion's result equals the reference as an exact number, else 0.0."""
        return float(extract_number(completion) == _parse(example.reference))

    def _worked(self) -> list[tuple[str, str]]:
        if not self.use_fewshot:
            return []
        rows = load_rows(SOURCE, "train", self.path, limit=self.num_fewshot, worked=True)
        check_num_fewshot("gsm8k", self.num_fewshot, len(rows), "the split train")
        return [(row["question"].strip(), _worked_solution(row["answer"])) for row in rows]

    def _prompt(self, question: str, worked: list[tuple[str, str]]) -> str:
        if self.chat:
            return CHAT.format(question=question.strip())
        solved = [PROBLEM.format(question=problem) + " " + reply for problem, reply in worked]
        return "\n\n".join([INSTRUCTION, *solved, PROBLEM.format(question=question.strip())])

    def _messages(self, question: str, worked: list[tuple[str, str]]) -> tuple[dict[str, str], ...]:
        if not self.chat:
            return ()
        requests = [(CHAT.format(question=problem), reply) for problem, reply in worked]
        return chat_messages(requests, CHAT.format(question=question.strip()))


def _solution(answer: str) -> tuple[str, str]:
    """The steps and the result of the data set's own solution."""
    steps, mark, number = answer.rpartition("####")
    if not mark or _parse(number.strip()) is None:
        raise ValueError(
            f"dataset.path: the answer {answer[-40:]!r} does not end with '#### NUMBER', as those "
            f"of {SOURCE.hub_name} do; correct it"
        )
    return steps.strip(), number.strip()


def _worked_solution(answer: str) -> str:
    steps, number = _solution(answer)
    return SOLUTION.format(steps=_without_annotations(steps), number=number)


def _without_annotations(text: str) -> str:
    """The text without the data set's notes for a calculator: `<<3*4=12>>`."""
    return re.sub(r"<<[^<>\n]*>>", "", text)


# ---------------------------------------------------------------------------------------------
# What is a number
# ---------------------------------------------------------------------------------------------

_VULGAR_FRACTIONS = {
    sign: f"{Fraction(unicodedata.numeric(sign)).limit_denominator(10)}"
    for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_^])(?<![0-9][.:/])(?<![A-Za-z]-)  # not inside a word, number, or power
    (?: (?<![)\]}%$€£])(?P<minus>[-−–]) )?
    (?: (?: [$€£] | USD | EUR | GBP )\s?(?P<minus_after>[-−–])? )?
    (?:
        (?P<none> [0-9]+/[0-9]+/[0-9]+ | [0-9]{4}-[0-9]{2}-[0-9]{2} )  # dates
      | (?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?![0-9])
      | (?P<ratio>[0-9]+:[0-9]+)
      | (?:(?P<whole>[0-9]+)(?:\s+|-|\s+and\s+))?(?P<top>[0-9]+)\s?/\s?(?P<bottom>[0-9]+)(?![0-9.])
      | (?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
        (?P<ordinal>(?:st|nd|rd|th)\b)?
    )
    """,
    re.VERBOSE,
)

# A longer number is a model that repeats itself. Its conversion would be slow or impossible.
_MAX_DIGITS = 100


class _Number(NamedTuple):
    value: Fraction
    incidental: bool  # "3rd", "5:00", "24/7": seldom the result
    digits: str  # as written, without sign and currency


def _numbers(text: str) -> Iterator[_Number]:
    return filter(None, map(_read_number, _NUMBER.finditer(text)))


def _read_number(match: re.Match | None) -> _Number | None:
    if match is None or len(match[0]) > _MAX_DIGITS:
        return None
    value, incidental = _magnitude(match)
    if value is None:
        return None
    negative = match["minus"] or match["minus_after"]
    digits = re.sub(r"^[^0-9.]+", "", match[0])
    return _Number(-value if negative else value, incidental, digits)


def _magnitude(match: re.Match) -> tuple[Fraction | None, bool]:
    if match["hour"] is not None:
        on_the_hour = int(match["minute"]) == 0
        return (Fraction(match["hour"]), True) if on_the_hour else (None, True)
    if match["top"] is not None:
        top, bottom = int(match["top"]), int(match["bottom"])
        value = int(match["whole"] or 0) + Fraction(top, bottom) if bottom else None
        return value, (top, bottom) == (24, 7)
    if match["decimal"] is not None:
        return Fraction(match["decimal"].replace(",", "")), match["ordinal"] is not None
    return None, True


def _parse(number: str) -> Fraction | None:
    read = _read_number(_NUMBER.fullmatch(number.rstrip(".")))
    return read and read.value


# ---------------------------------------------------------------------------------------------
# Where the result stands
# ---------------------------------------------------------------------------------------------

_MARKUP = r"[\s*_`\"'(\[\\]{0,8}(?:[a-z]\s?=\s?)?"

# A number must follow these words at once. Otherwise they are a heading, or reasoning follows.
_LABEL = re.compile(
    rf"\#\#\#\#{_MARKUP}|\b(?:answer|ans)\b[*_\s]{{0,8}}(?:\([^()\n]*\))?[*_\s]{{0,8}}[:=]{_MARKUP}",
    re.IGNORECASE,
)
# The rest of the sentence after these words states the result.
_PHRASE = re.compile(
    r"\banswer\b[^.\n?!]{0,80}?\b(?:is|was|equals|(?:would|should|must|will)\s+be)\b[\s:*_]*"
    r"(?:not\b[^.\n?!]{0,40}?\bbut\b)?",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_LONGEST = 600  # characters read of a sentence or paragraph; the limit keeps the time linear

# The text after these words gives reasons ("because she has 16 eggs"), not the result.
_GROUNDS = re.compile(
    r"\b(?:because|since|as|based|correct|incorrect|right|wrong|which|not(?=\s[$€£(]*\d))\b",
    re.IGNORECASE,
)
# The part of a calculation after its first number: "60 minutes - 15", "9 times $2", "2(40 + 9)",
# "60/6 = 10".
_OPERATION = re.compile(
    r"""
    (?: [^=\d]*?(?: [-−–+*/×÷·^] | (?<![a-z])(?:x|plus|minus|times|(?:multiplied|divided)\s+by) )
      | \W*= | (?=\() )
    [\s$€£(]*\.?\d
    """,
    re.IGNORECASE | re.VERBOSE,
)


def extract_number(text: str) -> Fraction | None:
    """The result that a solution states; None if it has no number.

    The function looks in this order:
    - The last place that announces a number ("The answer is 5", "Answer: 5", "#### 5",
      "\\boxed{5}"). If a calculation is there, its outcome counts.
    - The last number of the text. In a sentence with an equals sign, it is the number after the
      sign.

    Without an announcement, full hours ("5:00"), ordinals and "24/7" count only if there is no
    other number. Dates, other clock times, and numbers of steps never count.
    """
    text = _plain_text(text)
    announced = [number for _, number in sorted(_announced(text))]
    if len(announced) > 1 and _is_cut_off(text, announced[-1], announced[-2]):
        announced.pop()
    number = announced[-1] if announced else _concluding(text)
    return number and number.value


def _announced(text: str) -> Iterator[tuple[int, _Number]]:
    """Each announced number, with the position of its announcement."""
    for label in _LABEL.finditer(text):
        yield from _placed(label, _labelled(text, label.end()))
    for phrase in _PHRASE.finditer(text):
        yield from _placed(phrase, _stated(_up_to(_SENTENCE_END, text, phrase.end())))
    for box in _BOXED.finditer(text):
        yield from _placed(box, _stated(box[1]))


def _placed(announcement: re.Match, number: _Number | None) -> Iterator[tuple[int, _Number]]:
    if number is not None:
        yield announcement.start(), number


def _is_cut_off(text: str, last: _Number, previous: _Number) -> bool:
    """Whether the last number is an earlier one cut short: "The answer is 18. The answer is 1"."""
    tail = text[len(text.rstrip("0123456789.,")) :]
    return (
        tail.startswith(last.digits)
        and not tail.endswith(".")
        and previous.digits.startswith(tail)
        and previous.digits != tail
    )


def _labelled(text: str, start: int) -> _Number | None:
    """The number at `start`. If a calculation starts there, the last outcome of its paragraph."""
    number = _read_number(_NUMBER.match(text, start))
    first, *more = _SENTENCE_END.split(_up_to(_PARAGRAPH_END, text, start))
    if number is None or _outcome(first) is None:
        return number
    return list(filter(None, map(_outcome, [first, *more])))[-1]


def _stated(statement: str) -> _Number | None:
    """The outcome of a calculation in `statement` ("5 + 3 = 8"), or else the first number."""
    statement = _GROUNDS.split(statement, maxsplit=1)[0]
    return _outcome(statement) or next(_numbers(statement), None)


def _outcome(statement: str) -> _Number | None:
    """The outcome of a calculation: the number after its last equals sign; None without one.

    The calculation begins with the first number. If words precede that number, the calculation may
    begin with a later one: "She needs 3 and makes 9 * 2 = 18".
    """
    calculation, _, outcome = statement.rpartition("=")
    operands = list(_NUMBER.finditer(statement))
    if not calculation or not operands:
        return None
    if not re.search(r"[A-Za-z]{2}", statement[: operands[0].start()]):
        operands = operands[:1]
    if any(_OPERATION.match(statement, operand.end()) for operand in operands):
        return next(_numbers(outcome), None)
    return None


def _up_to(end: re.Pattern, text: str, start: int) -> str:
    limit = start + _LONGEST
    stop = end.search(text, start, limit)
    return text[start : stop.start() if stop else limit]


def _concluding(text: str) -> _Number | None:
    """The last number of the text, if possible not an incidental one.

    In a sentence with an equals sign it is the number after the sign: 9 in "6 + 3 = 9 of the 24
    litres".
    """
    last = None
    for sentence in _SENTENCE_END.split(text):
        numbers = list(_numbers(sentence))
        stated = [number for number in numbers if not number.incidental]
        outcome = next(_numbers(sentence.rpartition("=")[2]), None) if "=" in sentence else None
        if stated:
            last = outcome or stated[-1]
        elif numbers and (last is None or last.incidental):
            last = numbers[-1]
    return last


def _plain_text(text: str) -> str:
    """The text with plain numbers in place of LaTeX and typographic forms."""
    text = _without_annotations(text)
    text = re.sub(r"\\([$%,!])|\{(,)\}", lambda m: m[2] or m[1].strip(",!"), text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\s*\\[dt]?frac", r" \\frac", text)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\^\{[^{}]*\}", "", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", text)
    text = re.sub(r"\\div(?![A-Za-z])", "÷", text)
    for sign, plain in _VULGAR_FRACTIONS.items():
        text = re.sub(rf"(?<=\d){sign}", f" {plain}", text).replace(sign, plain)
    # Numbers of steps: "2. Then ...", "#### Step 3: ...".
    return re.sub(
        r"(?im)^[ \t]*(?:\#+[ \t]*)?[*_]*(?:step[ \t]+)?\d+[.):][*_]*[ \t]+(?=\S)", "", text
    )
