"""The operations of `eager.py`, one Triton kernel per function.

In torch each function takes a dozen operations or more, most of them on a few numbers. Together
they cost more than a small member's proposals. Each function behaves like its namesake. The tests
run both on the same cycles. One program handles one request, except in `gather_scores` and
`mask_scores`.
"""

from collections.abc import Sequence

import torch
from vllm.triton_utils import tl, triton

from vllm.chef.state import (
    NO_TOP_K,
    Candidates,
    Cycle,
    GatheredScores,
    LastScored,
    Outputs,
    PreparedTokens,
    ProposalState,
    ScorePlaces,
    SlotStates,
)
from vllm.chef.stats import TurnStats
from vllm.ensemble_decode.dtypes import widest

# Tokens of a request that a program reads at a time.
TOKEN_BLOCK = 256
# Tokens of the vocabulary that a program handles.
VOCAB_BLOCK = 4096


@triton.jit
def _slot(
    slots_ptr,  # [num_reqs]
    row,
    spare_slot,
):
    """The slot of a row. A row without a request has the spare slot."""
    slot = tl.load(slots_ptr + row).to(tl.int64)
    return tl.where(slot >= 0, slot, spare_slot)


@triton.jit
def _kept_row(slot, position, RING_SIZE: tl.constexpr):
    """The row of a position's scores in `ProposalState.kept_scores`."""
    ring = position % RING_SIZE
    # In Triton, the remainder of a negative number is negative.
    return slot * (RING_SIZE + 1) + tl.where(ring < 0, ring + RING_SIZE, ring)


@triton.jit
def _nobodys_row(slot, RING_SIZE: tl.constexpr):
    return slot * (RING_SIZE + 1) + RING_SIZE


@triton.jit
def _segments_len(
    lengths_ptr,  # [num_reqs, num_turns]
    row,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    NUM_TURNS: tl.constexpr,
):
    """Tokens in some segments of the window, in the order of `Turns.in_window`."""
    total = tl.zeros((), tl.int64)
    for at in tl.static_range(FIRST, END):
        total += tl.load(lengths_ptr + row * NUM_TURNS + (at + 1) % NUM_TURNS)
    return total


def load(
    cycle: Cycle,
    slots: torch.Tensor,  # [num_reqs]
    states: SlotStates,
) -> Cycle:
    """See `eager.load`."""
    _load_kernel[(cycle.num_reqs,)](
        slots,
        *states,
        len(slots),
        cycle.slots,
        *cycle.slot_states,
        cycle.active,
        cycle.step_start,
        cycle.first_position,
        cycle.end,
        cycle.num_drafts,
        cycle.first_step_row,
        cycle.lengths,
        cycle.new_lengths,
        NUM_TURNS=cycle.lengths.shape[1],
        NO_TOP_K=NO_TOP_K,
        num_warps=1,
    )
    return cycle.rows(len(slots))


@triton.jit(do_not_specialize=["num_reqs"])
def _load_kernel(
    slots_ptr,  # [num_reqs]
    prefill_len_ptr,  # [max_num_reqs]
    temperature_ptr,  # [max_num_reqs]
    seeds_ptr,  # [max_num_reqs]
    top_k_ptr,  # [max_num_reqs]
    top_p_ptr,  # [max_num_reqs]
    min_p_ptr,  # [max_num_reqs]
    num_reqs,
    cycle_slots_ptr,  # [max_num_reqs]
    cycle_prefill_len_ptr,  # [max_num_reqs]
    cycle_temperature_ptr,  # [max_num_reqs]
    cycle_seeds_ptr,  # [max_num_reqs]
    cycle_top_k_ptr,  # [max_num_reqs]
    cycle_top_p_ptr,  # [max_num_reqs]
    cycle_min_p_ptr,  # [max_num_reqs]
    active_ptr,  # [max_num_reqs]
    step_start_ptr,  # [max_num_reqs]
    first_position_ptr,  # [max_num_reqs]
    end_ptr,  # [max_num_reqs]
    num_drafts_ptr,  # [max_num_reqs]
    first_step_row_ptr,  # [max_num_reqs]
    lengths_ptr,  # [max_num_reqs, num_turns]
    new_lengths_ptr,  # [max_num_reqs, num_turns]
    NUM_TURNS: tl.constexpr,
    NO_TOP_K: tl.constexpr,
):
    row = tl.program_id(0)
    # Each branch loads before it stores: a store delays the loads after it, and each load is slow.
    if row >= num_reqs:
        none = tl.zeros((), tl.int64)
        tl.store(cycle_slots_ptr + row, tl.full((), -1, tl.int32))
        tl.store(step_start_ptr + row, none)
        tl.store(first_position_ptr + row, none)
        tl.store(end_ptr + row, none)
        tl.store(num_drafts_ptr + row, none)
        tl.store(first_step_row_ptr + row, none)
        tl.store(cycle_temperature_ptr + row, 0.0)
        tl.store(cycle_top_k_ptr + row, tl.full((), NO_TOP_K, tl.int32))
        tl.store(cycle_top_p_ptr + row, 1.0)
        tl.store(cycle_min_p_ptr + row, 0.0)
        for turn in tl.static_range(NUM_TURNS):
            tl.store(lengths_ptr + row * NUM_TURNS + turn, none)
            tl.store(new_lengths_ptr + row * NUM_TURNS + turn, none)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        prefill_len = tl.load(prefill_len_ptr + slot).to(tl.int64)
        temperature = tl.load(temperature_ptr + slot)
        seed = tl.load(seeds_ptr + slot)
        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot)
        min_p = tl.load(min_p_ptr + slot)
        tl.store(cycle_slots_ptr + row, slot.to(tl.int32))
        tl.store(cycle_prefill_len_ptr + row, prefill_len)
        tl.store(cycle_temperature_ptr + row, temperature)
        tl.store(cycle_seeds_ptr + row, seed)
        tl.store(cycle_top_k_ptr + row, top_k)
        tl.store(cycle_top_p_ptr + row, top_p)
        tl.store(cycle_min_p_ptr + row, min_p)
    tl.store(active_ptr + row, tl.full((), 0, tl.int1))


