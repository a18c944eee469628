"""The worker that an engine names: `worker_cls="vllm.ensemble_decode.worker.EnsembleDecodeWorker"`.

It differs from vLLM's worker only in the model runner that it makes, on CUDA and on CPU.
"""

from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from vllm.ensemble_decode.runner import EnsembleRunner, MemberRunner

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker


class RunnerWorker(BaseWorker):
    """A worker whose subclasses name the model runner that it makes."""

    runner_cls: type[MemberRunner]
    checked: tuple[Any, ...]
    """The result of `runner_cls.check`: the ensemble, its members, and a subclass's additions"""

    def init_device(self) -> None:
        self.checked = self.runner_cls.check(self.vllm_config)
        # vLLM makes the group of ranks that share experts only if the current model has experts.
        with set_current_vllm_config(with_experts(self.vllm_config, self.checked[1])):
            super().init_device()
        if current_platform.is_cpu():
            # The CPU worker has no hook for the runner. Its stock runner holds no weights yet.
            self.model_runner = self._make_model_runner()

    def _make_model_runner(self) -> MemberRunner:
        with set_current_vllm_config(self.vllm_config):
            return self.runner_cls(self.vllm_config, self.device, *self.checked)


class EnsembleDecodeWorker(RunnerWorker):
    """Runs a plain ensemble: every member on every token."""

    runner_cls = EnsembleRunner


def with_experts(vllm_config: VllmConfig, members: list[ModelConfig]) -> VllmConfig:
    """The configuration, with a model that has experts if any model of the engine has them."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    models = members if draft is None else [*members, draft]
    config = copy(vllm_config)
    config.model_config = next((model for model in models if model.is_moe), models[0])
    return config
