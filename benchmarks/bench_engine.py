"""One engine and its timed cells: what `bench_decode.py` runs in a process of its own.

This module knows vLLM's engine and how decoding is timed. It compares nothing.
"""

import gc
import re
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.engine_setup import (
    LEAST_KV_CACHE,
    in_blocks,
    in_child,
    is_dummy,
    kv_bytes_per_token,
    machine,
    model_folders,
    read_texts,
    run_arguments,
    sampling_params,
    shapes_folder,
)
from benchmarks.kinds import Kind, needs_tokenizer, requests_of
from benchmarks.plans import Plan, Run

BATCHED_TOKENS, SCHEDULED_TOKENS = 8192, 4096
NUM_TRACED_TOKENS = 64


@dataclass
class Sample:
    """The steady state of one batch.

    The sample begins after the step by which all requests have their first outputs. It ends with
    the step that reaches the requested number of tokens.
    """

    seconds: float = 0.0
    steps: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    """How often a request got each number of tokens from one step"""

    @property
    def num_cycles(self) -> int:
        """Cycles of all requests together."""
        return sum(self.counts.values())

    @property
    def num_tokens(self) -> int:
        return sum(length * times for length, times in self.counts.items())


def decode(
    engine: Any,
    prompts: Sequence[list[int]],
    params: Sequence[Any],
    num_tokens: int,
    skip: int,
    clock: Any = time.perf_counter,
) -> Sample:
    """Decode a batch until its requests have `num_tokens` each, on average.

    The clock starts at the step in which the last request gets its `skip`th output. The step that
    reaches `num_tokens` is counted whole, so tokens per cycle have no bias.
    """
    ids = [f"{id(params)}-{index}" for index in range(len(prompts))]
    for request_id, prompt, sampling in zip(ids, prompts, params, strict=True):
        engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
    outputs_of, sample, start, end = Counter(), Sample(), None, 0.0
    while engine.has_unfinished_requests():
        outputs = [out for out in engine.step() if out.outputs[0].token_ids]
        now = clock()
        if not outputs:
            continue
        if start is None:
            outputs_of.update(out.request_id for out in outputs)
            if all(outputs_of[request_id] >= skip for request_id in ids):
                start = now
        else:
            end = now
            sample.steps += 1
            sample.counts.update(len(out.outputs[0].token_ids) for out in outputs)
        if sample.num_tokens >= num_tokens * len(ids) or any(out.finished for out in outputs):
            engine.abort_request(ids)
    if start is None or not sample.steps:
        raise RuntimeError(
            "no steady state: a request ended before all had begun; raise num_tokens"
        )
    sample.seconds = end - start
    return sample


