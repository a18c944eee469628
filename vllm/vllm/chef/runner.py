"""Model Runner V2 whose steps are cycles of turns."""

from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm.chef.config import check_chef
from vllm.chef.graphs import offer_every_length
from vllm.chef.prompt_logprobs import TurnPromptLogprobsWorker
from vllm.chef.speculator import ChefSpeculator
from vllm.chef.stats import TurnStats
from vllm.chef.turns import Turns
from vllm.chef.verifier import StepScores, Verifier
from vllm.ensemble_decode.config import EnsembleConfig
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

    @classmethod
    def check(cls, vllm_config: VllmConfig) -> tuple[EnsembleConfig, list[ModelConfig], Turns]:
        return check_chef(vllm_config)

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        ensemble_config: EnsembleConfig,
        member_configs: list[ModelConfig],
        turns: Turns,
    ) -> None:
        super().__init__(vllm_config, device)
        self.ensemble_config, self.member_configs = ensemble_config, member_configs
        self.turns = turns
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
        self.speculator.first = self.model
        self.speculator.stats = TurnStats(self.turns, self.device)
        self.prompt_logprobs_worker = TurnPromptLogprobsWorker(
            self.ensemble_config, self.max_num_reqs, self.device, self.model_config.logprobs_mode
        )
        self.prompt_logprobs_worker.members = [
            (self.turns[0].members, self.model.compute_member_logits),
            *self.speculator.logits_functions(),
        ]

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        if self.cudagraph_manager is not None:
            offer_every_length(self.cudagraph_manager)
        return super().capture_model(*args, **kwargs)

    def sample(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        speculator, prompt_logprobs = self.speculator, self.prompt_logprobs_worker
        speculator.begin(input_batch, self.req_states.prefill_len.gpu, self.num_tokens_to_propose)
        logprobs = None
        if (
            grammar_output is not None
            or prompt_logprobs.is_asked
            or not self._asks_for_filters_only(input_batch)
            or not speculator.replay(hidden_states, self._asks_for_filters(input_batch))
        ):
            scores = self._first_turn(hidden_states, input_batch, grammar_output)
            logprobs = speculator.run(scores, self._forbidden(scores))
        if prompt_logprobs.is_asked:
            # Without what CUDA graphs pad it by.
            first = hidden_states[: input_batch.num_tokens]
            prompt_logprobs.hidden_states = [first, *speculator.hidden_states()]
        tokens, num_sampled, num_rejected = speculator.outputs()
        output = SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=None,
        )
        return output, num_sampled, num_rejected

    def _asks_for_filters_only(self, batch: InputBatch) -> bool:
        """Whether no request has log-probabilities to report, or another sampling parameter than
        temperature, min-p, top-k and top-p."""
        slots, sampler = batch.idx_mapping_np[: batch.num_reqs], self.sampler
        if sampler.get_logprobs_dims(slots) is not None:
            return False
        if not sampler.needs_logits_processing[slots].any():
            return True
        thinking = sampler.thinking_budget_state
        bias, penalties, bad_words, *custom = sampler.logits_processors
        return not (
            custom
            or (thinking.enabled and thinking.use_thinking_budget[slots].any())
            or bias.use_logit_bias[slots].any()
            or penalties.use_penalty[slots].any()
            or bad_words.num_bad_words.np[slots].any()
        )

    def _asks_for_filters(self, batch: InputBatch) -> bool:
        """Whether a request has min-p, top-k or top-p."""
        slots, states = batch.idx_mapping_np[: batch.num_reqs], self.sampler.sampling_states
        return bool(
            (states.min_p.np[slots] != 0).any()
            or (states.top_k.np[slots] != states.vocab_size).any()
            or (states.top_p.np[slots] != 1).any()
        )

    @torch.inference_mode()
    def _dummy_sampler_run(
        self,
        hidden_states: torch.Tensor,  # [num_reqs, hidden_size]
    ) -> None:
        """A decision for as many requests as there may be, for vLLM's memory profile."""
        num_reqs = hidden_states.shape[0]
        batch = InputBatch.make_dummy(num_reqs, num_reqs, self.input_buffers)
        cycle = self.speculator.begin(batch, self.req_states.prefill_len.gpu, self.turns.window)
        scores = StepScores(self.model.compute_member_logits(hidden_states), batch=batch)
        self.verifier.decide(self.turns.last_scorer, scores, cycle)

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
        return StepScores(logits, mask, batch)

    def _forbidden(self, scores: StepScores) -> torch.Tensor | None:  # [num_reqs]
        """The pending token behind the drafts, where a grammar is why vLLM left it out, or -1."""
        if scores.mask is None:
            return None
        batch = scores.batch
        slots = batch.idx_mapping[: batch.num_reqs]
        row_start = batch.cu_num_logits[: batch.num_reqs + 1].long()
        num_drafts = row_start.diff() - 1
        column = num_drafts.clamp(max=self.turns.window - 1)
        token = self.req_states.draft_tokens[slots, column].long()
        is_pending = num_drafts < self.speculator.state.lengths[slots].sum(1)
        is_allowed = scores.mask[row_start[:-1] + num_drafts, token] == 0
        return token.masked_fill(is_allowed | ~is_pending, -1)
