"""Processes of a server that are killed while a client reads a stream. Nothing is left of them."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from servers import Server, starting
from tiny_models import llama_config, save_model, save_noisy_copy

pytestmark = pytest.mark.slow

CONTEXT = 2048
# Without tokenizers, a server takes a prompt of tokens.
STREAM = dict(model="tiny", prompt=[5, 6, 7], max_tokens=2000, ignore_eos=True, stream=True)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(max_position_embeddings=CONTEXT), seed=0)
    return [first, save_noisy_copy(root / "1", first, 1, 0.02)]


@pytest.fixture
def server(members: list[str], tmp_path: Path) -> Iterator[Server]:
    keys = [
        "method=ensemble_chef",
        f"method.model={members[0]}",
        f"method.extra_model={members[1]}",
        "method.gamma=[1,3]",
        "method.llm.kv_cache_memory_bytes=33554432",
        "served_model_name=tiny",
    ]
    server_args = ["--skip-tokenizer-init", "--max-num-seqs", "4"]
    with starting("turns", keys, server_args, tmp_path / "log") as server:
        server.wait_until_it_answers()
        yield server


def read_a_stream(server: Server) -> subprocess.Popen:
    """A client in a process of its own, once it has got its first tokens."""
    client = subprocess.Popen(
        ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
        + ["-d", json.dumps(STREAM)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert client.stdout.readline().startswith(b"data: ")
    return client


def processes(server: Server) -> dict[str, psutil.Process]:
    """Those of a server, by what they are."""
    supervisor = psutil.Process(server.process.pid)
    found = {"supervisor": supervisor}
    for process in supervisor.children(recursive=True):
        names = {"EngineCore": "engine", "Worker": "worker", "api_server": "server"}
        for part, name in names.items():
            if part in " ".join(process.cmdline()) or part in process.name():
                found.setdefault(name, process)
    return found


@pytest.mark.parametrize("victim", ["engine", "worker", "server", "supervisor"])
def test_nothing_outlives_a_process_that_is_killed(victim, server):
    everything = [*psutil.Process(server.process.pid).children(recursive=True)]
    by_name = processes(server)
    assert by_name.keys() == {"supervisor", "server", "engine", "worker"}
    client = read_a_stream(server)
    by_name[victim].kill()
    status = server.process.wait(60)
    assert status != 0
    if victim == "supervisor":
        # The server is asked to end, and may wait for its client.
        client.kill()
    client.wait(60)
    _, alive = psutil.wait_procs(everything, timeout=60)
    assert not alive
    if victim != "supervisor":
        last = server.log.read_text().splitlines()[-1]
        assert last.startswith("error: the server ")


def test_clients_that_are_killed_are_forgotten_and_others_do_not_keep_a_server_alive(server):
    client = read_a_stream(server)
    client.kill()
    client.wait()
    end = time.monotonic() + 60
    while num_running(server) > 0:
        assert time.monotonic() < end, "a request without a client still runs"
        time.sleep(0.2)
    # vLLM aborts requests at once, but may wait for their clients.
    client = read_a_stream(server)
    server.process.terminate()
    server.process.wait(30)
    client.wait(30)


def num_running(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    (running,) = (line for line in lines if line.startswith("vllm:num_requests_running"))
    return float(running.split()[-1])
