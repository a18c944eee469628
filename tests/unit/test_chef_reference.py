"""The reference of chef against the exact ensemble; it is the oracle of all other chef tests.

Members are tables: the distribution of the next token by the last two tokens. Whole sequences are
compared twice: exactly, by walking every branch of the algorithm's own randomness, and with draws.
Other tests check its counts, and the speed that `docs/algorithm.md` expects.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from random import Random

import pytest
from quick import quick
from scipy.stats import chisquare

from vllm.chef.reference import Chef, Output, acceptance, residual, verify
from vllm.chef.turns import Turn

PROMPT = (0, 1)
NUM_DRAWS = 5_000
P_VALUE = 1e-4


def table_members(
    num_members: int, vocab_size: int, seed: int = 0, sharpness: float = 1.0
) -> list[Callable[[tuple[int, ...]], list[float]]]:
    rng = Random(seed)

    def table_member() -> Callable[[tuple[int, ...]], list[float]]:
        table = {}
        for context in product(range(vocab_size), repeat=2):
            scores = [math.exp(sharpness * rng.gauss(0, 1)) for _ in range(vocab_size)]
            table[context] = [score / sum(scores) for score in scores]
        return lambda tokens: table[tokens[-2:]]

    return [table_member() for _ in range(num_members)]


def weighted(distributions: list[Sequence[float]]) -> list[float]:
    """Weights 1, 2, ... by member."""
    total = len(distributions) * (len(distributions) + 1) / 2
    return [
        sum(weight * p for weight, p in enumerate(column, start=1)) / total
        for column in zip(*distributions, strict=True)
    ]


def contrastive(distributions: list[Sequence[float]]) -> list[float]:
    """The first member against the mean of the others' logarithms, if there are others."""
    num_others = max(1, len(distributions) - 1)
    scores = [
        expert / math.prod(others) ** (0.5 / num_others)
        for expert, *others in zip(*distributions, strict=True)
    ]
    return [score / sum(scores) for score in scores]


def chef_turns(*gammas: int) -> list[Turn]:
    return [Turn((member,), gamma) for member, gamma in enumerate(gammas)]


def sd_turns(num_members: int, gamma: int) -> list[Turn]:
    return [Turn(tuple(range(num_members - 1)), 0), Turn((num_members - 1,), gamma)]


