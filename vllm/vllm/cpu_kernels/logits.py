"""Changes to logits before vLLM samples, per request: penalties, biases, grammar masks.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs.
"""

import numpy as np
import torch

from vllm.cpu_kernels.rows import bits_of, float_row, put_back


def penalties_kernel(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    token_ids: torch.Tensor,  # [num_tokens], the drafts of a request follow its first token
    expanded_local_pos: torch.Tensor,  # [num_tokens]
    repetition_penalty: torch.Tensor,  # [max_num_reqs]
    frequency_penalty: torch.Tensor,  # [max_num_reqs]
    presence_penalty: torch.Tensor,  # [max_num_reqs]
    prompt_bin_mask: torch.Tensor,  # int32 [max_num_reqs, ceil(vocab_size / 32)]
    _prompt_bin_mask_stride: int,
    output_bin_counts: torch.Tensor,  # int32 [max_num_reqs, vocab_size]
    _output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    local_pos = expanded_local_pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        if req < 0:
            continue
        repetition, frequency, presence = (
            penalty[req].numpy()
            for penalty in (repetition_penalty, frequency_penalty, presence_penalty)
        )
        if repetition == 1.0 and frequency == 0.0 and presence == 0.0:
            continue
        counts = output_bin_counts[req, :vocab_size].numpy()
        if local_pos[row]:
            # This row counts only if the drafts before it are accepted.
            drafts = token_ids[row - local_pos[row] + 1 : row + 1].numpy()
            counts = counts.copy()
            np.add.at(counts, drafts[(drafts >= 0) & (drafts < vocab_size)], 1)
        scores = float_row(logits, row, vocab_size)
        if repetition != 1.0:
            seen = bits_of(prompt_bin_mask[req], vocab_size) | (counts > 0)
            divisor = np.float32(1.0) / repetition
            scores *= np.where(seen, np.where(scores > 0, divisor, repetition), np.float32(1.0))
        scores -= frequency * counts.astype(np.float32)
        scores -= presence * (counts > 0)
        put_back(logits, row, scores)


def bincount_kernel(
    idx_mapping: torch.Tensor,  # [num_reqs]
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    _all_token_ids_stride: int,
    prompt_len: torch.Tensor,  # [max_num_reqs]
    prefill_len: torch.Tensor,  # [max_num_reqs], the prompt and the tokens generated before
    prompt_bin_mask: torch.Tensor,  # int32 [max_num_reqs, ceil(vocab_size / 32)]
    _prompt_bin_mask_stride: int,
    output_bin_counts: torch.Tensor,  # int32 [max_num_reqs, vocab_size]
    _output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    for req in idx_mapping.tolist():
        num_prompt, num_prefill = int(prompt_len[req]), int(prefill_len[req])
        tokens = all_token_ids[req, :num_prefill].numpy()
        prompt = tokens[:num_prompt]
        words = prompt_bin_mask[req].numpy().view(np.uint32)
        np.bitwise_or.at(words, prompt // 32, np.uint32(1) << (prompt % 32).astype(np.uint32))
        np.add.at(output_bin_counts[req].numpy(), tokens[num_prompt:], 1)


def bias_kernel(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    num_allowed_token_ids: torch.Tensor,  # [max_num_reqs]
    allowed_token_ids: torch.Tensor,  # [max_num_reqs, max_allowed]
    _allowed_token_ids_stride: int,
    num_logit_bias: torch.Tensor,  # [max_num_reqs]
    bias_token_ids: torch.Tensor,  # [max_num_reqs, max_biased]
    _bias_token_ids_stride: int,
    bias: torch.Tensor,  # [max_num_reqs, max_biased]
    _bias_stride: int,
    pos: torch.Tensor,  # [num_tokens]
    min_lens: torch.Tensor,  # [max_num_reqs]
    num_stop_token_ids: torch.Tensor,  # [max_num_reqs]
    restore_when_all_masked: torch.Tensor,  # [max_num_reqs]
    stop_token_ids: torch.Tensor,  # [max_num_reqs, max_stop]
    _stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Apply the allowed tokens of a request, then its biases, then the ban on stop tokens.

    Stop tokens are banned until min_tokens are reached.
    """
    positions = pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        if req < 0:
            continue
        scores = float_row(logits, row, vocab_size)
        if num_allowed := int(num_allowed_token_ids[req]):
            allowed = allowed_token_ids[req, :num_allowed].numpy()
            kept = scores[allowed]
            scores.fill(-np.inf)
            scores[allowed] = kept
        if num_biased := int(num_logit_bias[req]):
            scores[bias_token_ids[req, :num_biased].numpy()] += bias[req, :num_biased].numpy()
        num_stop = int(num_stop_token_ids[req])
        if num_stop and positions[row] + 1 < int(min_lens[req]):
            restore = CHECK_ALL_MASKED_ROWS and bool(restore_when_all_masked[req])
            _mask_stop_tokens(scores, stop_token_ids[req, :num_stop].numpy(), restore)
        put_back(logits, row, scores)


def _mask_stop_tokens(
    scores: np.ndarray,  # [vocab_size], written to
    stop: np.ndarray,  # [num_stop]
    restore: bool,
) -> None:
    before = scores[stop]
    scores[stop] = -np.inf
    # A grammar may allow only the end. Stopping early is then better than having no token at all.
    if restore and scores.max() == -np.inf:
        finite = np.isfinite(before)
        scores[stop[finite]] = before[finite]


def apply_grammar_bitmask_kernel(
    logits: torch.Tensor,  # [num_logits, vocab_size]
    _logits_stride: int,
    logits_indices: torch.Tensor,  # [num_masks], req_idx * MASK_STRIDE + position
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    bitmask: torch.Tensor,  # int32 [num_masks, ceil(vocab_size / 32)]
    _bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    starts = cu_num_logits.tolist()
    for mask, index in zip(bitmask, logits_indices.tolist(), strict=True):
        req, position = divmod(index, MASK_STRIDE)
        if position < starts[req + 1] - starts[req]:  # drafts may have been trimmed since
            row = starts[req] + position
            scores = float_row(logits, row, vocab_size)
            scores[~bits_of(mask, vocab_size)] = -np.inf
            put_back(logits, row, scores)


def num_nans_kernel(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    _logits_stride: int,
    num_nans: torch.Tensor,  # int32 [num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    for row in range(num_nans.shape[0]):
        num_nans[row] = np.count_nonzero(np.isnan(float_row(logits, row, vocab_size)))
