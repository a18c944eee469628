"""The vocabulary-sized parts of vLLM's rejection sampler: statistics, residual mass, resampling.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs. `acceptance.py` decides about the
drafts from these statistics.
"""

import numpy as np
import torch

from vllm.cpu_kernels.noise import gumbel_noise, in_blocks
from vllm.cpu_kernels.rows import float_row
from vllm.cpu_kernels.sampling import write_block_argmax


def compute_local_logits_stats_kernel(
    target_local_argmax: torch.Tensor,  # int64 [num_logits, num_blocks]
    _target_local_argmax_stride: int,
    target_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_max_stride: int,
    target_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_sumexp_stride: int,
    draft_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_max_stride: int,
    draft_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_sumexp_stride: int,
    target_logits: torch.Tensor,  # [num_logits, >= vocab_size]
    _target_logits_stride: int,
    draft_logits: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    _draft_logits_stride_0: int,
    _draft_logits_stride_1: int,
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    temperature: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """By block: the target's argmax for greedy rows, the terms of both log-sums for sampled
    rows.
    """
    steps = expanded_local_pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        if steps[row] >= num_speculative_steps:
            continue  # the bonus token is sampled from the logits themselves
        temp = temperature[req].float().numpy()
        target = float_row(target_logits, row, vocab_size)
        if temp == 0.0:
            write_block_argmax(target, BLOCK_SIZE, target_local_argmax[row], target_local_max[row])
            continue
        _write_block_sums(target, BLOCK_SIZE, target_local_max[row], target_local_sumexp[row])
        if HAS_DRAFT_LOGITS:
            draft = float_row(draft_logits[req], steps[row], vocab_size) / temp
            _write_block_sums(draft, BLOCK_SIZE, draft_local_max[row], draft_local_sumexp[row])


def _write_block_sums(
    scores: np.ndarray,  # [vocab_size]
    block_size: int,
    local_max: torch.Tensor,  # [num_blocks]
    local_sumexp: torch.Tensor,  # [num_blocks]
) -> None:
    blocks = in_blocks(scores, block_size)
    maxima = blocks.max(axis=1)
    # A block that holds only -inf has no mass. Without the shift its sum would be NaN.
    shift = np.where(maxima > -np.inf, maxima, np.float32(0.0))
    local_max.copy_(torch.from_numpy(maxima))
    local_sumexp.copy_(torch.from_numpy(np.exp(blocks - shift[:, None]).sum(axis=1)))


def _log_sum_exp(
    local_max: torch.Tensor,  # [num_blocks]
    local_sumexp: torch.Tensor,  # [num_blocks]
) -> np.float32:
    maxima = local_max.numpy()
    highest = maxima.max()
    return highest + np.log((local_sumexp.numpy() * np.exp(maxima - highest)).sum())


def compute_local_residual_mass_kernel(
    local_residual_mass: torch.Tensor,  # [num_logits, num_blocks]
    _local_residual_mass_stride: int,
    cumulative_log_p: torch.Tensor,  # [num_logits]
    target_logits: torch.Tensor,  # [num_logits, >= vocab_size]
    _target_logits_stride: int,
    target_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_max_stride: int,
    target_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_sumexp_stride: int,
    draft_logits: torch.Tensor,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    _draft_logits_stride_0: int,
    _draft_logits_stride_1: int,
    draft_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_max_stride: int,
    draft_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_sumexp_stride: int,
    draft_sampled: torch.Tensor,  # [num_logits]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    temperature: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    num_speculative_steps: int,
    _vocab_num_blocks: int,
    BLOCK_SIZE: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
) -> None:
    """sum_x max(p * target(x) - draft(x), 0) by block, for block verification (2403.10444)."""
    steps = expanded_local_pos.tolist()
    next_drafts = draft_sampled[1:].tolist()  # the last row has no next draft, so the loop skips it
    for row, next_draft in enumerate(next_drafts):
        req = int(expanded_idx_mapping[row])
        temp = temperature[req].float().numpy()
        if not 0 < steps[row] < num_speculative_steps or next_draft < 0 or temp == 0.0:
            continue
        with np.errstate(all="ignore"):  # a row or a block may hold only -inf
            target_lse = _log_sum_exp(target_local_max[row], target_local_sumexp[row])
            draft_lse = _log_sum_exp(draft_local_max[row], draft_local_sumexp[row])
            target = np.exp(float_row(target_logits, row, vocab_size) - target_lse)
            draft = np.exp(float_row(draft_logits[req], steps[row], vocab_size) / temp - draft_lse)
            ratio = np.exp(cumulative_log_p[row - 1].numpy())
        residual = in_blocks(np.maximum(ratio * target - draft, 0.0), BLOCK_SIZE, padding=0.0)
        local_residual_mass[row].copy_(torch.from_numpy(residual.sum(axis=1)))


def resample_kernel(
    resampled_local_argmax: torch.Tensor,  # int64 [num_reqs, num_blocks]
    _resampled_local_argmax_stride: int,
    resampled_local_max: torch.Tensor,  # float32, or float64 with USE_FP64: [num_reqs, num_blocks]
    _resampled_local_max_stride: int,
    target_logits: torch.Tensor,  # [num_logits, >= vocab_size]
    _target_logits_stride: int,
    target_rejected_logsumexp: torch.Tensor,  # [num_reqs]
    draft_logits: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    _draft_logits_stride_0: int,
    _draft_logits_stride_1: int,
    draft_rejected_logsumexp: torch.Tensor,  # [num_reqs]
    rejected_step: torch.Tensor,  # [num_reqs]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    draft_sampled: torch.Tensor,  # [num_logits]
    temperature: torch.Tensor,  # [max_num_reqs]
    seeds: torch.Tensor,  # [max_num_reqs]
    pos: torch.Tensor,  # [num_logits]
    cumulative_log_p: torch.Tensor | None,  # [num_logits], with USE_BLOCK_VERIFICATION
    contexts: torch.Tensor | None,
    contexts_stride: int,
    watermarking: torch.Tensor | None,
    watermarking_skip_mask: torch.Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    """Draw the token after the accepted drafts: the bonus token, or one from the residual."""
    if WATERMARK:
        # A watermark has other noise, keyed by the context. It is seldom wanted.
        _run_interpreted(tuple(resampled_local_max.shape), *locals().values())
        return
    starts, num_accepted = cu_num_logits.tolist(), rejected_step.tolist()
    for index, step in enumerate(num_accepted):
        row = starts[index] + step
        is_bonus = row == starts[index + 1] - 1
        req = int(expanded_idx_mapping[row])
        temp = temperature[req].float().numpy() if req >= 0 else np.float32(0.0)
        if temp == 0.0 and not is_bonus:
            continue  # greedy: the rejection kernel has stored the target's argmax already
        scores = float_row(target_logits, row, vocab_size)
        if not is_bonus and (rejected := int(draft_sampled[row + 1])) >= 0:
            if HAS_DRAFT_LOGITS:
                target = scores - target_rejected_logsumexp[index].numpy()
                if USE_BLOCK_VERIFICATION and step > 0:
                    target = target + cumulative_log_p[row - 1].numpy()
                draft = float_row(draft_logits[req], step, vocab_size) / temp
                scores = _log_residual(target, draft - draft_rejected_logsumexp[index].numpy())
            else:  # the draft had all its mass on one token
                scores = scores.copy()
                scores[rejected : rejected + 1] = -np.inf  # a slice: the id may lie outside
        if temp != 0.0:
            scores = scores + gumbel_noise(int(seeds[req]), int(pos[row]), vocab_size, USE_FP64)
        write_block_argmax(
            scores, BLOCK_SIZE, resampled_local_argmax[index], resampled_local_max[index]
        )


def _run_interpreted(grid: tuple[int, int], *arguments: object) -> None:
    """Run the stock resampling kernel, which the registry keeps."""
    from vllm.triton_utils.dispatcher import _registry

    stock, _ = _registry["vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils._resample_kernel"]
    stock[grid](*arguments)


def _log_residual(
    target: np.ndarray,  # [vocab_size] log-probabilities
    draft: np.ndarray,  # [vocab_size] log-probabilities
) -> np.ndarray:  # [vocab_size]
    """log max(exp(target) - exp(draft), 0), without leaving log space."""
    with np.errstate(all="ignore"):  # -inf - -inf: no mass on either side, so none is left
        ratio = np.exp(draft - target)
        return np.where(ratio < 1.0, target + np.log1p(-ratio), np.float32(-np.inf))
