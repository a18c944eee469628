"""What is pending: the windows of all requests, and the members' scores on them.

This module knows positions and columns. It knows neither models nor distributions. A *column* is a
position counted from the request's first undecided token. All tensors are on the device and never
move, so that CUDA graphs find them. The operations in `ops/` work on them and return the named
tuples.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch

from vllm.chef.turns import Turns

# For a row without a request. No vocabulary is as large.
NO_TOP_K = 2**31 - 1


def num_positions(turns: Turns) -> int:
    """Positions whose scores are in use at the same time, at most.

    They are the step's window, the first turn's proposal, the window of the next step, and the
    position past its end.
    """
    return 2 * turns.window + 2


def kept_scores_bytes(
    turns: Turns, max_num_reqs: int, vocab_size: int, dtype: torch.dtype
) -> dict[int, int]:
    """By member of the turns after the first, bytes of its scores in `ProposalState`."""
    num_values = (max_num_reqs + 1) * (num_positions(turns) + 1) * vocab_size
    return {turn.members[0]: num_values * dtype.itemsize for turn in turns.sequence[1:]}


class ProposalState:
    """State that is kept from step to step, per slot of a request.

    Scores are kept by position in a ring, so nothing moves when tokens are committed. The ring's
    last row takes scores that nobody needs, so no mask is necessary. The last slot is for rows that
    pad the batch of a CUDA graph. The slot number of those rows is -1.
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
        self.ring_size = num_positions(turns)
        self.lengths = torch.zeros(num_slots, num_turns, dtype=torch.int64, device=device)
        """[num_slots, num_turns] length of each turn's segment in the window"""
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
        """[num_turns - 1, num_slots, ring_size + 1, vocab_size] raw logits of the turns after the
        first

        The first turn's logits come with each engine step and are not kept.
        """
        self.kept_scores = [scores.flatten(0, 1) for scores in self.scores]
        """num_turns - 1 x [num_slots * (ring_size + 1), vocab_size] views of `scores`"""


class SlotStates(NamedTuple):
    """vLLM's request states that a cycle needs, `[max_num_reqs]` by slot."""

    prefill_len: torch.Tensor  # int32
    temperature: torch.Tensor  # float32
    seeds: torch.Tensor  # int64
    top_k: torch.Tensor  # int32, vocab_size if unset
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32


@dataclass
class Cycle:
    """The undecided tokens of one step, in which every turn is called once.

    The columns of a request hold, in this order:

    - the window that the step found
    - the first turn's proposal
    - the proposals of the later turns

    A replacement takes the place of the replaced token and drops all tokens behind it.
    """

    slots: torch.Tensor  # [num_reqs] int32, slots of the requests; -1 in rows without a request
    prefill_len: torch.Tensor  # [num_reqs]
    temperature: torch.Tensor  # [num_reqs] float32
    seeds: torch.Tensor  # [num_reqs]
    top_k: torch.Tensor  # [num_reqs] int32, vocab_size if unset
    top_p: torch.Tensor  # [num_reqs] float32
    min_p: torch.Tensor  # [num_reqs] float32
    active: torch.Tensor  # [num_reqs] bool, False while the prompt goes on in the next step
    step_start: torch.Tensor  # [num_reqs] position of the first token of the engine step
    first_position: torch.Tensor  # [num_reqs] position of column 0
    num_drafts: torch.Tensor  # [num_reqs] the engine step has num_drafts + 1 rows of logits
    first_step_row: torch.Tensor  # [num_reqs] row of column 0 in the engine step
    lengths: torch.Tensor  # [num_reqs, num_turns] lengths of the segments that the step found
    new_lengths: torch.Tensor  # [num_reqs, num_turns] lengths of the segments that the step leaves
    tokens: torch.Tensor  # [num_reqs, ring_size], the last column is never read
    end: torch.Tensor  # [num_reqs] number of columns in use
    num_accepted: torch.Tensor  # [num_reqs] columns whose proposal was accepted
    num_decided: torch.Tensor  # [num_reqs] columns that are decided; they are the step's output
    replaced: torch.Tensor  # [num_reqs] bool: the token after the accepted ones was replaced
    settled: torch.Tensor  # [num_reqs] bool: no more columns are decided in this cycle
    just_settled: torch.Tensor  # [num_reqs] bool: the latest decision settled the request

    @property
    def num_reqs(self) -> int:
        return self.slots.shape[0]

    @property
    def segments(self) -> torch.Tensor:  # [num_reqs, num_turns]
        """Lengths of the segments, in the order of `Turns.in_window`."""
        return self.lengths.roll(-1, dims=1)

    @property
    def last_position(self) -> torch.Tensor:  # [num_reqs]
        return self.first_position + self.end - 1

    @property
    def slot_states(self) -> SlotStates:
        """The states that `load` looked up by slot, `[num_reqs]` by row."""
        return SlotStates(*(getattr(self, field) for field in SlotStates._fields))

    def rows(self, num_reqs: int) -> "Cycle":
        """The first `num_reqs` requests. The tensors share memory."""
        return self.part(slice(num_reqs))

    def part(self, requests: slice) -> "Cycle":
        """Some of the requests. The tensors share memory."""
        return Cycle(*(getattr(self, field.name)[requests] for field in fields(Cycle)))


