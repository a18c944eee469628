"""MMLU: questions with four options in 57 subjects, scored by the letter that is answered.

This module knows how an answer names its option. The engine compares the probabilities.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tasks.base import (
    Example,
    Task,
    chat_messages,
    check_at_least,
    check_num_fewshot,
    truncate_at_stop,
)
from tasks.loading import DatasetSource, MissingSplit, load_rows
from tasks.prompts.mmlu import CHAT, INSTRUCTION, PLAIN

SOURCE = DatasetSource(
    hub_name="cais/mmlu",
    config="all",
    revision="c30699e8356da336a370243923dbaf21066bb9fe",
    columns={"question": str, "subject": str, "choices": list, "answer": int},
)

LETTERS = "ABCD"
MODES = ("generate", "logprob")
SPLITS = ("test", "validation")

_STOP = ("\nQuestion:",)


@dataclass(frozen=True, kw_only=True)
class Mmlu(Task):
    """Accuracy; the reference of an example has `answer` (a letter), `choices` and `subject`.

    mode: `generate` reads the letter from a generated answer; `logprob` takes the letter that the
        ensemble finds likeliest.
    split: `test` or `validation`.
    subjects: names of subjects, such as `anatomy`; None: all.
    num_fewshot: worked examples, the first ones of the question's subject in the dev split, which
        has 5 per subject. An example that equals the question is left out, so this question may
        have one example fewer.
    """

    name: ClassVar[str] = "mmlu"
    metric: ClassVar[str] = "accuracy"
    max_tokens: ClassVar[int] = 32

    mode: str = "generate"
    split: str = "test"
    subjects: list[str] | None = None
    num_fewshot: int = 5

    def __post_init__(self) -> None:
        for option, known in (("mode", MODES), ("split", SPLITS)):
            value = getattr(self, option)
            if value not in known:
                raise ValueError(f"task.mmlu.{option}: {value!r} must be {' or '.join(known)}")
        if self.subjects is not None and not (isinstance(self.subjects, list) and self.subjects):
            raise ValueError(
                f"task.mmlu.subjects: {self.subjects!r} must be a list such as "
                "[anatomy,virology], or null for all"
            )
        check_at_least("task.mmlu.num_fewshot", self.num_fewshot, 1)

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self.chat else _STOP

    def examples(self) -> list[Example]:
        rows = self._rows()
        worked = self._worked()
        examples = []
        for position, row in enumerate(rows):
            if self.subjects is None or row["subject"] in self.subjects:
                examples.append(self._example(len(examples), position, row, worked))
        self._check_subjects({row["subject"] for row in rows})
        return examples

    def choices(self, example: Example) -> tuple[str, ...]:
        if self.mode != "logprob":
            return ()
        # A plain prompt ends with a colon; in a chat the choice begins the reply.
        return tuple(LETTERS if self.chat else (f" {letter}" for letter in LETTERS))

    def postprocess(self, example: Example, text: str) -> str:
        return text if self.chat else truncate_at_stop(text, _STOP)

    def score(self, example: Example, completion: str) -> float:
        """1.0 if the completion names the right option; 0.0 if it names another one or none."""
        letter = extract_letter(completion, example.reference["choices"])
        return float(letter == example.reference["answer"])

    def _example(
        self,
        index: int,
        position: int,  # in the split, before subjects are chosen
        row: Mapping[str, Any],
        worked: Mapping[str, list[Mapping[str, Any]]],  # by subject
    ) -> Example:
        _check_row(row)
        solved = self._worked_for(row, worked)
        return Example(
            index=index,
            task_id=f"mmlu/{self.split}/{position}",
            prompt=_fill(CHAT, row) if self.chat else _plain_prompt(row, solved),
            reference={
                "answer": LETTERS[row["answer"]],
                "choices": row["choices"],
                "subject": row["subject"],
            },
            messages=_messages(row, solved) if self.chat else (),
        )

    def _rows(self) -> list[dict[str, Any]]:
        try:
            return load_rows(SOURCE, self.split, self.path)
        except MissingSplit as error:
            if self.split == "validation":
                raise
            raise ValueError(
                f"{error}; if you have the split validation only, set task.mmlu.split=validation"
            ) from error

    def _worked(self) -> dict[str, list[Mapping[str, Any]]]:
        by_subject = defaultdict(list)
        if self.use_fewshot:
            for row in load_rows(SOURCE, "dev", self.path, worked=True):
                _check_row(row)
                by_subject[row["subject"]].append(row)
        return by_subject

    def _worked_for(
        self, row: Mapping[str, Any], worked: Mapping[str, list[Mapping[str, Any]]]
    ) -> list[Mapping[str, Any]]:
        if not self.use_fewshot:
            return []
        rows = worked.get(row["subject"], [])
        place = f"subject {row['subject']} in the split dev"
        check_num_fewshot("mmlu", self.num_fewshot, len(rows), place)
        # One question of the hub's validation split is in dev too. As a worked example it would
        # show its own answer.
        return [other for other in rows if not _same_question(other, row)][: self.num_fewshot]

    def _check_subjects(self, known: set[str]) -> None:
        unknown = [subject for subject in self.subjects or () if subject not in known]
        if unknown:
            raise ValueError(
                f"task.mmlu.subjects: no {', '.join(map(str, unknown))} in the split {self.split}; "
                f"it has {', '.join(sorted(known))}"
            )


def _check_row(row: Mapping[str, Any]) -> None:
    strings = all(isinstance(choice, str) for choice in row["choices"])
    if not (strings and len(row["choices"]) == 4 and 0 <= row["answer"] < 4):
        raise ValueError(
            f"dataset.path: the question {row['question'][:40]!r} needs four choices and an answer "
            f"from 0 to 3, as in {SOURCE.hub_name}; correct it"
        )


def _same_question(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = one["question"].strip() == other["question"].strip()
    return same and sorted(one["choices"]) == sorted(other["choices"])


def _plain_prompt(row: Mapping[str, Any], worked: Sequence[Mapping[str, Any]]) -> str:
    solved = [f"{_fill(PLAIN, example)} {LETTERS[example['answer']]}" for example in worked]
    return "\n\n".join([_fill(INSTRUCTION, row), *solved, _fill(PLAIN, row)])


def _messages(
    row: Mapping[str, Any], worked: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, str], ...]:
    requests = [(_fill(CHAT, example), LETTERS[example["answer"]]) for example in worked]
    return chat_messages(requests, _fill(CHAT, row))


def _fill(template: str, row: Mapping[str, Any]) -> str:
    return template.format(
        question=row["question"].strip(),
        choices=[choice.strip() for choice in row["choices"]],
        subject=row["subject"].replace("_", " "),
    )


# ---------------------------------------------------------------------------------------------
# Which option an answer names
# ---------------------------------------------------------------------------------------------

_OPENING = r"(?:[\s*_\"'“‘`(\[{<$:]|\\(?:boxed|text|textbf|mathrm|mathbf)\b)*"
_CLOSED = r"(?=[\s*_`]*(?:$|[\n).:,;!\"'”’\]}>$*_`]))"  # no word follows the letter at once

# A letter alone: "B", "(B)", "B. text", "**b**".
_LONE_LETTER = re.compile(rf"{_OPENING}([A-Da-d]){_CLOSED}")
# Signs that may close a letter or an option's text.
_CLOSING = " \t\n.:*_\"'”’`)]}$"
_WEIGHING = re.compile(
    r"(?:is|isn't|isn’t|was|are|and|or|nor|can|cannot|can't|can’t|does)\b|,\s*\(?[A-D](?!\w)"
)
# "A. ..." at the start of a line or sentence, and a line that is one letter.
_LISTED = re.compile(r"(?:^|(?<=[.;]\s))[ \t*_(-]*([A-D])[).:]", re.MULTILINE)
_LETTER_LINE = re.compile(r"^[ \t*_(]*([A-D])[).*_ \t]*$", re.MULTILINE)
# Within a statement, a capital from A to D names an option, whatever follows the capital.
_CAPITAL = re.compile(rf"{_OPENING}([A-D])(?![\w'’])")
# Further letters that are named after a letter: "and B", ", C or D". Not the second letters of
# "A, B is wrong" and "B, A cell".
_AND_OTHERS = re.compile(
    r"(?:[\s*_\"'”’)\]]*(?:,|/|&|\+|\b(?:and|or)\b)\s*(?:(?:and|or|option)\s+)*"
    r"[*_\"'“‘(\[]*(?:[B-D]|A(?!\s+(?!and\b|or\b|because\b)\w))(?![\w'’-]))++"
    r"(?![)\]*_]*\s+(?:is|are|was|were|isn|aren|can|does|do|has|have)\b)"
)
# Words between an announcement and the letter of the option.
_WORD_FOR_OPTION = re.compile(
    rf"{_OPENING}(?:not\b[^.\n]{{0,60}}?\bbut\s+(?:rather\s+)?)?"
    r"(?:(?:definitely|clearly|probably|(?:most\s+)?likely|therefore|thus|indeed|either)\s+)?"
    r"(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer)?",
    re.IGNORECASE,
)

# "The answer is", "Answer:", "I choose", "go with": an option comes next.
_ANNOUNCEMENT = re.compile(
    r"""
    \b(?:answer|solution|(?:correct|right|best)\s+(?:option|choice|one|letter|statement))\b
        [^.\n?!]{0,60}?(?:\b(?:is|was|(?:would|should|must|will)\s+be)\b|[:=])
    | \b(?:I(?:['’](?:d|ll)|\s+would)?|we|let's|let’s)\s+(?:\w+\s+){0,2}?
        (?:choose|pick|select|say|go\s+(?:with|for))\b
    | (?:so|thus|therefore|hence)[,\s]+(?:it\s+is|it's|it’s|it\s+must\s+be)\b
    | \\boxed(?=\{) | \#\#\#\#
    """,
    re.IGNORECASE | re.VERBOSE,
)
# "Answer B", "Therefore, D.": these words count only if no word follows the letter at once.
_BARE_ANNOUNCEMENT = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Ss]o|[Tt]hus|[Tt]herefore|[Hh]ence)\b[\s*_,]{1,8}"
    rf"(?=[*_\"'“‘(\[]*[A-D]{_CLOSED})"
)
# "B is correct", "(C) is the right answer"
_VERDICT = re.compile(
    r"(?<![\w'’])([A-D])[)\].:*_\"'”’]*\s+(?:is|must\s+be|would\s+be|seems)\s+(?:the\s+)?"
    r"(?:only\s+|most\s+likely\s+)?(?:correct|right|best|answer)\b"
)
# Words that may precede the letter of a verdict; "Hepatitis B is correct" is not a verdict.
_BEFORE_VERDICT = frozenset(
    "option choice letter answer statement so that thus therefore hence and but then only think "
    "believe say".split()
)
# Letters that can only name an option: "(C)", "option C", "it is C."
_POINTER = re.compile(
    rf"[(\[]([A-D])[)\]]|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+[*_\"'(]*([A-D])(?![\w'’])"
    rf"|(?<!not )(?<!n't )(?<!n’t )\b(?:is|be|it's|it’s)\s+[*_\"'(]*([A-D]){_CLOSED}"
)


def extract_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer names; None if it names none or several.

    The function looks in this order:
    - A letter or an option's text at the beginning.
    - A letter or an option's text after the last announcement ("The answer is"). A verdict ("B is
      correct") counts as an announcement.
    - The only letter that is pointed at ("(C)", "option C").
    - The only option whose text is quoted.
    """
    text = text.strip()
    announced = _announced_letters(text, choices)
    letters = _opening_letter(text, choices, announced) or announced
    if letters:
        return letters if len(letters) == 1 else None
    return _pointed_letter(text) or _quoted_option(text, choices)


def _opening_letter(text: str, choices: Sequence[str], announced: str) -> str | None:
    """The letter of a direct reply; None if the text weighs or lists the options.

    "(A) is wrong" weighs an option. A list has more than two options, or more than one if an
    announcement follows. So "B. This. A. That is wrong" is a direct reply.
    """
    if len(set(_LISTED.findall(text))) > (1 if announced else 2):
        return None
    if len(set(_LETTER_LINE.findall(text))) > 1:
        return None
    whole = _option_at_start(text, choices, whole=True)
    if whole:
        return whole
    letter = _LONE_LETTER.match(text)
    rest = text[letter.end() :].lstrip(_CLOSING) if letter else ""
    if letter and (not _WEIGHING.match(rest) or _own_option_follows(letter[1], rest, choices)):
        return letter[1].upper()
    # "B The second arch" names option B without a sign after the letter, and the option's text
    # follows. In "A cell" the capital is an article.
    letter = _CAPITAL.match(text)
    if letter and _own_option_follows(letter[1], text[letter.end() :].lstrip(), choices):
        return letter[1]
    return None


def _own_option_follows(letter: str, rest: str, choices: Sequence[str]) -> bool:
    return _begins_with(rest, choices[LETTERS.index(letter.upper())])


def _announced_letters(text: str, choices: Sequence[str]) -> str:
    """The letters that the last announcement or verdict names; empty without one."""
    found = [
        (verdict.start(), verdict[1])
        for verdict in _VERDICT.finditer(text)
        if _may_precede_verdict(text, verdict.start())
    ]
    for announcement in (*_ANNOUNCEMENT.finditer(text), *_BARE_ANNOUNCEMENT.finditer(text)):
        start = _WORD_FOR_OPTION.match(text, announcement.end()).end()
        letters = _letters_at(text[start:], choices)
        if letters:
            found.append((announcement.start(), letters))
    return max(found)[1] if found else ""


def _may_precede_verdict(text: str, position: int) -> bool:
    word = re.search(r"([\w’']+)[ \t(*_\"'\[]*$", text[max(0, position - 24) : position])
    return word is None or word[1].lower() in _BEFORE_VERDICT


def _letters_at(text: str, choices: Sequence[str]) -> str:
    lone, capital = _LONE_LETTER.match(text), _CAPITAL.match(text)
    letter = lone or capital
    others = letter and _AND_OTHERS.match(text, letter.end())
    rest = text[letter.end() :].lstrip(_CLOSING + ",") if letter else ""
    if others and _own_option_follows(letter[1], rest, choices):
        others = None
    option = None if lone and not others else _option_at_start(text, choices)
    if option or not letter:
        return option or ""
    named = {letter[1].upper(), *re.findall(r"(?<!\w)[A-D](?!\w)", others[0] if others else "")}
    return "".join(sorted(named))


def _pointed_letter(text: str) -> str | None:
    letters = {next(filter(None, pointer.groups())) for pointer in _POINTER.finditer(text)}
    return letters.pop() if len(letters) == 1 else None


def _option_at_start(text: str, choices: Sequence[str], whole: bool = False) -> str | None:
    """The letter of the longest option that `text` begins with; with `whole`, that it equals.

    An option whose text is one letter is left out, because that letter names an option.
    """
    bare = re.sub(rf"^{_OPENING}", "", text)
    fitting = {
        letter: len(choice)
        for letter, choice in zip(LETTERS, map(str.strip, choices), strict=True)
        for start in (text, bare)
        if len(choice) > 1
        and _begins_with(start, choice)
        and not (whole and start[len(choice) :].strip(_CLOSING))
    }
    longest = [letter for letter, length in fitting.items() if length == max(fitting.values())]
    return longest[0] if len(longest) == 1 else None  # a few questions have equal options


def _begins_with(text: str, choice: str) -> bool:
    choice = choice.strip()
    return bool(choice) and re.match(_pattern(choice), text, re.IGNORECASE) is not None


def _quoted_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only option that `text` quotes.

    An option that is a part of another quoted option does not count.
    """
    present = {
        letter: choice.strip().lower()
        for letter, choice in zip(LETTERS, choices, strict=True)
        if choice.strip() and re.search(_pattern(choice.strip()), text, re.IGNORECASE)
    }
    longest = [
        letter
        for letter, choice in present.items()
        if not any(choice in other and choice != other for other in present.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _pattern(choice: str) -> str:
    # Not `\b`: an option may begin or end with a sign.
    return rf"(?<!\w){re.escape(choice)}(?!\w)"
