"""What vLLM's metrics must show of members that take turns, counted by the algorithm on paper.

This module knows the reference of the algorithm. It knows no engine.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import torch
from tiny_models import next_logits

from vllm.chef.reference import Chef, Member, Tokens

NAMES = ("draft", "judged", "accepted")


class CountingChef(Chef):
    """Counts by member, and by place in the member's proposal.

    A cycle is to judge the window that it finds, and the proposal of the first turn.
    """

    def count(self, prompts: Iterable[Sequence[int]], num_tokens: int) -> Counter[Any]:
        """The counts over requests with `num_tokens` tokens each, by the names of metrics.

        Counts by member and position have keys of three.
        """
        self.counts: Counter[Any] = Counter()
        for prompt in prompts:
            self.generate(tuple(prompt), num_tokens)
        return self.counts

    def _call(self, i: int, replaced_before: bool) -> bool:
        if i == 0:
            self.before = len(self.committed)
            self.segments = Counter(proposal.turn for proposal in self.window)
            self.sums = [[*self.out.judged], [*self.out.accepted]]
        replaced = super()._call(i, replaced_before)
        if i == 0:
            self.segments[0] = sum(proposal.turn == 0 for proposal in self.window)
        if i == len(self.turns) - 1:
            self._end_cycle()
        return replaced

    def _end_cycle(self) -> None:
        found = {self.turns[turn].members[0]: n for turn, n in self.segments.items()}
        judged, accepted = (
            {member: now - then for member, (now, then) in enumerate(zip(*sums, strict=True))}
            for sums in zip((self.out.judged, self.out.accepted), self.sums, strict=True)
        )
        for name, by_member in zip(NAMES, (found, judged, accepted), strict=True):
            for member, number in by_member.items():
                # A member's judged tokens are the first of its segment, and so are the accepted.
                self.counts.update((name, member, place) for place in range(number))
        num_tokens = len(self.committed) - self.before
        window = sum(number for turn, number in self.segments.items() if turn)
        self.counts["cycles"] += 1
        self.counts["tokens"] += num_tokens
        if window:
            # What vLLM counts: a token of the step's own, and before it the accepted drafts.
            self.counts["num_drafts"] += 1
            self.counts["num_draft_tokens"] += window
            self.counts["num_accepted_tokens"] += num_tokens - 1
            self.counts.update(("num_accepted_tokens_per_pos", p) for p in range(num_tokens - 1))


def counting_chef(
    references: Sequence[torch.nn.Module], weights: Sequence[float], turns: Sequence[Any]
) -> CountingChef:
    """The algorithm on models of transformers, at temperature 0. It combines probabilities."""

    def member(reference: torch.nn.Module) -> Member:
        known: dict[Tokens, list[float]] = {}

        def probs(tokens: Tokens) -> list[float]:
            if tokens not in known:
                known[tokens] = next_logits(reference, tokens).softmax(-1).tolist()
            return known[tokens]

        return probs

    def combine(probs: list[Any]) -> list[float]:
        columns = zip(*probs, strict=True)
        return [sum(w * p for w, p in zip(weights, ps, strict=True)) for ps in columns]

    members = [member(reference) for reference in references]
    return CountingChef(members, combine, turns, Random(0), greedy=True)
