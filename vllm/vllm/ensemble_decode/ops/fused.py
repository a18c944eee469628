"""`eager.combine` in Triton, for functions that are sums of the members' scores.

The vocabulary is cut into blocks, so that a few rows keep the whole device busy. Values that a row
needs from all blocks go through memory. There are therefore three kernels:

- each member's extremes and mass
- the sum
- its normalisation
"""

from functools import cache

import torch
from vllm.triton_utils import tl, triton

from vllm.ensemble_decode.functions import EnsembleFunction
from vllm.ensemble_decode.request_args import RowCoefficients

BLOCK = 4096


def can_combine(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
) -> bool:
    return function.coefficients is not None and logits.stride(-1) == 1


def combine(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
    combines_probs: bool,
    rows: RowCoefficients | None = None,
) -> torch.Tensor:  # [num_rows, vocab_size], float32
    """See `eager.combine`. Only for inputs where `can_combine`."""
    num_members, num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    if rows is None:
        coefficients = _on_device(function.coefficients, logits.device)
        slots, rows_per_slot = None, 1
        subtracts = min(function.coefficients) < 0
    else:
        coefficients, slots, rows_per_slot = rows
        subtracts = function.subtracts
    takes_logs = combines_probs and function.log_space
    takes_probs = combines_probs and not takes_logs
    floors = subtracts and not takes_probs
    out = logits.new_empty(num_rows, vocab_size, dtype=torch.float32)
    # By block: the extremes and the mass of each member, and what the sum offers.
    of_members = out.new_empty(num_rows, 3, num_blocks, num_members)
    of_sum = out.new_empty(num_rows, num_blocks)
    shapes = dict(NUM_MEMBERS=num_members, BLOCK=BLOCK)
    kinds = dict(
        TAKES_PROBS=takes_probs, TAKES_LOGS=takes_logs, FLOORS=floors, HAS_SLOTS=rows is not None
    )
    arguments = (logits, logits.stride(0), logits.stride(1), vocab_size, num_blocks)
    grid = (num_rows, num_blocks)
    if takes_probs or takes_logs or floors:
        _members_kernel[grid](*arguments, of_members, **shapes, num_warps=8)
    _sum_kernel[grid](
        *arguments,
        coefficients,
        slots,
        rows_per_slot,
        of_members,
        of_sum,
        out,
        **shapes,
        **kinds,
        COUNT_BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )
    _finish_kernel[grid](
        *arguments,
        of_members,
        of_sum,
        out,
        **shapes,
        TAKES_PROBS=takes_probs,
        TAKES_LOGS=takes_logs,
        COUNT_BLOCK=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )
    return out


@cache
def _on_device(
    values: tuple[float, ...],  # [num_members]
    device: torch.device,
) -> torch.Tensor:  # [num_members]
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def _scores(
    logits_ptr,  # [num_members, num_rows, vocab_size]
    member_stride,
    row_stride,
    member,
    row,
    token,
    is_token,
):
    """A member's logits of a row at `token`. -inf past the end of the vocabulary."""
    # 64 bits, because offsets into the logits of many rows and members exceed 2^31.
    at = tl.cast(member_stride, tl.int64) * member + row * row_stride + token
    return tl.load(logits_ptr + at, mask=is_token, other=float("-inf")).to(tl.float32)