class BenchEngine:
    """An engine of one run, which measures cells on request."""

    def __init__(self, plan: Plan, args: Namespace, root: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self.run, self.plan, self.args = Run.parse(plan.run), plan, args
        self.seeds = count()
        self.warm: set[tuple[str, int]] = set()
        self.timed: set[int] = set()
        self.graph_ms: dict[str, Any] | None = None
        """What `bench_graph_times` says of all batch sizes so far"""
        self.refused: list[dict[str, Any]] = []
        """Kinds of requests that this engine refuses, with the reason"""
        # vLLM collects garbage a dozen times while it starts. Without this call each collection
        # visits all imported modules.
        gc.freeze()
        started = time.perf_counter()
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(**engine_arguments(plan, args, root)), UsageContext.LLM_CLASS
        )
        self.startup_s = time.perf_counter() - started
        self.rpc = self.engine.collective_rpc
        tokenizer = None if is_dummy(self.run) else self.engine.get_tokenizer()
        self.prompts = make_prompts(args, max(plan.batch_sizes), tokenizer)

    def describe(self) -> dict[str, Any]:
        return {
            "run": self.run.text,
            "startup_s": self.startup_s,
            "turns": self.rpc("bench_turns")[0],
            **machine(),
        }

    def cells(self) -> Iterator[dict[str, Any]]:
        for asked in requests_of(self.args):
            if why := self._refusal(asked):
                self.refused.append({"sampling": asked, "why": why})
                continue
            for acceptance, batch_size in self.plan.cells():
                yield self.cell(asked, acceptance, batch_size)

    def _refusal(self, asked: Kind) -> str | None:
        """Why this engine refuses such requests. None if it takes them."""
        if is_dummy(self.run) and needs_tokenizer(asked):
            return "dummy models have no tokenizer"
        from vllm.exceptions import VLLMClientError

        prompt = self.prompts[0]
        try:
            params = self._params(asked, prompt)
            self.engine.add_request("tried", {"prompt_token_ids": prompt}, params)
        except (ValueError, VLLMClientError) as error:
            return str(error)
        self.engine.abort_request(["tried"])
        return None

    def cell(self, asked: Kind, acceptance: float | None, batch_size: int) -> dict[str, Any]:
        if acceptance is not None:
            self.rpc("bench_set_acceptance", args=(acceptance,))
        kind = (str(asked), batch_size)
        if kind not in self.warm:
            self._decode(asked, batch_size)  # compiles what is compiled on first use
            self.warm.add(kind)
        self.rpc("bench_reset_memory")
        if self.run.takes_turns:
            self.rpc("reset_turn_stats")
        samples = self._samples(asked, batch_size)
        if batch_size not in self.timed:
            self.timed.add(batch_size)
            self.graph_ms = merged(
                self.graph_ms, self.rpc("bench_graph_times", args=(batch_size,))[0]
            )
        row = {
            "run": self.run.text,
            "batch_size": batch_size,
            "temperature": asked["temperature"],
            "sampling": {name: value for name, value in asked.items() if name != "temperature"},
            "acceptance_set": acceptance,
            **summary(samples, batch_size),
            "peak_memory_gib": self.rpc("bench_memory_gib")[0],
        }
        if self.run.takes_turns:
            row |= turn_counts(self.rpc("turn_stats")[0])
        elif self.run.policy:
            row |= draft_counts(samples, self.run)
        return row

    def _samples(self, asked: Kind, batch_size: int) -> list[Sample]:
        """Batches until there are enough cycles, or the time for a cell is over."""
        samples, deadline = [], time.perf_counter() + self.args.cell_seconds
        # Without proposals every cycle gives one token, so there is nothing to average.
        min_cycles = self.args.min_cycles if self.run.policy else 0
        while len(samples) < self.args.repeats or (
            sum(sample.num_cycles for sample in samples) < min_cycles
            and time.perf_counter() < deadline
        ):
            samples.append(self._decode(asked, batch_size))
        return samples

    def _decode(self, asked: Kind, batch_size: int, num_tokens: int | None = None) -> Sample:
        prompts = [self.prompts[i % len(self.prompts)] for i in range(batch_size)]
        params = [self._params(asked, prompt) for prompt in prompts]
        return decode(
            self.engine, prompts, params, num_tokens or self.args.num_tokens, self.args.skip
        )

    def _params(self, asked: Kind, prompt: Sequence[int]) -> Any:
        # No two requests have the same seed: acceptance depends on seed and position.
        max_tokens = max_model_len(self.run, self.args) - len(prompt)
        return sampling_params(asked, seed=next(self.seeds), max_tokens=max_tokens)

    def trace(self, folder: Path) -> None:
        """Write a Chrome trace of one short batch of the plan's first cell."""
        acceptance, batch_size = next(iter(self.plan.cells()))
        if acceptance is not None:
            self.rpc("bench_set_acceptance", args=(acceptance,))
        folder.mkdir(parents=True, exist_ok=True)
        self.rpc("bench_trace", args=(None,))
        self._decode(requests_of(self.args)[0], batch_size, NUM_TRACED_TOKENS)
        path = folder.resolve() / f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.run.text)}.json.gz"
        self.rpc("bench_trace", args=(str(path),))

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def summary(samples: Sequence[Sample], batch_size: int) -> dict[str, Any]:
    """Costs of a cycle and of a token. The times are medians over the samples."""
    cycles = sum(sample.num_cycles for sample in samples)
    steps = sum(sample.steps for sample in samples)
    per_step = [1000 * sample.seconds / sample.steps for sample in samples]
    tokens_per_cycle = sum(sample.num_tokens for sample in samples) / cycles
    ms_per_cycle = statistics.median(per_step)
    return {
        "ms_per_token": ms_per_cycle / tokens_per_cycle,
        "ms_per_cycle": ms_per_cycle,
        "ms_per_cycle_min": min(per_step),
        "ms_per_cycle_max": max(per_step),
        "tokens_per_s": 1000 * batch_size * tokens_per_cycle / ms_per_cycle,
        "tokens_per_cycle": tokens_per_cycle,
        "num_samples": len(samples),
        "num_steps": steps,
        "num_cycles": cycles,
        # If this is less than the batch size, vLLM did not run all requests in every step.
        "requests_per_step": cycles / steps,
    }


