"""Which drafts stay: acceptance in vLLM's rejection sampler, for all requests of a step at once.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs. The functions read the statistics by
block that `rejection.py` takes from the logits. They read single logits for the drafts only.
"""

from typing import NamedTuple

import numpy as np
import torch

from vllm.cpu_kernels.rows import takes_launch_options
from vllm.cpu_kernels.steps import segments

_NUM_PHILOX_ROUNDS = 10
# Maps 31 random bits to [0, 1]. It is also the smallest uniform that the kernel returns.
_UNIFORM_SCALE = np.float32(4.6566127342e-10)
_LOW_32 = np.uint64(0xFFFFFFFF)


def philox_uniform(
    seeds: np.ndarray,  # int64, broadcastable with offsets
    offsets: np.ndarray,  # int64
) -> np.ndarray:  # float32 in (0, 1)
    """The uniforms of `triton.language.rand`: Philox 4x32-10 (Salmon et al., 2011), without 0."""
    key = seeds.astype(np.int64).view(np.uint64)
    counter = offsets.astype(np.int64).view(np.uint64)
    k0, k1 = key & _LOW_32, key >> 32
    c0, c1, c2, c3 = counter & _LOW_32, counter >> 32, np.uint64(0), np.uint64(0)
    for _ in range(_NUM_PHILOX_ROUNDS):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW_32, (a >> 32) ^ c3 ^ k1, a & _LOW_32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW_32, (k1 + np.uint64(0xBB67AE85)) & _LOW_32
    bits = c0.astype(np.uint32).view(np.int32)
    folded = bits ^ (bits >> 31)  # drops the sign: 31 random bits
    return np.maximum(folded.astype(np.float32) * _UNIFORM_SCALE, _UNIFORM_SCALE)


class Drafts(NamedTuple):
    """The drafts of a step, padded to the longest window."""

    num_drafts: np.ndarray  # [num_reqs]
    start: np.ndarray  # [num_reqs], the first row of logits
    exists: np.ndarray  # bool [num_reqs, window]
    row: np.ndarray  # [num_reqs, window], row of logits that verifies the draft; 0 on padding
    token: np.ndarray  # [num_reqs, window], -1 for placeholders and on padding


def find_drafts(cu_num_logits: torch.Tensor, draft_sampled: torch.Tensor, num_reqs: int) -> Drafts:
    start, num_logits = segments(cu_num_logits, num_reqs)
    num_drafts = np.maximum(num_logits - 1, 0)
    step = np.arange(num_drafts.max(initial=0))
    exists = step < num_drafts[:, None]
    row = np.where(exists, start[:, None] + step, 0)
    token = np.where(exists, draft_sampled.numpy()[row + 1], -1)
    return Drafts(num_drafts, start, exists, row, token)


def padded(
    by_block: torch.Tensor,  # [num_logits, num_blocks]
    num_blocks: int,
    padding: float,
) -> np.ndarray:  # [num_logits, num_blocks padded to a power of two]
    """As wide as in the kernel, because the order of a float32 sum depends on the width."""
    wide = np.full((by_block.shape[0], num_blocks), padding, dtype=np.float32)
    wide[:, : by_block.shape[1]] = by_block.numpy()
    return wide


def log_sum_exp(
    local_max: torch.Tensor,  # [num_logits, num_blocks]
    local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    num_blocks: int,
) -> np.ndarray:  # [num_logits]
    maxima = padded(local_max, num_blocks, -np.inf)
    highest = maxima.max(axis=1)
    sums = padded(local_sumexp, num_blocks, 0.0) * np.exp(maxima - highest[:, None])
    return highest + np.log(sums.sum(axis=1))


def logits_of(logits: torch.Tensor, *index: np.ndarray) -> np.ndarray:  # float32
    return logits[tuple(torch.from_numpy(i).long() for i in index)].float().numpy()


def draft_log_probs(
    drafts: Drafts,
    target: tuple[torch.Tensor, np.ndarray],  # logits [num_logits, >= vocab], log-sums [num_logits]
    draft: tuple[torch.Tensor, np.ndarray] | None,  # [max_num_reqs, steps, >= vocab], [num_logits]
    req: np.ndarray,  # [num_reqs]
    temps: np.ndarray,  # [num_reqs]
) -> tuple[np.ndarray, np.ndarray | np.float32]:  # [num_reqs, window] each
    """Log-probabilities of the drafts under the target and under their proposer.

    The proposer's are 0 if its distribution is one-hot.
    """
    token = np.maximum(drafts.token, 0)
    target_log_prob = logits_of(target[0], drafts.row, token) - target[1][drafts.row]
    if draft is None:
        return target_log_prob, np.float32(0.0)
    draft_logit = logits_of(draft[0], req[:, None], np.arange(token.shape[1]), token)
    return target_log_prob, draft_logit / temps[:, None] - draft[1][drafts.row]


