"""Which pending tokens the ensemble accepts, and what replaces a rejected one.

This module knows distributions and runs no model. Let p be the distribution that a member drew
token x from, and r the ensemble's distribution. Token x is accepted with probability min(1, r(x) /
p(x)). A rejected token is replaced by a draw from norm(max(0, r - p)) (Leviathan et al. 2023, arXiv
2211.17192, algorithm 1). With block verification, the tokens of a decision are judged together (Sun
et al. 2024, arXiv 2403.10444). Both are vLLM's `rejection_sample`.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

from vllm.chef.ops import ops_for
from vllm.chef.sampling import Layout, Process, StepParams
from vllm.chef.state import Candidates, Cycle, GatheredScores, ProposalState
from vllm.chef.synthetic import configured_rates, uses_blocks
from vllm.chef.turns import Turns
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.ops import combine
from vllm.ensemble_decode.request_args import RowCoefficients, SlotCoefficients


class StepScores(NamedTuple):
    """The first turn's scores of an engine step: one row per column and request."""

    logits: list[torch.Tensor]  # members of the turn x [num_rows, vocab_size]
    params: StepParams
    bitmask: torch.Tensor | None = None
    """[num_rows, ceil(vocab_size / 32)] int32, the tokens that grammars allow, one bit each"""


