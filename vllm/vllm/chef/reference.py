"""The chef algorithm for one sequence, on members that are plain functions.

It is the oracle of the tests. Read it beside `docs/algorithm.md`. It knows members, turns and the
window of pending tokens. It knows nothing of the engine: no batch, no KV cache, no tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

Tokens = tuple[int, ...]
Distribution = Sequence[float]  # [vocab_size], sums to 1
Member = Callable[[Tokens], Distribution]  # distribution of the token after these tokens


class Proposal(NamedTuple):
    token: int
    turn: int  # tokens of one turn are a segment of the window
    probs: Distribution  # distribution that the token was drawn from


@dataclass
class Output:
    tokens: Tokens
    cycles: int  # a cycle calls every turn once, the first turn first
    calls: list[int]  # forward passes; this list and the next ones are by member, in user's order
    proposed: list[int]  # tokens
    judged: list[int]  # accepted or replaced; all other proposals were dropped unjudged
    accepted: list[int]


def draw(weights: Sequence[float], rng: Random) -> int:
    return rng.choices(range(len(weights)), weights)[0]


def greedy_probs(probs: Distribution) -> Distribution:
    """All probability on the likeliest token. Sampling from it is decoding at temperature 0."""
    best = max(range(len(probs)), key=probs.__getitem__)
    return [float(token == best) for token in range(len(probs))]


def acceptance(token: int, p: Distribution, r: Distribution) -> float:
    return min(1.0, r[token] / p[token])


def residual(p: Distribution, r: Distribution, ratio: float = 1.0) -> Sequence[float]:
    """The probability by which `ratio * r` exceeds `p`, per token. `draw` normalises it."""
    return [max(0.0, ratio * r_x - p_x) for p_x, r_x in zip(p, r, strict=True)]


def verify(
    token: int, p: Distribution, r: Distribution, rng: Random, accept=acceptance, replace=residual
) -> tuple[bool, int]:
    """Accepted or not, and the token to emit: drawn from `r` (arXiv 2211.17192, algorithm 1)."""
    probability = accept(token, p, r)
    if draw([1 - probability, probability], rng):
        return True, token
    return False, draw(replace(p, r), rng)


class Chef:
    """Members that take turns to propose tokens. The ensemble judges the tokens."""

    def __init__(
        self,
        members: Sequence[Member],
        combine: Callable[[list[Distribution]], Distribution],
        turns: Sequence[Any],  # each has `members` and `gamma`, like `turns.Turn`
        rng: Random,
        scorers: Sequence[int] | None = None,  # members that `combine` sees; None: all
        greedy: bool = False,
        verify: Callable[..., tuple[bool, int]] = verify,
        in_blocks: bool = False,  # judge the tokens of a decision together
    ) -> None:
        self.members, self.combine, self.turns = members, combine, turns
        self.rng, self.verify = rng, verify
        self.decide = self._decide_block if in_blocks else self._decide
        self.sharpen = greedy_probs if greedy else lambda probs: probs
        self.scorers = range(len(members)) if scorers is None else scorers
        self.scoring = [any(member in self.scorers for member in turn.members) for turn in turns]
        self.last_scoring = max(i for i in range(len(turns)) if self.scoring[i])
        # policy `sd`: the first turn only scores. The token past the window is drawn from r.
        self.is_sd = turns[0].gamma == 0

    def generate(self, prompt: Tokens, max_tokens: int, eos: int | None = None) -> Output:
        self.committed, self.window = tuple(prompt), []
        self.scores: list[dict[Tokens, Distribution]] = [{} for _ in self.members]
        self.out = out = Output((), 0, *([0] * len(self.members) for _ in range(4)))
        while len(out.tokens) < max_tokens and eos not in out.tokens:
            replaced = False
            for i in range(len(self.turns)):
                replaced |= self._call(i, replaced)
            out.cycles += 1
            out.tokens = self.committed[len(prompt) :][:max_tokens]
        if eos in out.tokens:
            out.tokens = out.tokens[: out.tokens.index(eos) + 1]
        return out

    def _call(self, i: int, replaced_before: bool) -> bool:
        """One turn. Returns whether it replaced a token. `replaced_before`: an earlier turn did."""
        for member in self.turns[i].members:
            self._forward(member)
        replaced = self.scoring[i] and self.decide(self._segments_scored_by_all(i))
        end_is_scored = i == self.last_scoring and not (self.window or replaced or replaced_before)
        if self.is_sd and end_is_scored:
            self.committed += (draw(self._target(self.committed), self.rng),)
        # Chef makes gamma passes. After a replacement, the first pass gives no proposal.
        self._propose(i, self.turns[i].gamma - (replaced and not self.is_sd))
        return replaced

    def _forward(self, member: int) -> None:
        """One pass over all unseen tokens. It scores the window and one position past its end."""
        text, seen, model = self._text(), self.scores[member], self.members[member]
        prefixes = [text[:end] for end in range(len(self.committed), len(text) + 1)]
        self.scores[member] = {x: seen[x] if x in seen else model(x) for x in prefixes}
        self.out.calls[member] += 1

    def _text(self) -> Tokens:
        return self.committed + tuple(proposal.token for proposal in self.window)

    def _target(self, prefix: Tokens) -> Distribution:
        """r at the position after the prefix. Every scorer must have scored it."""
        return self.sharpen(self.combine([self.scores[m][prefix] for m in self.scorers]))

    def _segments_scored_by_all(self, i: int) -> list[int]:
        """The segments that all have scored once `i` ran: up to the next turn that scores."""
        after = [(i + k) % len(self.turns) for k in range(1, len(self.turns) + 1)]
        return after[: [self.scoring[turn] for turn in after].index(True) + 1]

    def _decide(self, segments: list[int]) -> bool:
        """Judge these segments, oldest token first. Returns whether a token was replaced."""
        while self.window and self.window[0].turn in segments:
            token, turn, probs = self.window.pop(0)
            (proposer,) = self.turns[turn].members
            target = self._target(self.committed)
            accepted, emitted = self.verify(token, probs, target, self.rng)
            self.committed += (emitted,)
            self.out.judged[proposer] += 1
            self.out.accepted[proposer] += accepted
            if not accepted:
                self.window.clear()
                return True
        return False

    def _decide_block(self, segments: list[int]) -> bool:
        """The same, for all their tokens together (arXiv 2403.10444)."""
        block = [proposal for proposal in self.window if proposal.turn in segments]
        targets, ratios, prefix = [], [1.0], self.committed
        for token, _, probs in block:
            targets.append(self._target(prefix))
            ratios.append(min(1.0, ratios[-1] * targets[-1][token] / probs[token]))
            prefix += (token,)
        # At each place: what a replacement is drawn from.
        left = [
            residual(p.probs, r, ratio) for p, r, ratio in zip(block, targets, ratios, strict=False)
        ]
        num_accepted = 0
        for at in range(1, len(block) + 1):
            chance = ratios[at]
            if at < len(block):
                mass = sum(left[at])
                rest = 1.0 - ratios[at]
                chance = mass / (mass + rest) if mass + rest > 0 else 1.0
            if draw([1 - chance, chance], self.rng):
                num_accepted = at
        for at, proposal in enumerate(block[: num_accepted + 1]):
            (proposer,) = self.turns[proposal.turn].members
            self.out.judged[proposer] += 1
            self.out.accepted[proposer] += at < num_accepted
        self.committed += tuple(proposal.token for proposal in block[:num_accepted])
        self.window = self.window[num_accepted:]
        if num_accepted == len(block):
            return False
        self.committed += (draw(left[num_accepted], self.rng),)
        self.window.clear()
        return True

    def _propose(self, i: int, num_tokens: int) -> None:
        for _ in range(num_tokens):
            (member,) = self.turns[i].members
            if self._text() not in self.scores[member]:
                self._forward(member)
            probs = self.sharpen(self.scores[member][self._text()])
            self.window.append(Proposal(draw(probs, self.rng), i, probs))
            self.out.proposed[member] += 1
