"""vLLM's scheduler for members that take turns: prompts share steps, and depths may be chosen.

- Prompts wait a few steps for others (`PromptGate`). vLLM itself can defer prompts, to balance
  data-parallel ranks.
- With `gamma: auto` the depth of speculation is chosen at run time. vLLM's own dynamic speculation
  looks up the number of tokens by batch size. Here the lookup table is a `DepthChooser`, which
  answers from measurements.
"""

import time
from itertools import chain
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm.chef.config import ChefConfig, engine_turns
from vllm.chef.depth import DepthChooser
from vllm.chef.prompts import ENOUGH_TOKENS, PromptGate


class _SharedPromptSteps:
    """A mixin for vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On a CPU there are no CUDA graphs, and prompts that wait gain nothing.
        self.prompt_gate = None if current_platform.is_cpu() else PromptGate()

    def add_request(self, request: Request) -> None:
        if self.prompt_gate is not None:
            self.prompt_gate.arrive()
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.prompt_gate is not None and self.prompt_gate.waits(self._num_prompt_tokens()):
            throttle_prefills = True
        return super().schedule(throttle_prefills)

    def _num_prompt_tokens(self) -> int:
        """Tokens of prompts that a step could read, up to about `ENOUGH_TOKENS`."""
        chunks = (request for request in self.running if request.is_prefill_chunk)
        num_tokens = 0
        for request in chain(chunks, self.waiting):
            num_tokens += request.num_tokens - request.num_computed_tokens
            if num_tokens >= ENOUGH_TOKENS:
                break
        return num_tokens


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


class ChefScheduler(_SharedPromptSteps, Scheduler):
    pass


class AsyncChefScheduler(_SharedPromptSteps, AsyncScheduler):
    pass


class AdaptiveScheduler(_AdaptiveDepth, ChefScheduler):
    pass


class AsyncAdaptiveScheduler(_AdaptiveDepth, AsyncChefScheduler):
    pass


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler factory that `scheduler_cls` names.

    A factory is needed because vLLM decides late whether it schedules asynchronously.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    if ChefConfig.from_additional_config(vllm_config.additional_config).is_adaptive:
        scheduler = AsyncAdaptiveScheduler if is_async else AdaptiveScheduler
    else:
        scheduler = AsyncChefScheduler if is_async else ChefScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
