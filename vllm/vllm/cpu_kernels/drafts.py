"""Work on drafts that does not touch the vocabulary: n-gram proposals, and moving drafts around.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs. The grid is not among the arguments,
so each function takes the number of requests from a tensor's shape.
"""

import numpy as np
import torch

from vllm.cpu_kernels.rows import takes_launch_options
from vllm.cpu_kernels.steps import segments, unroll


def prepare_prefill_inputs_kernel(
    target_input_ids: torch.Tensor,  # [num_tokens]
    target_positions: torch.Tensor,  # [num_tokens]
    last_sampled: torch.Tensor,  # [max_num_reqs, 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    out_input_ids: torch.Tensor,  # [>= num_tokens + num_reqs]
    out_positions: torch.Tensor,  # [>= num_tokens + num_reqs]
    last_token_indices: torch.Tensor,  # [max_num_reqs]
    out_query_start_loc: torch.Tensor,  # [max_num_reqs + 1]
    out_seq_lens: torch.Tensor,  # [max_num_reqs]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    seq_lens: torch.Tensor,  # [num_reqs]
    num_rejected: torch.Tensor,  # [num_reqs]
    max_num_reqs: int,
    max_model_len: int,
    BLOCK_SIZE: int,
) -> None:
    """Inputs of a separate draft model: the accepted tokens of the target, then its last sampled
    token.

    Each request has room for one token more than the target's query. Zeros fill the rest.
    """
    num_reqs = idx_mapping.shape[0]
    starts, lengths = segments(query_start_loc, num_reqs)
    num_valid = lengths - num_rejected[:num_reqs].numpy()
    out_starts = starts + np.arange(num_reqs)
    request, offset = unroll(lengths + 1)
    place = out_starts[request] + offset

    tokens = np.zeros(request.size, dtype=np.int32)
    valid = offset < num_valid[request]
    tokens[valid] = target_input_ids.numpy()[(starts[request] + offset)[valid]]
    newest = last_sampled.view(-1).numpy()[idx_mapping.numpy()]
    is_newest = offset == num_valid[request]
    tokens[is_newest] = newest[request[is_newest]]
    out_input_ids.numpy()[place] = tokens
    positions = target_positions.numpy()[starts][request] + offset
    out_positions.numpy()[place] = np.minimum(positions, max_model_len - 1)

    fill(last_token_indices, out_starts + num_valid, max_num_reqs, 0)
    fill(out_query_start_loc, out_starts, max_num_reqs + 1, starts[-1] + lengths[-1] + num_reqs)
    new_lens = np.minimum(seq_lens[:num_reqs].numpy() + 1, max_model_len)
    fill(out_seq_lens, new_lens, max_num_reqs, 0)


def fill(out: torch.Tensor, values: np.ndarray, size: int, padding: int) -> None:
    """`values` first, and `padding` behind them up to `size`."""
    out.numpy()[: values.size] = values
    out.numpy()[values.size : size] = padding


@takes_launch_options
def ngram_scan_kernel(
    token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _token_ids_stride: int,
    idx_mapping: torch.Tensor,  # [num_reqs]
    total_len: torch.Tensor,  # [max_num_reqs]
    num_sampled: torch.Tensor,  # [num_reqs]
    scratch: torch.Tensor,  # int64 [max_num_reqs, num_blocks]
    _scratch_stride: int,
    L: int,  # max_model_len
    MIN_N: int,
    MAX_N: int,
    MAX_N_PO2: int,
    BLOCK_L: int,
    **_launch_options: object,
) -> None:
    """Where the longest suffix of each request last occurred before, by block of positions.

    A match of n tokens at a position has the score n * (L + 1) + position + 1. No match has 0.
    """
    for row, req in enumerate(idx_mapping.tolist()):
        tokens = token_ids[req, : int(total_len[req])].numpy()
        scores = np.zeros(scratch.shape[1] * BLOCK_L, dtype=np.int64)
        if num_sampled[row] > 0:
            for n in range(MIN_N, min(MAX_N, tokens.size - 1) + 1):
                earlier = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
                found = np.flatnonzero((earlier == tokens[-n:]).all(axis=1))
                scores[found] = n * (L + 1) + found + 1
        scratch[row].numpy()[:] = scores.reshape(-1, BLOCK_L).max(axis=1)


@takes_launch_options
def ngram_finalize_kernel(
    token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _token_ids_stride: int,
    idx_mapping: torch.Tensor,  # [num_reqs]
    total_len: torch.Tensor,  # [max_num_reqs]
    num_sampled: torch.Tensor,  # [num_reqs]
    last_sampled: torch.Tensor,  # [max_num_reqs]
    scratch: torch.Tensor,  # int64 [max_num_reqs, num_blocks]
    _scratch_stride: int,
    drafts: torch.Tensor,  # int64 [max_num_reqs, K]
    L: int,  # max_model_len
    N_BLOCKS: int,
    K: int,
    K_PO2: int,
    N_BLOCKS_PO2: int,
    **_launch_options: object,
) -> None:
    """Draft the tokens that followed the best match. Where there are none, draft the last sampled
    token.
    """
    num_reqs, req = idx_mapping.shape[0], idx_mapping.numpy()
    score = scratch[:num_reqs, :N_BLOCKS].numpy().max(axis=1)
    n, position = np.divmod(score - 1, L + 1)
    source = (position + n)[:, None] + np.arange(K)
    drafting = (num_sampled[:num_reqs].numpy() > 0) & (score > 0)
    valid = drafting[:, None] & (source < total_len.numpy()[req, None])
    tokens = token_ids.numpy()[req[:, None], np.where(valid, source, 0)]
    newest = last_sampled.view(-1).numpy()[req, None]
    drafts.numpy()[:num_reqs] = np.where(valid, tokens, newest)


def gather_draft_sampled_kernel(
    draft_sampled: torch.Tensor,  # [num_logits]
    pos: torch.Tensor,  # [num_logits]
    input_ids: torch.Tensor,  # [num_tokens]
    positions: torch.Tensor,  # [num_tokens]
    logits_indices: torch.Tensor,  # [num_logits]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    prefill_len: torch.Tensor,  # [max_num_reqs]
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """Token and position of each row of logits. -1 for drafts in a step that began in a prompt."""
    token = logits_indices[:num_logits].numpy()
    local_pos = expanded_local_pos[:num_logits].numpy()
    prefill = prefill_len.numpy()[expanded_idx_mapping[:num_logits].numpy()]
    positions = positions.numpy()[token]
    is_placeholder = (local_pos > 0) & (positions - local_pos < prefill)
    draft_sampled.numpy()[:num_logits] = np.where(is_placeholder, -1, input_ids.numpy()[token])
    pos.numpy()[:num_logits] = positions


@takes_launch_options
def flatten_sampled_kernel(
    flat_sampled: torch.Tensor,  # [num_logits]
    sampled: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    _sampled_stride: int,
    num_sampled: torch.Tensor,  # [num_reqs]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    **_launch_options: object,
) -> None:
    start, _ = segments(cu_num_logits, num_sampled.shape[0])
    request, offset = unroll(num_sampled.numpy())
    flat_sampled.numpy()[start[request] + offset] = sampled.numpy()[request, offset]
