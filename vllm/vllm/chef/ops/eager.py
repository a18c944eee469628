"""Operations of a cycle on its columns, in torch: used on CPU, and the reference for `fused.py`.

Most operations change `state` and `cycle` in place. None waits for the host.
"""

from collections.abc import Sequence

import torch

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

NO_POSITION = torch.iinfo(torch.int64).max


def load(
    cycle: Cycle,
    slots: torch.Tensor,  # [num_reqs]
    states: SlotStates,
) -> Cycle:
    """Write a step's requests into the first rows of `cycle`, and return those rows.

    The other rows hold no request. They are emptied, because a later graph of the cycle may cover
    more rows than the graph that begins it.
    """
    rows = cycle.rows(len(slots))
    cycle.slots.fill_(-1)
    cycle.active.fill_(False)
    for field in ("step_start", "first_position", "first_step_row", "num_drafts", "end"):
        getattr(cycle, field)[len(slots) :] = 0
    cycle.lengths[len(slots) :] = cycle.new_lengths[len(slots) :] = 0
    # They have no filters either, because filters take time.
    for field, none in (("temperature", 0), ("top_k", NO_TOP_K), ("top_p", 1), ("min_p", 0)):
        getattr(cycle, field)[len(slots) :] = none
    rows.slots.copy_(slots)
    for of_rows, of_slots in zip(rows.slot_states, states, strict=True):
        of_rows.copy_(of_slots[slots])
    return rows


def begin_cycle(
    state: ProposalState,
    cycle: Cycle,
    query_start_loc: torch.Tensor,  # [num_reqs + 1] of the engine step
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] of its rows of logits
    seq_lens: torch.Tensor,  # [num_reqs]
    input_ids: torch.Tensor,  # [at least num_tokens]
    forbidden: torch.Tensor | None = None,  # [num_reqs]
) -> None:
    """Take over the windows that vLLM scheduled, for the loaded requests.

    `forbidden` is a pending token that vLLM left out because it is the first that a grammar does
    not allow. -1 if there is none. The token stays in the window, and is certain to be replaced.
    Leaving it out because of its value would change the distribution of its replacement.
    """
    slots, window = cycle.slots, state.turns.window
    query_start_loc, cu_num_logits = query_start_loc.long(), cu_num_logits.long()
    seq_lens = seq_lens.long()
    num_drafts = cu_num_logits.diff() - 1
    step_start = seq_lens - query_start_loc.diff()
    first_position = seq_lens - num_drafts
    # vLLM may schedule less than the whole window, for example at the end of a context. The rest is
    # dropped. If the step reads a request's prompt, the request's drafts only pad the batch.
    limit = num_drafts if forbidden is None else num_drafts + (forbidden >= 0)
    limit = limit.masked_fill((step_start < cycle.prefill_len) | (slots < 0), 0)
    ends = torch.minimum(state.lengths[slots, 1:].cumsum(1), limit[:, None])
    zero = ends.new_zeros(len(slots), 1)
    cycle.lengths.copy_(torch.cat([zero, ends.diff(dim=1, prepend=zero)], dim=1))
    end = ends[:, -1]
    # Scores past the window belong to tokens that have changed. Without a window they may even
    # belong to another request.
    valid = torch.where(end > 0, first_position + end + 1, first_position)
    state.scored[slots] = torch.minimum(state.scored[slots], valid[:, None])
    # Drafts are the last tokens of a request's query.
    columns = torch.arange(window, device=slots.device)
    token = query_start_loc[1:, None] - num_drafts[:, None] + columns
    tokens = input_ids[token.clamp(0, len(input_ids) - 1)].long()
    cycle.tokens.zero_()
    cycle.tokens[:, :window] = tokens.masked_fill(columns >= num_drafts[:, None], 0)
    if forbidden is not None:
        column = num_drafts.masked_fill(forbidden < 0, cycle.tokens.shape[1] - 1)
        cycle.tokens.scatter_(1, column[:, None], forbidden[:, None])
    cycle.active.copy_((seq_lens >= cycle.prefill_len) & (slots >= 0))
    cycle.step_start.copy_(step_start)
    cycle.first_position.copy_(first_position)
    cycle.num_drafts.copy_(num_drafts)
    cycle.first_step_row.copy_(cu_num_logits[:-1])
    cycle.end.copy_(end)
    for field in ("new_lengths", "num_accepted", "num_decided"):
        getattr(cycle, field).zero_()
    for field in ("replaced", "settled", "just_settled"):
        getattr(cycle, field).fill_(False)


