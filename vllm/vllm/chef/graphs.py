"""CUDA graphs of a turn: the one in which its member reads, and those of its passes of one token.

Each holds all there is between its first and last operation, decisions and draws included, so that
a step is a launch or two per turn.  That takes an attention backend which can refresh its metadata
in a graph; with any other, turns run without graphs.  Built on vLLM's manager of a speculator's.
"""

from collections.abc import Callable, Collection, Mapping
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


def for_the_same_batches(vllm_config: VllmConfig, step_len: int, length: int) -> VllmConfig:
    """The same, with graphs for `length` tokens of as many requests as vLLM has graphs for of
    `step_len`: its sizes are in tokens, which it rounds up."""
    config = copy(vllm_config)
    # Of dynamic speculation it would make graphs of other lengths too.
    config.speculative_config = None
    config.compilation_config = compilation = copy(vllm_config.compilation_config)
    largest = compilation.max_cudagraph_capture_size or 0
    nums_reqs = {ceil(size / step_len) for size in compilation.cudagraph_capture_sizes or []}
    sizes = {n * length for n in nums_reqs if n * step_len <= largest}
    # No step is larger, and vLLM's slot mappings have no more room.
    most = vllm_config.scheduler_config.max_num_batched_tokens
    compilation.cudagraph_capture_sizes = sorted(size for size in sizes if size <= most)
    compilation.max_cudagraph_capture_size = max(compilation.cudagraph_capture_sizes, default=0)
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
        lengths: by tokens per request in the engine step, where all requests decode, those that
            the member reads.
        num_passes: how many passes of one token may follow.
        reads: what a turn does up to its first proposal; takes first the tokens per request in the
            engine step, then whether requests may have filters. Those are a dozen kernels, which
            requests without any should not wait for.
        passes: the passes of one token; takes their number first.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        lengths: Mapping[int, int],
        num_passes: Collection[int],
        reads: Captured,
        passes: Captured,
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
        """By tokens per request in the engine step, and whether requests may have filters"""
        self.loops = {
            number: SpeculatorCudaGraphManager(vllm_config, device, mode, 1)
            for number in num_passes
            if number
        }
        self.reads, self.passes = reads, passes

    def capture(self, *args: Any) -> None:
        """As `SpeculatorCudaGraphManager.capture`, without its first argument."""
        captures = []
        for (step_len, filters), manager in self.reading.items():
            name = f"reading after {step_len}" + (", with filters" if filters else "")
            captures.append((manager, partial(self.reads, step_len, filters), name))
        for number, manager in self.loops.items():
            captures.append((manager, partial(self.passes, number), f"{number} tokens"))
        for manager, function, name in captures:
            if manager.needs_capture():

                def captured(*shapes_and_metadata: Any, function=function, **_: Any) -> None:
                    function(*shapes_and_metadata[:4])

                description = f"Capturing a turn, {name}"
                manager.capture(captured, *args, progress_bar_desc=description)

    def find(self, num_reqs: int, step_len: int, filters: bool) -> Callable[[], Any] | None:
        """What replays the graph in which the member reads, after an engine step of so many tokens
        per request; None where there is none."""
        if step_len not in self.lengths:
            return None
        manager, length = self.reading[step_len, filters], self.lengths[step_len]
        desc = manager.dispatch(num_reqs, num_reqs * length, length, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        return partial(manager.run_fullgraph, desc)

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

    def max_step_tokens(self) -> int:
        """In the engine step of the largest batch that has a graph; 0 where there is none."""
        nums_tokens = [
            desc.num_reqs * step_len
            for (step_len, _), manager in self.reading.items()
            for desc in manager._capture_descs.get(CUDAGraphMode.FULL, [])
        ]
        return max(nums_tokens, default=0)
