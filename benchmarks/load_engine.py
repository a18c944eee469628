"""One engine under load: what `bench_load.py` runs in a process of its own.

The engine is driven through vLLM's `AsyncLLM`, as vLLM's server drives it. A request is sent while
a step runs, and takes part in the next step. A loop over `LLMEngine.step` could send a request only
between two steps. If the scheduler works ahead, this is one step too late. There is no HTTP and no
text, so the times are the engine's. Each request's times are taken here, where its outputs arrive.
"""

import asyncio
import gc
import json
import random
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

from benchmarks import loads
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
from benchmarks.inflate import Shape
from benchmarks.loads import Lengths, Load, Timing
from benchmarks.plans import Plan, Run

# Tokens that every shape has; the first ones are special.
RANDOM_TOKENS = range(3, 1000)
WARM_UP_TOKENS = 16
# The share of a GPU's memory for weights and caches. The rest is for activations, CUDA graphs, and
# the scores that turns keep.
MEMORY_SHARE = 0.85

Send = Callable[[int, float], Awaitable[Timing]]
Clock = Callable[[], float]


async def closed_loop(send: Send, num_requests: int, in_flight: int, clock: Clock) -> list[Timing]:
    """Each time a request ends, the next one is sent."""
    indices, timings = iter(range(num_requests)), []

    async def client() -> None:
        for index in indices:
            timings.append(await send(index, clock()))

    await asyncio.gather(*(client() for _ in range(in_flight)))
    return timings


async def open_loop(send: Send, arrivals: Sequence[float], clock: Clock) -> list[Timing]:
    """Requests are sent when they are due, whatever is in flight.

    Args:
        arrivals: seconds from now.
    """
    start = clock()

    async def client(index: int, due: float) -> Timing:
        await asyncio.sleep(max(0.0, due - clock()))
        return await send(index, due)

    return await asyncio.gather(*(client(i, start + at) for i, at in enumerate(arrivals)))


class LoadEngine:
    """An engine of one run, which measures loads on request."""

    def __init__(self, plan: Plan, args: Namespace, engine: Any) -> None:
        self.run, self.plan, self.args, self.engine = Run.parse(plan.run), plan, args, engine
        self.numbers = count()
        self.lengths = trace_of(args)
        tokenizer = None if is_dummy(self.run) else engine.get_tokenizer()
        self.prompts = make_prompts(self.lengths, args, tokenizer)
        self.drafts: list[Any] = []
        """What vLLM's own speculation says of each request since the last `_reset`"""

    @classmethod
    async def start(cls, plan: Plan, args: Namespace, root: Path) -> tuple[Self, dict[str, Any]]:
        """The engine, and what it reports."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # vLLM collects garbage a dozen times while it starts. Without this call each collection
        # visits all imported modules.
        gc.freeze()
        arguments, started = load_arguments(plan, args, root), time.perf_counter()
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        found = cls(plan, args, engine)
        kv_cache = arguments["kv_cache_memory_bytes"]
        per_token = kv_bytes_per_token(model_folders(found.run, args, root), args.dtype)
        return found, {
            "run": plan.run,
            "startup_s": time.perf_counter() - started,
            "turns": (await engine.collective_rpc("bench_turns"))[0],
            "kv_cache_gib": kv_cache / 2**30,
            "kv_cache_tokens": kv_cache * num_ranks(args) // per_token,
            **machine(),
        }

    async def cells(self, capacity: float | None) -> AsyncIterator[dict[str, Any]]:
        """The rows of all loads.

        Args:
            capacity: requests per second of the plain ensemble. If it is None, this engine must be
                the plain ensemble. Its closed loops then tell the capacity.
        """
        rows: list[dict[str, Any]] = []
        await self._warm_up()
        for load in loads.loads_of(self.args.in_flight, self.args.rates):
            if load.in_flight is None and capacity is None:
                capacity = loads.capacity_of(rows)
                if capacity is None:
                    raise RuntimeError("no capacity: the plain ensemble was not measured")
            rows.append(await self.cell(load, capacity))
            yield rows[-1]

    async def cell(self, load: Load, capacity: float | None) -> dict[str, Any]:
        number, per_second = load.num_requests(self.args.num_requests), None
        await self._reset()
        if load.in_flight is None:
            per_second = load.rate * capacity
            arrivals = loads.make_arrivals(number, per_second, self.args.seed)
            timings = await open_loop(self._send, arrivals, time.perf_counter)
        else:
            timings = await closed_loop(self._send, number, load.in_flight, time.perf_counter)
        return {
            "run": self.run.text,
            "load": load.kind,
            "in_flight": load.in_flight,
            "rate": load.rate,
            "requests_per_s_offered": per_second,
            "temperature": self.args.temperature,
            "sampling": self.args.sampling,
            "acceptance_set": next(iter(self.plan.acceptances), None),
            **loads.summary(timings),
            **loads.proposal_counts(await self._counts(), self.run),
        }

    async def _warm_up(self) -> None:
        """Compile what is compiled on first use.

        The prompts have all lengths, and as many requests as possible are in flight.
        """
        at_once = max_num_seqs(self.args)

        async def send(index: int, due: float) -> Timing:
            return await self._send(index % len(self.lengths), due, WARM_UP_TOKENS)

        await closed_loop(send, at_once * 3 // 2, at_once, time.perf_counter)

    async def _send(self, index: int, due: float, at_most: int | None = None) -> Timing:
        lengths, timing = self.lengths[index], Timing(due)
        params = sampling_params(
            {"temperature": self.args.temperature, **self.args.sampling},
            # A request has the same seed in all runs and loads, because acceptance depends on seed
            # and position.
            seed=self.args.seed + index,
            max_tokens=min(lengths.output, at_most or lengths.output),
        )
        prompt = {"prompt_token_ids": self.prompts[index]}
        async for output in self.engine.generate(prompt, params, f"r{next(self.numbers)}"):
            (completion,) = output.outputs
            if completion.token_ids:
                timing.add(len(completion.token_ids), time.perf_counter())
            if output.finished and completion.spec_decode_metrics is not None:
                self.drafts.append(completion.spec_decode_metrics)
        return timing

    async def _reset(self) -> None:
        self.drafts.clear()
        if self.run.takes_turns:
            await self.engine.collective_rpc("reset_turn_stats")

    async def _counts(self) -> dict[str, Any]:
        from harness.proposals import count_drafts

        if self.run.takes_turns:
            return (await self.engine.collective_rpc("turn_stats"))[0]
        return count_drafts(self.drafts)

    def close(self) -> None:
        self.engine.shutdown()


def trace_of(args: Namespace) -> list[Lengths]:
    """The lengths of all requests. Each load takes the first ones."""
    wanted = [load.num_requests(args.num_requests) for load in loads.loads_of(args.in_flight, ())]
    number = max([args.num_requests, *wanted])
    return loads.make_lengths(number, tuple(args.prompt_len), tuple(args.output_len), args.seed)


def make_prompts(lengths: Sequence[Lengths], args: Namespace, tokenizer: Any) -> list[list[int]]:
    """Random tokens for dummy models. For real models, texts from different places in the data.

    A prompt ends where a text of the data ends. It begins in that text or in one before it, so that
    it has the wanted length.
    """
    if tokenizer is None:
        draw = random.Random(args.seed)
        return [draw.choices(RANDOM_TOKENS, k=length.prompt) for length in lengths]
    texts = [tokenizer.encode(text) for text in read_texts(args.prompts)]
    prompts = []
    for index, length in enumerate(lengths):
        prompt: list[int] = []
        for back in count():
            prompt = texts[(index - back) % len(texts)] + prompt
            if len(prompt) >= length.prompt:
                break
        prompts.append(prompt[-length.prompt :])
    return prompts


def max_num_seqs(args: Namespace) -> int:
    return args.engine_args.get("max_num_seqs") or max(args.in_flight, default=128)


def load_arguments(plan: Plan, args: Namespace, root: Path) -> dict[str, Any]:
    """The arguments of vLLM's `AsyncEngineArgs`."""
    run = Run.parse(plan.run)
    limits = {
        # Proposals may go past the end.
        "max_model_len": args.prompt_len[1] + args.output_len[1] + 4 * (run.window + 2),
        "max_num_seqs": max_num_seqs(args),
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "kv_cache_memory_bytes": kv_cache_bytes(run, args, model_folders(run, args, root)),
    }
    if run.proposer:
        limits["per_request_spec_decode_metrics"] = "detailed"  # what `count_drafts` reads
    samples = args.temperature > 0
    return run_arguments(run, limits, args, root, plan.acceptances, samples)


