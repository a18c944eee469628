"""What a benchmark asks of a worker; vLLM mixes this class into it (`worker_extension_cls`).

It fits vLLM's own workers and ours. It knows runners, and it times only single CUDA graphs.
"""

import resource
from typing import Any

import torch

from vllm.chef.sampling import Processing

NUM_REPLAYS = 20


class BenchWorker:
    """Methods for `collective_rpc`. Call them between two batches, when the engine is empty."""

    model_runner: Any

    def bench_set_acceptance(self, rate: float) -> None:
        """Accept every proposed token with this probability. The verification must be synthetic."""
        verifier = getattr(self.model_runner.speculator, "verifier", None)
        if verifier is not None:
            rates = verifier.synthetic_rates
        else:
            rates = self.model_runner.rejection_sampler.synthetic_conditional_rates
        rates.fill_(rate)

    def bench_turns(self) -> dict[str, Any] | None:
        """`{"turns": [[members, gamma], ...], "scores": [...]}`; None if no member takes turns."""
        turns = getattr(self.model_runner, "turns", None)
        if turns is None:
            return None
        return {
            "turns": [[list(turn.members), turn.gamma] for turn in turns],
            "scores": list(turns.counted),
        }

    def bench_reset_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bench_memory_gib(self) -> float:
        """Peak memory in GiB.

        On a GPU: of tensors, since the reset. On a CPU: of this process, since its start.
        """
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB

    def bench_trace(self, path: str | None) -> None:
        """Record what the device and the host do.

        A call with a `path` stops the recording and writes a Chrome trace to it. The trace is
        compressed if the name ends in `.gz`.
        """
        if path is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._bench_profiler = torch.profiler.profile(activities=activities)
            self._bench_profiler.start()
        else:
            self._bench_profiler.stop()
            self._bench_profiler.export_chrome_trace(path)
            del self._bench_profiler

    def bench_graph_times(self, batch_size: int) -> dict[str, Any] | None:
        """Milliseconds of one replay of the graphs that a batch runs in, by number of tokens.

        The result is `{"primary": {num_tokens: ms}, "turns": [...]}`. "primary" is the engine's own
        model. "turns" has an entry for each turn after the first: `{"reading": {num_tokens: ms},
        "passes": {num_reqs: ms}, "passes_per_replay": n}`. The time of a reading includes the
        decisions that follow it. The second turn's includes the first turn's decision, too. None if
        there are no CUDA graphs.

        Call this after a batch of this size. A replay reads and writes the data of that batch's
        last step, so it attends to as many tokens.
        """
        manager = getattr(self.model_runner, "cudagraph_manager", None)
        if manager is None or not manager.graphs:
            return None
        found = {"primary": times(manager, batch_size), "turns": []}
        if getattr(self.model_runner, "turns", None) is not None:
            speculator = self.model_runner.speculator
            # Only the first turn's graph begins a cycle. The graph of a later turn, replayed by
            # itself, would propose again and again. In the end it would read past its own tokens.
            turn_gammas, managers = speculator.gammas.on_device, speculator.graphs.managers
            gammas = turn_gammas.clone()
            turn_gammas.zero_()
            further = range(1, len(speculator.turns))
            found["turns"] = [turn_times(managers, turn, batch_size) for turn in further]
            turn_gammas.copy_(gammas)
        return found


def turn_times(managers: dict[tuple[Any, ...], Any], turn: int, batch_size: int) -> dict[str, Any]:
    """Milliseconds of replays of a turn's graphs, for requests that ask for a temperature only.

    "reading" has the graphs with the most tokens in the engine step. "passes" has the graphs with
    the most passes.
    """
    numbers = [key[2] for key in managers if key[:2] == ("propose_more", turn)]
    number = max(numbers, default=0)
    step_len = max(key[2] for key in managers if key[:2] == ("read", turn))
    decisions = sum(
        min(times(managers["decide", of_turn, Processing.TEMPERATURE], batch_size).values())
        for of_turn in ([0, 1] if turn == 1 else [turn])
    )
    reading = times(managers["read", turn, step_len], batch_size)
    passes = ("propose_more", turn, number)
    return {
        "reading": {num_tokens: ms + decisions for num_tokens, ms in reading.items()},
        "passes": times(managers[passes], batch_size) if number else {},
        "passes_per_replay": number,
    }


def times(manager: Any, batch_size: int) -> dict[int, float]:
    """Milliseconds by `num_tokens`, for the graphs of a `CudaGraphManager` that a batch may use.

    For each number of tokens per request, this is the smallest graph that holds the batch.
    """
    fitting: dict[int | None, Any] = {}
    for desc in sorted(manager.graphs, key=lambda desc: desc.num_tokens):
        if desc.num_reqs >= batch_size:
            fitting.setdefault(desc.uniform_token_count, desc)
    return {desc.num_tokens: graph_ms(manager.graphs[desc]) for desc in fitting.values()}


def graph_ms(graph: "torch.cuda.CUDAGraph") -> float:
    """Milliseconds of one replay, the mean of many that follow one another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()  # warms caches up
    start.record()
    for _ in range(NUM_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / NUM_REPLAYS
