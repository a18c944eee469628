"""Model Runner V2 with an ensemble as its model. Only loading differs, not the step."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.members import check_ensemble, load_members
from vllm.ensemble_decode.memory import available_bytes, member_memory, memory_table
from vllm.ensemble_decode.model import EnsembleModel, MemberGroup
from vllm.ensemble_decode.outside import OutsideSpeculator
from vllm.ensemble_decode.recurrent import align_blocks
from vllm.ensemble_decode.request_args import SlotCoefficients
from vllm.ensemble_decode.sampler import (
    EnsembleModelState,
    EnsemblePromptLogprobsWorker,
    EnsembleStructuredOutputsWorker,
    RecurrentModelState,
)
from vllm.ensemble_decode.vocabulary import log_what_is_read

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunner
else:
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as ModelRunner


logger = init_logger(__name__)


class MemberRunner(ModelRunner):
    """A runner that gives vLLM a ready model. Subclasses make the model and replace helpers.

    It also keeps what the requests override of the ensemble.
    """

    ensemble_config: EnsembleConfig
    member_configs: list[ModelConfig]

    @classmethod
    def check(cls, vllm_config: VllmConfig) -> tuple[Any, ...]:
        """The arguments that the runner is made with besides the configuration.

        They are the ensemble, its members' configs, and a subclass's additions. They are checked
        before weights load.

        Raises:
            ConfigFieldError: one line that names the field and the remedy.
        """
        return check_ensemble(vllm_config)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        kept = self.kept_scores_bytes()
        rows = [
            member_memory(self.vllm_config, member, kept.get(index, 0))
            for index, member in enumerate(self.member_configs)
        ]
        logger.info_once(memory_table(rows, available_bytes(self.vllm_config)))
        log_what_is_read(self.member_configs, self.ensemble_config.read_as_of_members)
        function = self.ensemble_config.make_function()
        self.coefficients = SlotCoefficients(function, self.max_num_reqs, self.device)
        with DeviceMemoryProfiler() as profiler:
            with self.jit_warmup_registry.activate():
                model = self.make_model()
            super().load_model(model=model)
        # vLLM's own figure leaves out a model that was made before.
        self.model_memory_usage = profiler.consumed_memory
        self.replace_helpers()

    def make_model(self) -> MemberGroup:
        """Load the members that vLLM calls as its model."""
        raise NotImplementedError

    def kept_scores_bytes(self) -> dict[int, int]:
        """By member, bytes of the logits that are kept between its passes."""
        return {}

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        align_blocks(self.vllm_config, self.member_configs)
        return super().get_kv_cache_spec()

    def replace_helpers(self) -> None:
        """Replace vLLM's helpers of a step with ours. Called once everything is loaded."""

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[request.req_id]
            self.coefficients.add_request(slot, request.sampling_params)
        self.coefficients.apply_staged_writes()


class EnsembleRunner(MemberRunner):
    """Loads all members as one model. vLLM's own code runs it."""

    model: EnsembleModel

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        ensemble_config: EnsembleConfig,
        member_configs: list[ModelConfig],
    ) -> None:
        super().__init__(vllm_config, device)
        self.ensemble_config, self.member_configs = ensemble_config, member_configs
        if isinstance(self.speculator, StandaloneARSpeculator):
            self.speculator = OutsideSpeculator(vllm_config, device, member_configs)

    def make_model(self) -> EnsembleModel:
        config, members = self.ensemble_config, self.member_configs
        has_recurrent = any(member.is_hybrid for member in members)
        return EnsembleModel(
            members=load_members(self.vllm_config, config, members),
            function=self.coefficients.function,
            samples_members=config.samples_members,
            combines_probs=config.combines_probs,
            model_state_cls=RecurrentModelState if has_recurrent else EnsembleModelState,
            coefficients=self.coefficients,
        )

    def sample(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, sum(hidden_sizes)]
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        with self.model.slots_of_rows(input_batch.expanded_idx_mapping):
            return super().sample(hidden_states, input_batch, grammar_output)

    def replace_helpers(self) -> None:
        """Replace two helpers of a step, because vLLM has no hook for them.

        Ours take the logits of all members, and know what each request overrides.
        """
        self.prompt_logprobs_worker = EnsemblePromptLogprobsWorker(
            self.model, self.max_num_reqs, self.device, self.model_config.logprobs_mode
        )
        if not self.ensemble_config.samples_members:
            return
        self.structured_outputs_worker = EnsembleStructuredOutputsWorker(
            self.model,
            max_num_logits=self.max_num_reqs * self.decode_query_len,
            vocab_size=self.vocab_size,
            device=self.device,
            mask_stride=self.decode_query_len,
            num_bonus_tokens=self.model_state.num_new_sampled_tokens_per_step,
        )
