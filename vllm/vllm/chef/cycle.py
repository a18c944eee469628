"""The order of a cycle of turns, written once.

This module knows turns, columns and proposals. It does not know how members are run, or CUDA
graphs. The methods of `TurnRunner` run without graphs, and the same methods are captured in graphs.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, Protocol, Self

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.state import Cycle, Outputs, ProposalState
from vllm.chef.stats import TurnStats
from vllm.chef.verifier import StepScores, Verifier


class EngineStep(NamedTuple):
    """What vLLM has run when a cycle begins: the pass of the first turn's members."""

    query_start_loc: torch.Tensor  # [num_reqs + 1]
    cu_num_logits: torch.Tensor  # [num_reqs + 1]
    seq_lens: torch.Tensor  # [num_reqs]
    input_ids: torch.Tensor  # [at least num_tokens]
    scores: StepScores
    forbidden: torch.Tensor | None = None  # [num_reqs], see `begin_cycle`

    @classmethod
    def of_batch(
        cls,
        batch: InputBatch,
        scores: StepScores,
        forbidden: torch.Tensor | None,  # [num_reqs]
    ) -> Self:
        num_reqs = batch.num_reqs
        return cls(
            batch.query_start_loc[: num_reqs + 1],
            batch.cu_num_logits[: num_reqs + 1],
            batch.seq_lens[:num_reqs],
            batch.input_ids,
            scores,
            forbidden,
        )


class Reading(NamedTuple):
    """A pass of a turn's member over all tokens that are new to it."""

    query_start_loc: torch.Tensor  # [num_reqs + 1]
    read_start: torch.Tensor  # [num_reqs] position of the first token
    hidden_states: torch.Tensor  # [num_tokens, hidden_size]


class TokenReading(NamedTuple):
    """A pass of a turn's member over the last token of each request."""

    position: torch.Tensor  # [num_reqs] position of that token
    hidden_states: torch.Tensor  # [num_reqs, hidden_size]


class Passes(Protocol):
    """Prepares the inputs and the metadata of a pass, and runs one member."""

    def read(self, turn: int, cycle: Cycle) -> Reading:
        """Run the turn's member over all tokens that are new to it."""

    def read_token(self, turn: int, cycle: Cycle, number: int) -> TokenReading:
        """Run the turn's member over the last token of each request.

        `number` counts the passes of this kind that the turn has made before.
        """


class Parts(Protocol):
    """The parts of one cycle. Each calls the method of `TurnRunner`, or replays a graph of it."""

    def open(self) -> None:
        """`TurnRunner.open`"""

    def read(self, turn: int) -> Reading:
        """`Passes.read`"""

    def judge(self, turn: int, reading: Reading) -> None:
        """`TurnRunner.judge`"""

    def propose_more(self, turn: int) -> None:
        """`TurnRunner.propose_more`"""


Logits = Callable[
    [int, torch.Tensor],  # a turn, and its member's hidden states [num_rows, hidden_size]
    torch.Tensor,  # [num_rows, vocab_size], in the dtype of `ProposalState.scores`
]
Draw = Callable[
    [
        torch.Tensor,  # [num_reqs, vocab_size], a member's logits
        Cycle,
        torch.Tensor,  # [num_reqs] position of the token before the drawn one
    ],
    torch.Tensor,  # [num_reqs], proposed tokens
]


class TurnRunner:
    """Goes through the turns of a cycle.

    Args:
        gammas: `[num_turns]` the most tokens that each turn proposes in this step.
        compute_logits: a member's head.
        draw: proposes tokens from a member's logits.
    """

    def __init__(
        self,
        state: ProposalState,
        ops: ModuleType,
        gammas: torch.Tensor,
        verifier: Verifier,
        compute_logits: Logits,
        draw: Draw,
    ) -> None:
        self.turns, self.state, self.ops, self.gammas = state.turns, state, ops, gammas
        self.verifier = verifier
        self.compute_logits = compute_logits
        self.draw = draw

    def run(self, cycle: Cycle, parts: Parts) -> Outputs:
        """Run a cycle, except for the last turn's passes of one token, which `finish` makes."""
        parts.open()
        last = len(self.turns) - 1
        for turn in range(1, last + 1):
            parts.judge(turn, parts.read(turn))
            if turn < last:
                parts.propose_more(turn)
        return self.ops.outputs(cycle, self.turns.window + 1)

    def finish(
        self,
        cycle: Cycle,
        parts: Parts,
        stats: TurnStats,
        calls: torch.Tensor,  # [num_turns] passes of each turn in this cycle
    ) -> torch.Tensor:  # [num_reqs, window]
        """Run the rest of a cycle. Returns the pending tokens."""
        parts.propose_more(len(self.turns) - 1)
        return self.ops.end_cycle(self.state, cycle, stats, calls)

    def open(self, cycle: Cycle, step: EngineStep) -> None:
        """The rest of the first turn: decide, then propose the token past the window.

        vLLM itself has run the first turn's pass. The turn proposes only where it has read the
        whole window.
        """
        scores = step.scores
        self.ops.begin_cycle(
            self.state,
            cycle,
            step.query_start_loc,
            step.cu_num_logits,
            step.seq_lens,
            step.input_ids,
            step.forbidden,
        )
        self.verifier.decide(0, scores, cycle)
        if not self.turns.draws:
            source = self.ops.last_scored(cycle)
            logits = scores.logits[0][source.rows]
            if scores.bitmask is not None:
                self.ops.mask_scores(logits, scores.bitmask, source.rows)
            tokens = self.draw(logits, cycle, source.last_position)
            self.ops.append(self.state, cycle, 0, self.gammas, tokens)

    def judge(self, turn: int, cycle: Cycle, step: EngineStep, reading: Reading) -> None:
        """What follows the first pass of a turn: keep its scores, decide, propose one token."""
        logits, last_position = self._keep_scores(turn, cycle, reading)
        decides = self.turns.is_scorer(turn)
        if decides:
            self.verifier.decide(turn, step.scores, cycle)
        if not (decides and self.turns.draws):  # a draw settles a token in every request
            tokens = self.draw(logits, cycle, last_position)
            self.ops.append(self.state, cycle, turn, self.gammas, tokens, decides)

    def propose_more(self, turn: int, num_passes: int, cycle: Cycle, passes: Passes) -> None:
        """The turn's passes of one token. Each pass proposes one more token."""
        for number in range(num_passes):
            position, hidden_states = passes.read_token(turn, cycle, number)
            logits = self.compute_logits(turn, hidden_states)
            kept_rows = self.ops.place_score(self.state, cycle, turn, self.gammas)
            self.state.kept_scores[turn - 1].index_copy_(0, kept_rows, logits)
            tokens = self.draw(logits, cycle, position)
            self.ops.append(self.state, cycle, turn, self.gammas, tokens)

    def _keep_scores(
        self, turn: int, cycle: Cycle, reading: Reading
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_reqs, vocab_size], [num_reqs]
        """Keep the member's scores of what it has read.

        Returns its logits of the token past the end, and the position of the last token.
        """
        # The most columns that the member has to score, counted back from the one past the end.
        count = self.turns.num_unscored(turn)
        places = self.ops.place_scores(
            self.state, cycle, turn, count, reading.query_start_loc, reading.read_start
        )
        logits = self.compute_logits(turn, reading.hidden_states[places.rows.flatten()])
        self.state.kept_scores[turn - 1].index_copy_(0, places.kept_rows.flatten(), logits)
        return logits[count - 1 :: count], places.last_position