def exact_probs(
    members: Sequence[Callable], combine: Callable, length: int, eos: int | None = None
) -> dict[tuple[int, ...], float]:
    """The ensemble's probability of every sequence of this length, or ended by eos."""
    ended, open_ = {}, {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in open_.items():
            r = combine([member(PROMPT + tokens) for member in members])
            for token, r_token in enumerate(r):
                into = ended if token == eos else longer
                into[*tokens, token] = probability * r_token
        open_ = longer
    return ended | open_


def chi_square_p_value(
    draws: Sequence[tuple[int, ...]], probs: dict[tuple[int, ...], float]
) -> float:
    """The p-value of the draws; outcomes expected less than 5 times are pooled.

    It is 0.0 if an outcome without probability came.
    """
    counts = Counter(draws)
    if not counts.keys() <= probs.keys():
        return 0.0
    often = [outcome for outcome, p in probs.items() if p * len(draws) >= 5]
    observed = [counts[outcome] for outcome in often]
    expected = [probs[outcome] * len(draws) for outcome in often]
    if len(often) < len(probs):
        observed.append(len(draws) - sum(observed))
        expected.append(len(draws) - sum(expected))
    return float(chisquare(observed, expected).pvalue)


class EveryBranch:
    """Stands in for `Random`: takes the branches of all draws in turn, with their `probability`."""

    def __init__(self) -> None:
        self.path: list[list[tuple[int, float]]] = []  # by draw, the remaining branches

    def walk(self, generate: Callable[[], Output]) -> dict[tuple[int, ...], float]:
        probs = Counter()
        while True:
            self.depth, self.probability = 0, 1.0
            probs[generate().tokens] += self.probability
            while self.path and len(self.path[-1]) == 1:
                self.path.pop()
            if not self.path:
                return dict(probs)
            self.path[-1].pop()

    def choices(self, population: Sequence[int], weights: Sequence[float]) -> list[int]:
        if self.depth == len(self.path):
            total = sum(weights)
            branches = zip(population, (w / total for w in weights), strict=True)
            # If an acceptance is certain, rounding may leave a tiny other probability. It is not a
            # branch.
            self.path.append([(x, p) for x, p in branches if p > 1e-12])
        outcome, probability = self.path[self.depth][-1]
        self.depth += 1
        self.probability *= probability
        return [outcome]


# Turns and scorers (None: all) by name. Members are in the user's order; turns need not be. The
# branches of the first ones can be walked; the others have too many.
POLICIES = {
    "2 members, 1-1": (chef_turns(1, 1), None),
    "2 members, 1-2": (chef_turns(1, 2), None),
    "3 members, 1-1-1": (chef_turns(1, 1, 1), None),
    "2 members and a proposer": ([Turn((0,), 1), Turn((2,), 1), Turn((1,), 1)], (0, 1)),
    "1 member and a proposer": (chef_turns(1, 2), (0,)),
    "sd, 2 members": (sd_turns(2, 1), None),
    "sd, 2 members, 2 tokens": (sd_turns(2, 2), None),
    "sd, 3 members": (sd_turns(3, 1), None),
    "sd, 2 members and a proposer": (sd_turns(3, 2), (0, 1)),
}
LONGER_POLICIES = {
    "2 members, 1-5": (chef_turns(1, 5), None),
    "2 members, 5-1": ([Turn((1,), 1), Turn((0,), 5)], None),
    "3 members, 2-1-3": ([Turn((1,), 1), Turn((0,), 2), Turn((2,), 3)], None),
    "4 members, 1-1-1-1": (chef_turns(1, 1, 1, 1), None),
    "4 members, 1-2-1-3": (chef_turns(1, 2, 1, 3), None),
    "3 members and a proposer": ([Turn((3,), 1), *chef_turns(1, 3, 2)], (0, 2, 3)),
    "sd, 4 members": (sd_turns(4, 5), None),
    "sd, two that propose": ([Turn((0,), 0), Turn((1,), 1), Turn((2,), 2)], (0, 1)),
}


def setting(policy: str, vocab_size: int, seed: int = 0) -> tuple[list, list[Turn], Sequence[int]]:
    turns, scorers = (POLICIES | LONGER_POLICIES)[policy]
    num_members = 1 + max(max(turn.members) for turn in turns)
    members = table_members(num_members, vocab_size, seed)
    return members, turns, range(num_members) if scorers is None else scorers


@pytest.mark.parametrize("combine, eos", [(weighted, None), (contrastive, 2)])
@pytest.mark.parametrize("policy", quick(POLICIES, "2 members, 1-1", "sd, 3 members"))
def test_every_branch_adds_up_to_the_ensemble(policy, combine, eos):
    members, turns, scorers = setting(policy, vocab_size=3)
    rng = EveryBranch()
    chef = Chef(members, combine, turns, rng, scorers)
    probs = rng.walk(partial(chef.generate, PROMPT, 3, eos))
    exact = exact_probs([members[m] for m in scorers], combine, 3, eos)
    assert probs == pytest.approx(exact, abs=1e-10)


# The decisions of these judge two or three tokens together.
BLOCK_POLICIES = {
    "2 members, 1-2": (chef_turns(1, 2), None),
    "2 members and a proposer of 2": ([Turn((0,), 1), Turn((2,), 1), Turn((1,), 2)], (0, 2)),
    "1 member and a proposer": (chef_turns(1, 2), (0,)),
    "sd, 2 members, 2 tokens": (sd_turns(2, 2), None),
    "sd, 2 members, 3 tokens": (sd_turns(2, 3), None),
    "3 members, 1-1-2": (chef_turns(1, 1, 2), None),
    "sd, 3 members, 2 tokens": (sd_turns(3, 2), None),
}


@pytest.mark.parametrize("combine, eos", [(weighted, None), (contrastive, 1)])
@pytest.mark.parametrize("policy", quick(BLOCK_POLICIES, "2 members, 1-2"))
def test_every_branch_of_blocks_adds_up_to_the_ensemble(policy, combine, eos):
    turns, scorers = BLOCK_POLICIES[policy]
    num_members = 1 + max(max(turn.members) for turn in turns)
    members = table_members(num_members, vocab_size=2)
    scorers = range(num_members) if scorers is None else scorers
    exact = exact_probs([members[m] for m in scorers], combine, 4, eos)
    cycles = {}
    for in_blocks in (False, True):
        rng, means = EveryBranch(), Counter()
        chef = Chef(members, combine, turns, rng, scorers, in_blocks=in_blocks)

        def generate(chef=chef, rng=rng, means=means) -> Output:
            output = chef.generate(PROMPT, 4, eos)
            means["cycles"] += rng.probability * output.cycles
            return output

        assert rng.walk(generate) == pytest.approx(exact, abs=1e-10)
        cycles[in_blocks] = means["cycles"]
    assert cycles[True] <= cycles[False] + 1e-9, "accepted runs are no shorter"
    if (policy, combine) == ("2 members, 1-2", weighted):
        assert cycles[True] < cycles[False] - 1e-3, "and here they are longer"


def test_lemma_of_one_position():
    p, r = [0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.1, 0.5]
    left = residual(p, r)
    rejected = sum(p[x] * (1 - acceptance(x, p, r)) for x in range(3))
    emitted = [
        (p[x] * acceptance(x, p, r) if p[x] else 0) + rejected * left[x] / sum(left)
        for x in range(4)
    ]
    assert emitted == pytest.approx(r)


def draws_p_value(
    policy: str,
    vocab_size: int,
    length: int,
    combine: Callable = weighted,
    num_draws: int = NUM_DRAWS,
    method: type[Chef] = Chef,
    **kwargs,
) -> float:
    members, turns, scorers = setting(policy, vocab_size)
    chef = method(members, combine, turns, Random(0), scorers, **kwargs)
    draws = [chef.generate(PROMPT, length).tokens for _ in range(num_draws)]
    exact = exact_probs([members[m] for m in scorers], combine, length)
    return chi_square_p_value(draws, exact)


@pytest.mark.parametrize("policy", quick([*LONGER_POLICIES, "2 members, 1-1"], "2 members, 1-5"))
def test_draws_are_from_the_ensemble(policy):
    assert draws_p_value(policy, vocab_size=3, length=4) > P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("policy", LONGER_POLICIES)
def test_draws_past_the_longest_segment(policy):
    assert draws_p_value(policy, vocab_size=2, length=8, num_draws=3_000) > P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["2 members, 5-1", "sd, 4 members"])
