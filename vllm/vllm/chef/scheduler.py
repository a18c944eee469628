"""vLLM's scheduler with a depth of speculation that is chosen at run time.

It is used only with `gamma: auto`. vLLM's own dynamic speculation looks up the number of tokens by
batch size. Here the lookup table is a `DepthChooser`, which answers from measurements.
"""

import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from vllm.chef.config import engine_turns
from vllm.chef.depth import DepthChooser


class _AdaptiveDepth:
    """A mixin for vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        turns = engine_turns(self.vllm_config)
        places = [turns.places(depth) for depth in range(turns.window + 1)]
        self.depths = self.dynamic_sd_lookup = DepthChooser(places)
        self._last: tuple[int, int] | None = None  # requests and depth of the previous step
        self._last_time = 0.0

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        now = time.perf_counter()
        step = _uniform_step(scheduler_output)
        # If two successive steps are alike, the time between their ends is the time of one step.
        if step is not None and step == self._last:
            num_reqs, depth = step
            decided = [len(tokens) for tokens in model_runner_output.sampled_token_ids]
            self.depths.observe(num_reqs, depth, decided, now - self._last_time)
        self._last, self._last_time = step, now
        return super().update_from_output(scheduler_output, model_runner_output)


def _uniform_step(output: SchedulerOutput) -> tuple[int, int] | None:
    """Number of requests and depth of a step that only decodes and does not change the depth.

    None for any other step.
    """
    depth, num_reqs = output.num_spec_tokens_to_schedule, len(output.num_scheduled_tokens)
    counts = output.num_scheduled_tokens.values()
    if not num_reqs or output.scheduled_new_reqs or any(n != 1 + depth for n in counts):
        return None
    drafts = output.scheduled_spec_decode_tokens
    if depth and len(drafts) < num_reqs:
        return None  # a part of a prompt has 1 + depth tokens by chance
    return num_reqs, depth


class ChefScheduler(_AdaptiveDepth, Scheduler):
    pass


class AsyncChefScheduler(_AdaptiveDepth, AsyncScheduler):
    pass


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler factory that `scheduler_cls` names.

    A factory is needed because vLLM decides late whether it schedules asynchronously.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler = AsyncChefScheduler if is_async else ChefScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