def candidates(
    state: ProposalState,
    cycle: Cycle,
    segments: range,
    num_columns: int,
) -> Candidates:
    """What a decision judges: the tokens of some segments, which follow one another.

    The first of the `num_columns` columns is the first of these segments. In a request that is
    settled already, the columns may be any.
    """
    lengths = cycle.segments[:, segments.start : segments.stop]
    first_column = _first_column(cycle, segments)[:, None]
    offsets = torch.arange(num_columns, device=lengths.device)
    columns = first_column + offsets
    before = cycle.tokens.gather(1, (columns - 1).clamp(0, cycle.tokens.shape[1] - 1))
    is_proposed = (offsets > 0) & (offsets <= lengths.sum(1)[:, None])
    proposed = before.masked_fill(~is_proposed, -1)
    step_rows = cycle.first_step_row[:, None] + torch.minimum(columns, cycle.num_drafts[:, None])
    # Before the first step no request has a row of logits. Graphs are captured then.
    step_rows = step_rows.clamp(min=0)
    positions = cycle.first_position[:, None] + columns
    kept_rows = kept_row(state, cycle, positions, torch.ones_like(positions, dtype=torch.bool))
    segment = segment_of(offsets, lengths)
    return Candidates(proposed, segment, positions - 1, step_rows, kept_rows)


def gather_scores(
    cycle: Cycle,
    sources: Sequence[torch.Tensor],  # num_members x [any number of rows, vocab_size], raw logits
    rows: Sequence[torch.Tensor],  # num_members x [num_reqs, num_columns], rows of `sources`
    segment: torch.Tensor,  # [num_reqs, num_columns]
    proposers: Sequence[int],  # by judged segment, the member that proposed it
    dtype: torch.dtype,
    scales: bool,
) -> GatheredScores:
    """The logits of the members and of the proposer, for each column.

    The members' logits have the dtype `dtype`. If `scales`, they are divided by the temperature. A
    temperature of 0 stands for greedy decoding, and its logits are not divided.

    The proposer's logits are raw, in the widest dtype of the sources. A proposal must be judged by
    exactly the logits from which it was drawn. At temperature 0 only the proposed token matters,
    and the proposer's logits may be anything.
    """
    own_dtype = widest(source.dtype for source in sources)
    raw = [source[at].to(own_dtype) for source, at in zip(sources, rows, strict=True)]
    proposal = raw[proposers[0]]
    for at, member in enumerate(proposers[1:], start=1):
        proposal = torch.where((segment == at)[:, :, None], raw[member], proposal)
    members = torch.stack(raw).to(dtype)
    if scales:
        temperature = cycle.temperature.masked_fill(cycle.temperature == 0, 1)
        members /= temperature[:, None, None]
    return GatheredScores(members, proposal)