@triton.jit
def _members_kernel(
    logits_ptr,  # [num_members, num_rows, vocab_size]
    member_stride,
    row_stride,
    vocab_size,
    num_blocks,
    of_members_ptr,  # [num_rows, 3, num_blocks, num_members]
    NUM_MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block and member: the highest logit, `sum exp(x - highest)`, the lowest finite logit."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    for member in tl.static_range(NUM_MEMBERS):
        x = _scores(logits_ptr, member_stride, row_stride, member, row, token, is_token)
        highest = tl.max(x, axis=0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = tl.sum(tl.exp(x - base), axis=0)
        lowest = tl.min(tl.where(x == float("-inf"), float("inf"), x), axis=0)
        at = of_members_ptr + (row * 3 * num_blocks + block) * NUM_MEMBERS + member
        tl.store(at, highest)
        tl.store(at + num_blocks * NUM_MEMBERS, mass)
        tl.store(at + 2 * num_blocks * NUM_MEMBERS, lowest)


@triton.jit
def _log_mass(
    of_members_ptr,  # [num_rows, 3, num_blocks, num_members]
    row,
    member,
    num_blocks,
    NUM_MEMBERS,
    COUNT_BLOCK: tl.constexpr,
):
    """`log sum exp(x)` of a member's row."""
    block = tl.arange(0, COUNT_BLOCK)
    is_block = block < num_blocks
    at = of_members_ptr + (row * 3 * num_blocks + block) * NUM_MEMBERS + member
    highest = tl.load(at, mask=is_block, other=float("-inf"))
    mass = tl.load(at + num_blocks * NUM_MEMBERS, mask=is_block, other=0.0)
    of_all = tl.max(highest, axis=0)
    return of_all + tl.log(tl.sum(mass * tl.exp(highest - of_all), axis=0))


@triton.jit(do_not_specialize=["rows_per_slot"])
def _sum_kernel(
    logits_ptr,  # [num_members, num_rows, vocab_size]
    member_stride,
    row_stride,
    vocab_size,
    num_blocks,
    coefficients_ptr,  # [max_num_reqs, num_members] if HAS_SLOTS, else [num_members]
    slots_ptr,  # [num_rows / rows_per_slot] if HAS_SLOTS, else None
    rows_per_slot,
    of_members_ptr,  # [num_rows, 3, num_blocks, num_members]
    of_sum_ptr,  # [num_rows, num_blocks]
    out_ptr,  # [num_rows, vocab_size]
    NUM_MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAKES_PROBS: tl.constexpr,
    TAKES_LOGS: tl.constexpr,
    FLOORS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    if HAS_SLOTS:
        # A row without a request, of slot -1, gets some request's. It is never read.
        slot = tl.maximum(tl.load(slots_ptr + row // rows_per_slot).to(tl.int64), 0)
        coefficients_ptr += slot * NUM_MEMBERS
    total = tl.zeros((BLOCK,), tl.float32)
    # Add member by member, in the user's order: the order of a float sum is part of the result.
    for member in tl.static_range(NUM_MEMBERS):
        coefficient = tl.load(coefficients_ptr + member)
        x = _scores(logits_ptr, member_stride, row_stride, member, row, token, is_token)
        if FLOORS:
            # A token that is removed from a subtracted member gets the member's lowest logit.
            blocks = tl.arange(0, COUNT_BLOCK)
            at = of_members_ptr + ((row * 3 + 2) * num_blocks + blocks) * NUM_MEMBERS + member
            lowest = tl.load(at, mask=blocks < num_blocks, other=float("inf"))
            lowest = tl.min(lowest, axis=0)
            x = tl.where(coefficient < 0, tl.where(x == float("-inf"), lowest, x), x)
        if TAKES_PROBS or TAKES_LOGS:
            x -= _log_mass(of_members_ptr, row, member, num_blocks, NUM_MEMBERS, COUNT_BLOCK)
            if TAKES_PROBS:
                x = tl.exp(x)
        # Leave out members of weight 0, because 0 * -inf is not a number.
        total += tl.where(coefficient != 0, coefficient * x, 0.0)
    if TAKES_PROBS:
        # A difference of probabilities can be negative. Such a token gets no probability.
        total = tl.where(total > 0, total, 0.0)
        offer = tl.sum(tl.where(is_token, total, 0.0), axis=0)
    else:
        # -inf minus -inf is NaN: a token that no member offers.
        total = tl.where(total == total, total, float("-inf"))
        offer = tl.max(tl.where(is_token & (total > float("-inf")), 1.0, 0.0), axis=0)
    tl.store(of_sum_ptr + row * num_blocks + block, offer)
    tl.store(out_ptr + row * vocab_size + token, total, mask=is_token)


@triton.jit
def _finish_kernel(
    logits_ptr,  # [num_members, num_rows, vocab_size]
    member_stride,
    row_stride,
    vocab_size,
    num_blocks,
    of_members_ptr,  # [num_rows, 3, num_blocks, num_members]
    of_sum_ptr,  # [num_rows, num_blocks]
    out_ptr,  # [num_rows, vocab_size]
    NUM_MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAKES_PROBS: tl.constexpr,
    TAKES_LOGS: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    """Normalise probabilities and take their logarithms.

    Where the members together offer no token, the first member decides alone.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    blocks = tl.arange(0, COUNT_BLOCK)
    offers = tl.load(of_sum_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
    offer = tl.sum(offers, axis=0)
    at = out_ptr + row * vocab_size + token
    if offer > 0:
        if TAKES_PROBS:
            total = tl.load(at, mask=is_token, other=0.0)
            tl.store(at, tl.log(total / offer), mask=is_token)
    else:
        x = _scores(logits_ptr, member_stride, row_stride, 0, row, token, is_token)
        if TAKES_PROBS or TAKES_LOGS:
            x -= _log_mass(of_members_ptr, row, 0, num_blocks, NUM_MEMBERS, COUNT_BLOCK)
        tl.store(at, x, mask=is_token)
