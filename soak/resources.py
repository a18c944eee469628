"""What a server holds: requests, blocks of its KV cache, memory, file handles.

This module knows processes and the names of vLLM's metrics.
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
USAGE, PREEMPTIONS = "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"
AT_REST = (RUNNING, WAITING, USAGE)
EVERY_S = 0.5
MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What the processes of a server hold.

    Args:
        memory_mb: resident memory. What processes share counts once.
        handles: open file handles, sockets and pipes.
        device_mb: used memory of the visible GPUs, by whomever; None without one.
    """

    memory_mb: float
    handles: int
    num_processes: int
    device_mb: float | None = None

    def plain(self) -> dict[str, float | int | None]:
        return asdict(self)


def parse_metrics(text: str) -> dict[str, float]:
    """The sums of all samples of a name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def read_metrics(url: str) -> dict[str, float]:
    """Of a server, over a connection of its own."""
    return parse_metrics(httpx.get(f"{url}/metrics", timeout=30).text)


def what_is_left(metrics: Mapping[str, float]) -> str | None:
    """Why a server does not rest, in words. None: it rests."""
    missing = [name for name in AT_REST if name not in metrics]
    if missing:
        return f"/metrics has no {missing[0]}"
    if not any(metrics[name] for name in AT_REST):
        return None
    return (
        f"{metrics[RUNNING]:g} requests run, {metrics[WAITING]:g} wait, "
        f"{metrics[USAGE]:.1%} of the KV cache is in use"
    )


def wait_for(find_problem: Callable[[], str | None], seconds: float) -> str | None:
    """Wait until there is no problem. Returns the problem that is left after so many seconds."""
    end = time.monotonic() + seconds
    while (problem := find_problem()) is not None and time.monotonic() < end:
        time.sleep(EVERY_S)
    return problem


def measure(pid: int) -> Usage:
    """What a process and all its descendants hold."""
    parent = psutil.Process(pid)
    memory = handles = count = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            num_handles = process.num_fds()
        except psutil.NoSuchProcess:
            continue  # it has just ended
        memory += getattr(info, "pss", info.uss)
        handles += num_handles
        count += 1
    return Usage(memory / MIB, handles, count, device_memory_mb())


def device_memory_mb() -> float | None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", visible]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        return sum(map(float, done.stdout.split())) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def judge(before: Usage, after: Usage, memory_mb: float, handles: int) -> list[str]:
    """What a server holds more than it did, one line each.

    Args:
        memory_mb: how much more memory is allowed, of the host and of the devices.
        handles: how many more file handles are allowed.
    """
    faults = []
    if after.handles > before.handles + handles:
        faults.append(
            f"file handles: {before.handles} after the warm-up, {after.handles} at the end"
        )
    if after.num_processes != before.num_processes:
        faults.append(
            f"processes: {before.num_processes} after the warm-up, {after.num_processes} at the end"
        )
    pairs = {
        "memory": (before.memory_mb, after.memory_mb),
        "GPU memory": (before.device_mb, after.device_mb),
    }
    for name, (first, last) in pairs.items():
        if first is not None and last is not None and last > first + memory_mb:
            faults.append(
                f"{name}: {first:.0f} MiB after the warm-up, {last:.0f} MiB at the end; "
                f"memory_allowance_mb is {memory_mb:g}"
            )
    return faults
