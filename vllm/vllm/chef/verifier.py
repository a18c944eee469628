"""The mathematics of a turn: which pending tokens the ensemble accepts, and what it puts instead.

Knows distributions; runs no model.  A token x that a member proposed from q is accepted with
probability min(1, r(x) / q(x)), r being the ensemble's distribution; otherwise a draw from
norm(max(0, r - q)) takes its place (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm.chef.ops import eager as ops
from vllm.chef.state import Cycle, ProposalState
from vllm.chef.synthetic import configured_rates
from vllm.chef.turns import Turns
from vllm.ensemble_decode.combine import combine
from vllm.ensemble_decode.config import EnsembleConfig


class StepScores(NamedTuple):
    """The first turn's logits of an engine step, one row per column and request."""

    logits: list[torch.Tensor]  # members of the turn x [num_rows, vocab_size]
    first_row: torch.Tensor  # [num_reqs] row of column 0
    mask: torch.Tensor | None = None
    """[num_rows, vocab_size] of a grammar, 0 or -inf, for all members"""
    batch: InputBatch | None = None
    """None: no request asks for more than a temperature"""


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
        # [max_num_reqs] by slot: where CUDA graphs find them, as vLLM's own move about.
        self.temperature: torch.Tensor
        self.seeds: torch.Tensor
        # Not None only where a benchmark sets the acceptance.
        self.synthetic_rates = configured_rates(turns, state.scores.device)

    def decide(self, turn: int, scores: StepScores, cycle: Cycle) -> LogprobsTensors | None:
        """Decide what all scorers have scored once `turn` has run.

        Returns the log-probabilities of all decided tokens, after the last scorer's turn and where
        a request asks for them.
        """
        is_last = turn == self.turns.last_scorer
        num_segments = self.turns.num_decidable(turn)
        num_columns = self.turns.max_decided(turn) + 1
        logprobs_dims = None
        if scores.batch is not None and is_last:
            logprobs_dims = self.sampler.get_logprobs_dims(scores.batch.idx_mapping_np)
        proposed, segment, positions = ops.candidates(cycle, num_segments, num_columns)
        tokens, num_sampled, rows = [], [], []
        for part in self._chunks(cycle.num_reqs, num_columns):
            temperature = self.temperature[cycle.slots[part]]
            target, reported = self._target(
                part, positions[part], temperature, scores, cycle, logprobs_dims is not None
            )
            proposal = self._proposal_logits(part, segment[part], num_segments, scores, cycle)
            sampled, count = self._verify(
                part, target, proposal, proposed[part], positions[part], temperature, cycle
            )
            tokens.append(sampled)
            num_sampled.append(count)
            rows.append(reported)
        ops.settle(
            self.state,
            cycle,
            _joined(tokens),
            _joined(num_sampled),
            num_segments,
            draws=is_last and self.turns.draws,
        )
        if logprobs_dims is None:
            return None
        return self._logprobs(rows, num_columns, cycle, scores.batch, *logprobs_dims)

    def _target(
        self,
        part: slice,
        positions: torch.Tensor,  # [num_reqs, num_columns] of the token before each
        temperature: torch.Tensor,  # [num_reqs]
        scores: StepScores,
        cycle: Cycle,
        reports: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the ensemble's distribution `[num_reqs * num_columns, vocab_size]` after the
        sampling parameters, and where `reports` those that log-probabilities are reported of."""
        num_columns = positions.shape[1]
        members = torch.stack(
            [
                self._rows(member, part, num_columns, scores, cycle)
                for member in range(self.ensemble.num_members)
            ]
        )
        if scores.mask is not None:
            columns = torch.arange(num_columns, device=positions.device)
            members += scores.mask[self._step_rows(part, columns, scores, cycle)]
        if scores.batch is None:
            process = self._temperature_only(temperature, num_columns)
        else:
            process = self._sampling_params(part, positions, scores, cycle)
        probs, raw = self.ensemble.combines_probs, None
        if self.ensemble.samples_members:
            target = combine(self.function, torch.stack([process(m) for m in members]), probs)
        else:
            raw = combine(self.function, members, probs)
            target = process(raw)
        if not reports:
            return target, None
        if self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            return target, target
        return target, combine(self.function, members, probs) if raw is None else raw

    def _temperature_only(
        self,
        temperature: torch.Tensor,  # [num_reqs]
        num_columns: int,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Sampling parameters of requests that have no others; nothing asks the host."""
        requests = torch.arange(len(temperature), device=temperature.device)
        requests = requests.repeat_interleave(num_columns)

        def process(logits: torch.Tensor) -> torch.Tensor:
            logits = logits.float()  # nobody else's: a stack of rows, or what is made of one
            apply_temperature(logits, requests, temperature)
            return logits

        return process

    def _sampling_params(
        self,
        part: slice,
        positions: torch.Tensor,  # [num_reqs, num_columns]
        scores: StepScores,
        cycle: Cycle,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        batch, slots, num_columns = scores.batch, cycle.slots[part], positions.shape[1]
        inputs = torch.cat(
            [batch.input_ids[batch.logits_indices[scores.first_row[part]]][:, None].long(),
             cycle.tokens[part, : num_columns - 1]], dim=1
        )  # fmt: skip
        columns = torch.arange(num_columns, device=slots.device)
        arguments = (
            slots.repeat_interleave(num_columns),
            slots,
            batch.idx_mapping_np[part],
            positions.flatten(),
            inputs.flatten().int(),  # as vLLM's kernels have them
            columns.int().repeat(len(slots)),
            batch.seq_lens_cpu_upper_bound.numpy()[part] + num_columns,
        )
        return lambda logits: self.sampler.apply_sampling_params(logits, *arguments)

    def _verify(
        self,
        part: slice,
        target: torch.Tensor,  # [num_reqs * num_columns, vocab_size]
        proposal: torch.Tensor,  # [num_reqs, num_columns, vocab_size]
        proposed: torch.Tensor,  # [num_reqs, num_columns]
        positions: torch.Tensor,  # [num_reqs, num_columns]
        temperature: torch.Tensor,  # [num_reqs]
        cycle: Cycle,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_reqs, num_columns], [num_reqs]
        num_reqs, num_columns = proposed.shape
        requests = torch.arange(num_reqs, device=proposed.device)
        return rejection_sample(
            target,
            proposal,
            proposed.flatten(),
            torch.arange(0, num_reqs * num_columns + 1, num_columns, device=proposed.device).int(),
            positions.flatten(),
            requests,
            requests.repeat_interleave(num_columns),
            torch.arange(num_columns, device=proposed.device).int().repeat(num_reqs),
            temperature,
            self.seeds[cycle.slots[part]],
            num_columns - 1,
            self.synthetic_rates,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    def _proposal_logits(
        self,
        part: slice,
        segment: torch.Tensor,  # [num_reqs, num_columns]
        num_segments: int,
        scores: StepScores,
        cycle: Cycle,
    ) -> torch.Tensor:  # [num_reqs, num_columns, vocab_size]
        """Raw logits of the member that proposed each column."""
        num_columns = segment.shape[1]
        members = self.proposers[:num_segments]
        if self.turns.draws:
            members = [m for m in members if self.turn_of[m] != 0]
        logits = None
        for at, member in enumerate(members):
            rows = self._rows(member, part, num_columns, scores, cycle)
            if self.turn_of[member] == 0 and scores.mask is not None:
                # The first turn proposes after the grammar's mask, the others know of none.
                columns = torch.arange(num_columns, device=segment.device)
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
        ring = (cycle.first[part, None] + columns).remainder(self.state.ring_size)
        return self.state.scores[turn - 1][cycle.slots[part, None], ring].flatten(0, 1)

    def _step_rows(
        self, part: slice, columns: torch.Tensor, scores: StepScores, cycle: Cycle
    ) -> torch.Tensor:  # [num_reqs * num_columns]
        """Rows of the engine step, which has none past the drafts that it was given."""
        rows = torch.minimum(columns, cycle.num_drafts[part, None])
        return (scores.first_row[part, None] + rows).flatten()

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
        batch: InputBatch,
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


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
