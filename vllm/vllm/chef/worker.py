"""The worker that an engine names: `worker_cls="vllm.chef.worker.ChefWorker"`."""

from typing import Any

from vllm.chef.runner import ChefRunner
from vllm.ensemble_decode.worker import RunnerWorker


class ChefWorker(RunnerWorker):
    """Runs a speculative ensemble: members take turns."""

    runner_cls = ChefRunner

    def turn_stats(self) -> dict[str, Any]:
        """`TurnStats.to_dict`, for `collective_rpc("turn_stats")`."""
        return self.model_runner.speculator.stats.to_dict()

    def reset_turn_stats(self) -> None:
        self.model_runner.speculator.stats.reset()
