"""vLLM's scheduler for members that take turns: what it does besides.

- It replaces vLLM's counts of drafts, and counts proposals by member (`counts.py`).
- Prompts wait a few steps for others (`PromptGate`). vLLM itself can defer prompts, to balance
  data-parallel ranks.
- With `gamma: auto` the depth of speculation is chosen at run time. vLLM's own dynamic speculation
  looks up the number of tokens by batch size. Here the lookup table is a `DepthChooser`, which
  answers from measurements.
"""

import time
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm.chef.config import ChefConfig, engine_turns
from vllm.chef.counts import CountedOutput, StepCounts, TurnCounts, send
from vllm.chef.depth import DepthChooser
from vllm.chef.prompts import ENOUGH_TOKENS, PromptGate


class _CountedTurns:
    """A mixin for vLLM's schedulers.

    vLLM counts the drafts that it schedules. They may be fewer or more than the window that a cycle
    finds there. So the counts of cycles replace vLLM's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn_counts = TurnCounts(engine_turns(self.vllm_config))

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            request.spec_decode_metrics = WindowMetrics.new(self.num_spec_tokens)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> None:
        return None

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if isinstance(model_runner_output, CountedOutput):  # otherwise nothing was scheduled
            # A request that has ended is not in `outputs`, even if this step was under way then.
            decided = [
                output
                for of_client in outputs.values()
                for output in of_client.outputs
                if output.new_token_ids
            ]
            rows = [model_runner_output.req_id_to_index[output.request_id] for output in decided]
            counts = model_runner_output.counts.of_requests(rows)
            self._count_requests(decided, counts)
            for of_client in outputs.values():
                if of_client.scheduler_stats is not None:
                    of_client.scheduler_stats.spec_decoding_stats = self.turn_counts.drafts(counts)
                    send(of_client.scheduler_stats, self.turn_counts.sums(counts))
        return outputs

    def _count_requests(self, outputs: list[EngineCoreOutput], counts: StepCounts) -> None:
        level = self.spec_decode_metrics_level
        if level == "none":
            return
        of_requests = counts.num_in_window.tolist(), counts.num_accepted_in_window.tolist()
        for output, window, num_accepted in zip(outputs, *of_requests, strict=True):
            # An output has the metrics of its request if the request ends here.
            metrics = output.spec_decode_metrics
            if metrics is None:
                metrics = self.requests[output.request_id].spec_decode_metrics
            metrics.observe_window(window, num_accepted, level == "detailed")


@dataclass
class WindowMetrics(RequestSpecDecodeMetrics):
    """Counts the windows that cycles found, instead of what vLLM observes."""

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        pass

    def observe_window(self, window: int, num_accepted: int, detailed: bool) -> None:
        """An empty window is no draft."""
        if window:
            super().observe(window, num_accepted, detailed)


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
    ) -> dict[int, EngineCoreOutputs]:
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


class ChefScheduler(_SharedPromptSteps, _CountedTurns, Scheduler):
    pass


class AsyncChefScheduler(_SharedPromptSteps, _CountedTurns, AsyncScheduler):
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
