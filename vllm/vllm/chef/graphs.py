"""CUDA graphs of a member's passes: the one that reads, and those of one token.

The first holds the member's forward pass at a uniform number of tokens per request; what is made
of its hidden states is not in it.  The others are one graph together, with all that is between
them, where the attention backend can refresh its metadata in a graph; else one of one pass.  Built
on vLLM's manager of a speculator's graphs.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

# num_tokens, attention metadata and slot mappings by layer -> [num_tokens, hidden_size]
Forward = Callable[[int, Any, Any], torch.Tensor]
# number of passes, num_reqs, num_tokens, attention metadata and slot mappings by layer
Passes = Callable[[int, int, int, Any, Any], None]


class MemberGraphs:
    """The graphs of one turn's member.

    Args:
        query_len: tokens per request that the member reads when all requests decode, at most.
        num_passes: how many passes of one token may follow.
        forward: one pass.
        passes: all those of one token; None where they cannot be in one graph.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        query_len: int,
        num_passes: Collection[int],
        forward: Forward,
        passes: Passes | None,
    ) -> None:
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        self.forward = forward
        self.passes = passes
        make_manager = partial(SpeculatorCudaGraphManager, vllm_config, device, mode)
        # Of every length that vLLM may schedule, with dynamic speculation.
        self.reading = make_manager(query_len)
        self.one = make_manager(1) if any(num_passes) and passes is None else None
        self.loops = {n: make_manager(1) for n in num_passes if n and passes is not None}
        # [num_tokens, hidden_size]: a graph's own output lies in a pool that all graphs share.
        self.hidden_states: torch.Tensor | None = None

    def capture(self, *args: Any) -> None:
        """As `SpeculatorCudaGraphManager.capture`, without its first argument."""
        captures = [(self.reading, self._run_and_keep, "reading")]
        captures.append((self.one, self._run_and_keep, "one token"))
        for number, manager in self.loops.items():
            captures.append((manager, partial(self._run_passes, number), f"{number} tokens"))
        for manager, function, name in captures:
            if manager is not None and manager.needs_capture():
                description = f"Capturing a member, {name}"
                manager.capture(function, *args, progress_bar_desc=description)

    def run(
        self,
        query_start: np.ndarray,  # [num_reqs + 1]
        prepare: Callable[[BatchExecutionDescriptor], None],
    ) -> torch.Tensor | None:  # [num_tokens, hidden_size], until the next graph runs
        """One pass over a batch; None where there is no graph for it.

        Whether or not there is one, `prepare` is called before, with what is known of the batch.
        """
        num_reqs, num_tokens = len(query_start) - 1, int(query_start[-1])
        length = int(query_start[1])
        manager = self.one if length == 1 else self.reading
        desc = _no_graph(num_reqs, num_tokens)
        if manager is not None and (np.diff(query_start) == length).all():
            desc = manager.dispatch(num_reqs, num_tokens, length, num_active_loras=0)
        prepare(desc)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        manager.run_fullgraph(desc)
        return self.hidden_states[:num_tokens]

    def run_passes(self, number: int, num_reqs: int, prepare: Callable[[], None]) -> bool:
        """All passes of one token; False where there is no graph of them, and nothing is done."""
        manager = self.loops.get(number)
        if manager is None:
            return False
        desc = manager.dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return False
        prepare()
        manager.run_fullgraph(desc)
        return True

    def _run_passes(
        self,
        number: int,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        self.passes(number, num_reqs, num_tokens, attn_metadata, slot_mappings)

    def _run_and_keep(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        output = self.forward(num_tokens, attn_metadata, slot_mappings)
        if self.hidden_states is None:
            # The warm-up of the largest batch comes first, and is never a graph.
            most = max(
                desc.num_tokens
                for manager in (self.reading, self.one)
                if manager is not None
                for descs in manager._capture_descs.values()
                for desc in descs
            )
            self.hidden_states = output.new_zeros(most, output.shape[-1])
        self.hidden_states[:num_tokens] = output


def _no_graph(num_reqs: int, num_tokens: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
