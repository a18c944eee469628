"""The passes of single members, without CUDA graphs and captured in them.

This module knows vLLM's input buffers, block tables and attention metadata. It does not know what a
member's hidden states are used for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm.chef.cycle import Reading, TokenReading
from vllm.chef.ops import ops_for
from vllm.chef.state import Cycle, PreparedTokens, ProposalState
from vllm.chef.turns import Turns


class MemberCaller:
    """Runs members, and writes their inputs into the buffers of vLLM's speculator.

    Args:
        speculator: its `model` is a list, the members of the turns after the first.
        all_token_ids: `[max_num_reqs, max_model_len]`, vLLM's tokens of all requests.
    """

    def __init__(
        self,
        speculator: StandaloneARSpeculator,
        state: ProposalState,
        all_token_ids: torch.Tensor,
    ) -> None:
        self.speculator, self.state, self.all_token_ids = speculator, state, all_token_ids
        self.ops = ops_for(speculator.device)

    def run(
        self,
        turn: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        mode: CUDAGraphMode = CUDAGraphMode.NONE,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        """One pass of the turn's member over the tokens in the input buffers.

        Args:
            mode: `PIECEWISE` replays vLLM's piecewise graphs of `num_tokens` tokens.
        """
        buffers = self.speculator.input_buffers
        with set_forward_context(
            attn_metadata,
            self.speculator.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=mode,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            return self.speculator.model[turn - 1](
                buffers.input_ids[:num_tokens], buffers.positions[:num_tokens]
            )

    def compute_logits(
        self,
        turn: int,
        hidden_states: torch.Tensor,  # [num_rows, hidden_size]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        # A token must be judged by the same logits from which it was proposed. Both have the kept
        # dtype.
        logits = self.speculator.model[turn - 1].compute_logits(hidden_states)
        return logits.to(self.state.scores.dtype)

    def prepare_tokens(
        self,
        cycle: Cycle,
        query_start_loc: torch.Tensor,  # [num_reqs + 1]
        num_tokens: int,
    ) -> PreparedTokens:
        """Write all tokens that a turn reads, as input of its first pass."""
        buffers = self.speculator.input_buffers
        return self.ops.prepare_tokens(
            self.state,
            cycle,
            self.all_token_ids,
            query_start_loc,
            buffers.input_ids[:num_tokens],
            buffers.positions[:num_tokens],
            buffers.seq_lens[: cycle.num_reqs],
        )

    def prepare_token(self, cycle: Cycle) -> torch.Tensor:  # [num_reqs]
        """Write the last token of each request, as input of a pass. Returns its position."""
        buffers, num_reqs = self.speculator.input_buffers, cycle.num_reqs
        return self.ops.prepare_token(
            self.state,
            cycle,
            self.all_token_ids,
            buffers.input_ids[:num_reqs],
            buffers.positions[:num_reqs],
            buffers.seq_lens[:num_reqs],
        )

    def prepare_query_start_loc(self, query_start_loc: torch.Tensor) -> None:  # [num_reqs + 1]
        buffer, length = self.speculator.input_buffers.query_start_loc, len(query_start_loc)
        buffer[:length] = query_start_loc
        buffer[length:] = query_start_loc[-1]

    def slot_mappings(
        self,
        cycle: Cycle,
        num_tokens: int,
        is_again: torch.Tensor | None = None,  # [at most num_tokens] bool
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [num_kv_cache_groups, at least num_tokens]
        """KV cache slots of the tokens in the input buffers.

        Tokens behind those of the requests have no slot. By default, the slots are written to
        vLLM's own buffer.

        Tokens with `is_again` fill the front of a request's share of the batch. Their keys and
        values must not be written again, because a sliding window may have freed the tokens that
        they attend to.
        """
        buffers = self.speculator.input_buffers
        mappings = self.speculator.block_tables.compute_slot_mappings(
            cycle.slots,
            buffers.query_start_loc[: cycle.num_reqs + 1],
            buffers.positions[:num_tokens],
            num_tokens,
            out=out,
        )
        if is_again is not None:
            mappings[:, : len(is_again)].masked_fill_(is_again, PAD_SLOT_ID)
        return mappings


class EagerPasses:
    """The passes for batches of any layout, planned on the host.

    Args:
        mixed_size: takes a turn and a number of tokens. It returns the number of tokens in the
            turn's piecewise graphs that hold them, or None if none hold them.
    """

    def __init__(
        self,
        caller: MemberCaller,
        batch: InputBatch,
        mixed_size: Callable[[int, int], int | None],
    ) -> None:
        self.caller, self.batch, self.mixed_size = caller, batch, mixed_size

    def read(self, turn: int, cycle: Cycle) -> Reading:
        batch, rows, caller = self.batch, slice(cycle.num_reqs + 1), self.caller
        turns, max_model_len = caller.state.turns, caller.state.max_model_len
        query_start_loc = reading_query_start_loc(
            turns, turn, max_model_len, batch.query_start_loc[rows], batch.cu_num_logits[rows]
        )
        query_start_loc_np = reading_query_start_loc(
            turns,
            turn,
            max_model_len,
            torch.from_numpy(batch.query_start_loc_np[rows]),
            torch.from_numpy(batch.cu_num_logits_np[rows]),
        ).numpy()
        caller.prepare_query_start_loc(query_start_loc)
        read_start, is_again = caller.prepare_tokens(
            cycle, query_start_loc, int(query_start_loc_np[-1])
        )
        hidden_states = self._run(turn, cycle, query_start_loc_np, turns.num_new(turn), is_again)
        return Reading(query_start_loc, read_start, hidden_states)

    def read_token(self, turn: int, cycle: Cycle, number: int) -> TokenReading:
        caller, rows = self.caller, slice(cycle.num_reqs + 1)
        if number == 0:
            caller.prepare_query_start_loc(caller.speculator.arange_gpu[rows])
        position = caller.prepare_token(cycle)
        num_more = caller.state.turns.num_new(turn) + 1 + number
        hidden_states = self._run(turn, cycle, caller.speculator.arange_np[rows], num_more)
        return TokenReading(position, hidden_states)

    def _run(
        self,
        turn: int,
        cycle: Cycle,
        query_start_loc_np: np.ndarray,  # [num_reqs + 1]
        num_more: int,  # tokens that a request may have after those of the engine step
        is_again: torch.Tensor | None = None,  # [num_tokens] bool
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        num_reqs, num_tokens = cycle.num_reqs, int(query_start_loc_np[-1])
        speculator = self.caller.speculator
        mixed_size = self.mixed_size(turn, num_tokens)
        size = mixed_size or num_tokens
        # vLLM's own buffer is too short for some batches with prompts.
        mappings = self.caller.slot_mappings(
            cycle, size, is_again, out=speculator.expanded_slot_mappings
        )
        attn_metadata = speculator._build_attn_metadata(
            batch_desc=BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs),
            num_reqs=num_reqs,
            query_start_loc_np=query_start_loc_np,
            seq_lens_cpu_upper_bound=self.batch.seq_lens_cpu_upper_bound,
            step=num_more,
            slot_mappings=mappings,
        )
        by_layer = build_slot_mappings_by_layer(mappings, speculator.kv_cache_config)
        mode = CUDAGraphMode.NONE if mixed_size is None else CUDAGraphMode.PIECEWISE
        return self.caller.run(turn, size, attn_metadata, by_layer, mode)[:num_tokens]


class CapturedPasses:
    """The passes in a CUDA graph of `num_tokens` tokens, the same number for each request.

    No pass waits for the host. The graph's metadata is refreshed in place.
    """

    def __init__(
        self, caller: MemberCaller, num_tokens: int, attn_metadata: Any, slot_mappings: Any
    ) -> None:
        self.caller, self.num_tokens = caller, num_tokens
        self.attn_metadata, self.slot_mappings = attn_metadata, slot_mappings

    def read(self, turn: int, cycle: Cycle) -> Reading:
        speculator, num_reqs = self.caller.speculator, cycle.num_reqs
        query_start_loc = speculator.input_buffers.query_start_loc[: num_reqs + 1]
        length = self.num_tokens // num_reqs
        torch.mul(speculator.arange_gpu[: num_reqs + 1], length, out=query_start_loc)
        read_start, is_again = self.caller.prepare_tokens(cycle, query_start_loc, self.num_tokens)
        return Reading(query_start_loc, read_start, self._run(turn, cycle, is_again))

    def read_token(self, turn: int, cycle: Cycle, number: int) -> TokenReading:
        if number == 0:
            query_start_loc = self.caller.speculator.arange_gpu[: cycle.num_reqs + 1]
            self.caller.prepare_query_start_loc(query_start_loc)
        position = self.caller.prepare_token(cycle)
        return TokenReading(position, self._run(turn, cycle)[: cycle.num_reqs])

    def _run(
        self,
        turn: int,
        cycle: Cycle,
        is_again: torch.Tensor | None = None,  # [num_tokens] bool
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        if self.attn_metadata is not None:
            # Write to vLLM's own buffer, where the graph's layers find the mappings.
            self.caller.slot_mappings(cycle, self.num_tokens, is_again)
            self.caller.speculator._update_draft_decode_metadata(self.attn_metadata, cycle.num_reqs)
        return self.caller.run(turn, self.num_tokens, self.attn_metadata, self.slot_mappings)


def reading_query_start_loc(
    turns: Turns,
    turn: int,
    max_model_len: int,
    query_start_loc: torch.Tensor,  # [num_reqs + 1] of the engine step
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] of the engine step
) -> torch.Tensor:  # [num_reqs + 1] int32
    """query_start_loc of the tokens that a turn reads, for batches of any shape."""
    step_lens, num_rows = query_start_loc.diff(), cu_num_logits.diff()
    prompt = step_lens + turns.num_new(turn)
    decoding = prompt.clamp(max=turns.num_unscored(turn))
    query_lens = torch.where(step_lens == num_rows, decoding, prompt)
    ends = query_lens.clamp(max=max_model_len).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()
