"""Whose turn it is: the order in which members are called, and how many tokens each proposes.

Plain data; knows neither models nor scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One call: `members` (places in the user's order) run together and propose `gamma` tokens."""

    members: tuple[int, ...]
    gamma: int


@dataclass(frozen=True)
class Turns:
    """A cycle of calls. The first turn opens the engine's step, the others follow in it.

    Args:
        sequence: the first proposes one token (chef), or none (`*_sd`); then the token past the
            window is drawn from the ensemble once the last scorer has scored it. Each other
            turn has one member, which proposes one token or more.
        scores: by member, whether the ensemble counts it. One that it does not count proposes,
            and is never waited for.
    """

    sequence: tuple[Turn, ...]
    scores: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, turn: int) -> Turn:
        return self.sequence[turn]

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.sequence)

    @property
    def max_gammas(self) -> tuple[int, ...]:
        """By turn, tokens that it proposes at most."""
        return tuple(turn.gamma for turn in self.sequence)

    @property
    def in_window(self) -> list[int]:
        """The turns in the order of their segments, as the step finds the window; the first turn's
        own proposal comes last."""
        return [*range(1, len(self)), 0]

    @property
    def turn_of(self) -> dict[int, int]:
        """By member, the turn it is called in."""
        return {member: at for at, turn in enumerate(self.sequence) for member in turn.members}

    @property
    def window(self) -> int:
        """Tokens carried from one step to the next, at most: what the first turn has not seen."""
        return sum(self.max_gammas[1:])

    @property
    def draws(self) -> bool:
        """Whether the token past the window is drawn from the ensemble, not proposed."""
        return self.sequence[0].gamma == 0

    @property
    def last_scorer(self) -> int:
        """The turn that ends the step's decisions."""
        return max(turn for turn in range(len(self)) if self.is_scorer(turn))

    def is_scorer(self, turn: int) -> bool:
        return any(self.scores[member] for member in self.sequence[turn].members)

    def num_new(self, turn: int) -> int:
        """Tokens that have come behind those of the engine step when a turn after the first is
        called, at most: proposals of the turns before it, or one replacement."""
        return max(1, sum(self.max_gammas[:turn]))

    def num_unscored(self, turn: int) -> int:
        """Positions that the turn's members have not scored when it is called, at most: what the
        other turns proposed, and the one past the end. Where tokens are drawn, all turns score
        (`config.py` sees to that), and so none comes after the draw."""
        return 1 + sum(self.max_gammas) - self.max_gammas[turn]

    def num_read(self, turn: int, step_len: int) -> int:
        """Tokens that a turn's member reads in its first pass, of a request that decodes, with
        `step_len` tokens in the engine step: no more than it has not scored what comes after."""
        return min(step_len + self.num_new(turn), self.num_unscored(turn))

    def num_passes(self, gamma: int) -> int:
        """Passes of one token after the first of a turn that proposes `gamma`: one less, since the
        first gives the first proposal; where tokens are drawn, the drawn one goes through before.
        """
        return max(0, gamma - (not self.draws))

    def num_calls(self, gammas: Sequence[int]) -> tuple[int, ...]:
        """Passes of each turn's members in a cycle in which the turns propose `gammas`."""
        return (1, *(1 + self.num_passes(gamma) for gamma in gammas[1:]))

    def gammas(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that each turn proposes in a step that leaves a window of `num_tokens`, at most:
        as many of the last turns' as there is room for, since the cheapest come last."""
        first, *others = self.max_gammas
        gammas = [first]
        for max_gamma in reversed(others):
            gammas.insert(1, min(max_gamma, num_tokens))
            num_tokens -= gammas[1]
        return tuple(gammas)

    def places(self, num_tokens: int) -> list[tuple[int, int]]:
        """Of a window of `num_tokens`, each token's turn and place among that turn's."""
        gammas = self.gammas(num_tokens)
        return [(turn, at) for turn in range(1, len(self)) for at in range(gammas[turn])]

    def num_decidable(self, turn: int) -> int:
        """Segments that all scorers have scored after this turn, counted in the order of the
        window as the step finds it: those of turns 1, 2, ..., and the first turn's last."""
        if not self.is_scorer(turn):
            return 0
        later = [at for at in range(turn + 1, len(self)) if self.is_scorer(at)]
        return later[0] if later else len(self)

    def max_decided(self, turn: int) -> int:
        """Tokens that are decided by the end of this turn, at most."""
        return sum(self.max_gammas[at] for at in self.in_window[: self.num_decidable(turn)])


def sd_turns(num_members: int, gamma: int) -> Turns:
    """`*_sd`: the last member always proposes; the others only score, in one call."""
    *others, last = range(num_members)
    return Turns((Turn(tuple(others), 0), Turn((last,), gamma)), (True,) * num_members)


def chef_turns(
    gammas: Sequence[int],
    costs: Sequence[float],
    scores: Sequence[bool],
    order: Sequence[int] | None = None,
) -> Turns:
    """Turns of one member each.

    Args:
        gammas, costs, scores: by member, in the user's order; `costs` are relative.
        order: the members in the order of their calls. None: the costliest that proposes one
            token opens, and the others follow by the tokens they propose, those with most last.

    Raises:
        ValueError: one line that names the key and the remedy.
    """
    if order is None:
        opens = primary(gammas, costs, scores)
        others = [member for member in range(len(gammas)) if member != opens]
        order = [opens, *sorted(others, key=lambda member: gammas[member])]
    elif sorted(order) != list(range(len(gammas))):
        raise ValueError(
            f"method.turn_order: {list(order)} must name each member once, by its place from 0 to "
            f"{len(gammas) - 1}"
        )
    elif gammas[order[0]] != 1 or not scores[order[0]]:
        raise ValueError(
            f"method.turn_order: member {order[0]} cannot open the step, which a member of the "
            "ensemble with gamma 1 must do; begin with another, or set its gamma to 1"
        )
    return Turns(tuple(Turn((member,), gammas[member]) for member in order), tuple(scores))


def primary(gammas: Sequence[int], costs: Sequence[float], scores: Sequence[bool]) -> int:
    """The member that opens the step: the costliest scorer of those that propose one token."""
    candidates = [m for m in range(len(gammas)) if gammas[m] == 1 and scores[m]]
    if not candidates:
        raise ValueError(
            f"method.gamma: {list(gammas)} has no 1; the member that opens a cycle proposes one "
            "token, so give the largest member gamma 1"
        )
    return max(candidates, key=lambda member: costs[member])


def spread_gamma(gamma: int, costs: Sequence[float]) -> list[int]:
    """One number for all members: the cheapest proposes `gamma` tokens, the others one each."""
    cheapest = min(reversed(range(len(costs))), key=lambda member: costs[member])
    return [gamma if member == cheapest else 1 for member in range(len(costs))]