def mask_scores(
    scores: torch.Tensor,  # [num_rows, vocab_size], written
    bitmask: torch.Tensor,  # [num_step_rows, ceil(vocab_size / 32)] int32
    step_rows: torch.Tensor,  # [num_rows], rows of `bitmask`
    where: torch.Tensor | None = None,  # [num_rows] bool. None: everywhere
) -> None:
    """Give -inf to tokens that a grammar does not allow. Their bit is 0."""
    tokens = torch.arange(scores.shape[1], device=scores.device)
    allowed = bitmask[step_rows][:, tokens // 32] >> (tokens % 32) & 1
    forbidden = allowed == 0
    if where is not None:
        forbidden &= where[:, None]
    scores.masked_fill_(forbidden, float("-inf"))


def settle(
    state: ProposalState,
    cycle: Cycle,
    sampled: torch.Tensor,  # [num_reqs, num_columns] accepted tokens, then a token of the ensemble
    num_sampled: torch.Tensor,  # [num_reqs]
    segments: range,
    draws: bool,
) -> None:
    """Commit the accepted columns and, if there is one, the ensemble's token after them.

    The columns are those of `candidates` for the same segments.

    The ensemble's token is committed where a proposal was rejected, and everywhere if `draws`. It
    drops all tokens behind it.
    """
    num_accepted = _first_column(cycle, segments) + num_sampled.long() - 1
    live = cycle.active & ~cycle.settled
    replaced = live & (num_accepted < cycle.segments[:, : segments.stop].sum(1))
    settled = live if draws else replaced
    cycle.num_accepted.copy_(torch.where(live, num_accepted, cycle.num_accepted))
    cycle.num_decided.copy_(torch.where(live, num_accepted + settled, cycle.num_decided))
    cycle.replaced |= replaced
    cycle.settled |= settled
    cycle.just_settled.copy_(settled)
    column = num_accepted.masked_fill(~settled, cycle.tokens.shape[1] - 1)
    token = sampled.gather(1, num_sampled.long()[:, None] - 1)
    cycle.tokens.scatter_(1, column[:, None], token)
    cycle.end.copy_(torch.where(settled, column + 1, cycle.end))
    cycle.new_lengths.masked_fill_(settled[:, None], 0)
    # The scores at the token's own column depend only on earlier tokens and stay valid. The scores
    # behind it depend on the token.
    valid = torch.where(settled, cycle.first_position + column + 1, NO_POSITION)
    state.scored[cycle.slots] = torch.minimum(state.scored[cycle.slots], valid[:, None])


def append(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    gammas: torch.Tensor,  # [num_turns]
    tokens: torch.Tensor,  # [num_reqs]
    has_decided: bool = False,
) -> None:
    """Append a turn's proposed token behind all others.

    It is appended only where all of these hold:

    - the turn has tokens left to propose
    - the context has room
    - if the turn `has_decided` after its pass: that decision did not settle the request
    """
    where = cycle.active & (cycle.first_position + cycle.end < state.max_model_len)
    if turn == 0:
        # The first turn has scored the engine step's tokens only. It proposes where they include
        # the last token.
        where &= ~cycle.settled & (cycle.end <= cycle.num_drafts)
    else:
        where &= cycle.new_lengths[:, turn] < gammas[turn]
        if has_decided:
            where &= ~cycle.just_settled
    column = cycle.end.masked_fill(~where, cycle.tokens.shape[1] - 1)
    cycle.tokens.scatter_(1, column[:, None], tokens[:, None])
    cycle.end += where
    (cycle.lengths if turn == 0 else cycle.new_lengths)[:, turn] += where


def last_scored(cycle: Cycle) -> LastScored:
    """The rows from which the first turn proposes.

    Where the first turn has not read the last token, the row belongs to an earlier one. Nothing is
    proposed there.
    """
    rows = cycle.first_step_row + torch.minimum(cycle.end, cycle.num_drafts)
    return LastScored(rows.clamp(min=0), cycle.last_position)


def prepare_tokens(
    state: ProposalState,
    cycle: Cycle,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    query_start_loc: torch.Tensor,  # [num_reqs + 1]
    input_ids: torch.Tensor,  # [num_tokens], written
    positions: torch.Tensor,  # [num_tokens], written
    seq_lens: torch.Tensor,  # [num_reqs], written
) -> PreparedTokens:
    """Write the inputs of the pass in which a member reads.

    A request's input is its last tokens, including those decided and proposed in this cycle. A
    request may have fewer tokens than its share of the batch. The rest of its share then holds
    padding, whose KV entries are overwritten later.
    """
    num_tokens = len(input_ids)
    query_lens = query_start_loc.long().diff()
    end = (cycle.first_position + cycle.end).clamp(max=state.max_model_len)
    read_start = (end - query_lens).clamp(min=0)
    request = torch.repeat_interleave(
        torch.arange(cycle.num_reqs, device=read_start.device), query_lens, output_size=num_tokens
    )
    offset = torch.arange(num_tokens, device=read_start.device) - query_start_loc.long()[request]
    at = read_start[request] + offset
    column = at - cycle.first_position[request]
    known = all_token_ids[cycle.slots[request], at].long() * (cycle.slots[request] >= 0)
    pending = cycle.tokens[request, column.clamp(0, cycle.tokens.shape[1] - 1)]
    pending = pending.masked_fill(column >= cycle.end[request], 0)
    input_ids.copy_(torch.where(column < 0, known, pending))
    positions.copy_(at)
    seq_lens.copy_(read_start + query_lens)
    return PreparedTokens(read_start, at < cycle.step_start[request])


def prepare_token(
    state: ProposalState,
    cycle: Cycle,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    input_ids: torch.Tensor,  # [num_reqs], written
    positions: torch.Tensor,  # [num_reqs], written
    seq_lens: torch.Tensor,  # [num_reqs], written
) -> torch.Tensor:  # [num_reqs]
    """Write the last token of each request, as input of a pass. Returns the positions as int64."""
    pending = cycle.tokens.gather(1, (cycle.end - 1).clamp(min=0)[:, None])[:, 0]
    before = (cycle.first_position - 1).clamp(min=0)
    known = all_token_ids[cycle.slots, before].long() * (cycle.slots >= 0)
    last = cycle.last_position.clone()
    at = last.clamp(0, state.max_model_len - 1)
    input_ids.copy_(torch.where(cycle.end > 0, pending, known))
    positions.copy_(at)
    seq_lens.copy_(at + 1)
    return last


def place_scores(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    count: int,
    query_start_loc: torch.Tensor,  # [num_reqs + 1] of the member's reading
    read_start: torch.Tensor,  # [num_reqs] position of the first token it reads
) -> ScorePlaces:
    """Where the scores of the last `count` columns are read from, and where they are kept.

    The last of these columns is the one past the end. Scores that were kept before, or that belong
    to no column, go to the row that nobody reads.
    """
    columns = cycle.end[:, None] - torch.arange(count - 1, -1, -1, device=cycle.end.device)
    positions = cycle.first_position[:, None] + columns
    first_token, next_token = query_start_loc[:-1, None].long(), query_start_loc[1:, None].long()
    rows = first_token + positions - 1 - read_start[:, None]
    # A token that is drawn past the end of the context is not read, and nobody needs its scores.
    rows = rows.minimum(next_token - 1).maximum(first_token)
    is_new = positions >= state.scored[cycle.slots, turn, None]
    keep = is_new & (columns >= 0) & cycle.active[:, None]
    _mark_scored(state, cycle, turn, positions, keep)
    return ScorePlaces(rows, kept_row(state, cycle, positions, keep), cycle.last_position)


def place_score(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    gammas: torch.Tensor,  # [num_turns]
) -> torch.Tensor:  # [num_reqs]
    """Row of the turn's kept scores for the column past the end.

    Where the turn has no token left to propose, it is the row that nobody reads.
    """
    keep = cycle.active & (cycle.first_position + cycle.end < state.max_model_len)
    keep &= cycle.new_lengths[:, turn] < gammas[turn]
    positions = (cycle.first_position + cycle.end)[:, None]
    _mark_scored(state, cycle, turn, positions, keep[:, None])
    return kept_row(state, cycle, positions, keep[:, None])[:, 0]


def end_cycle(
    state: ProposalState,
    cycle: Cycle,
    stats: TurnStats,
    calls: torch.Tensor,  # [num_turns] passes of each turn in a cycle
) -> torch.Tensor:  # [num_reqs, window]
    """Keep what is pending for the next step, and update the counts.

    Returns the pending tokens, padded with 0.
    """
    _count(cycle, stats, calls)
    columns = torch.arange(state.turns.window, device=cycle.slots.device)
    columns = cycle.num_decided[:, None] + columns
    tokens = cycle.tokens.gather(1, columns.clamp(max=cycle.tokens.shape[1] - 1))
    state.lengths[cycle.slots] = cycle.new_lengths * cycle.active[:, None]
    return tokens.masked_fill(columns >= cycle.end[:, None], 0)


def outputs(cycle: Cycle, num_tokens: int) -> Outputs:
    """The decided tokens and counts, in memory of their own. The next step reuses the cycle's.

    The last decision has been made.
    """
    num_decided = (cycle.num_decided * cycle.active).int()
    num_rejected = ((cycle.num_drafts + 1) * cycle.active).int() - num_decided
    num_judged = cycle.num_accepted + cycle.replaced
    counts = [cycle.lengths, cycle.num_accepted[:, None], num_judged[:, None]]
    tokens = torch.cat([cycle.tokens[:, :num_tokens], *counts], dim=1)
    return Outputs(tokens, num_decided, num_rejected)


def kept_row(
    state: ProposalState,
    cycle: Cycle,
    positions: torch.Tensor,  # [num_reqs, num_positions]
    keep: torch.Tensor,  # [num_reqs, num_positions] bool
) -> torch.Tensor:  # [num_reqs, num_positions]
    """Rows of `state.kept_scores`. Where not `keep`, the row of the ring that nobody reads."""
    ring = positions.remainder(state.ring_size).masked_fill(~keep, state.ring_size)
    slot = cycle.slots.long().masked_fill(cycle.slots < 0, len(state.lengths) - 1)
    return slot[:, None] * (state.ring_size + 1) + ring


def segment_of(
    columns: torch.Tensor,  # [num_columns]
    segments: torch.Tensor,  # [num_reqs, num_segments] lengths
) -> torch.Tensor:  # [num_reqs, num_columns]
    """The segment of each column: the number of segments that end at or before the column."""
    return (columns >= segments.cumsum(1)[:, :-1, None]).sum(1)


def _first_column(cycle: Cycle, segments: range) -> torch.Tensor:  # [num_reqs]
    """The column where the first of some segments begins."""
    return cycle.segments[:, : segments.start].sum(1)


def _mark_scored(
    state: ProposalState,
    cycle: Cycle,
    turn: int,
    positions: torch.Tensor,  # [num_reqs, count]
    keep: torch.Tensor,  # [num_reqs, count] bool
) -> None:
    scored = torch.where(keep, positions + 1, 0).amax(dim=1)
    state.scored[cycle.slots, turn] = torch.maximum(state.scored[cycle.slots, turn], scored)


def _count(
    cycle: Cycle,
    stats: TurnStats,
    calls: torch.Tensor,  # [num_turns]
) -> None:
    columns = torch.arange(stats.turns.window + 1, device=cycle.slots.device)
    lengths = cycle.segments
    segment = segment_of(columns, lengths)
    offset = columns - (lengths.cumsum(1) - lengths).gather(1, segment)
    cell = (stats.row_of[segment] * stats.width + offset).clamp(0, len(stats.judged) - 1)
    active = cycle.active[:, None]
    judged = columns < (cycle.num_accepted + cycle.replaced)[:, None]
    accepted = columns < cycle.num_accepted[:, None]
    stats.judged.index_add_(0, cell.flatten(), (judged & active).flatten().long())
    stats.accepted.index_add_(0, cell.flatten(), (accepted & active).flatten().long())
    num_active = cycle.active.sum()
    stats.totals += torch.stack([num_active, (cycle.num_decided * cycle.active).sum()])
    stats.calls += calls * num_active
