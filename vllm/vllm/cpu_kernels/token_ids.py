"""Chosen token ids: the ones whose log-probabilities are asked for, and the ends of bad words.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs.
"""

import numpy as np
import torch

from vllm.cpu_kernels.steps import segments, unroll


def fill_logprob_token_ids_kernel(
    out_token_ids: torch.Tensor,  # int64 [num_tokens, 1 + num_cols]
    _out_token_ids_stride: int,
    out_valid_mask: torch.Tensor,  # bool [num_tokens, 1 + num_cols]
    _out_valid_mask_stride: int,
    sampled_token_ids: torch.Tensor,  # [num_tokens]
    topk_indices: torch.Tensor,  # [num_tokens, NUM_TOPK], read with NUM_TOPK
    _topk_indices_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    num_per_req_token_ids: torch.Tensor,  # [max_num_reqs]
    per_req_token_ids: torch.Tensor,  # [max_num_reqs, max_num_token_ids]
    _per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """The sampled token, then the request's own token ids.

    A request without token ids of its own gets the most likely tokens.
    """
    req = expanded_idx_mapping.numpy()
    token_ids, valid = out_token_ids.numpy(), out_valid_mask.numpy()
    token_ids[:, 0] = sampled_token_ids.numpy()
    valid[:, 0] = True
    num_own = num_per_req_token_ids.numpy()[req]
    if NUM_TOPK:
        rows = np.flatnonzero(num_own == 0)
        token_ids[rows, 1 : NUM_TOPK + 1] = topk_indices.numpy()[rows, :NUM_TOPK]
        valid[rows, 1 : NUM_TOPK + 1] = True
    row, col = unroll(num_own)
    token_ids[row, col + 1] = per_req_token_ids.numpy()[req[row], col]
    valid[row, col + 1] = True


def prompt_logprobs_token_ids_kernel(
    prompt_logprobs_token_ids: torch.Tensor,  # [num_tokens]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    num_computed_tokens: torch.Tensor,  # [max_num_reqs]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """The token that follows each token of the batch."""
    starts, lengths = segments(query_start_loc, idx_mapping.shape[0])
    request, offset = unroll(lengths)
    req = idx_mapping.numpy()[request]
    following = num_computed_tokens.numpy()[req] + 1 + offset
    # Nothing follows a request's very last token, and nobody asks there.
    following = np.minimum(following, all_token_ids.shape[1] - 1)
    out = prompt_logprobs_token_ids.numpy()
    out[starts[request] + offset] = all_token_ids.numpy()[req, following]


def bad_words_kernel(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    bad_word_token_ids: torch.Tensor,  # [max_num_reqs, max_num_bad_word_tokens]
    _bad_word_token_ids_stride: int,
    bad_word_offsets: torch.Tensor,  # [max_num_reqs, max_num_bad_words + 1]
    _bad_word_offsets_stride: int,
    num_bad_words: torch.Tensor,  # [max_num_reqs]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _all_token_ids_stride: int,
    prompt_len: torch.Tensor,  # [max_num_reqs]
    total_len: torch.Tensor,  # [max_num_reqs]
    input_ids: torch.Tensor,  # [num_tokens], the drafts of a request follow its first token
    expanded_local_pos: torch.Tensor,  # [num_tokens]
) -> None:
    """-inf for the last token of a bad word if the output so far ends in its other tokens."""
    local_pos = expanded_local_pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        num_words = int(num_bad_words[req])
        if num_words == 0:
            continue
        # This row counts only if the drafts before it are accepted.
        drafts = input_ids[row - local_pos[row] + 1 : row + 1].tolist()
        output = all_token_ids[req, int(prompt_len[req]) : int(total_len[req])].tolist() + drafts
        offsets = bad_word_offsets[req, : num_words + 1].tolist()
        tokens = bad_word_token_ids[req, : offsets[-1]].tolist()
        for start, end in zip(offsets, offsets[1:], strict=False):
            *prefix, last = tokens[start:end]
            if output[len(output) - len(prefix) :] == prefix:
                logits[row, last] = -torch.inf
