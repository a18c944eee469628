"""Model Runner V2 whose steps are cycles of turns."""

from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm.chef.config import check_chef
from vllm.chef.counts import AsyncCountedOutput
from vllm.chef.cycle import EngineStep
from vllm.chef.grammar import allowed_tokens
from vllm.chef.graphs import offer_every_length
from vllm.chef.prompt_logprobs import TurnPromptLogprobsWorker
from vllm.chef.sampling import Processing, SamplerParams, StepParams, needed_processing
from vllm.chef.speculator import ChefSpeculator
from vllm.chef.state import Outputs
from vllm.chef.step import CycleStep
from vllm.chef.turns import Turns
from vllm.chef.verifier import StepScores
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.members import load_member
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.runner import MemberRunner


class ChefRunner(MemberRunner):
    """vLLM's runner. Its model is the first turn's members. The others are in the speculator.

    `sample` holds the whole cycle except for the last turn's proposals. vLLM asks for those
    (`propose`) while the step's tokens travel to the host.
    """

    speculator: ChefSpeculator
    model: MemberGroup
    num_tokens_to_propose: int  # in the current step

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
            self.ensemble_config,
            self.member_configs,
            self.turns,
            self.req_states,
        )

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self.execute_model_state is None:
            return super().sample_tokens(*args, **kwargs)
        self.num_tokens_to_propose = self.execute_model_state.num_spec_tokens_to_schedule
        return AsyncCountedOutput(
            super().sample_tokens(*args, **kwargs), num_tokens=self.turns.window + 1
        )

    def kept_scores_bytes(self) -> dict[int, int]:
        return self.speculator.kept_scores_bytes()

    def make_model(self) -> MemberGroup:
        loaded: dict[int, nn.Module] = {}
        for member in self.turns[0].members:
            loaded[member] = load_member(
                self.vllm_config, self.ensemble_config, self.member_configs, member, loaded
            )
        return MemberGroup(members=list(loaded.values()))

    def replace_helpers(self) -> None:
        self.speculator.set_sampler(self.sampler, self.coefficients)
        first_turn = (self.turns[0].members, self.model.compute_member_logits)
        self.prompt_logprobs_worker = TurnPromptLogprobsWorker(
            self.coefficients,
            self.ensemble_config.combines_probs,
            [first_turn, *self.speculator.logits_functions()],
            self.max_num_reqs,
            self.device,
            self.model_config.logprobs_mode,
        )

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
        step = self._begin(hidden_states, input_batch, grammar_output)
        outputs = step.run()
        return self._output(step, outputs, input_batch)

    def _begin(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> CycleStep:
        processing = self._processing(batch, grammar_output)
        params = self.speculator.step_params(batch, processing)
        engine_step = self._engine_step(hidden_states, batch, params, grammar_output)
        self.prompt_logprobs_worker.take_up_first(hidden_states, batch)
        return self.speculator.begin(
            batch,
            engine_step,
            processing,
            self.num_tokens_to_propose,
            self.prompt_logprobs_worker.is_asked,
        )

    def _output(
        self, step: CycleStep, outputs: Outputs, batch: InputBatch
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        self.prompt_logprobs_worker.take_up(step.readings.kept, step.cycle, batch)
        dims = self.sampler.get_logprobs_dims(batch.idx_mapping_np)
        logprobs = None if dims is None else self.speculator.logprobs(step, dims)
        return sampler_output(outputs, logprobs)

    def _processing(self, batch: InputBatch, grammar_output: GrammarOutput | None) -> Processing:
        """What the step's logits pass through."""
        processing = needed_processing(self.sampler, batch)
        return processing if grammar_output is None else max(processing, Processing.BUILT_IN)

    @torch.inference_mode()
    def _dummy_sampler_run(
        self,
        hidden_states: torch.Tensor,  # [num_reqs, hidden_size]
    ) -> None:
        """A decision for the largest number of requests, for vLLM's memory profile."""
        num_reqs = hidden_states.shape[0]
        batch = InputBatch.make_dummy(num_reqs, num_reqs, self.input_buffers)
        logits = self.model.compute_member_logits(hidden_states)
        scores = StepScores(logits, SamplerParams(self.sampler, batch))
        self.speculator.dummy_decision(batch, scores)

    def _engine_step(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, sum of the first turn's hidden sizes]
        batch: InputBatch,
        params: StepParams,
        grammar_output: GrammarOutput | None,
    ) -> EngineStep:
        """The step as vLLM has run it, with the first turn's logits and what grammars allow."""
        logits = self.model.compute_member_logits(hidden_states[batch.logits_indices])
        bitmask = forbidden = None
        if grammar_output is not None:
            bitmask = allowed_tokens(batch, grammar_output, self.device)
            forbidden = self.speculator.forbidden_tokens(batch, bitmask)
        scores = StepScores(logits, params, bitmask)
        return EngineStep.of_batch(batch, scores, forbidden)


def sampler_output(
    outputs: Outputs, logprobs: LogprobsTensors | None
) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
    """The return value of vLLM's `sample`."""
    output = SamplerOutput(
        sampled_token_ids=outputs.tokens,
        logprobs_tensors=logprobs,
        num_nans=None,
        num_sampled=outputs.num_decided,
        num_rejected=outputs.num_rejected,
        sampling_mask_tensors=None,
    )
    return output, outputs.num_decided, outputs.num_rejected