class Verifier:
    """Decides the columns of a cycle."""

    def __init__(
        self,
        ensemble: EnsembleConfig,
        coefficients: SlotCoefficients,
        turns: Turns,
        state: ProposalState,
        sampler: Sampler,
    ) -> None:
        self.ensemble = ensemble
        self.coefficients = coefficients
        self.function = coefficients.function
        self.turns = turns
        self.state = state
        self.sampler = sampler
        self.ops = ops_for(state.scores.device)
        # [num_turns] the first member of each turn, in the order of the window
        self.proposers = [turns[turn].members[0] for turn in turns.in_window]
        self.turn_of = turns.turn_of
        self.layouts: dict[int, Layout] = {}
        """By number of columns"""
        # Only a benchmark sets the acceptance. Otherwise this is None.
        self.synthetic_rates = configured_rates(turns, state.scores.device)
        self.uses_blocks = uses_blocks()

    def decide(self, turn: int, scores: StepScores, cycle: Cycle) -> None:
        """Decide the segments that become decidable with `turn`."""
        segments = self.turns.decidable(turn)
        if scores.params.needs_all_columns:
            # Segments that were decided before get the same result again. The noise of a draw
            # depends only on the request's seed and the position.
            segments = range(segments.stop)
        candidates = self._candidates(cycle, segments)
        verdicts = [
            self._judge(part, candidates.part(part), scores, cycle, segments)
            for part in self._chunks(*candidates.segment.shape)
        ]
        sampled, num_sampled = zip(*verdicts, strict=True)
        self.ops.settle(
            self.state,
            cycle,
            _joined(sampled),
            _joined(num_sampled),
            segments,
            draws=turn == self.turns.last_scorer and self.turns.draws,
        )

    def logprobs(
        self, scores: StepScores, cycle: Cycle, num_logprobs: int, max_token_ids: int
    ) -> LogprobsTensors:
        """Log-probabilities of every column's token, and of the most likely tokens beside it.

        The cycle's last decision has been made. vLLM reads only the decided columns. The last two
        arguments are the result of vLLM's `Sampler.get_logprobs_dims`.
        """
        candidates = self._candidates(cycle, self._all_segments)
        num_columns, parts = candidates.segment.shape[1], []
        for part in self._chunks(cycle.num_reqs, num_columns):
            logits = self._reported(part, candidates.part(part), scores, cycle)
            parts.append(
                compute_topk_scores(
                    logits,
                    num_logprobs,
                    cycle.tokens[part, :num_columns].flatten(),
                    logprob_token_ids_state=self.sampler.logprob_token_ids_state,
                    expanded_idx_mapping=cycle.slots[part].repeat_interleave(num_columns),
                    max_per_req_token_ids=max_token_ids,
                    logits_mode=self.sampler.logprobs_mode.endswith("_logits"),
                )
            )
        offsets = (np.arange(cycle.num_reqs + 1) * num_columns).tolist()
        return LogprobsTensors.cat(parts, cu_num_generated_tokens=offsets)

    @property
    def _all_segments(self) -> range:
        return range(len(self.turns))

    def _candidates(self, cycle: Cycle, segments: range) -> Candidates:
        num_columns = self.turns.max_tokens(segments) + 1
        return self.ops.candidates(self.state, cycle, segments, num_columns)

    def _judge(
        self,
        part: slice,
        candidates: Candidates,
        scores: StepScores,
        cycle: Cycle,
        segments: range,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_reqs, num_columns], [num_reqs]
        """A decision on the requests in `part`: accepted tokens and one more, and their number.

        `candidates` belong to the part. All other arguments belong to the whole step.
        """
        of_part, params = cycle.part(part), scores.params
        members, proposal = self._gather(of_part, candidates, scores, segments, params.scales)
        layout = self._layout(*candidates.segment.shape)
        process = params.processor(part, cycle, candidates, layout)
        rows = self.coefficients.of(of_part.slots, candidates.segment.shape[1])
        target = self._target(members.flatten(1, 2), process, rows)
        # Tokens that were judged before cannot be judged again as a part of a block.
        has_block = candidates.segment.shape[1] > 2
        is_block = self.uses_blocks and has_block and not params.needs_all_columns
        return self._verify(part, layout, target, proposal, candidates, cycle, is_block)

    def _reported(
        self, part: slice, candidates: Candidates, scores: StepScores, cycle: Cycle
    ) -> torch.Tensor:  # [num_reqs * num_columns, vocab_size]
        """The logits from which log-probabilities of the requests in `part` are reported."""
        params, of_part = scores.params, cycle.part(part)
        is_processed = self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        scales = is_processed and params.scales
        members, _ = self._gather(of_part, candidates, scores, self._all_segments, scales)
        members = members.flatten(1, 2)
        rows = self.coefficients.of(of_part.slots, candidates.segment.shape[1])
        if is_processed:
            layout = self._layout(*candidates.segment.shape)
            process = params.processor(part, cycle, candidates, layout)
            return self._target(members, process, rows)
        return combine(self.function, members, self.ensemble.combines_probs, rows)

    def _gather(
        self,
        cycle: Cycle,
        candidates: Candidates,
        scores: StepScores,
        segments: range,
        scales: bool,
    ) -> GatheredScores:
        """The scores that judge some segments. If `scales`, they are divided by the temperature.

        Past the segments that a member has scored, its scores may be anything.
        """
        sources, rows = [], []
        for member in range(self.ensemble.num_members):
            turn = self.turn_of[member]
            if turn == 0:
                sources.append(scores.logits[self.turns[0].members.index(member)])
                rows.append(candidates.step_rows)
            else:
                sources.append(self.state.kept_scores[turn - 1])
                rows.append(candidates.kept_rows)
        dtype = reduce(torch.promote_types, (source.dtype for source in sources))
        gathered = self.ops.gather_scores(
            cycle,
            sources,
            rows,
            candidates.segment,
            self.proposers[segments.start : segments.stop],
            torch.float32 if scores.params.needs_float32 else dtype,
            scales,
        )
        if scores.bitmask is not None:
            step_rows = candidates.step_rows.flatten()
            for member in gathered.members.flatten(1, 2):
                self.ops.mask_scores(member, scores.bitmask, step_rows)
            # The first turn proposes after the grammar's mask. The other turns do not know the
            # mask.
            first = self.turns.in_window.index(0) - segments.start
            is_first = (candidates.segment == first).flatten()
            proposal = gathered.proposal.flatten(0, 1)
            self.ops.mask_scores(proposal, scores.bitmask, step_rows, is_first)
        return gathered

    def _target(
        self,
        members: torch.Tensor,  # [num_members, num_reqs * num_columns, vocab_size]
        process: Process,
        rows: RowCoefficients | None,
    ) -> torch.Tensor:  # [num_reqs * num_columns, vocab_size]
        """Logits of the ensemble's distribution after the sampling parameters."""
        combines_probs = self.ensemble.combines_probs
        if self.ensemble.samples_members:
            return combine(self.function, process(members), combines_probs, rows)
        return process(combine(self.function, members, combines_probs, rows)[None])[0]

    def _verify(
        self,
        part: slice,
        layout: Layout,
        target: torch.Tensor,  # [num_reqs * num_columns, vocab_size]
        proposal: torch.Tensor,  # [num_reqs, num_columns, vocab_size]
        candidates: Candidates,
        cycle: Cycle,
        is_block: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_reqs, num_columns], [num_reqs]
        return rejection_sample(
            target,
            proposal,
            candidates.proposed.flatten(),
            layout.cu_num_logits,
            candidates.positions.flatten(),
            layout.requests,
            layout.request,
            layout.column,
            cycle.temperature[part],
            cycle.seeds[part],
            candidates.segment.shape[1] - 1,
            self.synthetic_rates,
            use_fp64=self.sampler.use_fp64_gumbel,
            use_block_verification=is_block,
        )

    def _layout(self, num_reqs: int, num_columns: int) -> Layout:
        """The layout for this many requests and columns.

        It depends on these two numbers only. It is therefore computed once for the largest batch,
        and a batch takes its first rows.
        """
        if num_columns not in self.layouts:
            num_slots, device = len(self.state.lengths), self.state.lengths.device
            requests = torch.arange(num_slots, device=device)
            columns = torch.arange(num_columns, device=device)
            self.layouts[num_columns] = Layout(
                requests,
                requests.repeat_interleave(num_columns),
                columns.int().repeat(num_slots),
                (torch.arange(num_slots + 1, device=device) * num_columns).int(),
            )
        requests, request, column, cu_num_logits = self.layouts[num_columns]
        num_rows = num_reqs * num_columns
        return Layout(
            requests[:num_reqs],
            request[:num_rows],
            column[:num_rows],
            cu_num_logits[: num_reqs + 1],
        )

    def _chunks(self, num_reqs: int, num_columns: int) -> Iterator[slice]:
        """Slices of requests whose logits fit into the size that vLLM allows for a verification."""
        size = get_max_chunk_logits(self.state.scores.shape[-1])
        size = max(1, size // (num_columns * self.ensemble.num_members))
        for start in range(0, num_reqs, size):
            yield slice(start, min(start + size, num_reqs))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
