"""The cycle of one engine step, in CUDA graphs where they fit. vLLM's own pass has run before.

This module knows the batch and which graphs fit it. `cycle.py` knows the order of a cycle.
"""

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.captured import GraphFunctions
from vllm.chef.cycle import EngineStep, Parts, Passes, Reading, TurnRunner
from vllm.chef.gammas import StepGammas
from vllm.chef.graphs import CycleGraphs, StepGraphs
from vllm.chef.state import Cycle, Outputs
from vllm.chef.stats import TurnStats


class CycleStep(Parts):
    """The cycle of one step. Call `run`, then `finish`.

    Each part of the cycle is replayed if a graph holds it. Otherwise it runs without a graph.

    Args:
        engine_step: what vLLM has run.
        passes: the passes that no graph holds.
        step_graphs: the graphs of this step's decisions, and of its readings.
        captured: what graphs hold. None if the engine has no graphs.
        keeps_readings: whether `run` keeps all readings in `readings`.
    """

    reading: Reading  # the latest one that no full graph made

    def __init__(
        self,
        cycle: Cycle,
        engine_step: EngineStep,
        turn_runner: TurnRunner,
        passes: Passes,
        gammas: StepGammas,
        graphs: CycleGraphs,
        step_graphs: StepGraphs,
        captured: GraphFunctions | None,
        keeps_readings: bool = False,
    ) -> None:
        self.cycle, self.engine_step = cycle, engine_step
        self.turn_runner, self.passes = turn_runner, passes
        self.gammas, self.graphs = gammas, graphs
        self.step_graphs, self.captured = step_graphs, captured
        self.keeps_readings = keeps_readings
        self.readings: list[Reading] = []
        """By turn after the first. Empty unless `keeps_readings`."""

    def run(self) -> Outputs:
        """The cycle, except for the last turn's passes of one token."""
        return self.turn_runner.run(self.cycle, self)

    def finish(self, stats: TurnStats) -> torch.Tensor:  # [num_reqs, window]
        """Make the last turn's passes of one token, and return the window for the next step."""
        return self.turn_runner.finish(self.cycle, self, stats, self.gammas.calls)

    # The parts of the cycle

    def open(self) -> None:
        if self.step_graphs.decisions is not None:
            self.step_graphs.decisions[0]()
        else:
            self.turn_runner.open(self.cycle, self.engine_step)

    def read(self, turn: int) -> None:
        if self.step_graphs.readings is not None:
            self.step_graphs.readings[turn - 1]()
            return
        self.reading = reading = self.passes.read(turn, self.cycle)
        if self.keeps_readings:
            # The graphs of other members overwrite what piecewise graphs return.
            hidden_states = reading.hidden_states.clone()
            self.readings.append(reading._replace(hidden_states=hidden_states))
        if self.step_graphs.decisions is not None:
            self.captured.readings.load(turn, reading)

    def judge(self, turn: int) -> None:
        if self.step_graphs.decisions is not None:
            self.step_graphs.decisions[turn]()
            return
        if self.step_graphs.readings is not None:
            reading = self.captured.readings.of_turn(turn, self.cycle.num_reqs)
        else:
            reading = self.reading
        self.turn_runner.judge(turn, self.cycle, self.engine_step, reading)

    def propose_more(self, turn: int) -> None:
        num_passes = self.gammas.num_passes(turn)
        replay = self.graphs.find_passes(turn, num_passes, self.cycle.num_reqs)
        if replay is not None:
            replay()
        else:
            self.turn_runner.propose_more(turn, num_passes, self.cycle, self.passes)


def uniform_step_len(batch: InputBatch) -> int | None:
    """Tokens of each request in the engine step, if all requests have the same number.

    None if the numbers differ, or if a request reads its prompt. In such a request, some tokens
    after the first are not drafts.
    """
    query_start_loc = batch.query_start_loc_np[: batch.num_reqs + 1]
    length = int(query_start_loc[1])
    if not (np.diff(query_start_loc) == length).all():
        return None
    if not (batch.cu_num_logits_np[: batch.num_reqs + 1] == query_start_loc).all():
        return None
    return length