@takes_launch_options
def compute_cumulative_log_p_kernel(
    cumulative_log_p: torch.Tensor,  # [num_logits]
    target_logits: torch.Tensor,  # [num_logits, >= vocab_size]
    _target_logits_stride: int,
    target_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_max_stride: int,
    target_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_sumexp_stride: int,
    draft_sampled: torch.Tensor,  # [num_logits]
    draft_logits: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    _draft_logits_stride_0: int,
    _draft_logits_stride_1: int,
    draft_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_max_stride: int,
    draft_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_sumexp_stride: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor,  # [max_num_reqs]
    _vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    **_launch_options: object,
) -> None:
    """log min(p * target(x) / draft(x), 1) along the drafts, for block verification."""
    req = idx_mapping.numpy()
    drafts = find_drafts(cu_num_logits, draft_sampled, req.size)
    temps = temperature.float().numpy()[req]
    out = cumulative_log_p.numpy()
    with np.errstate(all="ignore"):  # rows of greedy requests have no statistics
        blocks = PADDED_VOCAB_NUM_BLOCKS
        target = target_logits, log_sum_exp(target_local_max, target_local_sumexp, blocks)
        draft = None
        if HAS_DRAFT_LOGITS:
            draft = draft_logits, log_sum_exp(draft_local_max, draft_local_sumexp, blocks)
        target_log_prob, draft_log_prob = draft_log_probs(drafts, target, draft, req, temps)
        ratio = target_log_prob - draft_log_prob
        log_p = np.zeros(req.size, dtype=np.float32)
        for step in range(drafts.token.shape[1]):
            longer = np.fmin(log_p + ratio[:, step], np.float32(0.0))
            log_p = np.where(drafts.token[:, step] >= 0, longer, log_p)
            written = drafts.exists[:, step] & (temps != 0.0)
            out[drafts.row[written, step]] = log_p[written]


@takes_launch_options
def rejection_kernel(
    sampled: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    _sampled_stride: int,
    rejected_steps: torch.Tensor,  # [num_reqs], how many drafts are accepted
    target_rejected_logsumexp: torch.Tensor,  # [num_reqs]
    draft_rejected_logsumexp: torch.Tensor,  # [num_reqs]
    target_logits: torch.Tensor,  # [num_logits, >= vocab_size]
    _target_logits_stride: int,
    target_local_argmax: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_argmax_stride: int,
    target_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_max_stride: int,
    target_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _target_local_sumexp_stride: int,
    draft_sampled: torch.Tensor,  # [num_logits], -1 for placeholders
    draft_logits: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    _draft_logits_stride_0: int,
    _draft_logits_stride_1: int,
    draft_local_max: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_max_stride: int,
    draft_local_sumexp: torch.Tensor,  # [num_logits, num_blocks]
    _draft_local_sumexp_stride: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    idx_mapping: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor,  # [max_num_reqs]
    seeds: torch.Tensor,  # [max_num_reqs]
    pos: torch.Tensor,  # [num_logits]
    synthetic_conditional_rates: torch.Tensor | None,  # [num_speculative_steps]
    cumulative_log_p: torch.Tensor | None,  # [num_logits], with USE_BLOCK_VERIFICATION
    local_residual_mass: torch.Tensor | None,  # [num_logits, num_blocks], with draft logits too
    _local_residual_mass_stride: int,
    _vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
    **_launch_options: object,
) -> None:
    """How many drafts stay, and the tokens up to the first that does not stay.

    A greedy request compares its drafts with the target's argmax. The argmax replaces a rejected
    draft. A sampled request accepts with min(target / draft, 1) (2211.17192), or by block
    (2403.10444).
    """
    req, blocks = idx_mapping.numpy(), PADDED_VOCAB_NUM_BLOCKS
    drafts = find_drafts(cu_num_logits, draft_sampled, req.size)
    temps = temperature.float().numpy()[req]
    greedy = (temps == 0.0)[:, None]
    step, valid = np.arange(drafts.token.shape[1]), drafts.token >= 0
    uniform = philox_uniform(seeds.numpy()[req, None], pos.numpy()[drafts.row])
    best = best_of_blocks(target_local_max, target_local_argmax)[drafts.row]

    with np.errstate(all="ignore"):  # rows of greedy requests have no statistics
        target = target_logits, log_sum_exp(target_local_max, target_local_sumexp, blocks)
        draft = None
        if HAS_DRAFT_LOGITS:
            draft = draft_logits, log_sum_exp(draft_local_max, draft_local_sumexp, blocks)
        if SYNTHETIC_MODE:
            accepted = uniform < synthetic_conditional_rates.numpy()[step]
        else:
            accepted = best == drafts.token
            if not USE_BLOCK_VERIFICATION:
                target_lp, draft_lp = draft_log_probs(drafts, target, draft, req, temps)
                accepted = np.where(greedy, accepted, target_lp > np.log(uniform) + draft_lp)
        accepted &= valid
        num_accepted = leading(accepted).sum(axis=1)
        verified = drafts.exists & (valid | greedy) & (step <= num_accepted[:, None])
        # Resampling starts from the log-sums of the row in which verification ended.
        last = drafts.start + verified.sum(axis=1) - 1
        needs_log_sum = ~greedy[:, 0] & (last >= drafts.start)
        if USE_BLOCK_VERIFICATION:
            ratio = np.exp(cumulative_log_p.numpy()[drafts.row])
            mass = residual_mass(drafts, ratio, target, local_residual_mass, blocks)
            fits = leading(valid) & (uniform <= block_threshold(drafts, ratio, mass))
            longest = np.where(fits, step + 1, 0).max(axis=1, initial=0)
            num_accepted = np.where(greedy[:, 0], num_accepted, longest)
            verified = np.where(greedy, verified, leading(valid))
            last = drafts.start + num_accepted
            needs_log_sum = ~greedy[:, 0] & (num_accepted < drafts.num_drafts)

    tokens = np.where(greedy & ~accepted, best, drafts.token)
    np.copyto(sampled.numpy()[:, : step.size], tokens, where=verified)
    rejected_steps.numpy()[:] = num_accepted
    last = np.where(needs_log_sum, last, 0)
    target_rejected_logsumexp.numpy()[:] = np.where(needs_log_sum, target[1][last], 0.0)
    draft_rejected_logsumexp.numpy()[:] = 0.0
    if draft is not None:
        draft_rejected_logsumexp.numpy()[needs_log_sum] = draft[1][last[needs_log_sum]]