def begin_cycle(
    state: ProposalState,
    cycle: Cycle,
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    seq_lens: torch.Tensor,  # [num_reqs]
    input_ids: torch.Tensor,  # [at least num_tokens]
    forbidden: torch.Tensor | None = None,  # [num_reqs]
) -> None:
    """See `eager.begin_cycle`."""
    num_turns, width = len(state.turns), cycle.tokens.shape[1]
    _begin_cycle_kernel[(cycle.num_reqs,)](
        cycle.slots,
        state.lengths,
        state.scored,
        query_start_loc,
        cu_num_logits,
        seq_lens,
        input_ids,
        cycle.prefill_len,
        forbidden,
        cycle.active,
        cycle.step_start,
        cycle.first_position,
        cycle.num_drafts,
        cycle.first_step_row,
        cycle.lengths,
        cycle.new_lengths,
        cycle.tokens,
        cycle.end,
        cycle.num_accepted,
        cycle.num_decided,
        cycle.replaced,
        cycle.settled,
        cycle.just_settled,
        len(state.lengths) - 1,
        NUM_TURNS=num_turns,
        TURN_BLOCK=triton.next_power_of_2(num_turns),
        WINDOW=state.turns.window,
        WIDTH=width,
        COLUMN_BLOCK=triton.next_power_of_2(width),
        HAS_FORBIDDEN=forbidden is not None,
        num_warps=1,
    )


@triton.jit
def _begin_cycle_kernel(
    slots_ptr,  # [num_reqs]
    state_lengths_ptr,  # [num_slots, num_turns]
    scored_ptr,  # [num_slots, num_turns]
    query_start_loc_ptr,  # [num_reqs + 1]
    cu_num_logits_ptr,  # [num_reqs + 1]
    seq_lens_ptr,  # [num_reqs]
    input_ids_ptr,  # [at least num_tokens]
    prefill_len_ptr,  # [num_reqs]
    forbidden_ptr,  # [num_reqs] if HAS_FORBIDDEN, else None
    active_ptr,  # [num_reqs]
    step_start_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    num_drafts_ptr,  # [num_reqs]
    first_step_row_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    new_lengths_ptr,  # [num_reqs, num_turns]
    tokens_ptr,  # [num_reqs, ring_size]
    end_ptr,  # [num_reqs]
    num_accepted_ptr,  # [num_reqs]
    num_decided_ptr,  # [num_reqs]
    replaced_ptr,  # [num_reqs]
    settled_ptr,  # [num_reqs]
    just_settled_ptr,  # [num_reqs]
    spare_slot,
    NUM_TURNS: tl.constexpr,
    TURN_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_real = slot >= 0
    slot = tl.where(is_real, slot, spare_slot)
    query_start = tl.load(query_start_loc_ptr + row).to(tl.int64)
    query_end = tl.load(query_start_loc_ptr + row + 1).to(tl.int64)
    first_step_row = tl.load(cu_num_logits_ptr + row).to(tl.int64)
    num_drafts = tl.load(cu_num_logits_ptr + row + 1).to(tl.int64) - first_step_row - 1
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int64)
    prefill_len = tl.load(prefill_len_ptr + row)
    step_start = seq_len - (query_end - query_start)
    first_position = seq_len - num_drafts

    limit = num_drafts
    forbidden = tl.full((), -1, tl.int64)
    if HAS_FORBIDDEN:
        forbidden = tl.load(forbidden_ptr + row).to(tl.int64)
        limit += tl.where(forbidden >= 0, 1, 0)
    limit = tl.where((step_start >= prefill_len) & is_real, limit, 0)

    turn = tl.arange(0, TURN_BLOCK)
    is_turn = turn < NUM_TURNS
    lengths = tl.load(
        state_lengths_ptr + slot * NUM_TURNS + turn, mask=is_turn & (turn > 0), other=0
    )
    ends = tl.cumsum(lengths, axis=0)
    lengths = tl.minimum(ends, limit) - tl.minimum(ends - lengths, limit)
    end = tl.sum(lengths, axis=0)
    tl.store(lengths_ptr + row * NUM_TURNS + turn, lengths, mask=is_turn)
    tl.store(new_lengths_ptr + row * NUM_TURNS + turn, tl.zeros_like(lengths), mask=is_turn)
    valid = tl.where(end > 0, first_position + end + 1, first_position)
    scored = tl.load(scored_ptr + slot * NUM_TURNS + turn, mask=is_turn, other=0)
    tl.store(scored_ptr + slot * NUM_TURNS + turn, tl.minimum(scored, valid), mask=is_turn)

    column = tl.arange(0, COLUMN_BLOCK)
    is_draft = (column < WINDOW) & (column < num_drafts)
    tokens = tl.load(input_ids_ptr + query_end - num_drafts + column, mask=is_draft, other=0)
    tokens = tokens.to(tl.int64)
    tokens = tl.where((forbidden >= 0) & (column == num_drafts), forbidden, tokens)
    tl.store(tokens_ptr + row * WIDTH + column, tokens, mask=column < WIDTH)

    tl.store(active_ptr + row, is_real & (seq_len >= prefill_len))
    tl.store(step_start_ptr + row, step_start)
    tl.store(first_position_ptr + row, first_position)
    tl.store(num_drafts_ptr + row, num_drafts)
    tl.store(first_step_row_ptr + row, first_step_row)
    tl.store(end_ptr + row, end)
    tl.store(num_accepted_ptr + row, tl.zeros((), tl.int64))
    tl.store(num_decided_ptr + row, tl.zeros((), tl.int64))
    no = tl.full((), 0, tl.int1)
    tl.store(replaced_ptr + row, no)
    tl.store(settled_ptr + row, no)
    tl.store(just_settled_ptr + row, no)


