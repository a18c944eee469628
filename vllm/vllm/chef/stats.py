"""Counts of what happened to the proposals. They are kept on the device and read on request."""

from typing import Any

import torch

from vllm.chef.turns import Turns


class TurnStats:
    """Counts over all requests since the last `reset`. `ops` update them when a cycle ends."""

    def __init__(self, turns: Turns, device: torch.device) -> None:
        self.turns = turns
        self.width = max(1, *turns.max_gammas)
        self.row_of = torch.tensor(turns.in_window, device=device)
        """[num_turns] turns in the order of their segments in the window"""
        shape = len(turns) * self.width
        self.judged = torch.zeros(shape, dtype=torch.int64, device=device)
        """[num_turns * width], and so is `accepted`"""
        self.accepted = torch.zeros(shape, dtype=torch.int64, device=device)
        self.calls = torch.zeros(len(turns), dtype=torch.int64, device=device)
        """[num_turns]"""
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)
        """[2] cycles, and tokens that they emitted"""

    def reset(self) -> None:
        for counts in (self.judged, self.accepted, self.calls, self.totals):
            counts.zero_()

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain numbers.

        Lists are by member in the user's order, and within a member by place in its segment.
        """
        num_cycles, num_tokens = self.totals.tolist()
        turn_of, max_gammas = self.turns.turn_of, self.turns.max_gammas
        calls = self.calls.tolist()

        def by_member(counts: torch.Tensor) -> list[list[int]]:
            rows = counts.view(len(max_gammas), self.width).tolist()
            return [rows[turn_of[m]][: max_gammas[turn_of[m]]] for m in sorted(turn_of)]

        return {
            "num_cycles": num_cycles,
            "num_tokens": num_tokens,
            "num_calls": [calls[turn_of[m]] for m in sorted(turn_of)],
            "num_judged": by_member(self.judged),
            "num_accepted": by_member(self.accepted),
        }