def leading(mask: np.ndarray) -> np.ndarray:  # bool [num_reqs, window], both
    """True up to the first False of each row."""
    return np.logical_and.accumulate(mask, axis=1)


def best_of_blocks(
    local_max: torch.Tensor,  # [num_logits, num_blocks]
    local_argmax: torch.Tensor,  # [num_logits, num_blocks]
) -> np.ndarray:  # [num_logits]
    maxima = local_max.numpy()
    block = np.where(np.isnan(maxima), -np.inf, maxima).argmax(axis=1)
    return local_argmax.numpy()[np.arange(block.size), block]


def residual_mass(
    drafts: Drafts,
    ratio: np.ndarray,  # [num_reqs, window], ratio of target to draft over all drafts so far
    target: tuple[torch.Tensor, np.ndarray],  # logits [num_logits, >= vocab], log-sums [num_logits]
    local_residual_mass: torch.Tensor | None,  # [num_logits, num_blocks]
    num_blocks: int,
) -> np.ndarray:  # [num_reqs, window], mass at the position after each draft
    if local_residual_mass is not None:
        return padded(local_residual_mass, num_blocks, 0.0).sum(axis=1)[drafts.row + 1]
    next_token = np.maximum(next_drafts(drafts), 0)
    logit = logits_of(target[0], drafts.row + 1, next_token)
    return ratio * (1.0 - np.exp(logit - target[1][drafts.row + 1]))  # a one-hot draft


def next_drafts(drafts: Drafts) -> np.ndarray:  # [num_reqs, window], -1 behind the last
    return np.pad(drafts.token[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def block_threshold(
    drafts: Drafts,
    ratio: np.ndarray,  # [num_reqs, window]
    mass: np.ndarray,  # [num_reqs, window]
) -> np.ndarray:  # [num_reqs, window]
    """By draft, the largest uniform with which the block ends there or later."""
    rest = mass + 1.0 - ratio
    before_last = np.where(rest > 0.0, mass / rest, np.float32(1.0))
    return np.where(next_drafts(drafts) >= 0, before_last, ratio)


def insert_resampled_kernel(
    sampled: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    _sampled_stride: int,
    num_sampled: torch.Tensor,  # [num_reqs], number of accepted drafts; the kernel adds one
    resampled_local_argmax: torch.Tensor,  # [num_reqs, num_blocks]
    _resampled_local_argmax_stride: int,
    resampled_local_max: torch.Tensor,  # [num_reqs, num_blocks]
    _resampled_local_max_stride: int,
    _resample_num_blocks: int,
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    temperature: torch.Tensor,  # [max_num_reqs]
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    """Put the resampled token, or the bonus token, behind the accepted drafts."""
    accepted = num_sampled.numpy()
    start, num_logits = segments(cu_num_logits, accepted.size)
    temps = temperature.float().numpy()[expanded_idx_mapping.numpy()[start + accepted]]
    # A greedy request already has the target's argmax in place of its rejected draft.
    rows = np.flatnonzero((temps != 0.0) | (accepted == num_logits - 1))
    resampled = best_of_blocks(resampled_local_max, resampled_local_argmax)
    sampled.numpy()[rows, accepted[rows]] = resampled[rows]
    accepted += 1
