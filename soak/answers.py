"""What clients read, and whether it is what the plain ensemble answers.

This module knows tokens and log-probabilities. It knows no server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EQUAL, TIE, WRONG = "equal", "tie", "wrong"


@dataclass(frozen=True)
class Answer:
    """One choice of an answer, as far as it was read.

    Args:
        reason: why it ended, and what stopped it. None: the client left before its end.
        text: of all tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    reason: tuple[str, int | str | None] | None


@dataclass(frozen=True)
class PlainAnswer:
    """The plain ensemble's answer.

    Args:
        logprobs: for each of its tokens, the log-probabilities of the likeliest tokens.
    """

    answer: Answer
    logprobs: Sequence[Mapping[int, float]]


class Verdict(NamedTuple):
    """What a comparison found.

    Args:
        kind: EQUAL: as far as it was read. TIE: up to a tie, behind which nothing can be compared.
        position: of the first token that differs.
        why: one line if the answer is wrong.
    """

    kind: str
    position: int | None = None
    why: str | None = None


def compare(found: Answer, plain: PlainAnswer, tolerance: float) -> Verdict:
    """Whether an answer at temperature 0 is the plain ensemble's.

    Args:
        tolerance: two tokens tie if the plain ensemble's log-probabilities are this close.
    """
    expected = plain.answer
    for position, (token, other) in enumerate(
        zip(found.token_ids, expected.token_ids, strict=False)
    ):
        if token == other:
            continue
        at_position = plain.logprobs[position]
        where = f"token {position} is {token}, the plain ensemble's is {other}"
        if token not in at_position:
            why = f"{where}, and {token} is not among its {len(at_position)} likeliest"
            return Verdict(WRONG, position, why)
        gap = at_position[other] - at_position[token]
        if gap <= tolerance:
            return Verdict(TIE, position)
        return Verdict(WRONG, position, f"{where}, whose log-probability is {gap:.3g} higher")
    lengths = len(found.token_ids), len(expected.token_ids)
    if lengths[0] > lengths[1] or (found.reason and lengths[0] < lengths[1]):
        why = f"it has {lengths[0]} tokens, the plain ensemble's has {lengths[1]}"
        return Verdict(WRONG, min(lengths), why)
    if found.reason is None:
        return Verdict(EQUAL)
    if found.reason != expected.reason:
        why = f"it ended by {found.reason}, the plain ensemble's by {expected.reason}"
        return Verdict(WRONG, lengths[0], why)
    if found.text != expected.text:
        why = f"its text is {found.text!r}, the plain ensemble's {expected.text!r}"
        return Verdict(WRONG, lengths[0], why)
    return Verdict(EQUAL)


def find_malformed(answers: Sequence[Answer], body: Mapping) -> str | None:
    """What is wrong with a whole answer, whatever its tokens are. One line, or None."""
    if len(answers) != body.get("n", 1):
        return f"{len(answers)} answers, {body.get('n', 1)} were asked for"
    for answer in answers:
        length, most = len(answer.token_ids), body["max_tokens"]
        allowed = body.get("allowed_token_ids")
        if answer.reason is None or answer.reason[0] not in ("stop", "length"):
            return f"it ended by {answer.reason}"
        if length > most or (answer.reason[0] == "length" and length != most):
            return f"it ended by {answer.reason[0]} at {length} tokens, max_tokens is {most}"
        if length < body.get("min_tokens", 0):
            return f"it has {length} tokens, min_tokens is {body['min_tokens']}"
        # What ends an answer may be outside of allowed_token_ids.
        kept = answer.token_ids if answer.reason[0] == "length" else answer.token_ids[:-1]
        if strange := [token for token in kept if allowed and token not in allowed]:
            return f"token {strange[0]} is not allowed"
    return None
