"""vLLM's OpenAI-compatible server with members that take turns, started by `scripts/serve.py`."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from servers import serving
from tiny_models import llama_config, save_byte_tokenizer, save_model, save_noisy_copy

PROMPT = [5, 6, 7, 8]
# One after another: greedy, then the two that vLLM refuses beside speculation. A min_p of 1 leaves
# the likeliest token only.
REQUESTS = [
    dict(temperature=0),
    dict(temperature=1, min_p=1, seed=0),
    dict(temperature=0, logit_bias={"97": 100}),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(vocab_size=257), seed=0)
    other = save_noisy_copy(root / "1", first, 1, 0.02)
    for folder in (first, other):
        save_byte_tokenizer(folder)
    keys = [
        "method=cd_chef",
        f"method.model={first}",
        f"method.amateur_model={other}",
        "method.alpha=0.3",
        "method.gamma=3",
        "method.llm.kv_cache_memory_bytes=33554432",
        "served_model_name=tiny",
    ]
    with serving({"turns": (keys, ("--max-num-seqs", "4"))}, root) as urls:
        yield urls["turns"]


def complete(url: str, **params: Any) -> list[int]:
    data = json.dumps(
        {"prompt": PROMPT, "max_tokens": 8, "return_token_ids": True, **params}
    ).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@pytest.mark.slow
def test_a_request_may_override_alpha_and_a_bad_value_ends_that_request_only(url):
    default, same, alone = (
        complete(url, temperature=0, vllm_xargs=xargs)
        for xargs in ({}, {"ensemble_alpha": 0.3}, {"ensemble_alpha": 1})
    )
    assert same == default != alone
    for xargs in ({"ensemble_alpha": 2}, {"ensemble_alpha": "0.5"}, {"ensemble_weights": [1, 0]}):
        with pytest.raises(urllib.error.HTTPError) as error:
            complete(url, temperature=0, vllm_xargs=xargs)
        assert error.value.code == 400
        (key,) = xargs
        message = json.load(error.value)["error"]["message"]
        assert message.startswith(f"{key}: ") and "\n" not in message
        assert complete(url, temperature=0) == default


@pytest.mark.slow
def test_the_server_takes_the_sampling_parameters_that_vllm_refuses(url):
    greedy, likeliest, biased = (complete(url, **params) for params in REQUESTS)
    assert likeliest == greedy
    assert len(greedy) == 8
    assert biased == [97] * 8 != greedy


def test_the_server_says_what_it_serves(url):
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["tiny"]