class Candidates(NamedTuple):
    """What a decision judges. Each tensor is `[num_reqs, num_columns]`."""

    proposed: torch.Tensor
    """Tokens as vLLM's verification needs them: the token of column k stands in place k + 1. -1:
    none
    """
    segment: torch.Tensor  # which of the judged segments each column lies in
    positions: torch.Tensor  # of the token before each column
    step_rows: torch.Tensor
    """Rows of each column's scores in the engine step

    Columns past the step's drafts have no row of their own. They get the last one.
    """
    kept_rows: torch.Tensor  # rows of each column's scores in `kept_scores` of a turn

    def part(self, requests: slice) -> Self:
        """The candidates of some of the requests. The tensors share memory."""
        return type(self)(*(field[requests] for field in self))


class GatheredScores(NamedTuple):
    """The scores of each column, either raw or divided by the temperature (see `gather_scores`)."""

    members: torch.Tensor  # [num_members, num_reqs, num_columns, vocab_size]
    proposal: torch.Tensor  # [num_reqs, num_columns, vocab_size], scores of the column's proposer


class LastScored(NamedTuple):
    """The scores from which the first turn proposes."""

    rows: torch.Tensor  # [num_reqs] rows of logits of the engine step
    last_position: torch.Tensor  # [num_reqs] position of the last token


class PreparedTokens(NamedTuple):
    """What a turn's first pass reads."""

    read_start: torch.Tensor  # [num_reqs] position of the first token
    is_again: torch.Tensor  # [num_tokens] bool: the token stands before the engine step's tokens


class ScorePlaces(NamedTuple):
    """Where the scores of a reading come from, and where they are kept."""

    rows: torch.Tensor  # [num_reqs, count] rows of the hidden states
    kept_rows: torch.Tensor  # [num_reqs, count] rows of `kept_scores` of the turn
    last_position: torch.Tensor  # [num_reqs] position of the last token


class Outputs(NamedTuple):
    """What a cycle gives to the engine."""

    tokens: torch.Tensor
    """[num_reqs, num_tokens + num_turns + 2] tokens, and behind them the counts of `StepCounts`

    vLLM reads the decided tokens only. The counts travel to the host with them.
    """
    num_decided: torch.Tensor  # [num_reqs] int32, how many of `tokens` are decided
    num_rejected: torch.Tensor  # [num_reqs] int32, of the engine step's tokens


def make_cycle(state: ProposalState, max_num_reqs: int) -> Cycle:
    """Memory for the cycles of up to `max_num_reqs` requests. It holds no request yet."""
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
