"""CUDA graphs of a turn: the one in which its member reads, and those of its passes of one token.

Each holds all there is between its first and last operation, decisions and draws included, so that
a step is a launch or two per turn.  That takes an attention backend which can refresh its metadata
in a graph; with any other, turns run without graphs.  Built on vLLM's manager of a speculator's.
"""

from collections.abc import Callable, Collection
from copy import copy
from functools import partial
from math import ceil
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

# A choice, num_reqs, num_tokens, attention metadata and slot mappings by layer
Captured = Callable[[int, int, int, Any, Any], None]


def with_room(vllm_config: VllmConfig, step_len: int, num_new: int) -> VllmConfig:
    """The same, with graphs that are larger by `num_new` tokens per request than the largest for
    `step_len` tokens: vLLM's sizes are in tokens, and every batch whose full windows have a graph
    in the engine step shall have one in the turns."""
    config = copy(vllm_config)
    config.compilation_config = compilation = copy(vllm_config.compilation_config)
    largest = compilation.max_cudagraph_capture_size or 0
    sizes = compilation.cudagraph_capture_sizes or []
    nums_reqs = {ceil(size / step_len) for size in sizes}
    larger = {n * (step_len + num_new) for n in nums_reqs if n * step_len <= largest}
    # No step is larger, and vLLM's slot mappings have no more room.
    most = vllm_config.scheduler_config.max_num_batched_tokens
    larger = {size for size in larger if largest < size <= most}
    compilation.cudagraph_capture_sizes = sorted({*sizes, *larger})
    compilation.max_cudagraph_capture_size = max({largest, *larger})
    return config


def offer_every_length(manager: CudaGraphManager) -> None:
    """Let `manager.dispatch` find a graph where requests may have several lengths (`gamma: auto`).

    vLLM offers a batch the graphs of the next larger number of tokens alone. Sizes are rounded up
    to each length, so that often none of those has the batch's: then it would run without.
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
        step_len: tokens per request in the engine step when all requests decode, at most.
        num_new: tokens besides these that the member reads.
        num_passes: how many passes of one token may follow.
        reads: what a turn does up to its first proposal; takes first whether requests may have
            filters. Those are a dozen kernels, which requests without any should not wait for.
        passes: the passes of one token; takes their number first.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        step_len: int,
        num_new: int,
        num_passes: Collection[int],
        reads: Captured,
        passes: Captured,
    ) -> None:
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        config, length = with_room(vllm_config, step_len, num_new), step_len + num_new
        self.reading = {
            filters: SpeculatorCudaGraphManager(config, device, mode, length)
            for filters in (False, True)
        }
        """By whether requests may have filters; otherwise alike"""
        for manager in self.reading.values():
            offer_every_length(manager)
        self.loops = {
            number: SpeculatorCudaGraphManager(vllm_config, device, mode, 1)
            for number in num_passes
            if number
        }
        self.reads, self.passes = reads, passes

    def capture(self, *args: Any) -> None:
        """As `SpeculatorCudaGraphManager.capture`, without its first argument."""
        captures = []
        for filters, manager in self.reading.items():
            name = "reading, with filters" if filters else "reading"
            captures.append((manager, partial(self.reads, filters), name))
        for number, manager in self.loops.items():
            captures.append((manager, partial(self.passes, number), f"{number} tokens"))
        for manager, function, name in captures:
            if manager.needs_capture():

                def captured(*shapes_and_metadata: Any, function=function, **_: Any) -> None:
                    function(*shapes_and_metadata[:4])

                description = f"Capturing a turn, {name}"
                manager.capture(captured, *args, progress_bar_desc=description)

    def find(self, num_reqs: int, query_len: int) -> BatchExecutionDescriptor | None:
        """The graph in which a member reads so many tokens of each request, for `replay`."""
        either, num_tokens = self.reading[False], num_reqs * query_len
        desc = either.dispatch(num_reqs, num_tokens, query_len, num_active_loras=0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL else None

    def replay(self, desc: BatchExecutionDescriptor, filters: bool) -> None:
        self.reading[filters].run_fullgraph(desc)

    def replay_passes(self, number: int, num_reqs: int) -> bool:
        """All passes of one token; False where there is no graph of them, and nothing is done."""
        manager = self.loops.get(number)
        if manager is None:
            return False
        desc = manager.dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return False
        manager.run_fullgraph(desc)
        return True

    def max_reading_tokens(self) -> int:
        """Of the largest batch that has a graph; 0 where there is none."""
        descs = self.reading[False]._capture_descs.get(CUDAGraphMode.FULL, [])
        return max((desc.num_tokens for desc in descs), default=0)
