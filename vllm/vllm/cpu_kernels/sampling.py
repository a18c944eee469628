"""Temperature, min-p, top-k, top-p and the draw, as vLLM's kernels compute them.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs.
"""

import numpy as np
import torch

from vllm.cpu_kernels.noise import DRAFT_NOISE_SALT, block_argmax, gumbel_noise
from vllm.cpu_kernels.rows import (
    copy_row,
    float_row,
    per_token,
    put_back,
    takes_launch_options,
)


def temperature_kernel(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    temperature: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    temps = per_token(temperature.float(), expanded_idx_mapping, 1.0).numpy()
    for row in np.flatnonzero((temps != 0.0) & (temps != 1.0)):
        scores = float_row(logits, row, vocab_size)
        scores /= temps[row]
        put_back(logits, row, scores)


def gumbel_sample_kernel(
    local_argmax: torch.Tensor,  # int64 [num_tokens, num_blocks]
    _local_argmax_stride: int,
    local_max: torch.Tensor,  # float32, or float64 with USE_FP64: [num_tokens, num_blocks]
    _local_max_stride: int,
    logits_cache: torch.Tensor | None,  # [max_num_reqs, num_cols, >= vocab_size]
    _logits_cache_stride_0: int,
    _logits_cache_stride_1: int,
    logits_cache_col: torch.Tensor | None,  # scalar, or [num_tokens] with PER_TOKEN_COL
    logits_cache_source: torch.Tensor | None,  # [num_tokens, vocab_size]
    _logits_cache_source_stride: int,
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens], -1 on padding rows
    seeds: torch.Tensor,  # [max_num_reqs]
    pos: torch.Tensor,  # [num_tokens]
    temperature: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    if logits_cache is not None:
        # The copy comes before the temperature, so that the cache can keep the dtype of the head.
        cols = logits_cache_col.expand(expanded_idx_mapping.shape).tolist()
        for row, req in enumerate(expanded_idx_mapping.tolist()):
            if req >= 0:
                kept = logits_cache[req, cols[row], :vocab_size]
                copy_row(kept, logits_cache_source[row, :vocab_size])
    temps = per_token(temperature.float(), expanded_idx_mapping, 0.0).numpy()
    request_seeds = per_token(seeds, expanded_idx_mapping, 0).tolist()
    positions = pos.tolist()
    for row, temp in enumerate(temps):
        scores = float_row(logits, row, vocab_size)
        if temp != 0.0:
            if APPLY_TEMPERATURE:
                scores = scores / temp
            position = positions[row] + (DRAFT_NOISE_SALT if IS_DRAFTING else 0)
            scores = scores + gumbel_noise(request_seeds[row], position, vocab_size, USE_FP64)
        write_block_argmax(scores, BLOCK_SIZE, local_argmax[row], local_max[row])


def write_block_argmax(
    scores: np.ndarray,  # [vocab_size]
    block_size: int,
    local_argmax: torch.Tensor,  # [num_blocks]
    local_max: torch.Tensor,  # [num_blocks]
) -> None:
    tokens, values = block_argmax(scores, block_size)
    local_argmax.copy_(torch.from_numpy(tokens))
    local_max.copy_(torch.from_numpy(values))


def min_p_kernel(
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,  # [num_tokens]
    min_p: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    per_row = per_token(min_p.float(), expanded_idx_mapping, 0.0).numpy()
    for row in np.flatnonzero(per_row):
        scores = float_row(logits, row, vocab_size)
        scores[scores < scores.max() + np.log(per_row[row])] = -np.inf
        put_back(logits, row, scores)


@takes_launch_options
def topk_topp_kernel(
    LOGITS: torch.Tensor,  # float32 [batch_size, vocab_size]
    LOGITS_STRIDE_0: int,
    BUFFER: torch.Tensor,
    PERCENTILE_TO_STD_TABLE: torch.Tensor,
    NORMAL_CDF_TO_SIGMA_TABLE: torch.Tensor,
    K: torch.Tensor,  # [batch_size], read with TOPK_ENABLED
    P: torch.Tensor,  # [batch_size], read with TOPP_ENABLED
    BATCH_SIZE: int,
    VOCAB_SIZE: int,
    MASK_VALUE: float,
    BLOCK_SIZE: int,
    BLOCK_SIZE_TRUNC: int,
    TOPK_ENABLED: bool,
    TOPP_ENABLED: bool,
    SPLIT_COVERS_PONLY: bool,
    **_launch_options: object,  # num_warps: this kernel is launched by keyword, with its options
) -> None:
    """Keep the k best tokens, and among them the fewest whose probability reaches p.

    Exactly that many are kept. Among equal logits at the border, the lowest ids are kept. The stock
    kernel counts duplicates to get the same result.
    """
    for row in range(BATCH_SIZE):
        scores = LOGITS[row].numpy()
        k = int(K[row]) if TOPK_ENABLED else VOCAB_SIZE
        p = float(P[row]) if TOPP_ENABLED else 1.0
        if k >= VOCAB_SIZE and p >= 1.0:
            continue
        best = scores if k >= VOCAB_SIZE else np.partition(scores, VOCAB_SIZE - k)[-k:]
        best = np.sort(best)[::-1]
        num_kept = nucleus_size(best, p) if p < 1.0 else best.size
        keep_best(scores, num_kept, best[num_kept - 1], MASK_VALUE)


def nucleus_size(
    descending: np.ndarray,  # [num_candidates] logits
    p: float,
) -> int:
    """The smallest number of best candidates whose total probability is at least p."""
    # float64, because the borderline token must not depend on the order of a long float32 sum.
    with np.errstate(invalid="ignore"):  # in a row of -inf every comparison fails, so all are kept
        mass = np.cumsum(np.exp(descending.astype(np.float64) - descending[0]))
    return min(int(np.searchsorted(mass, p * mass[-1])) + 1, descending.size)


def keep_best(
    scores: np.ndarray,  # [vocab_size], written to
    num_kept: int,
    threshold: float,  # the num_kept-th best score
    mask_value: float,
) -> None:
    dropped = scores < threshold
    num_surplus = scores.size - np.count_nonzero(dropped) - num_kept
    if num_surplus > 0:
        dropped[np.flatnonzero(scores == threshold)[-num_surplus:]] = True
    scores[dropped] = mask_value
