"""The metrics of a server of turns: against the algorithm on paper, and read by others' tools."""

import concurrent.futures
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import free_port, serving
from tiny_models import (
    llama_config,
    load_reference,
    save_byte_tokenizer,
    save_model,
    save_noisy_copy,
)
from turn_counts import CountingChef, counting_chef
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

from repository import ROOT
from vllm.chef.turns import Turn

PROMPTS = ["def f(", "x = ", "\n\n", "hello world", "a", "1 + 1 ="]
LENGTH = 24
DASHBOARD = ROOT / "docs/grafana/ensemble.json"

pytestmark = pytest.mark.slow


class Served(NamedTuple):
    url: str
    model: str  # folder of the first member, with the tokenizer
    chef: CountingChef


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(257, max_position_embeddings=256), seed=0)
    other = save_noisy_copy(root / "1", first, 1, 0.02)
    for folder in (first, other):
        save_byte_tokenizer(folder)
    keys = [
        "method=ensemble_chef",
        f"method.model={first}",
        f"method.extra_model={other}",
        "method.gamma=[1,3]",
        "method.llm.kv_cache_memory_bytes=33554432",
        "served_model_name=tiny",
    ]
    turns = [Turn((0,), 1), Turn((1,), 3)]
    chef = counting_chef([load_reference(path) for path in (first, other)], [0.5, 0.5], turns)
    server_args = ("--max-num-seqs", "4", "--per-request-spec-decode-metrics", "detailed")
    with serving({"turns": (keys, server_args)}, root) as urls:
        yield Served(urls["turns"], first, chef)


def post(url: str, **body: Any) -> Any:
    data = json.dumps({"model": "tiny", **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def complete(url: str, prompt: str) -> Any:
    params = dict(max_tokens=LENGTH, temperature=0, ignore_eos=True)
    return post(f"{url}/v1/completions", prompt=prompt, **params)


def token_ids(url: str) -> list[list[int]]:
    return [post(f"{url}/tokenize", prompt=prompt)["tokens"] for prompt in PROMPTS]


def samples(url: str) -> list[Any]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [sample for family in families for sample in family.samples]


def scraped(url: str) -> Counter[Any]:
    """What `/metrics` shows, by the keys of `CountingChef.count`."""
    found: Counter[Any] = Counter()
    for name, labels, value, *_ in samples(url):
        if ours := re.fullmatch(r"vllm:ensemble_num_(\w+)_tokens_total", name):
            found[ours[1], int(labels["member"]), int(labels["position"])] += int(value)
        elif of_vllm := re.fullmatch(r"vllm:(?:spec_decode|ensemble)_(\w+)_total", name):
            at = labels.get("position")
            found[of_vllm[1] if at is None else (of_vllm[1], int(at))] += int(value)
        elif name == "vllm:generation_tokens_total":
            found["generated"] += int(value)
    found["cycles"] = found.pop("num_cycles")
    return found


def test_the_scrape_shows_what_the_answers_took(served):
    before = scraped(served.url)
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(served.url, prompt), PROMPTS))
    found = scraped(served.url) - before
    expected = served.chef.count(token_ids(served.url), LENGTH)
    num_generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert found.pop("generated") == num_generated == LENGTH * len(PROMPTS)
    num_decided = expected.pop("tokens")
    assert found == +expected
    assert found["cycles"] + found["num_accepted_tokens"] == num_decided
    # The last cycle of a request may decide more than was asked for.
    assert num_generated < num_decided < num_generated + 3 * len(PROMPTS)
    of_requests = [answer["metrics"]["speculative_decoding"] for answer in answers]
    for ours, theirs in (
        ("num_spec_steps", "num_drafts"),
        ("num_draft_tokens", "num_draft_tokens"),
        ("num_accepted_draft_tokens", "num_accepted_tokens"),
    ):
        assert sum(request[ours] for request in of_requests) == found[theirs], ours


def test_vllm_bench_serve_shows_the_right_figures(served, tmp_path):
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = f"--base-url {served.url} --model tiny --tokenizer {served.model} --dataset-name custom"
    words += f" --dataset-path {dataset} --num-prompts {len(PROMPTS)} --skip-chat-template"
    words += f" --custom-output-len {LENGTH} --temperature 0 --ignore-eos --disable-tqdm"
    shown = main(parser.parse_args(words.split()))
    expected = served.chef.count(token_ids(served.url), LENGTH)
    assert shown["completed"] == len(PROMPTS)
    num_drafts, accepted = expected["num_drafts"], expected["num_accepted_tokens"]
    assert shown["spec_decode_num_drafts"] == num_drafts
    assert shown["spec_decode_draft_tokens"] == expected["num_draft_tokens"]
    assert shown["spec_decode_accepted_tokens"] == accepted
    rate = 100 * accepted / expected["num_draft_tokens"]
    assert shown["spec_decode_acceptance_rate"] == pytest.approx(rate)
    # All cycles but the first of each request are drafts. The first gives one token.
    tokens_per_cycle = (expected["tokens"] - len(PROMPTS)) / (expected["cycles"] - len(PROMPTS))
    assert shown["spec_decode_acceptance_length"] == pytest.approx(tokens_per_cycle)
    by_position = [expected["num_accepted_tokens_per_pos", at] / num_drafts for at in range(3)]
    assert shown["spec_decode_per_position_acceptance_rates"] == pytest.approx(by_position)


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_in_a_scrape(served):
    complete(served.url, PROMPTS[0])
    labels: dict[str, set[str]] = {}
    for sample in samples(served.url):
        labels.setdefault(sample.name, set()).update(sample.labels)
    named = {name for expr in expressions() for name in re.findall(r"vllm:\w+", expr)}
    assert named <= labels.keys(), named - labels.keys()
    # Each name is followed by its labels, and has the words of the sum before it.
    pattern = r"(?:by \(([\w, ]+)\) \()?(?:rate\()?\b(vllm:\w+)\{(\w+)=~"
    for expr in expressions():
        found = re.findall(pattern, expr)
        assert len(found) == expr.count("vllm:"), expr
        for by, name, selected in found:
            used = {selected, *filter(None, by.split(", "))}
            assert used <= labels[name], f"{name} has no labels {used - labels[name]}"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on this machine")
def test_prometheus_answers_every_expression_of_the_dashboard(served, tmp_path):
    target, port = served.url.removeprefix("http://"), free_port()
    config = tmp_path / "prometheus.yml"
    job = {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            complete(served.url, PROMPTS[0])
        for expr in expressions():
            asked = expr.replace("$__rate_interval", "10s").replace("$model_name", ".*")
            query = urllib.parse.urlencode({"query": asked})
            url = f"http://127.0.0.1:{port}/api/v1/query?{query}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                result = json.load(answer)["data"]["result"]
            values = [float(series["value"][1]) for series in result]
            assert values and all(value >= 0 for value in values), (expr, values)
    finally:
        process.terminate()
        process.wait()
