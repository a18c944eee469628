"""A step of the engine after vLLM's own pass: its cycle, replayed from CUDA graphs or run without.

Knows the batch at hand and which graphs fit it; what a cycle is, `cycle.py` knows.
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
    """The cycle of one step: `replay` where `find_graphs` finds graphs of it, else `run`; then
    `finish`."""

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
        """Calls that replay the turns after the first; None where a turn has no graph of the step.

        They are for requests that ask for no more than temperature and, where `filters`, min-p,
        top-k and top-p.
        """
        step_len = uniform_step_len(self.batch)
        if step_len is None:
            return None
        return self.graphs.find(self.cycle.num_reqs, step_len, filters)

    def replay(
        self,
        replays: list[Replay],  # of `find_graphs`
        hidden_states: torch.Tensor,  # [num_tokens, ...] of the engine step
    ) -> tuple[Outputs, LogprobsTensors | None]:
        """The cycle, up to the last turn's passes of one token."""
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
        """By turn, what was read without graphs."""
        return self.passes.readings

    def finish(self, stats: TurnStats) -> torch.Tensor:  # [num_reqs, window]
        """The last turn's passes of one token, and the window for the next step."""
        return self.turn_runner.finish(self.cycle, self._propose_more, stats, self.gammas.calls)

    def _propose_more(self, turn: int) -> None:
        """The turn's passes of one token, in a graph where there is one.

        They may have a graph where what the turn has read before had none.
        """
        num_passes = self.gammas.num_passes(turn)
        replay = self.graphs.find_passes(turn, num_passes, self.cycle.num_reqs)
        if replay is not None:
            replay()
        else:
            self.turn_runner.propose_more(turn, num_passes, self.cycle, self.passes)


def uniform_step_len(batch: InputBatch) -> int | None:
    """Tokens of every request in the engine step, where all are drafts but the first."""
    query_start_loc = batch.query_start_loc_np[: batch.num_reqs + 1]
    length = int(query_start_loc[1])
    if not (np.diff(query_start_loc) == length).all():
        return None
    if not (batch.cu_num_logits_np[: batch.num_reqs + 1] == query_start_loc).all():
        return None
    return length
