"""What is pending: the windows of all requests, and the members' scores on them.

Knows positions and columns; knows neither models nor distributions.  A *column* is a position
counted from the request's first undecided token; everything is device data.
"""

from dataclasses import dataclass, fields

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.turns import Turns

NO_POSITION = torch.iinfo(torch.int64).max


class ProposalState:
    """Kept from step to step, per slot of a request.

    Scores are kept by position, in a ring, so that nothing moves when tokens are committed. The
    ring's last row takes what nobody needs, in the place of a mask. The last slot is that of rows
    which fill a CUDA graph's batch up, whose slot is -1.
    """

    def __init__(
        self,
        turns: Turns,
        max_num_reqs: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.turns = turns
        num_turns, num_slots = len(turns), max_num_reqs + 1
        # Live at once, at most: the step's window, the first turn's proposal, the window of the
        # next step, and the position past its end.
        self.ring_size = 2 * turns.window + 2
        self.lengths = torch.zeros(num_slots, num_turns, dtype=torch.int64, device=device)
        """[num_slots, num_turns] tokens of each turn's segment in the window"""
        self.scored = torch.zeros(num_slots, num_turns, dtype=torch.int64, device=device)
        """[num_slots, num_turns] the first position that the turn's members have not scored"""
        self.scores = torch.zeros(
            num_turns - 1,
            num_slots,
            self.ring_size + 1,
            vocab_size,
            dtype=dtype,
            device=device,
        )
        """[num_turns - 1, num_slots, ring_size + 1, vocab_size] raw logits of the turns after
        the first, whose own are the engine step's"""

    def ring(
        self,
        positions: torch.Tensor,
        keep: torch.Tensor | None = None,  # as positions, bool
    ) -> torch.Tensor:  # as positions
        """Rows of the ring; where not `keep`, the row that nobody reads."""
        rows = positions.remainder(self.ring_size)
        return rows if keep is None else rows.masked_fill(~keep, self.ring_size)


@dataclass
class Pending:
    """The undecided tokens of a step at hand: what a turn's passes of one token read and change.

    `columns` of a request: its window as the step found it, the first turn's proposal, then what
    the turns after propose; a replacement takes the place of what it replaces and of all behind.
    """

    slots: torch.Tensor  # [num_reqs] slots of the requests; -1 where there is none
    active: torch.Tensor  # [num_reqs] bool, False: the prompt goes on in the next step
    first: torch.Tensor  # [num_reqs] position of column 0
    tokens: torch.Tensor  # [num_reqs, num_columns + 1], the last column is never read
    end: torch.Tensor  # [num_reqs] number of columns in use
    new_lengths: torch.Tensor  # [num_reqs, num_turns] of the segments that the step leaves

    @property
    def num_reqs(self) -> int:
        return self.slots.shape[0]

    @property
    def last_position(self) -> torch.Tensor:  # [num_reqs]
        return self.first + self.end - 1

    def last_token(
        self,
        all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    ) -> torch.Tensor:  # [num_reqs]
        pending = self.tokens.gather(1, (self.end - 1).clamp(min=0)[:, None])[:, 0]
        known = all_token_ids[self.slots, (self.first - 1).clamp(min=0)].long()
        return torch.where(self.end > 0, pending, known)

    def append(
        self,
        tokens: torch.Tensor,  # [num_reqs]
        where: torch.Tensor,  # [num_reqs] bool
        lengths: torch.Tensor,  # [num_reqs], of the segment that they belong to
    ) -> None:
        """Put a proposed token behind all others, for the requests `where`."""
        column = self.end.masked_fill(~where, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, column[:, None], tokens[:, None])
        self.end += where
        lengths += where

    def rows(self, num_reqs: int) -> "Pending":
        """The first requests, sharing memory."""
        return Pending(*(getattr(self, field.name)[:num_reqs] for field in fields(Pending)))

    def load(self, other: "Pending") -> None:
        """Take over another's requests; the rows behind them are of no request."""
        for field in fields(Pending):
            getattr(self, field.name)[: other.num_reqs] = getattr(other, field.name)
        self.slots[other.num_reqs :] = -1
        self.active[other.num_reqs :] = False


@dataclass
class Cycle(Pending):
    """The step at hand: one call of every turn."""

    batch: InputBatch
    start: torch.Tensor  # [num_reqs] position of the first token of the engine step
    num_drafts: torch.Tensor  # [num_reqs] columns for which the engine step has rows
    lengths: torch.Tensor  # [num_reqs, num_turns] of the segments that the step found
    num_accepted: torch.Tensor  # [num_reqs] columns whose proposal was accepted
    replaced: torch.Tensor  # [num_reqs] bool: the column after those has another token now
    settled: torch.Tensor  # [num_reqs] bool: no more columns are decided in this cycle
    num_decided: torch.Tensor  # [num_reqs] columns that are decided, hence the step's output

    @property
    def segments(self) -> torch.Tensor:  # [num_reqs, num_turns]
        """Lengths of the segments in the order of `Turns.in_window`."""
        return self.lengths.roll(-1, dims=1)

    def accept(self, num_accepted: torch.Tensor, where: torch.Tensor) -> None:
        """Commit the first `num_accepted` columns, for the requests `where`."""
        self.num_accepted = torch.where(where, num_accepted, self.num_accepted)
        self.num_decided = torch.where(where, num_accepted, self.num_decided)

    def settle(self, tokens: torch.Tensor, where: torch.Tensor, state: ProposalState) -> None:
        """Commit a token of the ensemble's after the accepted ones, and drop all behind it."""
        column = self.num_accepted.masked_fill(~where, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, column[:, None], tokens[:, None])
        self.end = torch.where(where, column + 1, self.end)
        self.num_decided = torch.where(where, column + 1, self.num_decided)
        self.new_lengths.masked_fill_(where[:, None], 0)
        self.settled = self.settled | where
        # The scores at its own column depend on what stands before it, those behind on the token.
        valid = torch.where(where, self.first + column + 1, NO_POSITION)
        state.scored[self.slots] = torch.minimum(state.scored[self.slots], valid[:, None])


def make_pending(state: ProposalState, num_reqs: int) -> Pending:
    """Memory for the pending tokens of `num_reqs` requests, as yet of none."""
    num_turns, device = len(state.turns), state.lengths.device
    numbers = torch.zeros(
        num_reqs, state.ring_size + num_turns + 2, dtype=torch.int64, device=device
    )
    tokens, new_lengths, ends = numbers.split([state.ring_size, num_turns, 2], dim=1)
    return Pending(
        slots=torch.full((num_reqs,), -1, dtype=torch.int32, device=device),
        active=torch.zeros(num_reqs, dtype=torch.bool, device=device),
        first=ends[:, 0],
        tokens=tokens,
        end=ends[:, 1],
        new_lengths=new_lengths,
    )


def segment_of(
    columns: torch.Tensor,  # [num_columns]
    segments: torch.Tensor,  # [num_reqs, num_segments] lengths
) -> torch.Tensor:  # [num_reqs, num_columns]
    """The segment that a column lies in: as many as end at or before it."""
    return (columns >= segments.cumsum(1)[:, :-1, None]).sum(1)


def begin_cycle(
    state: ProposalState,
    batch: InputBatch,
    prefill_len: torch.Tensor,  # [max_num_reqs]
    forbidden: torch.Tensor | None = None,  # [num_reqs]
) -> Cycle:
    """The cycle of an engine step, with the windows that vLLM scheduled for it.

    `forbidden` is the pending token that vLLM left out as the first that a grammar does not allow,
    -1 where it did not.  It stays in the window, where it is bound to be replaced: leaving it out
    because of what it is would change the distribution of what comes in its place.
    """
    num_reqs, slots = batch.num_reqs, batch.idx_mapping[: batch.num_reqs]
    cu_num_logits = batch.cu_num_logits[: num_reqs + 1].long()
    query_start = batch.query_start_loc[: num_reqs + 1].long()
    seq_lens = batch.seq_lens[:num_reqs].long()
    num_drafts = cu_num_logits.diff() - 1
    first, start = seq_lens - num_drafts, seq_lens - query_start.diff()
    # vLLM may schedule less than the whole window, at the end of a context for example. What is
    # left out falls. Drafts of a request whose prompt is read in this step only fill a batch up.
    limit = num_drafts if forbidden is None else num_drafts + (forbidden >= 0)
    limit = limit.masked_fill(start < prefill_len[slots], 0)
    ends = torch.minimum(state.lengths[slots, 1:].cumsum(1), limit[:, None])
    zero = ends.new_zeros(num_reqs, 1)
    lengths = torch.cat([zero, ends.diff(dim=1, prepend=zero)], dim=1)
    end = ends[:, -1].clone()
    # Scores past the window are of other tokens now; without a window, of another request even.
    valid = torch.where(end > 0, first + end + 1, first)
    state.scored[slots] = torch.minimum(state.scored[slots], valid[:, None])

    window, num_columns = state.turns.window, state.ring_size - 1
    tokens = slots.new_zeros(num_reqs, num_columns + 1)
    # Column k is the input token behind row k of the engine step's logits.
    rows = cu_num_logits[:-1, None] + torch.arange(1, window + 1, device=slots.device)
    rows = torch.minimum(rows, cu_num_logits[1:, None] - 1)
    tokens[:, :window] = batch.input_ids[batch.logits_indices[rows]]
    if forbidden is not None:
        column = num_drafts.masked_fill(forbidden < 0, num_columns)
        tokens.scatter_(1, column[:, None], forbidden[:, None])
    return Cycle(
        batch=batch,
        slots=slots,
        active=seq_lens >= prefill_len[slots],
        start=start,
        first=first,
        num_drafts=num_drafts,
        lengths=lengths,
        tokens=tokens,
        end=end,
        new_lengths=torch.zeros_like(lengths),
        num_accepted=torch.zeros_like(end),
        replaced=torch.zeros_like(end, dtype=torch.bool),
        settled=torch.zeros_like(end, dtype=torch.bool),
        num_decided=torch.zeros_like(end),
    )


def end_cycle(state: ProposalState, cycle: Cycle) -> torch.Tensor:  # [num_reqs, window]
    """Keep what is pending for the next step, and return its tokens, filled up with 0."""
    columns = torch.arange(state.turns.window, device=cycle.slots.device)
    columns = cycle.num_decided[:, None] + columns
    tokens = cycle.tokens.gather(1, columns.clamp(max=cycle.tokens.shape[1] - 1))
    state.lengths[cycle.slots] = cycle.new_lengths * cycle.active[:, None]
    return tokens.masked_fill(columns >= cycle.end[:, None], 0)
