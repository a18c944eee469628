"""The parts of a cycle as CUDA graphs hold them, and the memory that graphs share with a step.

All inputs are in memory that does not move. What changes from step to step is copied there before
the graphs are replayed. This module does not know which graphs there are.
"""

from math import ceil
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm.chef.cycle import EngineStep, Reading, TurnRunner
from vllm.chef.grammar import ALL_TOKENS
from vllm.chef.passes import CapturedPasses, MemberCaller
from vllm.chef.sampling import DeviceParams, Processing, ProcessorStates
from vllm.chef.state import Cycle
from vllm.chef.verifier import StepScores


class StepInputs:
    """What decisions read of the engine step, in memory that does not move.

    Args:
        logits: of the first turn's members, one row each. Only widths and dtypes are read.
        engine_inputs: the input buffers of vLLM's own pass.
        max_num_reqs: requests in the largest graph of a decision.
        num_rows: the most rows of logits that `max_num_reqs` requests have.
        states: what vLLM's logits processors know of the requests.
    """

    def __init__(
        self,
        logits: list[torch.Tensor],
        engine_inputs: InputBuffers,
        max_num_reqs: int,
        num_rows: int,
        samples_members: bool,
        states: ProcessorStates,
    ) -> None:
        self.engine_inputs, self.states = engine_inputs, states
        self.samples_members = samples_members
        device, vocab_size = engine_inputs.device, logits[0].shape[-1]
        self.logits = [row.new_zeros(num_rows, row.shape[-1]) for row in logits]
        """members of the first turn x [num_rows, vocab_size]"""
        self.cu_num_logits = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.bitmask = torch.full(
            (num_rows, ceil(vocab_size / 32)), ALL_TOKENS, dtype=torch.int32, device=device
        )
        self.forbidden = torch.full((max_num_reqs,), -1, dtype=torch.int64, device=device)
        self._has_grammar = False

    def load(self, step: EngineStep, processing: Processing) -> None:
        """Copy a step before its graphs run, because vLLM's own tensors move."""
        for kept, logits in zip(self.logits, step.scores.logits, strict=True):
            kept[: len(logits)].copy_(logits)
        num_reqs = len(step.seq_lens)
        self.cu_num_logits[: num_reqs + 1] = step.cu_num_logits
        # Rows that fill up the batch have no logits.
        self.cu_num_logits[num_reqs + 1 :] = step.cu_num_logits[-1]
        if processing == Processing.BUILT_IN:
            self._load_grammar(step)

    def _load_grammar(self, step: EngineStep) -> None:
        if self._has_grammar:
            self.bitmask.fill_(ALL_TOKENS)
            self.forbidden.fill_(-1)
        self._has_grammar = step.scores.bitmask is not None
        if self._has_grammar:
            self.bitmask[: len(step.scores.bitmask)] = step.scores.bitmask
            self.forbidden[: len(step.forbidden)] = step.forbidden

    def step(self, num_reqs: int, processing: Processing) -> EngineStep:
        """The loaded step, with `num_reqs` rows of requests."""
        inputs, has_all = self.engine_inputs, processing == Processing.BUILT_IN
        params = DeviceParams(self.samples_members, processing, self.states)
        return EngineStep(
            inputs.query_start_loc[: num_reqs + 1],
            self.cu_num_logits[: num_reqs + 1],
            inputs.seq_lens[:num_reqs],
            inputs.input_ids,
            StepScores(self.logits, params, self.bitmask if has_all else None),
            self.forbidden[:num_reqs] if has_all else None,
        )


class ReadingBuffers:
    """The latest reading, in memory that does not move. All turns share it.

    Args:
        hidden_sizes: of each turn after the first.
        num_tokens: tokens of the largest reading.
    """

    def __init__(
        self,
        hidden_sizes: list[int],
        max_num_reqs: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.hidden_sizes = hidden_sizes
        self.query_start_loc = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.read_start = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # Rows that fill up the batch take their scores from the row behind the reading.
        self.hidden_states = torch.zeros(
            num_tokens + 1, max(hidden_sizes), dtype=dtype, device=device
        )
        self._views: dict[tuple[int, int], Reading] = {}

    def load(self, turn: int, reading: Reading) -> None:
        num_reqs, num_tokens = len(reading.read_start), len(reading.hidden_states)
        self.query_start_loc[: num_reqs + 1] = reading.query_start_loc
        self.query_start_loc[num_reqs + 1 :] = reading.query_start_loc[-1]
        self.read_start[:num_reqs] = reading.read_start
        self.hidden_states[:num_tokens, : self.hidden_sizes[turn - 1]] = reading.hidden_states

    def of_turn(self, turn: int, num_reqs: int) -> Reading:
        """Views of the buffers. They are made once for each batch size, since a step needs them."""
        if (turn, num_reqs) not in self._views:
            self._views[turn, num_reqs] = Reading(
                self.query_start_loc[: num_reqs + 1],
                self.read_start[:num_reqs],
                self.hidden_states[:, : self.hidden_sizes[turn - 1]],
            )
        return self._views[turn, num_reqs]


class GraphFunctions:
    """The functions that are captured. The arguments from `num_reqs` on are vLLM's.

    Args:
        all_cycle: the cycle of the largest batch.
    """

    def __init__(
        self,
        turn_runner: TurnRunner,
        caller: MemberCaller,
        all_cycle: Cycle,
        inputs: StepInputs,
        readings: ReadingBuffers,
    ) -> None:
        self.turn_runner, self.caller, self.all_cycle = turn_runner, caller, all_cycle
        self.inputs, self.readings = inputs, readings

    def decide(self, turn: int, processing: Processing, num_reqs: int, *_: Any) -> None:
        """`TurnRunner.open` of the first turn, `TurnRunner.judge` of the others."""
        cycle, step = self.all_cycle.rows(num_reqs), self.inputs.step(num_reqs, processing)
        if turn == 0:
            self.turn_runner.open(cycle, step)
        else:
            self.turn_runner.judge(turn, cycle, step, self.readings.of_turn(turn, num_reqs))

    def read(
        self,
        turn: int,
        step_len: int,
        num_reqs: int,
        num_tokens: int,
        metadata: Any,
        slots: Any,
        *_: Any,
    ) -> None:
        """A turn's reading. `step_len` only tells graphs apart."""
        passes = CapturedPasses(self.caller, num_tokens, metadata, slots)
        self.readings.load(turn, passes.read(turn, self.all_cycle.rows(num_reqs)))

    def propose_more(
        self,
        turn: int,
        number: int,
        num_reqs: int,
        num_tokens: int,
        metadata: Any,
        slots: Any,
        *_: Any,
    ) -> None:
        """A turn's passes of one token."""
        passes = CapturedPasses(self.caller, num_tokens, metadata, slots)
        self.turn_runner.propose_more(turn, number, self.all_cycle.rows(num_reqs), passes)

    def member(
        self,
        turn: int,
        num_reqs: int,
        num_tokens: int,
        metadata: Any,
        slots: Any,
        num_tokens_across_dp: Any,
        mode: CUDAGraphMode,
    ) -> None:
        """One pass of a turn's member, and nothing else. vLLM makes its piecewise graphs."""
        self.caller.run(turn, num_tokens, metadata, slots, mode)