def test_draws_of_a_contrastive_ensemble(policy):
    assert draws_p_value(policy, vocab_size=5, length=3, combine=contrastive) > P_VALUE


BROKEN = {
    "accepts too much": partial(verify, accept=lambda x, p, r: min(1.0, 1.5 * r[x] / p[x])),
    "accepts too little": partial(verify, accept=lambda x, p, r: min(0.5, r[x] / p[x])),
    "replaces from the ensemble": partial(verify, replace=lambda p, r: r),
}


@pytest.mark.parametrize("policy", ["2 members, 1-1", "3 members, 2-1-3", "sd, 2 members"])
@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_the_test_notices_a_broken_rule(policy, broken):
    assert draws_p_value(policy, 3, 4, verify=BROKEN[broken]) < 1e-12


class KnowsTheWindow(Chef):
    """Drops a pending token because of its value, which no policy may do."""

    def _propose(self, i: int, num_tokens: int) -> None:
        super()._propose(i, num_tokens)
        if self.window and self.window[-1].token == 0:
            self.window.pop()


@pytest.mark.slow
def test_the_test_notices_a_drop_that_depends_on_the_dropped_token():
    assert draws_p_value("2 members, 1-1", 3, 4, method=KnowsTheWindow) < 1e-12


@pytest.mark.parametrize("combine", [weighted, contrastive])
@pytest.mark.parametrize("policy", POLICIES | LONGER_POLICIES)
def test_greedy_is_the_plain_loop(policy, combine):
    for seed in range(20):
        members, turns, scorers = setting(policy, vocab_size=5, seed=seed)
        out = Chef(members, combine, turns, Random(seed), scorers, greedy=True).generate(PROMPT, 30)
        tokens = PROMPT
        for _ in range(30):
            r = combine([members[m](tokens) for m in scorers])
            tokens += (r.index(max(r)),)
        assert out.tokens == tokens[len(PROMPT) :]


def test_counts_of_identical_members():
    member, *_ = table_members(1, vocab_size=4)
    out = Chef([member] * 2, weighted, chef_turns(1, 1), Random(0)).generate(PROMPT, 99)
    # Two tokens a cycle, except for the first cycle's first call, which finds no window.
    assert out.cycles == 50
    assert out.calls == out.proposed == [50, 50]
    assert out.judged == out.accepted == [50, 49]


