"""The order in which members are called, and how many tokens each proposes.

Plain data. This module knows neither models nor scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm.ensemble_decode.errors import ConfigFieldError


@dataclass(frozen=True)
class Turn:
    """One call: `members` run together and propose `gamma` tokens.

    `members` holds places in the user's order.
    """

    members: tuple[int, ...]
    gamma: int


@dataclass(frozen=True)
class Turns:
    """A cycle of calls. The first turn opens the engine's step, and the others follow in it.

    Args:
        sequence: the first turn proposes one token (policy `chef`) or none (`sd`). If it proposes
            none, the token past the window is drawn from the ensemble, once the last scorer has
            scored it. Each other turn has one member, which proposes one token or more.
        counted: by member, whether the ensemble counts it. A member that is not counted only
            proposes. No decision waits for its scores.
    """

    sequence: tuple[Turn, ...]
    counted: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, turn: int) -> Turn:
        return self.sequence[turn]

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.sequence)

    @property
    def max_gammas(self) -> tuple[int, ...]:
        """By turn, the most tokens that it proposes."""
        return tuple(turn.gamma for turn in self.sequence)

    @property
    def in_window(self) -> list[int]:
        """The turns in the order of their segments in the window that a step finds.

        The first turn's own proposal comes last.
        """
        return [*range(1, len(self)), 0]

    @property
    def turn_of(self) -> dict[int, int]:
        """By member, the turn in which it is called."""
        return {member: at for at, turn in enumerate(self.sequence) for member in turn.members}

    @property
    def window(self) -> int:
        """The most tokens carried from one step to the next. The first turn has not seen them."""
        return sum(self.max_gammas[1:])

    @property
    def draws(self) -> bool:
        """Whether the token past the window is drawn from the ensemble instead of proposed."""
        return self.sequence[0].gamma == 0

    @property
    def last_scorer(self) -> int:
        """The turn that makes the last decision of a step."""
        return max(turn for turn in range(len(self)) if self.is_scorer(turn))

    def follows_draw(self, turn: int) -> bool:
        """Whether the token past the window was drawn in an earlier turn of the same step."""
        return self.draws and turn > self.last_scorer

    def is_scorer(self, turn: int) -> bool:
        return any(self.counted[member] for member in self.sequence[turn].members)

    def num_new(self, turn: int) -> int:
        """The most tokens that follow the engine step's tokens when a turn after the first is
        called.

        They are proposals of the turns before it, or one replacement.
        """
        return max(1, sum(self.max_gammas[:turn]))

    def num_unscored(self, turn: int) -> int:
        """The most positions that the turn's members have not scored when it is called.

        They are the tokens that the other turns proposed, the token that was drawn before this
        turn, and the position past the end.
        """
        others = sum(self.max_gammas) - self.max_gammas[turn]
        return others + self.follows_draw(turn) + 1

    def num_read(self, turn: int, step_len: int) -> int:
        """Tokens of a decoding request that a turn's member reads in its first pass.

        The engine step has `step_len` tokens of the request. The number is capped at the positions
        the member has not scored.
        """
        return min(step_len + self.num_new(turn), self.num_unscored(turn))

    def num_passes(self, turn: int, gamma: int) -> int:
        """Passes of one token that follow the first pass of a turn that proposes `gamma` tokens.

        The first pass gives the first proposal, so there is one pass less than `gamma`. If a token
        is drawn after the first pass, there are `gamma`: the first of them reads the drawn token.
        """
        draws_now = self.draws and turn == self.last_scorer
        return max(0, gamma - (not draws_now))

    def num_calls(self, gammas: Sequence[int]) -> tuple[int, ...]:
        """By turn, the passes of its members in a cycle in which the turns propose `gammas`."""
        further = range(1, len(self))
        return (1, *(1 + self.num_passes(turn, gammas[turn]) for turn in further))

    def gammas(self, depth: int) -> tuple[int, ...]:
        """Tokens that each turn proposes in a step that leaves at most `depth` in the window.

        The last turns get the room first, because the cheapest members come last.
        """
        first, *others = self.max_gammas
        gammas = [first]
        for max_gamma in reversed(others):
            gammas.insert(1, min(max_gamma, depth))
            depth -= gammas[1]
        return tuple(gammas)

    def places(self, depth: int) -> list[tuple[int, int]]:
        """By token of a window of `depth` tokens: its turn, and its place in that segment."""
        gammas = self.gammas(depth)
        return [(turn, at) for turn in range(1, len(self)) for at in range(gammas[turn])]

    def num_decidable(self, turn: int) -> int:
        """The number of segments that all scorers have scored after this turn.

        Segments count in the order of the window that the step finds: turns 1, 2, ..., and then the
        first turn.
        """
        if not self.is_scorer(turn):
            return 0
        later = [at for at in range(turn + 1, len(self)) if self.is_scorer(at)]
        return later[0] if later else len(self)

    def decidable(self, turn: int) -> range:
        """The segments that become decidable with this turn, see `num_decidable`."""
        before = max((self.num_decidable(at) for at in range(turn)), default=0)
        return range(before, self.num_decidable(turn))

    def max_tokens(self, segments: range) -> int:
        """The most tokens that these segments of the window hold."""
        return sum(self.max_gammas[self.in_window[at]] for at in segments)


def sd_turns(num_members: int, gamma: int, counted: Sequence[bool] | None = None) -> Turns:
    """`*_sd`: the last member always proposes. The others only score, in one call.

    For `counted`, see `Turns`. None: all members count.
    """
    *others, last = range(num_members)
    counted = (True,) * num_members if counted is None else tuple(counted)
    return Turns((Turn(tuple(others), 0), Turn((last,), gamma)), counted)


def chef_turns(
    gammas: Sequence[int],
    costs: Sequence[float] | None,
    counted: Sequence[bool],
    order: Sequence[int] | None = None,
) -> Turns:
    """Turns of one member each.

    Args:
        gammas, costs, counted: by member, in the user's order. `costs` are relative. They may be
            None if there is an order.
        order: the members in the order of their calls. None: `default_order`.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    if order is None:
        order = default_order(gammas, costs, counted)
    elif sorted(order) != list(range(len(gammas))):
        raise ConfigFieldError(
            "chef.turn_order",
            f"{list(order)} must name each member once, by its place from 0 to {len(gammas) - 1}",
        )
    elif gammas[order[0]] != 1 or not counted[order[0]]:
        raise ConfigFieldError(
            "chef.turn_order",
            f"member {order[0]} (counted from 0) cannot be the first; the first member must have "
            "gamma 1 and a weight above 0, so begin with another member, or set its gamma to 1",
        )
    return Turns(tuple(Turn((member,), gammas[member]) for member in order), tuple(counted))


def default_order(
    gammas: Sequence[int], costs: Sequence[float], counted: Sequence[bool]
) -> list[int]:
    """The members in the order of their calls: `primary`, then those that propose fewest tokens.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    opens = primary(gammas, costs, counted)
    others = [member for member in range(len(gammas)) if member != opens]
    return [opens, *sorted(others, key=lambda member: gammas[member])]


def primary(gammas: Sequence[int], costs: Sequence[float], counted: Sequence[bool]) -> int:
    """The member that opens the step: the costliest scorer among those that propose one token.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    candidates = [m for m in range(len(gammas)) if gammas[m] == 1 and counted[m]]
    if not candidates:
        raise ConfigFieldError(
            "chef.gamma",
            f"{list(gammas)} has no 1; the member that opens a cycle proposes one "
            "token, so give the largest member gamma 1",
        )
    return max(candidates, key=lambda member: costs[member])


def spread_gamma(gamma: int, costs: Sequence[float]) -> list[int]:
    """One gamma per member: the cheapest member proposes `gamma` tokens, every other member one."""
    cheapest = min(reversed(range(len(costs))), key=lambda member: costs[member])
    return [gamma if member == cheapest else 1 for member in range(len(costs))]
