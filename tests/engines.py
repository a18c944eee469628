"""Starts and stops vLLM engines inside the test process, several one after another.

It also has the chi-square test that every sampled path must pass.
"""

import gc
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# In this process, an engine starts in seconds and fixtures can look at its state.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Triton multiplies float32 as TF32 by default, which is too coarse to compare greedy tokens.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import torch
from scipy.stats import chisquare
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from vllm.chef import ensemble_args
from vllm.chef.config import AUTO
from vllm.chef.step import CycleStep, ReplayedDecisions, ReplayedReadings

# Far below any level at which a sound sampler fails in the suite's lifetime, far above what a
# biased one reaches with thousands of draws.
P_VALUE = 1e-4


@contextmanager
def engine(
    model: str,
    ensemble: dict[str, Any] | None = None,
    chef: dict[str, Any] | None = None,
    window: int = 1,
    **arguments: Any,
) -> Iterator[LLM]:
    """An engine for tiny models.

    With `ensemble`, it runs the plain ensemble of `model` and others. With `chef` as well, the
    members take turns, and `window` tokens are carried from step to step. If `chef` leaves gamma to
    the engine, each step's depth is random: it changes more often than any measurement would make
    it.
    """
    is_adaptive = chef is not None and chef["gamma"] == AUTO
    arguments = {
        **dict(
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=32 << 20,
            gpu_memory_utilization=0.05,  # vLLM wants that much to be free
            max_num_seqs=64,
            max_model_len=96,
            disable_log_stats=False,
            seed=0,
        ),
        **arguments,
    }
    if chef is not None:
        chef = {"policy": "chef", **chef}
        arguments.setdefault("max_num_scheduled_tokens", 256)
    if ensemble is not None:
        ensemble = {"ensemble_target": "probs", **ensemble}
        arguments = ensemble_args(model, **ensemble, **(chef or {}), **arguments)
    if chef is not None:
        assert arguments["speculative_config"]["num_speculative_tokens"] == window
    # vLLM collects garbage a dozen times as it starts: half a second each, without this.
    gc.freeze()
    with _async_scheduling(bool(arguments.get("async_scheduling"))):
        llm = LLM(**{"model": model, **arguments})
    if is_adaptive:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.dynamic_sd_lookup = RandomDepths(window)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


class RandomDepths:
    """Stands in for `DepthChooser` and returns random depths."""

    def __init__(self, max_depth: int) -> None:
        self.random, self.max_depth = random.Random(0), max_depth

    def __getitem__(self, num_reqs: int) -> int:
        return self.random.randint(0, self.max_depth)


@contextmanager
def _async_scheduling(wanted: bool) -> Iterator[None]:
    """vLLM turns asynchronous scheduling off on a CPU, where it works but gains nothing."""
    if not wanted or not current_platform.is_cpu():
        yield
        return
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_keep(config: VllmConfig) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    with patch.object(platform, "check_and_update_config", staticmethod(check_and_keep)):
        yield


def generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Any]:
    """The outputs `[num_prompts]` of token prompts."""
    token_prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [out.outputs[0] for out in llm.generate(token_prompts, params, use_tqdm=False)]


def counted_replays(monkeypatch: Any) -> Counter[str]:
    """Count steps from now on, and how often full CUDA graphs held decisions and readings."""
    run, counts = CycleStep.run, Counter()

    def counted_run(step: CycleStep) -> Any:
        counts["steps"] += 1
        counts["decisions"] += isinstance(step.decisions, ReplayedDecisions)
        counts["readings"] += isinstance(step.readings, ReplayedReadings)
        return run(step)

    monkeypatch.setattr(CycleStep, "run", counted_run)
    return counts


def greedy(num_tokens: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **kwargs
    )


def sampled(num_tokens: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, **kwargs)


def chi_square_p_value(
    draws: Sequence[int],
    probs: torch.Tensor,  # [num_outcomes]
) -> float:
    """The p-value of the draws under `probs`; outcomes expected less than 5 times are pooled.

    It is 0.0 if an outcome without probability was drawn.
    """
    counts = Counter(draws)
    probs = (probs.double() / probs.double().sum()).tolist()
    expected = [p * len(draws) for p in probs]
    if any(probs[outcome] == 0 for outcome in counts):
        return 0.0
    often = [i for i, e in enumerate(expected) if e >= 5]
    observed_bins = [counts[i] for i in often]
    expected_bins = [expected[i] for i in often]
    rest_expected = len(draws) - sum(expected_bins)
    if rest_expected > 1e-6 * len(draws):
        observed_bins.append(len(draws) - sum(observed_bins))
        expected_bins.append(rest_expected)
    if len(expected_bins) == 1:
        return 1.0
    scale = sum(observed_bins) / sum(expected_bins)
    return float(chisquare(observed_bins, [e * scale for e in expected_bins]).pvalue)
