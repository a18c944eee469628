"""What became of the proposals: counted on the device, read when somebody asks."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm.chef.state import Cycle, segment_of
from vllm.chef.turns import Turns


class TurnStats:
    """Counts over all requests since the last `reset`."""

    def __init__(self, turns: Turns, device: torch.device) -> None:
        self.turns = turns
        self.width = max(1, *(turn.gamma for turn in turns.turns))
        self.row_of = torch.tensor(turns.in_window, device=device)
        """[num_turns] turns in the order of their segments in the window"""
        shape = len(turns) * self.width
        self.judged = torch.zeros(shape, dtype=torch.int64, device=device)
        self.accepted = torch.zeros(shape, dtype=torch.int64, device=device)
        self.calls = torch.zeros(len(turns), dtype=torch.int64, device=device)
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, cycle: Cycle, gammas: Sequence[int]) -> None:
        """Count a cycle whose decisions are made, in which the turns proposed `gammas`."""
        columns = torch.arange(self.turns.window + 1, device=cycle.slots.device)
        lengths = cycle.segments
        segment = segment_of(columns, lengths)
        offset = columns - (lengths.cumsum(1) - lengths).gather(1, segment)
        cell = (self.row_of[segment] * self.width + offset).clamp(0, len(self.judged) - 1)
        active = cycle.active[:, None]
        judged = columns < (cycle.num_accepted + cycle.replaced)[:, None]
        accepted = columns < cycle.num_accepted[:, None]
        self.judged.index_add_(0, cell.flatten(), (judged & active).flatten().long())
        self.accepted.index_add_(0, cell.flatten(), (accepted & active).flatten().long())
        num_active = cycle.active.sum()
        self.totals += torch.stack([num_active, (cycle.num_decided * cycle.active).sum()])
        for turn, gamma in enumerate(gammas):
            passes = 1 + self.turns.num_passes(gamma) if turn else 1
            self.calls[turn] += passes * num_active

    def reset(self) -> None:
        for counts in (self.judged, self.accepted, self.calls, self.totals):
            counts.zero_()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; by member in the user's order, and by position in its segment."""
        num_cycles, num_tokens = self.totals.tolist()
        turns = self.turns.turns
        turn_of = self.turns.turn_of
        calls = self.calls.tolist()

        def by_member(counts: torch.Tensor) -> list[list[int]]:
            rows = counts.view(len(turns), self.width).tolist()
            return [rows[turn_of[m]][: turns[turn_of[m]].gamma] for m in sorted(turn_of)]

        return {
            "num_cycles": num_cycles,
            "num_tokens": num_tokens,
            "num_calls": [calls[turn_of[m]] for m in sorted(turn_of)],
            "num_judged": by_member(self.judged),
            "num_accepted": by_member(self.accepted),
        }
