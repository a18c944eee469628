"""Grammars: all members share their masks, and vLLM cuts windows because of them."""

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch


def forbidden_tokens(
    batch: InputBatch,
    mask: torch.Tensor,  # [num_rows, vocab_size] 0 or -inf, one row per row of logits
    draft_tokens: torch.Tensor,  # [max_num_reqs, window] tokens that were pending, by slot
    lengths: torch.Tensor,  # [num_slots, num_turns] lengths of their segments
) -> torch.Tensor:  # [num_reqs]
    """The pending token after the drafts, if a grammar is why vLLM left it out. Otherwise -1."""
    slots = batch.idx_mapping[: batch.num_reqs]
    cu_num_logits = batch.cu_num_logits[: batch.num_reqs + 1].long()
    num_drafts = cu_num_logits.diff() - 1
    column = num_drafts.clamp(max=draft_tokens.shape[1] - 1)
    token = draft_tokens[slots, column].long()
    is_pending = num_drafts < lengths[slots].sum(1)
    is_allowed = mask[cu_num_logits[:-1] + num_drafts, token] == 0
    return token.masked_fill(is_allowed | ~is_pending, -1)
