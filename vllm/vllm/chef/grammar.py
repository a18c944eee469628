"""Grammars: all members share their masks, and vLLM cuts windows because of them."""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

ALL_TOKENS = -1  # 32 bits


def allowed_tokens(
    batch: InputBatch, grammar: GrammarOutput, device: torch.device
) -> torch.Tensor:  # [num_rows, ceil(vocab_size / 32)] int32
    """The tokens that grammars allow at each row of logits, one bit each.

    For each request with a grammar, vLLM sends one row per scheduled token. The rows follow one
    another, request after request.
    """
    offsets, masks = batch.cu_num_logits_np, grammar.grammar_bitmask
    row_of = {request: row for row, request in enumerate(batch.req_ids)}
    bitmask = np.full((offsets[batch.num_reqs], masks.shape[1]), ALL_TOKENS, dtype=np.int32)
    start = 0
    for request in grammar.structured_output_request_ids:
        row = row_of[request]
        rows = slice(offsets[row], offsets[row + 1])
        num_rows = rows.stop - rows.start
        bitmask[rows] = masks[start : start + num_rows]
        start += num_rows
    return async_tensor_h2d(bitmask, device=device)


def forbidden_tokens(
    batch: InputBatch,
    bitmask: torch.Tensor,  # [num_rows, ceil(vocab_size / 32)], see `allowed_tokens`
    draft_tokens: torch.Tensor,  # [max_num_reqs, window] tokens that were pending, by slot
    lengths: torch.Tensor,  # [num_slots, num_turns] lengths of their segments
) -> torch.Tensor:  # [num_reqs]
    """The pending token after the drafts, if vLLM left it out because of a grammar. Else -1."""
    slots = batch.idx_mapping[: batch.num_reqs]
    cu_num_logits = batch.cu_num_logits[: batch.num_reqs + 1].long()
    num_drafts = cu_num_logits.diff() - 1
    column = num_drafts.clamp(max=draft_tokens.shape[1] - 1)
    token = draft_tokens[slots, column].long()
    is_pending = num_drafts < lengths[slots].sum(1)
    word = bitmask[cu_num_logits[:-1] + num_drafts, token // 32]
    is_allowed = (word >> (token % 32) & 1) != 0
    return token.masked_fill(is_allowed | ~is_pending, -1)
