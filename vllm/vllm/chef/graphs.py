"""CUDA graphs of a turn: one for its first pass, and one for its passes of one token.

Each graph holds all operations of its part, including decisions and draws. A step therefore
launches one or two graphs per turn. The graphs need an attention backend that can refresh its
metadata inside a graph. With any other backend, turns run without graphs. The module builds on
vLLM's graph manager for speculators.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from functools import partial
from math import ceil
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm.chef.cycle import EngineStep
from vllm.chef.sampling import StepParams
from vllm.chef.verifier import StepScores
from vllm.ensemble_decode.model import MemberGroup

# What selects the graph, then num_reqs, num_tokens, attention metadata and slot mappings by layer
Captured = Callable[[int, int, int, Any, Any], None]
Replay = Callable[[], None]


def obstacle_to_graphs(speculator: DraftModelSpeculator, query_len: int) -> str | None:
    """Why no graph can hold a pass over `query_len` tokens of each request. None if one can.

    The answer depends on the backends of the speculator's attention.
    """
    if not speculator.supports_decode_metadata_update:
        return "attention metadata that cannot be refreshed in a graph"
    support = speculator.attn_cg_support
    if support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
        return f"{support.min_cg_attn_backend}"
    for group in (group for groups in speculator.attn_groups for group in groups):
        threshold = group.get_metadata_builder().reorder_batch_threshold
        if threshold is not None and threshold < query_len:
            # Such a backend treats the tokens that a member reads as a prompt, and plans them on
            # the host.
            return f"an attention backend that takes {query_len} tokens for a prompt"
    return None


def for_the_same_batches(vllm_config: VllmConfig, step_len: int, length: int) -> VllmConfig:
    """A copy whose capture sizes cover the same request counts, at `length` tokens each.

    vLLM's own sizes are in tokens. vLLM rounds them up to whole requests of `step_len` tokens.
    """
    config = copy(vllm_config)
    # With dynamic speculation, vLLM would also make graphs of other lengths.
    config.speculative_config = None
    config.compilation_config = compilation = copy(vllm_config.compilation_config)
    largest = compilation.max_cudagraph_capture_size or 0
    nums_reqs = {ceil(size / step_len) for size in compilation.cudagraph_capture_sizes or []}
    sizes = {n * length for n in nums_reqs if n * step_len <= largest}
    # No step is larger. vLLM's slot mappings have no room for more tokens either.
    max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    compilation.cudagraph_capture_sizes = sorted(size for size in sizes if size <= max_num_tokens)
    compilation.max_cudagraph_capture_size = max(compilation.cudagraph_capture_sizes, default=0)
    return config


def offer_every_length(manager: CudaGraphManager) -> None:
    """Let `manager.dispatch` find a graph where requests may have several lengths (`gamma: auto`).

    vLLM offers a batch only the graphs of the next larger number of tokens. Sizes are rounded up to
    a multiple of each length. Often none of the offered graphs then has the batch's length, and the
    batch would run without a graph.
    """
    graphs = manager._capture_descs.get(CUDAGraphMode.FULL, [])
    graphs = sorted(graphs, key=lambda desc: desc.num_tokens)
    for (num_tokens, num_loras), offered in manager._candidates.items():
        smallest: dict[Any, BatchExecutionDescriptor] = {}
        for desc in graphs:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_loras:
                smallest.setdefault((desc.uniform_token_count, desc.num_ubatches), desc)
        others = [desc for desc in offered if desc.cg_mode != CUDAGraphMode.FULL]
        manager._candidates[num_tokens, num_loras] = [*smallest.values(), *others]


class TurnGraphs:
    """The graphs of one turn after the first.

    Args:
        lengths: tokens per request that the member reads, by tokens per request in the engine step.
            All requests decode.
        num_passes: the possible numbers of passes of one token.
        take_turn: the turn, up to its first proposal. Its first arguments are the tokens per
            request in the engine step, and whether requests may have filters. Filters are a dozen
            kernels, and requests without filters should not wait for them.
        propose_more: the passes of one token. Its first argument is their number.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        lengths: Mapping[int, int],
        num_passes: Collection[int],
        take_turn: Captured,
        propose_more: Captured,
    ) -> None:
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.lengths = lengths
        self.reading = {
            (step_len, filters): SpeculatorCudaGraphManager(
                for_the_same_batches(vllm_config, step_len, length), device, mode, length
            )
            for step_len, length in lengths.items()
            for filters in (False, True)
        }
        """By tokens per request in the engine step, and by whether requests may have filters"""
        self.loops = {
            number: SpeculatorCudaGraphManager(vllm_config, device, mode, 1)
            for number in num_passes
            if number
        }
        self.take_turn, self.propose_more = take_turn, propose_more

    def capture(self, *args: Any) -> None:
        """Like `SpeculatorCudaGraphManager.capture`, without its first argument."""
        captures = []
        for (step_len, filters), manager in self.reading.items():
            name = f"reading after {step_len}" + (", with filters" if filters else "")
            captures.append((manager, partial(self.take_turn, step_len, filters), name))
        for number, manager in self.loops.items():
            captures.append((manager, partial(self.propose_more, number), f"{number} tokens"))
        for manager, function, name in captures:
            if manager.needs_capture():

                def captured(*shapes_and_metadata: Any, function=function, **_: Any) -> None:
                    function(*shapes_and_metadata[:4])

                description = f"Capturing a turn, {name}"
                manager.capture(captured, *args, progress_bar_desc=description)

    def find(self, num_reqs: int, step_len: int, filters: bool) -> Replay | None:
        """A call that replays the graph in which the member reads.

        None if there is no graph for this many requests of `step_len` tokens each in the engine
        step.
        """
        if step_len not in self.lengths:
            return None
        manager, length = self.reading[step_len, filters], self.lengths[step_len]
        desc = manager.dispatch(num_reqs, num_reqs * length, length, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        return partial(manager.run_fullgraph, desc)

    def find_passes(self, number: int, num_reqs: int) -> Replay | None:
        """A call that replays `number` passes of one token. None if there is no such graph."""
        manager = self.loops.get(number)
        if manager is None:
            return None
        desc = manager.dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        return partial(manager.run_fullgraph, desc)

    def max_step_tokens(self) -> int:
        """Tokens in the engine step of the largest batch that has a graph. 0 if none has."""
        nums_tokens = [
            desc.num_reqs * step_len
            for (step_len, _), manager in self.reading.items()
            for desc in manager._capture_descs.get(CUDAGraphMode.FULL, [])
        ]
        return max(nums_tokens, default=0)


class StepBuffers:
    """The engine step, in memory that does not move, so that the turns' graphs find it.

    Args:
        members: the members of the first turn.
        engine_inputs: the input buffers of vLLM's own pass.
        step_lens: the numbers of tokens that each request of a replayed step may have.
        num_rows: rows of logits in the largest replayed step.
        dtype: dtype of the hidden states.
    """

    def __init__(
        self,
        members: MemberGroup,
        engine_inputs: InputBuffers,
        step_lens: Collection[int],
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        self.members, self.engine_inputs = members, engine_inputs
        device = engine_inputs.device
        self.hidden_states = torch.zeros(
            num_rows, sum(members.hidden_sizes), dtype=dtype, device=device
        )
        """[num_rows, sum of the members' hidden sizes], one row per row of logits"""
        # The first graph of a step computes the logits. The later graphs read them.
        self.logits = [
            logits.new_zeros(num_rows, logits.shape[-1])
            for logits in members.compute_member_logits(self.hidden_states[:1])
        ]
        rows = torch.arange(engine_inputs.max_num_reqs + 1, dtype=torch.int32, device=device)
        self.query_start_loc = {step_len: rows * step_len for step_len in step_lens}
        """By tokens per request, [max_num_reqs + 1]. All tokens have rows of logits."""

    def load(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, sum of the members' hidden sizes]
        logits_indices: torch.Tensor,  # [num_rows]
    ) -> None:
        """Copy the hidden states before a step's graphs run, because vLLM's own tensors move."""
        out = self.hidden_states[: len(logits_indices)]
        torch.index_select(hidden_states, 0, logits_indices, out=out)

    def score(self, num_rows: int) -> None:
        """Compute the logits, in the first graph of a step."""
        logits = self.members.compute_member_logits(self.hidden_states[:num_rows])
        for computed, kept in zip(logits, self.logits, strict=True):
            kept[:num_rows].copy_(computed)

    def step(self, num_reqs: int, step_len: int, params: StepParams) -> EngineStep:
        """A step of `num_reqs` requests. Its logits are valid once `score` has run."""
        query_start_loc = self.query_start_loc[step_len][: num_reqs + 1]
        logits = [logits[: num_reqs * step_len] for logits in self.logits]
        return EngineStep(
            query_start_loc,
            query_start_loc,
            self.engine_inputs.seq_lens[:num_reqs],
            self.engine_inputs.input_ids,
            StepScores(logits, params),
        )


class CycleGraphs:
    """The graphs of all turns after the first, and the memory where they find the engine step.

    Args:
        turns: `[num_turns - 1]`. Empty if turns run without graphs.
    """

    step_buffers: StepBuffers

    def __init__(self, turns: Sequence[TurnGraphs] = ()) -> None:
        self.turns = list(turns)

    def reserve(
        self, members: MemberGroup, engine_inputs: InputBuffers, dtype: torch.dtype
    ) -> None:
        """Allocate the memory of the engine step. `members` are the first turn's."""
        num_rows = max(graphs.max_step_tokens() for graphs in self.turns)
        step_lens = self.turns[0].lengths
        self.step_buffers = StepBuffers(members, engine_inputs, step_lens, num_rows, dtype)

    def capture(self, *args: Any) -> None:
        """Call `TurnGraphs.capture` for all turns."""
        for graphs in self.turns:
            graphs.capture(*args)

    def find(self, num_reqs: int, step_len: int, filters: bool) -> list[Replay] | None:
        """By turn, the result of `TurnGraphs.find`. None if one turn has no graph."""
        replays = [graphs.find(num_reqs, step_len, filters) for graphs in self.turns]
        return replays if replays and None not in replays else None

    def find_passes(self, turn: int, number: int, num_reqs: int) -> Replay | None:
        """`TurnGraphs.find_passes` of one turn."""
        return self.turns[turn - 1].find_passes(number, num_reqs) if self.turns else None
