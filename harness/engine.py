"""A vLLM engine that is driven request by request; it returns each completion as it finishes.

This module knows token ids and sampling parameters. It knows neither data sets nor files.
"""

import gc
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.proposals import Counts, count_drafts
from triton_cpu_interpreter import is_cpu_build

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

# vLLM kills its processes after five seconds. On a busy machine they then leave things behind.
SHUTDOWN_TIMEOUT_S = 60
WATCH_EVERY_S = 0.5


def configure_process(verbose: bool) -> None:
    """Set the process up. torch and vLLM read these settings when they are imported.

    So call this before the imports. Variables that the environment already sets keep their values.
    """
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # vLLM sets its log up only when an engine is configured, but it warns before that.
        logging.getLogger("vllm").setLevel(logging.ERROR)
    if is_cpu_build():
        # On a GPU, a separate engine process works while this one prepares the next step. On a CPU,
        # both would share the cores, and the second one would import everything again.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # One core stays free, as in vLLM's own set-up of an engine process. Threads wait for one
        # another in loops. With a thread on every core, all of them become much slower as soon as
        # another process uses a core.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() - 1)))


def forget_closed_engines() -> None:
    """Free what closed engines leave in this process, so that another engine can start in it."""
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Request:
    """One prompt, and the seed of its samples.

    Args:
        choices: continuations of one token each, by token. If there are any, the text of the
            completion is the likeliest choice, and nothing is generated.
        sampling_params: the parameters that differ from the run's, by vLLM's names.
    """

    index: int
    prompt_token_ids: list[int]
    seed: int | None
    choices: Mapping[int, str] = field(default_factory=dict)
    sampling_params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What the engine made of a request.

    Args:
        latency_s: seconds from submission to the last token.
        logprobs: log-probabilities of the requested tokens, by position and token; None if none
            were requested.
        prompt_logprobs: the same for the tokens of the prompt. The first token has none.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    latency_s: float
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None


class Engine:
    """Requests in, completions out. Close the engine after use: it holds the device's memory.

    Args:
        llm_engine: vLLM's engine.
        sampling_params: vLLM's sampling parameters by name, for every request.
        takes_turns: whether the worker is a `ChefWorker`, which counts the proposals itself.
    """

    def __init__(
        self, llm_engine: "LLMEngine", sampling_params: dict[str, Any], takes_turns: bool = False
    ) -> None:
        self._llm_engine = llm_engine
        self._sampling_params = sampling_params
        self._takes_turns = takes_turns
        self._request_ids = map(str, itertools.count())
        self._drafts: list[RequestSpecDecodeMetrics] = []

    @classmethod
    def start(
        cls, config: "VllmConfig", sampling_params: dict[str, Any], takes_turns: bool
    ) -> "Engine":
        """Start the engine and load the weights."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        # vLLM collects garbage several times while it starts. Without this line, each collection
        # looks through all imported objects, which takes long.
        gc.freeze()
        llm_engine = LLMEngine.from_vllm_config(
            config, UsageContext.LLM_CLASS, disable_log_stats=True
        )
        if hasattr(llm_engine.engine_core, "resources"):  # the engine has a process of its own
            threading.Thread(target=_watch, args=[llm_engine.engine_core], daemon=True).start()
        return cls(llm_engine, sampling_params, takes_turns)

    def close(self) -> None:
        self._llm_engine.engine_core.shutdown(timeout=SHUTDOWN_TIMEOUT_S)

    def warm_up(self, request: Request, num_tokens: int = 8) -> None:
        """Run everything once that compiles or allocates on first use.

        Afterwards no prefix is cached and nothing is counted.
        """
        list(self.generate([request], None, max_tokens=num_tokens, min_tokens=0))
        self._llm_engine.reset_prefix_cache()
        self._drafts.clear()
        if self._takes_turns:
            self._llm_engine.collective_rpc("reset_turn_stats")

    def generate(
        self, requests: Sequence[Request], batch_size: int | None, **overrides: Any
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish, with `batch_size` requests in flight."""
        waiting = list(reversed(requests))
        started: dict[str, tuple[Request, float]] = {}
        while waiting or started:
            while waiting and (batch_size is None or len(started) < batch_size):
                request, start = waiting.pop(), time.perf_counter()
                started[self._submit(request, overrides)] = (request, start)
            for output in self._llm_engine.step():
                if output.finished:
                    request, start = started.pop(output.request_id)
                    if output.outputs[0].spec_decode_metrics is not None:
                        self._drafts.append(output.outputs[0].spec_decode_metrics)
                    yield _completion(request, output, time.perf_counter() - start)

    def synchronize(self) -> None:
        """Wait for the device, whichever process the workers run in."""
        self._llm_engine.collective_rpc("synchronize_device")

    def proposals(self) -> Counts:
        """Counts of the tokens proposed since the warm-up; empty if none are proposed."""
        if self._takes_turns:
            # Every worker has the same counts.
            return self._llm_engine.collective_rpc("turn_stats")[0]
        return count_drafts(self._drafts)

    def _submit(self, request: Request, overrides: dict[str, Any]) -> str:
        from vllm import SamplingParams

        params = {"seed": request.seed, **self._sampling_params, **request.sampling_params}
        if request.choices:
            params |= {"max_tokens": 1, "min_tokens": 0, "stop": None, "logprobs": None}
            params["logprob_token_ids"] = list(request.choices)
        request_id = next(self._request_ids)
        prompt = {"prompt_token_ids": request.prompt_token_ids}
        self._llm_engine.add_request(request_id, prompt, SamplingParams(**params | overrides))
        return request_id


def _watch(engine_core: "SyncMPClient") -> None:
    """End what waits for an engine whose process was killed. vLLM (0.32) waits forever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while not engine_core.resources.engine_dead:
        time.sleep(WATCH_EVERY_S)
    engine_core.outputs_queue.put(EngineDeadError())
    for result in list(engine_core.utility_results.values()):
        if not result.done():
            result.set_exception(EngineDeadError())


def _completion(request: Request, output: "RequestOutput", latency_s: float) -> Completion:
    first = output.outputs[0]
    text, logprobs = first.text, _plain(first.logprobs)
    if request.choices:
        text = request.choices[max(request.choices, key=logprobs[0].__getitem__)]
    return Completion(
        index=request.index,
        text=text,
        token_ids=list(first.token_ids),
        finish_reason=str(first.finish_reason),
        latency_s=latency_s,
        logprobs=logprobs,
        prompt_logprobs=_plain(output.prompt_logprobs),
    )


def _plain(logprobs: Any) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        at_position and {token: entry.logprob for token, entry in at_position.items()}
        for at_position in logprobs
    ]
