"""A step of the engine after vLLM's own pass: its cycle, replayed from CUDA graphs or run without.

This module knows the batch and which graphs fit it. `cycle.py` knows the order of a cycle.
"""

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.cycle import EngineStep, Reading, TurnRunner
from vllm.chef.gammas import StepGammas
from vllm.chef.graphs import CycleGraphs, Replay
from vllm.chef.passes import EagerPasses
from vllm.chef.state import Cycle, Outputs
from vllm.chef.stats import TurnStats


class CycleStep:
    """The cycle of one step.

    Call `replay` if `find_graphs` finds graphs, else `run`. Then call `finish`.
    """

    def __init__(
        self,
        batch: InputBatch,
        cycle: Cycle,
        turn_runner: TurnRunner,
        passes: EagerPasses,
        gammas: StepGammas,
        graphs: CycleGraphs,
    ) -> None:
        self.batch, self.cycle = batch, cycle
        self.turn_runner, self.passes = turn_runner, passes
        self.gammas, self.graphs = gammas, graphs

    def find_graphs(self, filters: bool) -> list[Replay] | None:
        """Calls that replay the turns after the first. None if a turn has no graph for this step.

        The graphs apply temperature only. If `filters`, they also apply min-p, top-k and top-p.
        Requests that need more than that run without graphs.
        """
        step_len = uniform_step_len(self.batch)
        if step_len is None:
            return None
        return self.graphs.find(self.cycle.num_reqs, step_len, filters)

    def replay(
        self,
        replays: list[Replay],  # from `find_graphs`
        hidden_states: torch.Tensor,  # [num_tokens, sum of the first turn's hidden sizes]
    ) -> tuple[Outputs, LogprobsTensors | None]:
        """Replay the cycle, except for the last turn's passes of one token."""
        self.graphs.step_buffers.load(hidden_states, self.batch.logits_indices)

        def take_turn(turn: int) -> None:
            replays[turn - 1]()

        return self.turn_runner.run(self.cycle, take_turn, self._propose_more)

    def run(self, step: EngineStep) -> tuple[Outputs, LogprobsTensors | None]:
        """The same without graphs, for any step."""

        def take_turn(turn: int) -> LogprobsTensors | None:
            return self.turn_runner.take_turn(turn, self.cycle, step, self.passes)

        return self.turn_runner.run(self.cycle, take_turn, self._propose_more)

    @property
    def readings(self) -> list[Reading]:
        """By turn, the readings made without graphs."""
        return self.passes.readings

    def finish(self, stats: TurnStats) -> torch.Tensor:  # [num_reqs, window]
        """Make the last turn's passes of one token, and return the window for the next step."""
        return self.turn_runner.finish(self.cycle, self._propose_more, stats, self.gammas.calls)

    def _propose_more(self, turn: int) -> None:
        """The turn's passes of one token, replayed if a graph holds them.

        They may have a graph even where the turn's first pass had none.
        """
        num_passes = self.gammas.num_passes(turn)
        replay = self.graphs.find_passes(turn, num_passes, self.cycle.num_reqs)
        if replay is not None:
            replay()
        else:
            self.turn_runner.propose_more(turn, num_passes, self.cycle, self.passes)


def uniform_step_len(batch: InputBatch) -> int | None:
    """Tokens of each request in the engine step, if all requests have the same number.

    None if the numbers differ, or if a request has prompt tokens. Some of its tokens after the
    first are then not drafts.
    """
    query_start_loc = batch.query_start_loc_np[: batch.num_reqs + 1]
    length = int(query_start_loc[1])
    if not (np.diff(query_start_loc) == length).all():
        return None
    if not (batch.cu_num_logits_np[: batch.num_reqs + 1] == query_start_loc).all():
        return None
    return length
