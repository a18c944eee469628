"""How many tokens each turn proposes in a step, on the host and in memory where graphs find it."""

from collections.abc import Iterable

import torch

from vllm.chef.turns import Turns


class StepGammas:
    """The gammas of a step. They follow from its depth: the tokens that it may leave pending.

    Args:
        depths: all depths that a step may have.
    """

    def __init__(self, turns: Turns, depths: Iterable[int], device: torch.device) -> None:
        self.turns = turns
        self.depths = sorted(depths)
        possible = {turns.gammas(depth) for depth in self.depths}
        self._on_device = {gammas: self._tensor(gammas, device) for gammas in possible}
        self._calls = {gammas: self._tensor(turns.num_calls(gammas), device) for gammas in possible}
        self.on_device = self._tensor([0] * len(turns), device)
        """[num_turns], in memory that does not move"""
        self._set(turns.gammas(self.depths[-1]))

    @staticmethod
    def _tensor(numbers: Iterable[int], device: torch.device) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def set_depth(self, depth: int) -> None:
        gammas = self.turns.gammas(depth)
        if gammas != self._at_hand:
            self._set(gammas)

    def num_passes(self, turn: int) -> int:
        """Passes of one token that the turn makes in the current step."""
        return self.turns.num_passes(turn, self._at_hand[turn])

    def possible_passes(self, turn: int) -> set[int]:
        """The numbers of passes that the turn may make in any step."""
        return {self.turns.num_passes(turn, gammas[turn]) for gammas in self._on_device}

    def _set(self, gammas: tuple[int, ...]) -> None:
        self._at_hand = gammas
        self.on_device.copy_(self._on_device[gammas])
        self.calls = self._calls[gammas]
        """[num_turns] passes of each turn's members in the current step"""
