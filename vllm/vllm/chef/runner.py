"""Model Runner V2 whose steps are cycles of turns."""

from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm.chef.config import check_chef
from vllm.chef.prompt_logprobs import TurnPromptLogprobsWorker
from vllm.chef.speculator import ChefSpeculator
from vllm.chef.state import begin_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.verifier import StepScores, Verifier
from vllm.ensemble_decode.members import load_member
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.runner import MemberRunner


class ChefRunner(MemberRunner):
    """vLLM's runner with the first turn's members as its model and the others in the speculator.

    `sample` holds the whole cycle but the last turn's proposals, which vLLM makes (`propose`)
    while the step's tokens travel to the host.
    """

    speculator: ChefSpeculator
    model: MemberGroup
    num_tokens_to_propose: int  # of the step at hand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ensemble_config, self.member_configs, self.turns = check_chef(self.vllm_config)
        self.speculator = ChefSpeculator(
            self.vllm_config,
            self.device,
            self.member_configs,
            self.turns,
            self.req_states.all_token_ids.gpu,
        )

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self.execute_model_state is not None:
            self.num_tokens_to_propose = self.execute_model_state.num_spec_tokens_to_schedule
        return super().sample_tokens(*args, **kwargs)

    def make_model(self) -> MemberGroup:
        first = self.turns[0].members
        return MemberGroup(
            members=[load_member(self.vllm_config, self.member_configs, m) for m in first]
        )

    def replace_helpers(self) -> None:
        self.verifier = Verifier(
            self.ensemble_config, self.turns, self.speculator.state, self.sampler
        )
        self.speculator.verifier = self.verifier
        self.speculator.stats = TurnStats(self.turns, self.device)
        self.prompt_logprobs_worker = TurnPromptLogprobsWorker(
            self.ensemble_config, self.max_num_reqs, self.device, self.model_config.logprobs_mode
        )
        self.prompt_logprobs_worker.members = [
            (self.turns[0].members, self.model.compute_member_logits),
            *self.speculator.logits_functions(),
        ]

    def sample(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        scores = self._first_turn(hidden_states, input_batch, grammar_output)
        speculator = self.speculator
        cycle = begin_cycle(
            speculator.state,
            input_batch,
            self.req_states.prefill_len.gpu,
            self._forbidden(scores, input_batch),
        )
        prompt_logprobs = self.prompt_logprobs_worker
        # Without what CUDA graphs pad it by.
        prompt_logprobs.hidden_states = [hidden_states[: input_batch.num_tokens]]
        speculator.begin(cycle, self.num_tokens_to_propose)
        logprobs = self.verifier.decide(0, scores, cycle)
        if not self.turns.draws:
            self._propose_first(scores)
        last = len(self.turns) - 1
        for turn in range(1, len(self.turns)):
            logits = speculator.read(turn)
            if prompt_logprobs.is_asked:
                prompt_logprobs.hidden_states.append(speculator.step_hidden_states())
            settled = cycle.settled
            if self.turns.is_scorer(turn):
                logprobs = self.verifier.decide(turn, scores, cycle)
            speculator.propose_first(turn, logits, settled)
            if turn < last:
                speculator.propose_more(turn)
        return self._output(logprobs)

    @torch.inference_mode()
    def _dummy_sampler_run(
        self,
        hidden_states: torch.Tensor,  # [num_reqs, hidden_size]
    ) -> None:
        """A decision for as many requests as there may be, for vLLM's memory profile."""
        num_reqs = hidden_states.shape[0]
        batch = InputBatch.make_dummy(num_reqs, num_reqs, self.input_buffers)
        state = self.speculator.state
        cycle = begin_cycle(state, batch, self.req_states.prefill_len.gpu)
        logits = self.model.compute_member_logits(hidden_states)
        scores = StepScores(logits, batch.cu_num_logits[:num_reqs].long(), None)
        self.verifier.decide(self.turns.last_scorer, scores, cycle)
        state.scored.zero_()

    def _first_turn(
        self,
        hidden_states: torch.Tensor,
        batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> StepScores:
        logits = self.model.compute_member_logits(hidden_states[batch.logits_indices])
        mask = None
        if grammar_output is not None:
            mask = torch.zeros_like(logits[0], dtype=torch.float32)
            self.structured_outputs_worker.apply_grammar_bitmask(
                mask,
                batch,
                grammar_output.structured_output_request_ids,
                grammar_output.grammar_bitmask,
            )
        return StepScores(logits, batch.cu_num_logits[: batch.num_reqs].long(), mask)

    def _forbidden(
        self, scores: StepScores, batch: InputBatch
    ) -> torch.Tensor | None:  # [num_reqs]
        """The pending token behind the drafts, where a grammar is why vLLM left it out, or -1."""
        if scores.mask is None:
            return None
        slots = batch.idx_mapping[: batch.num_reqs]
        num_drafts = batch.cu_num_logits[: batch.num_reqs + 1].long().diff() - 1
        column = num_drafts.clamp(max=self.turns.window - 1)
        token = self.req_states.draft_tokens[slots, column].long()
        is_pending = num_drafts < self.speculator.state.lengths[slots].sum(1)
        is_allowed = scores.mask[scores.first_row + num_drafts, token] == 0
        return token.masked_fill(is_allowed | ~is_pending, -1)

    def _propose_first(self, scores: StepScores) -> None:
        """The first turn's member proposes the token past the window, if it has read all of it."""
        cycle = self.speculator.cycle
        rows = scores.first_row + cycle.end.clamp(max=cycle.num_drafts)
        logits = scores.logits[0][rows]
        if scores.mask is not None:
            logits = logits + scores.mask[rows]
        where = cycle.active & ~cycle.settled & self.speculator.has_room(cycle)
        where &= cycle.end <= cycle.num_drafts
        cycle.append(self.speculator.draw(logits, cycle), where, cycle.lengths[:, 0])

    def _output(self, logprobs: Any) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        cycle = self.speculator.cycle
        num_sampled = (cycle.num_decided * cycle.active).int()
        num_rejected = ((cycle.num_drafts + 1) * cycle.active).int() - num_sampled
        output = SamplerOutput(
            sampled_token_ids=cycle.tokens[:, : self.turns.window + 1].contiguous(),
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=None,
        )
        return output, num_sampled, num_rejected