def kv_cache_bytes(run: Run, args: Namespace, folders: Sequence[str]) -> int:
    """What the longest requests need, with as many in flight as possible. At most what is free."""
    if args.kv_cache_gib:
        return int(args.kv_cache_gib * 2**30)
    totals = sorted((lengths.prompt + lengths.output for lengths in trace_of(args)), reverse=True)
    in_flight = totals[: max_num_seqs(args)]
    num_tokens = sum(in_blocks(total + run.window + 1) for total in in_flight)
    wanted = num_tokens * kv_bytes_per_token(folders, args.dtype) // num_ranks(args)
    return max(LEAST_KV_CACHE, min(wanted, free_bytes(args, folders)))


def free_bytes(args: Namespace, folders: Sequence[str]) -> int:
    """An engine's share of a GPU's memory, less the weights. Without a GPU there is no limit."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return sys.maxsize
    weights = 0
    for folder in folders:
        config = json.loads((Path(folder) / "config.json").read_text())
        weights += Shape.of(config).num_parameters * (4 if args.dtype == "float32" else 2)
    # This call asks the driver. torch would start CUDA in this process, and vLLM could not fork its
    # engine from it.
    share = MEMORY_SHARE * current_platform.get_device_total_memory() / args.engines_at_once
    free = int(share) - weights // num_ranks(args)
    if free < LEAST_KV_CACHE:
        raise ValueError("the weights leave no memory; see --engines-at-once and --kv-cache-gib")
    return free


def num_ranks(args: Namespace) -> int:
    return args.engine_args.get("tensor_parallel_size", 1)


def measure(plan: Plan, args: Namespace, write: Callable[[str, Any], None]) -> None:
    asyncio.run(measure_loads(plan, args, write))


async def measure_loads(plan: Plan, args: Namespace, write: Callable[[str, Any], None]) -> None:
    engine, description = await LoadEngine.start(plan, args, shapes_folder())
    write("engine", description)
    # Waits until no other engine starts or measures. The line is the capacity, or null.
    capacity = json.loads(sys.stdin.readline())
    async for row in engine.cells(capacity):
        write("row", row)
    engine.close()


if __name__ == "__main__":
    in_child(measure)
