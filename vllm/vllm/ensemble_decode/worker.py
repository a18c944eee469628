"""The worker that an engine names: `worker_cls="vllm.ensemble_decode.worker.EnsembleDecodeWorker"`.

Differs from vLLM's worker in the model runner it makes, on CUDA and on CPU.
"""

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm.ensemble_decode.runner import EnsembleRunner, MemberRunner

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

    class RunnerWorker(BaseWorker):
        """A worker whose subclasses say which model runner it makes."""

        runner_cls: type[MemberRunner]

        def _make_model_runner(self) -> MemberRunner:
            return self.runner_cls(self.vllm_config, self.device)

else:
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker

    class RunnerWorker(BaseWorker):
        """A worker whose subclasses say which model runner it makes."""

        runner_cls: type[MemberRunner]

        def init_device(self) -> None:
            # The CPU worker has no hook of its own; its stock runner holds no weights yet.
            super().init_device()
            self.model_runner = self.runner_cls(self.vllm_config, self.device)


class EnsembleDecodeWorker(RunnerWorker):
    """Runs a plain ensemble: every member on every token."""

    runner_cls = EnsembleRunner
