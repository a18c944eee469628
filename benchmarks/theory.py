"""The expected number of tokens that a method decides per cycle, by `docs/algorithm.md`.

This module knows turns and acceptance rates. It runs no model.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from math import prod

from benchmarks.simulate_turns import simulate
from vllm.chef.turns import Turn

# For turns without a formula: enough for three digits.
NUM_SEQUENCES, NUM_TOKENS = 20, 1000

# Members and gamma of each turn, in the order of the calls.
TurnList = Sequence[tuple[Sequence[int], int]]


def run_of(rate: float, num_tokens: int) -> float:
    """1 + a + ... + a**n: expected tokens of a verification that adds one token of its own."""
    return sum(rate**length for length in range(num_tokens + 1))


def two_members(gamma: int, opener: float, other: float) -> float:
    """Tokens per cycle of two members: the opener proposes one token, the other `gamma`.

    Args:
        opener, other: their rates of acceptance.
    """
    full, short = other**gamma, other ** (gamma - 1)
    # The share of cycles with one token less in the window. If no token is ever accepted, the
    # formula for the share is 0 / 0, and its value does not matter.
    share = full * (1 - opener) / ((1 - (short - full) * (1 - opener)) or 1.0)
    return (1 - share) * run_of(other, gamma) + share * run_of(other, gamma - 1)


def one_token_each(rates: Sequence[float]) -> float:
    """Tokens per cycle of members that propose one token each."""
    if not prod(rates):
        # After a replacement the same member proposes the next token. If all its proposals are
        # rejected, it proposes forever, and each cycle decides one token.
        return 1.0
    mean = len(rates) / sum(1 / rate for rate in rates)
    return len(rates) / (1 + (len(rates) - 1) * (1 - mean))


def tokens_per_cycle(
    turns: TurnList, scores: Sequence[bool], rates: Sequence[float | None]
) -> float:
    """Tokens per cycle of members that take turns.

    Args:
        scores: by member, whether the member has a say.
        rates: by member, the probability that a proposal is accepted; None for a member that never
            proposes.
    """
    gammas = [gamma for _, gamma in turns]
    ordered = [rates[members[0]] for members, _ in turns]
    if gammas[0] == 0:
        return run_of(ordered[1], gammas[1])
    if all(scores) and len(turns) == 2:
        return two_members(gammas[1], *ordered)
    if all(scores) and set(gammas) == {1}:
        return one_token_each(ordered)
    frozen = tuple((tuple(members), gamma) for members, gamma in turns)
    return _simulated(frozen, tuple(scores), tuple(round(rate, 3) for rate in rates))


@cache
def _simulated(
    turns: tuple[tuple[tuple[int, ...], int], ...],
    scores: tuple[bool, ...],
    rates: tuple[float, ...],
) -> float:
    scorers = [member for member, counts in enumerate(scores) if counts]
    calls = [Turn(members, gamma) for members, gamma in turns]
    size = Namespace(sequences=NUM_SEQUENCES, num_tokens=NUM_TOKENS)
    return simulate(calls, rates, scorers, size)["tokens_per_cycle"]
