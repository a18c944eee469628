"""What the cycles of a step did to the proposals, on the host.

The counts travel with the step's tokens: device -> worker -> scheduler -> front end. The scheduler
knows which requests still run, so it counts here. `TurnStats` counts on the device and does not
know them. This module knows no device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.worker.gpu.async_utils import AsyncOutput

from vllm.chef.turns import Turns

CYCLES = "cycles"
KINDS = ("draft", "judged", "accepted")


class StepCounts(NamedTuple):
    """What each request's cycle did, `[num_reqs]` in the order of the step's output."""

    lengths: np.ndarray
    """[num_reqs, num_turns] tokens of each turn that the cycle was to judge: the window that the
    step found, and the first turn's proposal
    """
    num_accepted: np.ndarray  # [num_reqs]
    num_judged: np.ndarray  # [num_reqs] accepted tokens, and one more where a token was refused

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "StepCounts":  # [num_reqs, num_turns + 2]
        return cls(rows[:, :-2], rows[:, -2], rows[:, -1])

    def of_requests(self, rows: Sequence[int]) -> "StepCounts":
        """The counts of some requests of the step."""
        return StepCounts(*(field[list(rows)] for field in self))

    @property
    def num_in_window(self) -> np.ndarray:  # [num_reqs]
        """Tokens of the window that the step found. The first turn proposes behind it."""
        return self.lengths[:, 1:].sum(axis=1)

    @property
    def num_accepted_in_window(self) -> np.ndarray:  # [num_reqs]
        return np.minimum(self.num_accepted, self.num_in_window)


@dataclass
class CountedOutput(ModelRunnerOutput):
    """The output of a step, with what its cycles did."""

    counts: StepCounts | None = None


class AsyncCountedOutput(AsyncModelRunnerOutput):
    """Takes the counts from where `Outputs.tokens` has them, behind the tokens of each request.

    Args:
        output: vLLM's. It copies all columns to the host, and returns the decided tokens only.
        num_tokens: the columns before the counts.
    """

    def __init__(self, output: AsyncOutput, num_tokens: int) -> None:
        self.output, self.num_tokens = output, num_tokens

    def get_output(self) -> CountedOutput:
        output = self.output.get_output()
        rows = self.output.sampled_token_ids[:, self.num_tokens :].astype(np.int32)
        return CountedOutput(**vars(output), counts=StepCounts.of_rows(rows))


class TurnCounts:
    """Sums the counts of a step by member, and by the token's place in the member's proposal."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.width = max(1, *turns.max_gammas)

    def places(self) -> Iterator[tuple[int, int]]:
        """Each member that proposes, with each place in its proposal."""
        for turn in self.turns:
            for place in range(turn.gamma):
                yield turn.members[0], place

    def drafts(self, counts: StepCounts) -> SpecDecodingStats | None:
        """What vLLM shows of drafts: the windows. None if all of them are empty."""
        window, accepted = counts.num_in_window, counts.num_accepted_in_window
        if not (num_drafts := np.count_nonzero(window)):
            return None
        position = np.arange(self.turns.window)
        return SpecDecodingStats(
            num_spec_tokens=self.turns.window,
            num_drafts=int(num_drafts),
            num_draft_tokens=int(window.sum()),
            num_accepted_tokens=int(accepted.sum()),
            num_accepted_tokens_per_pos=(position < accepted[:, None]).sum(axis=0).tolist(),
            num_draft_tokens_per_pos=(position < window[:, None]).sum(axis=0).tolist(),
        )

    def sums(self, counts: StepCounts) -> dict[str, int]:
        """The sums over all requests, by the names of `key`, without zeros."""
        lengths, num_accepted, num_judged = counts
        order = self.turns.in_window
        ends = lengths[:, order].cumsum(axis=1)
        starts = np.empty_like(lengths)  # [num_rows, num_turns] first column of each segment
        starts[:, order] = ends - lengths[:, order]
        place = np.arange(self.width)
        column = starts[:, :, None] + place  # [num_rows, num_turns, width]
        drafted = place < lengths[:, :, None]
        judged = drafted & (column < num_judged[:, None, None])
        accepted = drafted & (column < num_accepted[:, None, None])
        found = {CYCLES: len(lengths)} if len(lengths) else {}
        for kind, where in zip(KINDS, (drafted, judged, accepted), strict=True):
            for turn, at in zip(*np.nonzero(total := where.sum(axis=0)), strict=True):
                (member,) = self.turns[turn].members
                found[key(kind, member, at)] = int(total[turn, at])
        return found


def key(kind: str, member: int, place: int) -> str:
    """The name of a sum, as plain data."""
    return f"{kind} {member} {place}"


# vLLM's `SchedulerStats` has no field for the counts of others. Ensembles refuse LoRA adapters, so
# a field that counts adapters is free, and vLLM's own loggers do not read it.


def send(stats: SchedulerStats, sums: dict[str, int]) -> None:
    """Give the sums to the front end, with the other statistics of the step."""
    stats.running_lora_adapters = sums


def received(stats: SchedulerStats) -> dict[str, int]:
    """What the scheduler sent."""
    return stats.running_lora_adapters
