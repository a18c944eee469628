"""The worker that an engine names: `worker_cls="vllm.chef.worker.ChefWorker"`."""

from vllm.chef.runner import ChefRunner
from vllm.ensemble_decode.worker import RunnerWorker


class ChefWorker(RunnerWorker):
    """Runs a speculative ensemble: members take turns."""

    runner_cls = ChefRunner