def candidates(state: ProposalState, cycle: Cycle, segments: range, num_columns: int) -> Candidates:
    """See `eager.candidates`."""
    out = cycle.tokens.new_empty(5, cycle.num_reqs, num_columns)
    _candidates_kernel[(cycle.num_reqs,)](
        cycle.slots,
        cycle.lengths,
        cycle.tokens,
        cycle.first_position,
        cycle.first_step_row,
        cycle.num_drafts,
        out,
        out.stride(0),
        len(state.lengths) - 1,
        NUM_TURNS=len(state.turns),
        FIRST_SEGMENT=segments.start,
        END_SEGMENT=segments.stop,
        WIDTH=cycle.tokens.shape[1],
        NUM_COLUMNS=num_columns,
        COLUMN_BLOCK=triton.next_power_of_2(num_columns),
        RING_SIZE=state.ring_size,
        num_warps=1,
    )
    return Candidates(*out)


@triton.jit(do_not_specialize=["out_stride"])
def _candidates_kernel(
    slots_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    tokens_ptr,  # [num_reqs, ring_size]
    first_position_ptr,  # [num_reqs]
    first_step_row_ptr,  # [num_reqs]
    num_drafts_ptr,  # [num_reqs]
    out_ptr,  # [5, num_reqs, num_columns]
    out_stride,
    spare_slot,
    NUM_TURNS: tl.constexpr,
    FIRST_SEGMENT: tl.constexpr,
    END_SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    RING_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = _slot(slots_ptr, row, spare_slot)
    first_position = tl.load(first_position_ptr + row)
    offset = tl.arange(0, COLUMN_BLOCK).to(tl.int64)
    is_column = offset < NUM_COLUMNS
    first_column = _segments_len(lengths_ptr, row, 0, FIRST_SEGMENT, NUM_TURNS)
    end = tl.zeros((), tl.int64)
    segment = tl.zeros_like(offset)
    for at in tl.static_range(FIRST_SEGMENT, END_SEGMENT):
        end += tl.load(lengths_ptr + row * NUM_TURNS + (at + 1) % NUM_TURNS)
        if at < END_SEGMENT - 1:
            segment += tl.where(offset >= end, 1, 0)
    is_proposed = (offset > 0) & (offset <= end)
    column = first_column + offset
    proposed = tl.load(
        tokens_ptr + row * WIDTH + column - 1, mask=is_column & is_proposed, other=-1
    )
    first_step_row = tl.load(first_step_row_ptr + row)
    step_rows = first_step_row + tl.minimum(column, tl.load(num_drafts_ptr + row))
    # Before the first step no request has a row of logits. Graphs are captured then.
    step_rows = tl.maximum(step_rows, 0)
    position = first_position + column
    out_ptr += row * NUM_COLUMNS + offset
    tl.store(out_ptr, proposed, mask=is_column)
    tl.store(out_ptr + out_stride, segment, mask=is_column)
    tl.store(out_ptr + 2 * out_stride, position - 1, mask=is_column)
    tl.store(out_ptr + 3 * out_stride, step_rows, mask=is_column)
    tl.store(out_ptr + 4 * out_stride, _kept_row(slot, position, RING_SIZE), mask=is_column)


def gather_scores(
    cycle: Cycle,
    sources: Sequence[torch.Tensor],  # num_members x [any number of rows, vocab_size], raw logits
    rows: Sequence[torch.Tensor],  # num_members x [num_reqs, num_columns], rows of `sources`
    segment: torch.Tensor,  # [num_reqs, num_columns]
    proposers: Sequence[int],
    dtype: torch.dtype,
    scales: bool,
) -> GatheredScores:
    """See `eager.gather_scores`."""
    num_columns, vocab_size = segment.shape[1], sources[0].shape[1]
    members = sources[0].new_empty(len(sources), *segment.shape, vocab_size, dtype=dtype)
    own_dtype = widest(source.dtype for source in sources)
    proposal = sources[0].new_empty(*segment.shape, vocab_size, dtype=own_dtype)
    _gather_scores_kernel[(segment.numel(), triton.cdiv(vocab_size, VOCAB_BLOCK))](
        tuple(sources),
        tuple(source.stride(0) for source in sources),
        tuple(rows),
        segment,
        cycle.temperature,
        members,
        proposal,
        vocab_size,
        PROPOSERS=tuple(proposers),
        NUM_COLUMNS=num_columns,
        BLOCK=VOCAB_BLOCK,
        SCALES=scales,
        num_warps=8,
    )
    return GatheredScores(members, proposal)


@triton.jit
def _gather_scores_kernel(
    sources,  # num_members x [any number of rows, vocab_size]
    source_strides,
    rows,  # num_members x [num_reqs, num_columns]
    segment_ptr,  # [num_reqs, num_columns]
    temperature_ptr,  # [num_reqs]
    members_ptr,  # [num_members, num_reqs, num_columns, vocab_size]
    proposal_ptr,  # [num_reqs, num_columns, vocab_size]
    vocab_size,
    PROPOSERS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
):
    # 64 bits, because offsets into the logits of many rows and members exceed 2^31.
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    temperature = tl.load(temperature_ptr + row // NUM_COLUMNS)
    segment = tl.load(segment_ptr + row)
    proposer = tl.full((), PROPOSERS[0], tl.int64)
    for at in tl.static_range(1, len(PROPOSERS)):
        proposer = tl.where(segment == at, PROPOSERS[at], proposer)
    for member in tl.static_range(len(sources)):
        of_source = tl.load(rows[member] + row) * source_strides[member] + token
        scores = tl.load(sources[member] + of_source, mask=is_token, other=0.0).to(tl.float32)
        if (proposer == member) & (temperature != 0):
            tl.store(proposal_ptr + row * vocab_size + token, scores, mask=is_token)
        if SCALES:
            scores /= tl.where(temperature == 0, 1.0, temperature)
        of_member = (member * num_rows + row) * vocab_size + token
        tl.store(members_ptr + of_member, scores, mask=is_token)


def mask_scores(
    scores: torch.Tensor,  # [num_rows, vocab_size], written
    bitmask: torch.Tensor,  # [num_step_rows, ceil(vocab_size / 32)] int32
    step_rows: torch.Tensor,  # [num_rows], rows of `bitmask`
    where: torch.Tensor | None = None,  # [num_rows] bool. None: everywhere
) -> None:
    """See `eager.mask_scores`."""
    num_rows, vocab_size = scores.shape
    _mask_scores_kernel[(num_rows, triton.cdiv(vocab_size, VOCAB_BLOCK))](
        scores,
        scores.stride(0),
        bitmask,
        bitmask.stride(0),
        step_rows,
        where,
        vocab_size,
        BLOCK=VOCAB_BLOCK,
        HAS_WHERE=where is not None,
        num_warps=8,
    )


@triton.jit
def _mask_scores_kernel(
    scores_ptr,  # [num_rows, vocab_size]
    scores_stride,
    bitmask_ptr,  # [num_step_rows, ceil(vocab_size / 32)]
    bitmask_stride,
    step_rows_ptr,  # [num_rows]
    where_ptr,  # [num_rows] if HAS_WHERE, else None
    vocab_size,
    BLOCK: tl.constexpr,
    HAS_WHERE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    is_wanted = True
    if HAS_WHERE:
        is_wanted = tl.load(where_ptr + row) != 0
    if is_wanted:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_token = token < vocab_size
        bitmask_ptr += tl.load(step_rows_ptr + row) * bitmask_stride
        bits = tl.load(bitmask_ptr + token // 32, mask=is_token, other=0)
        is_forbidden = ((bits >> (token % 32)) & 1) == 0
        at = scores_ptr + row * scores_stride + token
        tl.store(at, tl.full((BLOCK,), float("-inf"), tl.float32), mask=is_token & is_forbidden)


def settle(
    state: ProposalState,
    cycle: Cycle,
    sampled: torch.Tensor,  # [num_reqs, num_columns]
    num_sampled: torch.Tensor,  # [num_reqs]
    segments: range,
    draws: bool,
) -> None:
    """See `eager.settle`."""
    num_turns = len(state.turns)
    _settle_kernel[(cycle.num_reqs,)](
        cycle.slots,
        state.scored,
        sampled,
        sampled.stride(0),
        num_sampled,
        cycle.active,
        cycle.first_position,
        cycle.lengths,
        cycle.new_lengths,
        cycle.tokens,
        cycle.end,
        cycle.num_accepted,
        cycle.num_decided,
        cycle.replaced,
        cycle.settled,
        cycle.just_settled,
        len(state.lengths) - 1,
        NUM_TURNS=num_turns,
        TURN_BLOCK=triton.next_power_of_2(num_turns),
        FIRST_SEGMENT=segments.start,
        END_SEGMENT=segments.stop,
        WIDTH=cycle.tokens.shape[1],
        DRAWS=draws,
        num_warps=1,
    )


@triton.jit
def _settle_kernel(
    slots_ptr,  # [num_reqs]
    scored_ptr,  # [num_slots, num_turns]
    sampled_ptr,  # [num_reqs, num_columns]
    sampled_stride,
    num_sampled_ptr,  # [num_reqs]
    active_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    new_lengths_ptr,  # [num_reqs, num_turns]
    tokens_ptr,  # [num_reqs, ring_size]
    end_ptr,  # [num_reqs]
    num_accepted_ptr,  # [num_reqs]
    num_decided_ptr,  # [num_reqs]
    replaced_ptr,  # [num_reqs]
    settled_ptr,  # [num_reqs]
    just_settled_ptr,  # [num_reqs]
    spare_slot,
    NUM_TURNS: tl.constexpr,
    TURN_BLOCK: tl.constexpr,
    FIRST_SEGMENT: tl.constexpr,
    END_SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    DRAWS: tl.constexpr,
):
    row = tl.program_id(0)
    was_settled = tl.load(settled_ptr + row)
    is_live = tl.load(active_ptr + row) & (was_settled == 0)
    last = tl.load(num_sampled_ptr + row).to(tl.int64) - 1
    first_column = _segments_len(lengths_ptr, row, 0, FIRST_SEGMENT, NUM_TURNS)
    num_candidates = _segments_len(lengths_ptr, row, 0, END_SEGMENT, NUM_TURNS)
    num_accepted = first_column + last
    is_replaced = is_live & (num_accepted < num_candidates)
    is_settled = is_live if DRAWS else is_replaced
    tl.store(just_settled_ptr + row, is_settled)
    if is_live:
        tl.store(num_accepted_ptr + row, num_accepted)
        tl.store(num_decided_ptr + row, num_accepted + tl.where(is_settled, 1, 0))
    if is_replaced:
        tl.store(replaced_ptr + row, is_replaced)
    if is_settled:
        tl.store(settled_ptr + row, is_settled)
        token = tl.load(sampled_ptr + row * sampled_stride + last)
        tl.store(tokens_ptr + row * WIDTH + num_accepted, token)
        tl.store(end_ptr + row, num_accepted + 1)
        slot = _slot(slots_ptr, row, spare_slot)
        turn = tl.arange(0, TURN_BLOCK)
        is_turn = turn < NUM_TURNS
        scored = tl.load(scored_ptr + slot * NUM_TURNS + turn, mask=is_turn, other=0)
        valid = tl.load(first_position_ptr + row) + num_accepted + 1
        scored = tl.minimum(scored, valid)
        tl.store(scored_ptr + slot * NUM_TURNS + turn, scored, mask=is_turn)
        none = tl.zeros((TURN_BLOCK,), tl.int64)
        tl.store(new_lengths_ptr + row * NUM_TURNS + turn, none, mask=is_turn)


def append(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    gammas: torch.Tensor,  # [num_turns]
    tokens: torch.Tensor,  # [num_reqs]
    has_decided: bool = False,
) -> None:
    """See `eager.append`."""
    _append_kernel[(cycle.num_reqs,)](
        tokens,
        gammas,
        cycle.active,
        cycle.first_position,
        cycle.end,
        cycle.num_drafts,
        cycle.settled,
        cycle.just_settled,
        cycle.lengths if turn == 0 else cycle.new_lengths,
        cycle.tokens,
        state.max_model_len,
        TURN=turn,
        NUM_TURNS=len(state.turns),
        WIDTH=cycle.tokens.shape[1],
        HAS_DECIDED=has_decided,
        num_warps=1,
    )


@triton.jit
def _append_kernel(
    proposed_ptr,  # [num_reqs]
    gammas_ptr,  # [num_turns]
    active_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    num_drafts_ptr,  # [num_reqs]
    settled_ptr,  # [num_reqs]
    just_settled_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    tokens_ptr,  # [num_reqs, ring_size]
    max_model_len,
    TURN: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DECIDED: tl.constexpr,
):
    row = tl.program_id(0)
    end = tl.load(end_ptr + row)
    length = tl.load(lengths_ptr + row * NUM_TURNS + TURN)
    first_position = tl.load(first_position_ptr + row)
    is_wanted = tl.load(active_ptr + row) & (first_position + end < max_model_len)
    if TURN == 0:
        is_wanted &= (tl.load(settled_ptr + row) == 0) & (end <= tl.load(num_drafts_ptr + row))
    else:
        is_wanted &= length < tl.load(gammas_ptr + TURN)
        if HAS_DECIDED:
            is_wanted &= tl.load(just_settled_ptr + row) == 0
    if is_wanted:
        tl.store(tokens_ptr + row * WIDTH + end, tl.load(proposed_ptr + row).to(tl.int64))
        tl.store(end_ptr + row, end + 1)
        tl.store(lengths_ptr + row * NUM_TURNS + TURN, length + 1)


def last_scored(cycle: Cycle) -> LastScored:
    """See `eager.last_scored`."""
    out = cycle.end.new_empty(2, cycle.num_reqs)
    _last_scored_kernel[(cycle.num_reqs,)](
        cycle.first_position,
        cycle.first_step_row,
        cycle.end,
        cycle.num_drafts,
        out,
        out.stride(0),
        num_warps=1,
    )
    return LastScored(*out)


@triton.jit(do_not_specialize=["out_stride"])
def _last_scored_kernel(
    first_position_ptr,  # [num_reqs]
    first_step_row_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    num_drafts_ptr,  # [num_reqs]
    out_ptr,  # [2, num_reqs]
    out_stride,
):
    row = tl.program_id(0)
    first_position = tl.load(first_position_ptr + row)
    first_step_row = tl.load(first_step_row_ptr + row)
    end = tl.load(end_ptr + row)
    num_drafts = tl.load(num_drafts_ptr + row)
    tl.store(out_ptr + row, tl.maximum(first_step_row + tl.minimum(end, num_drafts), 0))
    tl.store(out_ptr + out_stride + row, first_position + end - 1)


def prepare_tokens(
    state: ProposalState,
    cycle: Cycle,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    input_ids: torch.Tensor,  # [num_tokens], written
    positions: torch.Tensor,  # [num_tokens], written
    seq_lens: torch.Tensor,  # [num_reqs], written
) -> PreparedTokens:
    """See `eager.prepare_tokens`."""
    read_start = torch.empty_like(cycle.step_start)
    is_again = torch.empty_like(input_ids, dtype=torch.bool)
    _prepare_tokens_kernel[(cycle.num_reqs,)](
        cycle.slots,
        cycle.step_start,
        cycle.first_position,
        cycle.end,
        cycle.tokens,
        all_token_ids,
        all_token_ids.stride(0),
        query_start_loc,
        input_ids,
        positions,
        seq_lens,
        read_start,
        is_again,
        state.max_model_len,
        WIDTH=cycle.tokens.shape[1],
        BLOCK=TOKEN_BLOCK,
        num_warps=1,
    )
    return PreparedTokens(read_start, is_again)


@triton.jit
def _prepare_tokens_kernel(
    slots_ptr,  # [num_reqs]
    step_start_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    tokens_ptr,  # [num_reqs, ring_size]
    all_token_ids_ptr,  # [max_num_reqs, max_model_len]
    all_token_ids_stride,
    query_start_loc_ptr,  # [num_reqs + 1]
    input_ids_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    seq_lens_ptr,  # [num_reqs]
    read_start_ptr,  # [num_reqs]
    is_again_ptr,  # [num_tokens]
    max_model_len,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    step_start = tl.load(step_start_ptr + row)
    first_position = tl.load(first_position_ptr + row)
    end = tl.load(end_ptr + row)
    query_start = tl.load(query_start_loc_ptr + row).to(tl.int64)
    query_len = tl.load(query_start_loc_ptr + row + 1).to(tl.int64) - query_start
    read_start = tl.maximum(tl.minimum(first_position + end, max_model_len) - query_len, 0)
    tl.store(read_start_ptr + row, read_start)
    tl.store(seq_lens_ptr + row, read_start + query_len)
    num_known = tl.where(slot >= 0, query_len, 0)  # 0 in a row without a request
    for block in range(0, query_len, BLOCK):
        offset = block + tl.arange(0, BLOCK)
        is_token = offset < query_len
        position = read_start + offset
        column = position - first_position
        known = tl.load(
            all_token_ids_ptr + slot * all_token_ids_stride + position,
            mask=(offset < num_known) & (column < 0),
            other=0,
        ).to(tl.int64)
        is_pending = (column >= 0) & (column < end)
        pending = tl.load(tokens_ptr + row * WIDTH + column, mask=is_token & is_pending, other=0)
        at = query_start + offset
        tl.store(input_ids_ptr + at, tl.where(column < 0, known, pending), mask=is_token)
        tl.store(positions_ptr + at, position, mask=is_token)
        tl.store(is_again_ptr + at, position < step_start, mask=is_token)


def prepare_token(
    state: ProposalState,
    cycle: Cycle,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    input_ids: torch.Tensor,  # [num_reqs], written
    positions: torch.Tensor,  # [num_reqs], written
    seq_lens: torch.Tensor,  # [num_reqs], written
) -> torch.Tensor:  # [num_reqs]
    """See `eager.prepare_token`."""
    last = torch.empty_like(cycle.end)
    _prepare_token_kernel[(cycle.num_reqs,)](
        cycle.slots,
        cycle.first_position,
        cycle.end,
        cycle.tokens,
        all_token_ids,
        all_token_ids.stride(0),
        input_ids,
        positions,
        seq_lens,
        last,
        state.max_model_len,
        WIDTH=cycle.tokens.shape[1],
        num_warps=1,
    )
    return last


@triton.jit
def _prepare_token_kernel(
    slots_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    tokens_ptr,  # [num_reqs, ring_size]
    all_token_ids_ptr,  # [max_num_reqs, max_model_len]
    all_token_ids_stride,
    input_ids_ptr,  # [num_reqs]
    positions_ptr,  # [num_reqs]
    seq_lens_ptr,  # [num_reqs]
    last_ptr,  # [num_reqs]
    max_model_len,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first_position = tl.load(first_position_ptr + row)
    end = tl.load(end_ptr + row)
    pending = tl.load(tokens_ptr + row * WIDTH + end - 1, mask=end > 0, other=0)
    known = tl.load(
        all_token_ids_ptr + slot * all_token_ids_stride + tl.maximum(first_position - 1, 0),
        mask=(end <= 0) & (slot >= 0),
        other=0,
    ).to(tl.int64)
    last = first_position + end - 1
    position = tl.minimum(tl.maximum(last, 0), max_model_len - 1)
    tl.store(input_ids_ptr + row, tl.where(end > 0, pending, known))
    tl.store(positions_ptr + row, position)
    tl.store(seq_lens_ptr + row, position + 1)
    tl.store(last_ptr + row, last)


def place_scores(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    count: int,
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    read_start: torch.Tensor,  # [num_reqs]
) -> ScorePlaces:
    """See `eager.place_scores`."""
    out = cycle.tokens.new_empty(2, cycle.num_reqs, count)
    last = torch.empty_like(cycle.end)
    _place_scores_kernel[(cycle.num_reqs,)](
        cycle.slots,
        state.scored,
        cycle.active,
        cycle.first_position,
        cycle.end,
        query_start_loc,
        read_start,
        out,
        out.stride(0),
        last,
        len(state.lengths) - 1,
        TURN=turn,
        NUM_TURNS=len(state.turns),
        COUNT=count,
        BLOCK=triton.next_power_of_2(count),
        RING_SIZE=state.ring_size,
        num_warps=1,
    )
    return ScorePlaces(*out, last)


@triton.jit(do_not_specialize=["out_stride"])
def _place_scores_kernel(
    slots_ptr,  # [num_reqs]
    scored_ptr,  # [num_slots, num_turns]
    active_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    query_start_loc_ptr,  # [num_reqs + 1]
    read_start_ptr,  # [num_reqs]
    out_ptr,  # [2, num_reqs, count]
    out_stride,
    last_ptr,  # [num_reqs]
    spare_slot,
    TURN: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    RING_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = _slot(slots_ptr, row, spare_slot)
    scored_ptr += slot * NUM_TURNS + TURN
    scored = tl.load(scored_ptr)
    at = tl.arange(0, BLOCK).to(tl.int64)
    is_asked = at < COUNT
    end = tl.load(end_ptr + row)
    first_position = tl.load(first_position_ptr + row)
    column = end - (COUNT - 1) + at
    position = first_position + column
    first_token = tl.load(query_start_loc_ptr + row).to(tl.int64)
    last_token = tl.load(query_start_loc_ptr + row + 1).to(tl.int64) - 1
    rows = tl.minimum(first_token + position - 1 - tl.load(read_start_ptr + row), last_token)
    rows = tl.maximum(rows, first_token)
    keep = is_asked & (position >= scored) & (column >= 0) & tl.load(active_ptr + row)
    kept = tl.where(keep, _kept_row(slot, position, RING_SIZE), _nobodys_row(slot, RING_SIZE))
    out_ptr += row * COUNT + at
    tl.store(out_ptr, rows, mask=is_asked)
    tl.store(out_ptr + out_stride, kept, mask=is_asked)
    tl.store(last_ptr + row, first_position + end - 1)
    scored_until = tl.max(tl.where(keep, position + 1, 0), axis=0)
    tl.store(scored_ptr, tl.maximum(scored, scored_until))


def place_score(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    gammas: torch.Tensor,  # [num_turns]
) -> torch.Tensor:  # [num_reqs]
    """See `eager.place_score`."""
    out = torch.empty_like(cycle.end)
    _place_score_kernel[(cycle.num_reqs,)](
        cycle.slots,
        state.scored,
        cycle.active,
        cycle.first_position,
        cycle.end,
        cycle.new_lengths,
        gammas,
        out,
        len(state.lengths) - 1,
        state.max_model_len,
        TURN=turn,
        NUM_TURNS=len(state.turns),
        RING_SIZE=state.ring_size,
        num_warps=1,
    )
    return out


@triton.jit
def _place_score_kernel(
    slots_ptr,  # [num_reqs]
    scored_ptr,  # [num_slots, num_turns]
    active_ptr,  # [num_reqs]
    first_position_ptr,  # [num_reqs]
    end_ptr,  # [num_reqs]
    new_lengths_ptr,  # [num_reqs, num_turns]
    gammas_ptr,  # [num_turns]
    out_ptr,  # [num_reqs]
    spare_slot,
    max_model_len,
    TURN: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    RING_SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = _slot(slots_ptr, row, spare_slot)
    position = tl.load(first_position_ptr + row) + tl.load(end_ptr + row)
    length = tl.load(new_lengths_ptr + row * NUM_TURNS + TURN)
    keep = tl.load(active_ptr + row) & (position < max_model_len)
    keep &= length < tl.load(gammas_ptr + TURN)
    kept = tl.where(keep, _kept_row(slot, position, RING_SIZE), _nobodys_row(slot, RING_SIZE))
    tl.store(out_ptr + row, kept)
    scored = tl.load(scored_ptr + slot * NUM_TURNS + TURN)
    scored = tl.where(keep, tl.maximum(scored, position + 1), scored)
    tl.store(scored_ptr + slot * NUM_TURNS + TURN, scored)


def end_cycle(
    state: ProposalState,
    cycle: Cycle,
    stats: TurnStats,
    calls: torch.Tensor,  # [num_turns]
) -> torch.Tensor:  # [num_reqs, window]
    """See `eager.end_cycle`."""
    num_turns, window = len(state.turns), state.turns.window
    tokens = cycle.tokens.new_empty(cycle.num_reqs, window)
    _end_cycle_kernel[(cycle.num_reqs,)](
        cycle.slots,
        state.lengths,
        cycle.active,
        cycle.lengths,
        cycle.new_lengths,
        cycle.tokens,
        cycle.end,
        cycle.num_accepted,
        cycle.num_decided,
        cycle.replaced,
        tokens,
        stats.judged,
        stats.accepted,
        stats.totals,
        stats.calls,
        calls,
        len(state.lengths) - 1,
        NUM_TURNS=num_turns,
        TURN_BLOCK=triton.next_power_of_2(num_turns),
        WINDOW=window,
        WIDTH=cycle.tokens.shape[1],
        STATS_WIDTH=stats.width,
        COLUMN_BLOCK=triton.next_power_of_2(window + 1),
        num_warps=1,
    )
    return tokens


@triton.jit
def _end_cycle_kernel(
    slots_ptr,  # [num_reqs]
    state_lengths_ptr,  # [num_slots, num_turns]
    active_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    new_lengths_ptr,  # [num_reqs, num_turns]
    tokens_ptr,  # [num_reqs, ring_size]
    end_ptr,  # [num_reqs]
    num_accepted_ptr,  # [num_reqs]
    num_decided_ptr,  # [num_reqs]
    replaced_ptr,  # [num_reqs]
    window_ptr,  # [num_reqs, window]
    judged_ptr,  # [num_turns * stats_width]
    accepted_ptr,  # [num_turns * stats_width]
    totals_ptr,  # [2]
    calls_ptr,  # [num_turns]
    calls_per_cycle_ptr,  # [num_turns]
    spare_slot,
    NUM_TURNS: tl.constexpr,
    TURN_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    # All loads come first: a store delays the loads after it, and each load is slow.
    slot = _slot(slots_ptr, row, spare_slot)
    is_active = tl.load(active_ptr + row)
    num_accepted = tl.load(num_accepted_ptr + row)
    num_decided = tl.load(num_decided_ptr + row)
    replaced = tl.load(replaced_ptr + row)
    end = tl.load(end_ptr + row)
    turn = tl.arange(0, TURN_BLOCK)
    is_turn = turn < NUM_TURNS
    new_lengths = tl.load(new_lengths_ptr + row * NUM_TURNS + turn, mask=is_turn, other=0)
    new_lengths = tl.where(is_active, new_lengths, 0)
    calls = tl.load(calls_per_cycle_ptr + turn, mask=is_turn, other=0)
    column = tl.arange(0, COLUMN_BLOCK).to(tl.int64)
    # The segments in the order of `Turns.in_window`: the start of each, and for each column the
    # cell of its turn and place.
    start = tl.zeros((), tl.int64)
    cell = tl.full((COLUMN_BLOCK,), -1, tl.int64)
    for at in tl.static_range(NUM_TURNS):
        of_turn = (at + 1) % NUM_TURNS
        length = tl.load(lengths_ptr + row * NUM_TURNS + of_turn)
        is_here = (column >= start) & (column < start + length)
        cell = tl.where(is_here, of_turn * STATS_WIDTH + column - start, cell)
        start += length
    pending = tl.load(
        tokens_ptr + row * WIDTH + num_decided + column,
        mask=(column < WINDOW) & (num_decided + column < end),
        other=0,
    )
    tl.store(state_lengths_ptr + slot * NUM_TURNS + turn, new_lengths, mask=is_turn)
    tl.store(window_ptr + row * WINDOW + column, pending, mask=column < WINDOW)
    if is_active:
        num_judged = num_accepted + tl.where(replaced, 1, 0)
        one = tl.full((COLUMN_BLOCK,), 1, tl.int64)
        tl.atomic_add(judged_ptr + cell, one, mask=(cell >= 0) & (column < num_judged))
        tl.atomic_add(accepted_ptr + cell, one, mask=(cell >= 0) & (column < num_accepted))
        tl.atomic_add(totals_ptr, tl.full((), 1, tl.int64))
        tl.atomic_add(totals_ptr + 1, num_decided)
        tl.atomic_add(calls_ptr + turn, calls, mask=is_turn)


def outputs(cycle: Cycle, num_tokens: int) -> Outputs:
    """See `eager.outputs`."""
    num_turns = cycle.lengths.shape[1]
    tokens = cycle.tokens.new_empty(cycle.num_reqs, num_tokens + num_turns + 2)
    counts = tokens.new_empty(2, cycle.num_reqs, dtype=torch.int32)
    _outputs_kernel[(cycle.num_reqs,)](
        cycle.active,
        cycle.tokens,
        cycle.num_drafts,
        cycle.num_decided,
        cycle.lengths,
        cycle.num_accepted,
        cycle.replaced,
        tokens,
        counts,
        counts.stride(0),
        NUM_TURNS=num_turns,
        TURN_BLOCK=triton.next_power_of_2(num_turns),
        NUM_TOKENS=num_tokens,
        WIDTH=cycle.tokens.shape[1],
        COLUMN_BLOCK=triton.next_power_of_2(num_tokens),
        num_warps=1,
    )
    return Outputs(tokens, *counts)


@triton.jit(do_not_specialize=["counts_stride"])
def _outputs_kernel(
    active_ptr,  # [num_reqs]
    cycle_tokens_ptr,  # [num_reqs, ring_size]
    num_drafts_ptr,  # [num_reqs]
    num_decided_ptr,  # [num_reqs]
    lengths_ptr,  # [num_reqs, num_turns]
    num_accepted_ptr,  # [num_reqs]
    replaced_ptr,  # [num_reqs]
    tokens_ptr,  # [num_reqs, num_tokens + num_turns + 2]
    counts_ptr,  # [2, num_reqs]
    counts_stride,
    NUM_TURNS: tl.constexpr,
    TURN_BLOCK: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMN_BLOCK)
    is_column = column < NUM_TOKENS
    turn = tl.arange(0, TURN_BLOCK)
    is_turn = turn < NUM_TURNS
    # All loads come first: a store delays the loads after it, and each load is slow.
    tokens = tl.load(cycle_tokens_ptr + row * WIDTH + column, mask=is_column, other=0)
    lengths = tl.load(lengths_ptr + row * NUM_TURNS + turn, mask=is_turn, other=0)
    num_accepted = tl.load(num_accepted_ptr + row)
    replaced = tl.load(replaced_ptr + row)
    is_active = tl.load(active_ptr + row)
    num_decided = tl.where(is_active, tl.load(num_decided_ptr + row), 0)
    num_rows = tl.where(is_active, tl.load(num_drafts_ptr + row) + 1, 0)
    out_ptr = tokens_ptr + row * (NUM_TOKENS + NUM_TURNS + 2)
    tl.store(out_ptr + column, tokens, mask=is_column)
    tl.store(out_ptr + NUM_TOKENS + turn, lengths, mask=is_turn)
    tl.store(out_ptr + NUM_TOKENS + NUM_TURNS, num_accepted)
    tl.store(out_ptr + NUM_TOKENS + NUM_TURNS + 1, num_accepted + tl.where(replaced, 1, 0))
    tl.store(counts_ptr + row, num_decided.to(tl.int32))
    tl.store(counts_ptr + counts_stride + row, (num_rows - num_decided).to(tl.int32))