def test_counts_of_identical_members_in_sd():
    member, *_ = table_members(1, vocab_size=4)
    out = Chef([member] * 3, weighted, sd_turns(3, 4), Random(0)).generate(PROMPT, 46)
    # The first cycle judges nothing and draws one token. Every other cycle emits 4 + 1.
    assert out.cycles == 10
    assert out.calls == [10, 10, 10 * 5]
    assert out.proposed == [0, 0, 40]
    assert out.judged == out.accepted == [0, 0, 36]


@pytest.mark.parametrize("policy", POLICIES | LONGER_POLICIES)
def test_counts(policy):
    members, turns, scorers = setting(policy, vocab_size=3)
    out = Chef(members, weighted, turns, Random(0), scorers).generate(PROMPT, 200)
    assert len(out.tokens) == 200
    by_member = zip(out.accepted, out.judged, out.proposed, strict=True)
    assert all(accepted <= judged <= proposed for accepted, judged, proposed in by_member)
    for turn in turns:
        for member in turn.members:
            if turns[0].gamma == 0:  # one more pass for the drawn token, if there was one
                least, most = max(1, turn.gamma), turn.gamma + 1
            else:
                least = most = turn.gamma
            assert least * out.cycles <= out.calls[member] <= most * out.cycles
            if turn.gamma == 1 and turns[0].gamma == 1 and member in scorers:
                # It proposes unless it has just replaced a token.
                assert out.proposed[member] >= out.cycles - (sum(out.judged) - sum(out.accepted))


def expected_equal(*a: float) -> float:
    """N members with gamma 1 and the acceptances `a`."""
    mean = len(a) / sum(1 / a_j for a_j in a)
    return len(a) / (1 + (len(a) - 1) * (1 - mean))


def expected_pair(gamma: int, a: float, b: float) -> float:
    """A member that proposes `gamma` tokens, accepted with `a`, and another accepted with `b`."""
    short = a**gamma * (1 - b) / (1 - (a ** (gamma - 1) - a**gamma) * (1 - b))
    return sum(
        weight * (1 - a ** (length + 1)) / (1 - a)
        for length, weight in [(gamma, 1 - short), (gamma - 1, short)]
    )


def expected_sd(gamma: int, a: float) -> float:
    return (1 - a ** (gamma + 1)) / (1 - a)


# Each member's acceptance, turns, members of the ensemble, expected tokens per cycle.
SPEEDS = {
    "1-1, a = 0.5": ([0.5] * 2, chef_turns(1, 1), None, 2 / (2 - 0.5)),
    "1-1, a = 0.8": ([0.8] * 2, chef_turns(1, 1), None, 2 / (2 - 0.8)),
    "1-1, a = 0.9 and 0.6": ([0.9, 0.6], chef_turns(1, 1), None, expected_equal(0.9, 0.6)),
    "1-1-1, a = 0.8": ([0.8] * 3, chef_turns(1, 1, 1), None, expected_equal(*[0.8] * 3)),
    "1-1-1, unequal": ([0.9, 0.5, 0.7], chef_turns(1, 1, 1), None, expected_equal(0.9, 0.5, 0.7)),
    "1-1-1-1, a = 0.8": ([0.8] * 4, chef_turns(1, 1, 1, 1), None, expected_equal(*[0.8] * 4)),
    "1-3, a = 0.6, b = 0.9": ([0.9, 0.6], chef_turns(1, 3), None, expected_pair(3, 0.6, 0.9)),
    "1-5, a = b = 0.8": ([0.8] * 2, chef_turns(1, 5), None, expected_pair(5, 0.8, 0.8)),
    "sd, gamma 5, a = 0.8": ([0.8] * 2, sd_turns(2, 5), None, expected_sd(5, 0.8)),
    "sd, gamma 5 outside, a = 0.8": ([0.8] * 3, sd_turns(3, 5), (0, 1), expected_sd(5, 0.8)),
}


def simulate(name: str, num_tokens: int, seed: int = 0) -> Output:
    """Members that give probability a to the one token that the ensemble wants."""
    rates, turns, scorers, _ = SPEEDS[name]
    members = [lambda tokens, a=a: (a, 1 - a) for a in rates]
    chef = Chef(members, lambda _: (1.0, 0.0), turns, Random(seed), scorers)
    return chef.generate((), num_tokens)


@pytest.mark.parametrize("name", quick(SPEEDS, "1-1, a = 0.8", "1-5, a = b = 0.8"))
def test_tokens_per_cycle_are_as_derived(name):
    out = simulate(name, 3000)
    assert len(out.tokens) / out.cycles == pytest.approx(SPEEDS[name][-1], rel=0.03)
