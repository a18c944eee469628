"""The cycle of one engine step, in CUDA graphs where they fit. vLLM's own pass has run before.

A step's decisions and its readings each have an implementation without graphs and one that replays
them. They are chosen once, before the cycle runs. `cycle.py` knows the order of a cycle.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.captured import ReadingBuffers
from vllm.chef.cycle import EngineStep, Parts, Passes, Reading, TurnRunner
from vllm.chef.gammas import StepGammas
from vllm.chef.graphs import CycleGraphs, Replay
from vllm.chef.state import Cycle, Outputs
from vllm.chef.stats import TurnStats


class Decisions(Protocol):
    """The decisions of one cycle."""

    def open(self) -> None:
        """`TurnRunner.open`"""

    def judge(self, turn: int, reading: Reading) -> None:
        """`TurnRunner.judge`"""


class EagerDecisions(Decisions):
    def __init__(self, turn_runner: TurnRunner, cycle: Cycle, engine_step: EngineStep) -> None:
        self.turn_runner, self.cycle, self.engine_step = turn_runner, cycle, engine_step

    def open(self) -> None:
        self.turn_runner.open(self.cycle, self.engine_step)

    def judge(self, turn: int, reading: Reading) -> None:
        self.turn_runner.judge(turn, self.cycle, self.engine_step, reading)


class ReplayedDecisions(Decisions):
    """The graphs find the engine step and each reading in buffers: `StepInputs`, `ReadingBuffers`.

    Args:
        replays: `[num_turns]`
    """

    def __init__(self, replays: list[Replay]) -> None:
        self.replays = replays

    def open(self) -> None:
        self.replays[0]()

    def judge(self, turn: int, reading: Reading) -> None:
        self.replays[turn]()


class Readings(Protocol):
    """The readings of one cycle."""

    kept: Sequence[Reading] = ()
    """By turn after the first. Empty, except in `KeptReadings`."""

    def read(self, turn: int) -> Reading:
        """`Passes.read`"""


class EagerReadings(Readings):
    def __init__(self, passes: Passes, cycle: Cycle) -> None:
        self.passes, self.cycle = passes, cycle

    def read(self, turn: int) -> Reading:
        return self.passes.read(turn, self.cycle)


class LoadedReadings(Readings):
    """Readings without graphs, copied to where the graphs of decisions find them."""

    def __init__(self, readings: Readings, buffers: ReadingBuffers) -> None:
        self.readings, self.buffers = readings, buffers

    def read(self, turn: int) -> Reading:
        reading = self.readings.read(turn)
        self.buffers.load(turn, reading)
        return reading


class ReplayedReadings(Readings):
    """The graphs leave each reading in buffers.

    Args:
        replays: `[num_turns - 1]`
    """

    def __init__(self, replays: list[Replay], buffers: ReadingBuffers, num_reqs: int) -> None:
        self.replays, self.buffers, self.num_reqs = replays, buffers, num_reqs

    def read(self, turn: int) -> Reading:
        self.replays[turn - 1]()
        return self.buffers.of_turn(turn, self.num_reqs)


class KeptReadings(Readings):
    """Readings without graphs that stay until the step ends."""

    def __init__(self, readings: Readings) -> None:
        self.readings = readings
        self.kept: list[Reading] = []

    def read(self, turn: int) -> Reading:
        reading = self.readings.read(turn)
        # The graphs of other members overwrite what piecewise graphs return.
        self.kept.append(reading._replace(hidden_states=reading.hidden_states.clone()))
        return reading


class CycleStep(Parts):
    """The cycle of one step. Call `run`, then `finish`.

    Args:
        engine_step: what vLLM has run.
        passes: the passes of one token that no graph holds.
        graphs: those of passes of one token.
    """

    def __init__(
        self,
        cycle: Cycle,
        engine_step: EngineStep,
        turn_runner: TurnRunner,
        decisions: Decisions,
        readings: Readings,
        passes: Passes,
        gammas: StepGammas,
        graphs: CycleGraphs,
    ) -> None:
        self.cycle, self.engine_step = cycle, engine_step
        self.turn_runner = turn_runner
        self.decisions, self.readings, self.passes = decisions, readings, passes
        self.gammas, self.graphs = gammas, graphs

    def run(self) -> Outputs:
        """The cycle, except for the last turn's passes of one token."""
        return self.turn_runner.run(self.cycle, self)

    def finish(self, stats: TurnStats) -> torch.Tensor:  # [num_reqs, window]
        """Make the last turn's passes of one token, and return the window for the next step."""
        return self.turn_runner.finish(self.cycle, self, stats, self.gammas.calls)

    # The parts of the cycle

    def open(self) -> None:
        self.decisions.open()

    def read(self, turn: int) -> Reading:
        return self.readings.read(turn)

    def judge(self, turn: int, reading: Reading) -> None:
        self.decisions.judge(turn, reading)

    def propose_more(self, turn: int) -> None:
        num_passes = self.gammas.num_passes(turn)
        eager = partial(self.turn_runner.propose_more, turn, num_passes, self.cycle, self.passes)
        propose = self.graphs.find_passes(turn, num_passes, self.cycle.num_reqs) or eager
        propose()


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
