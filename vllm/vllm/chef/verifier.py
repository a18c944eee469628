"""The mathematics of a turn: which pending tokens the ensemble accepts, and what it puts instead.

Knows distributions; runs no model.  A token x that a member proposed from q is accepted with
probability min(1, r(x) / q(x)), r being the ensemble's distribution; otherwise a draw from
norm(max(0, r - q)) takes its place (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm.chef.state import Cycle, ProposalState, segment_of
from vllm.chef.synthetic import configured_rates
from vllm.chef.turns import Turns
from vllm.ensemble_decode.combine import combine
from vllm.ensemble_decode.config import EnsembleConfig


class StepScores(NamedTuple):
    """The first turn's logits of an engine step, one row per column and request."""

    logits: list[torch.Tensor]  # members of the turn x [num_rows, vocab_size]
    first_row: torch.Tensor  # [num_reqs] row of column 0
    mask: torch.Tensor | None  # [num_rows, vocab_size] of a grammar, 0 or -inf, for all members


class Verifier:
    """Decides the columns of a cycle.

    Each call goes over all columns from the first: those decided before come out the same, since
    the noise of a draw depends on the request's seed and the position alone.
    """

    def __init__(
        self, ensemble: EnsembleConfig, turns: Turns, state: ProposalState, sampler: Sampler
    ) -> None:
        self.ensemble = ensemble
        self.function = ensemble.make_function()
        self.turns = turns
        self.state = state
        self.sampler = sampler
        # [num_turns] members that propose, in the order of the window
        self.proposers = [turns[turn].members[0] for turn in turns.in_window]
        self.turn_of = turns.turn_of
        # Not None only where a benchmark sets the acceptance.
        self.synthetic_rates = configured_rates(turns, state.scores.device)

    def decide(self, turn: int, scores: StepScores, cycle: Cycle) -> LogprobsTensors | None:
        """Decide what all scorers have scored once `turn` has run.

        Returns the log-probabilities of all decided tokens, after the last scorer's turn and where
        a request asks for them.
        """
        is_last = turn == self.turns.last_scorer
        num_columns = self.turns.max_decided(turn) + 1
        lengths = cycle.segments[:, : self.turns.num_decidable(turn)]
        num_candidates = lengths.sum(1)
        logprobs_dims = self.sampler.get_logprobs_dims(cycle.batch.idx_mapping_np)
        reports = is_last and logprobs_dims is not None
        tokens, accepted, rows = [], [], []
        for part in self._chunks(cycle.num_reqs, num_columns):
            target, reported = self._target(part, num_columns, scores, cycle, reports)
            sampled, num_sampled = self._verify(part, target, lengths, scores, cycle)
            tokens.append(sampled)
            accepted.append(num_sampled.long() - 1)
            rows.append(reported)
        num_accepted = torch.cat(accepted)
        live = cycle.active & ~cycle.settled
        replaced = live & (num_accepted < num_candidates)
        cycle.accept(num_accepted, live)
        cycle.replaced = cycle.replaced | replaced
        settle = live if is_last and self.turns.draws else replaced
        cycle.settle(torch.cat(tokens).gather(1, num_accepted[:, None])[:, 0], settle, self.state)
        return self._logprobs(rows, num_columns, cycle, *logprobs_dims) if reports else None

    def _target(
        self, part: slice, num_columns: int, scores: StepScores, cycle: Cycle, reports: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the ensemble's distribution `[num_reqs * num_columns, vocab_size]` after the
        sampling parameters, and where `reports` those that log-probabilities are reported of."""
        members = torch.stack(
            [
                self._rows(member, part, num_columns, scores, cycle)
                for member in range(self.ensemble.num_members)
            ]
        )
        batch, slots = cycle.batch, cycle.slots[part]
        columns = torch.arange(num_columns, device=slots.device)
        if scores.mask is not None:
            members += scores.mask[self._step_rows(part, columns, scores, cycle)]
        inputs = torch.cat(
            [batch.input_ids[batch.logits_indices[scores.first_row[part]]][:, None].long(),
             cycle.tokens[part, : num_columns - 1]], dim=1
        )  # fmt: skip
        arguments = (
            slots.repeat_interleave(num_columns),
            slots,
            batch.idx_mapping_np[part],
            self._positions(part, columns, cycle).flatten(),
            inputs.flatten().int(),  # as vLLM's kernels have them
            columns.int().repeat(len(slots)),
            batch.seq_lens_cpu_upper_bound.numpy()[part] + num_columns,
        )
        process, probs = self.sampler.apply_sampling_params, self.ensemble.combines_probs
        raw = None
        if self.ensemble.samples_members:
            processed = torch.stack([process(m, *arguments) for m in members])
            target = combine(self.function, processed, probs)
        else:
            raw = combine(self.function, members, probs)
            target = process(raw, *arguments)
        if not reports:
            return target, None
        if self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            return target, target
        return target, combine(self.function, members, probs) if raw is None else raw

    def _verify(
        self,
        part: slice,
        target: torch.Tensor,  # [num_reqs * num_columns, vocab_size]
        lengths: torch.Tensor,  # [all requests, num_segments]
        scores: StepScores,
        cycle: Cycle,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_reqs, num_columns], [num_reqs]
        slots = cycle.slots[part]
        num_reqs, num_columns = len(slots), target.shape[0] // len(slots)
        columns = torch.arange(num_columns, device=slots.device)
        num_candidates = lengths[part].sum(1)
        # Row k + 1 holds the token that is proposed for column k; -1 is accepted by nobody.
        proposed = slots.new_full((num_reqs, num_columns), -1)
        proposed[:, 1:] = cycle.tokens[part, : num_columns - 1].masked_fill(
            columns[:-1] >= num_candidates[:, None], -1
        )
        requests = torch.arange(num_reqs, device=slots.device)
        states = self.sampler.sampling_states
        return rejection_sample(
            target,
            self._proposal_logits(part, num_columns, lengths[part], scores, cycle),
            proposed.flatten(),
            (torch.arange(num_reqs + 1, device=slots.device) * num_columns).int(),
            self._positions(part, columns, cycle).flatten(),
            requests,
            requests.repeat_interleave(num_columns),
            columns.int().repeat(num_reqs),
            states.temperature.gpu[slots],
            states.seeds.gpu[slots],
            num_columns - 1,
            self.synthetic_rates,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    def _proposal_logits(
        self,
        part: slice,
        num_columns: int,
        lengths: torch.Tensor,  # [num_reqs, num_segments]
        scores: StepScores,
        cycle: Cycle,
    ) -> torch.Tensor:  # [num_reqs, num_columns, vocab_size]
        """Raw logits of the member that proposed each column."""
        columns = torch.arange(num_columns, device=lengths.device)
        segment = segment_of(columns, lengths)
        members = self.proposers[: lengths.shape[1]]
        if self.turns.draws:
            members = [m for m in members if self.turn_of[m] != 0]
        logits = None
        for at, member in enumerate(members):
            rows = self._rows(member, part, num_columns, scores, cycle)
            if self.turn_of[member] == 0 and scores.mask is not None:
                # The first turn proposes after the grammar's mask, the others know of none.
                rows = rows + scores.mask[self._step_rows(part, columns, scores, cycle)]
            rows = rows.unflatten(0, (-1, num_columns))
            here = (segment == at)[:, :, None]
            logits = rows if logits is None else torch.where(here, rows, logits)
        return logits

    def _rows(
        self, member: int, part: slice, num_columns: int, scores: StepScores, cycle: Cycle
    ) -> torch.Tensor:  # [num_reqs * num_columns, vocab_size]
        """A member's raw logits on the first columns; anything where it has not scored."""
        columns = torch.arange(num_columns, device=cycle.slots.device)
        turn = self.turn_of[member]
        if turn == 0:
            return scores.logits[self.turns[0].members.index(member)][
                self._step_rows(part, columns, scores, cycle)
            ]
        ring = self.state.ring(cycle.first[part, None] + columns)
        return self.state.scores[turn - 1][cycle.slots[part, None], ring].flatten(0, 1)

    def _step_rows(
        self, part: slice, columns: torch.Tensor, scores: StepScores, cycle: Cycle
    ) -> torch.Tensor:  # [num_reqs * num_columns]
        """Rows of the engine step, which has none past the drafts that it was given."""
        rows = torch.minimum(columns, cycle.num_drafts[part, None])
        return (scores.first_row[part, None] + rows).flatten()

    def _positions(
        self, part: slice, columns: torch.Tensor, cycle: Cycle
    ) -> torch.Tensor:  # [num_reqs, num_columns]
        """Of the token before each column, as vLLM counts positions of a draw."""
        return cycle.first[part, None] + columns - 1

    def _chunks(self, num_reqs: int, num_columns: int) -> Iterator[slice]:
        """Requests whose logits fit into what vLLM allows a verification to take."""
        size = get_max_chunk_logits(self.state.scores.shape[-1])
        size = max(1, size // (num_columns * self.ensemble.num_members))
        for start in range(0, num_reqs, size):
            yield slice(start, min(start + size, num_reqs))

    def _logprobs(
        self,
        rows: list[torch.Tensor],
        num_columns: int,
        cycle: Cycle,
        num_logprobs: int,
        max_token_ids: int,
    ) -> LogprobsTensors:
        """Of every column's token, most likely tokens beside it; vLLM reads the decided ones."""
        parts = []
        for part, logits in zip(self._chunks(cycle.num_reqs, num_columns), rows, strict=True):
            slots = cycle.slots[part]
            parts.append(
                compute_topk_scores(
                    logits,
                    num_logprobs,
                    cycle.tokens[part, :num_columns].flatten(),
                    logprob_token_ids_state=self.sampler.logprob_token_ids_state,
                    expanded_idx_mapping=slots.repeat_interleave(num_columns),
                    max_per_req_token_ids=max_token_ids,
                    logits_mode=self.sampler.logprobs_mode.endswith("_logits"),
                )
            )
        offsets = (np.arange(cycle.num_reqs + 1) * num_columns).tolist()
        return LogprobsTensors.cat(parts, cu_num_generated_tokens=offsets)
