"""CUDA graphs of a member's passes: the one that reads, and those of one token.

Each graph holds the member's forward pass at a uniform number of tokens per request; what is made
of its hidden states is not in it.  Built on vLLM's manager of a speculator's graphs.
"""

from collections.abc import Callable
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


class MemberGraphs:
    """The graphs of one turn's member.

    Args:
        query_len: tokens per request that the member reads when all requests decode.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        query_len: int,
        forward: Forward,
    ) -> None:
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        self.forward = forward
        self.managers = {
            length: SpeculatorCudaGraphManager(vllm_config, device, mode, length)
            for length in (query_len, 1)
        }
        # [num_tokens, hidden_size]: a graph's own output lies in a pool that all graphs share.
        self.hidden_states: torch.Tensor | None = None

    def capture(self, *args: Any) -> None:
        """As `SpeculatorCudaGraphManager.capture`, without its first argument."""
        for length, manager in self.managers.items():
            if manager.needs_capture():
                name = "one token" if length == 1 else "reading"
                manager.capture(
                    self._run_and_keep, *args, progress_bar_desc=f"Capturing a member, {name}"
                )

    def dispatch(
        self,
        query_start: np.ndarray,  # [num_reqs + 1]
    ) -> BatchExecutionDescriptor:
        """The graph for a batch; its `cg_mode` is NONE where there is none."""
        num_reqs, num_tokens = len(query_start) - 1, int(query_start[-1])
        lengths = np.diff(query_start)
        manager = self.managers.get(int(lengths[0]))
        if manager is None or (lengths != lengths[0]).any():
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
        return manager.dispatch(num_reqs, num_tokens, int(lengths[0]), num_active_loras=0)

    def run(self, desc: BatchExecutionDescriptor) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Replay a graph; what comes back is overwritten by the next."""
        self.managers[desc.uniform_token_count].run_fullgraph(desc)
        return self.hidden_states

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
                for manager in self.managers.values()
                for descs in manager._capture_descs.values()
                for desc in descs
            )
            self.hidden_states = output.new_zeros(most, output.shape[-1])
        self.hidden_states[:num_tokens] = output