def merged(times: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Times of graphs together with those of another batch size."""
    if times is None or more is None:
        return more or times
    return {
        "primary": times["primary"] | more["primary"],
        "turns": [
            new | {kind: old[kind] | new[kind] for kind in ("reading", "passes")}
            for old, new in zip(times["turns"], more["turns"], strict=True)
        ],
    }


def turn_counts(stats: dict[str, Any]) -> dict[str, Any]:
    """Acceptance and calls by member, from `TurnStats`.

    Cycles before the clock started are included.
    """
    judged = [sum(row) for row in stats["num_judged"]]
    accepted = [sum(row) for row in stats["num_accepted"]]
    return {
        "acceptance": [a / j if j else None for a, j in zip(accepted, judged, strict=True)],
        "calls_per_cycle": [calls / stats["num_cycles"] for calls in stats["num_calls"]],
    }


def draft_counts(samples: Sequence[Sample], run: Run) -> dict[str, Any]:
    """Acceptance and calls by model, for vLLM's own speculation.

    Every cycle ends in a token of the target, so one token of each cycle was not a proposal.
    """
    (gamma,) = run.gammas
    counts = sum((sample.counts for sample in samples), Counter())
    judged = sum(times * min(length, gamma) for length, times in counts.items())
    accepted = sum(times * (length - 1) for length, times in counts.items())
    return {
        "acceptance": [None] * len(run.members) + [accepted / judged],
        "calls_per_cycle": [1.0] * len(run.members) + [float(gamma)],
    }


def engine_arguments(plan: Plan, args: Namespace, root: Path) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs`."""
    run = Run.parse(plan.run)
    num_reqs = max(plan.batch_sizes + plan.sweep_batch_sizes)
    limits = {
        "max_model_len": max_model_len(run, args),
        "max_num_seqs": num_reqs,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "kv_cache_memory_bytes": kv_cache_bytes(
            model_folders(run, args, root), num_reqs, run, args
        ),
    }
    if run.takes_turns:
        limits["max_num_scheduled_tokens"] = SCHEDULED_TOKENS
    samples = any(kind["temperature"] for kind in requests_of(args))
    return run_arguments(run, limits, args, root, plan.acceptances[:1], samples)


def max_model_len(run: Run, args: Namespace) -> int:
    """A length with room for two things.

    Some requests get more tokens than the mean, and members propose past the end of a request.
    """
    return args.prompt_len + args.skip + args.num_tokens * 3 // 2 + 4 * (run.window + 2)


def kv_cache_bytes(folders: Sequence[str], num_reqs: int, run: Run, args: Namespace) -> int:
    if args.kv_cache_gib:
        return int(args.kv_cache_gib * 2**30)
    # One block more than the longest text needs, so that no request is ever preempted. No further
    # blocks, so that several engines fit on one GPU.
    num_tokens = num_reqs * in_blocks(max_model_len(run, args))
    return max(kv_bytes_per_token(folders, args.dtype) * num_tokens, LEAST_KV_CACHE)


def make_prompts(args: Namespace, num_prompts: int, tokenizer: Any) -> list[list[int]]:
    """Arbitrary tokens for dummy models. For real models, the ends of texts.

    The texts are those of `--prompts`, or HumanEval's prompts.
    """
    if tokenizer is None:
        return [[3 + i] * args.prompt_len for i in range(num_prompts)]
    texts = read_texts(args.prompts)
    return [tokenizer.encode(text)[-args.prompt_len :] for text in texts[:num_prompts]]


def measure(plan: Plan, args: Namespace, write: Callable[[str, Any], None]) -> None:
    engine = BenchEngine(plan, args, shapes_folder())
    write("engine", engine.describe())
    sys.stdin.readline()  # waits until no other engine starts or measures
    for row in engine.cells():
        write("row", row)
    if args.trace:
        engine.trace(Path(args.trace))
    write("graph_ms", engine.graph_ms)
    if engine.refused:
        write("refused", engine.refused)
    engine.close()


if __name__ == "__main__":
    in_child(measure)
