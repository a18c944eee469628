"""What is pending: the windows of all requests, and the members' scores on them.

Knows positions and columns; knows neither models nor distributions.  A *column* is a position
counted from the request's first undecided token; everything is device data, in memory that never
moves, so that CUDA graphs find it.  `ops/` has what is done with it, and returns the named tuples.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch

from vllm.chef.turns import Turns

# Of a row of no request; no vocabulary is as large.
NO_TOP_K = 2**31 - 1


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
        max_model_len: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.turns = turns
        self.max_model_len = max_model_len
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
        self.kept_scores = [scores.flatten(0, 1) for scores in self.scores]
        """num_turns - 1 x [num_slots * (ring_size + 1), vocab_size], the same"""


class SlotStates(NamedTuple):
    """vLLM's states of requests that a cycle needs, `[max_num_reqs]` by slot."""

    prefill_len: torch.Tensor  # int32
    temperature: torch.Tensor  # float32
    seeds: torch.Tensor  # int64
    top_k: torch.Tensor  # int32, the size of the vocabulary where there is none
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32


@dataclass
class Cycle:
    """The undecided tokens of the step at hand, in which every turn is called once.

    `columns` of a request: its window as the step found it, the first turn's proposal, then what
    the turns after propose; a replacement takes the place of what it replaces and of all behind.
    """

    slots: torch.Tensor  # [num_reqs] int32, slots of the requests; -1 where there is none
    prefill_len: torch.Tensor  # [num_reqs]
    temperature: torch.Tensor  # [num_reqs] float32
    seeds: torch.Tensor  # [num_reqs]
    top_k: torch.Tensor  # [num_reqs] int32, the size of the vocabulary where there is none
    top_p: torch.Tensor  # [num_reqs] float32
    min_p: torch.Tensor  # [num_reqs] float32
    active: torch.Tensor  # [num_reqs] bool, False: the prompt goes on in the next step
    step_start: torch.Tensor  # [num_reqs] position of the first token of the engine step
    first_position: torch.Tensor  # [num_reqs] position of column 0
    num_drafts: torch.Tensor  # [num_reqs] the engine step has rows for these columns and the next
    first_step_row: torch.Tensor  # [num_reqs] row of column 0 in the engine step
    lengths: torch.Tensor  # [num_reqs, num_turns] of the segments that the step found
    new_lengths: torch.Tensor  # [num_reqs, num_turns] of the segments that the step leaves
    tokens: torch.Tensor  # [num_reqs, num_columns + 1], the last column is never read
    end: torch.Tensor  # [num_reqs] number of columns in use
    num_accepted: torch.Tensor  # [num_reqs] columns whose proposal was accepted
    num_decided: torch.Tensor  # [num_reqs] columns that are decided, hence the step's output
    replaced: torch.Tensor  # [num_reqs] bool: the column after the accepted ones has another token
    settled: torch.Tensor  # [num_reqs] bool: no more columns are decided in this cycle
    just_settled: torch.Tensor  # [num_reqs] bool: by the latest decision

    @property
    def num_reqs(self) -> int:
        return self.slots.shape[0]

    @property
    def segments(self) -> torch.Tensor:  # [num_reqs, num_turns]
        """Lengths of the segments in the order of `Turns.in_window`."""
        return self.lengths.roll(-1, dims=1)

    @property
    def last_position(self) -> torch.Tensor:  # [num_reqs]
        return self.first_position + self.end - 1

    @property
    def slot_states(self) -> SlotStates:
        """What was looked up by slot, `[num_reqs]` by row."""
        return SlotStates(*(getattr(self, field) for field in SlotStates._fields))

    def rows(self, num_reqs: int) -> "Cycle":
        """The first requests, sharing memory."""
        return self.part(slice(num_reqs))

    def part(self, requests: slice) -> "Cycle":
        """Some of the requests, sharing memory."""
        return Cycle(*(getattr(self, field.name)[requests] for field in fields(Cycle)))


class Candidates(NamedTuple):
    """What a decision judges, `[num_reqs, num_columns]` each."""

    proposed: torch.Tensor
    """Tokens as vLLM's verification has them: that of column k in place k + 1, -1 for none"""
    segment: torch.Tensor  # of each column
    positions: torch.Tensor  # of the token before
    step_rows: torch.Tensor
    """Rows of the column's scores in the engine step, which has none past its drafts"""
    kept_rows: torch.Tensor  # the same among the scores that are kept of a turn

    def part(self, requests: slice) -> Self:
        """Of some of the requests, sharing memory."""
        return type(self)(*(field[requests] for field in self))


class GatheredScores(NamedTuple):
    """What is said of each column, raw or as `gather_scores` is asked."""

    members: torch.Tensor  # [num_members, num_reqs, num_columns, vocab_size]
    proposal: torch.Tensor  # [num_reqs, num_columns, vocab_size], of the member that proposed it


class LastScored(NamedTuple):
    """Where the first turn proposes from."""

    rows: torch.Tensor  # [num_reqs] of the engine step
    last_position: torch.Tensor  # [num_reqs] of the last token


class PreparedTokens(NamedTuple):
    """What a turn's first pass reads."""

    read_start: torch.Tensor  # [num_reqs] position of the first token
    is_again: torch.Tensor  # [num_tokens] bool: before those of the engine step


class ScorePlaces(NamedTuple):
    """Where the scores of what was read come from, and are kept."""

    rows: torch.Tensor  # [num_reqs, count] of the hidden states
    kept_rows: torch.Tensor  # [num_reqs, count] of the scores that are kept of a turn
    last_position: torch.Tensor  # [num_reqs] of the last token


class Outputs(NamedTuple):
    """What a cycle gives to the engine."""

    tokens: torch.Tensor  # [num_reqs, num_tokens]
    num_decided: torch.Tensor  # [num_reqs] int32, of the tokens
    num_rejected: torch.Tensor  # [num_reqs] int32, of the engine step's


def make_cycle(state: ProposalState, max_num_reqs: int) -> Cycle:
    """Memory for the cycles of up to so many requests, as yet of none."""
    num_turns, device = len(state.turns), state.lengths.device

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

    return Cycle(
        slots=zeros(dtype=torch.int32).fill_(-1),
        prefill_len=zeros(),
        temperature=zeros(dtype=torch.float32),
        seeds=zeros(),
        top_k=zeros(dtype=torch.int32),
        top_p=zeros(dtype=torch.float32),
        min_p=zeros(dtype=torch.float32),
        active=zeros(dtype=torch.bool),
        step_start=zeros(),
        first_position=zeros(),
        num_drafts=zeros(),
        first_step_row=zeros(),
        lengths=zeros(num_turns),
        new_lengths=zeros(num_turns),
        tokens=zeros(state.ring_size),
        end=zeros(),
        num_accepted=zeros(),
        num_decided=zeros(),
        replaced=zeros(dtype=torch.bool),
        settled=zeros(dtype=torch.bool),
        just_settled=zeros(dtype=torch.bool),
    )
