"""The `openai` client against two servers: a plain ensemble, and the same ensemble by turns.

At temperature 0, both must give the same answer to every request.
"""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI
from servers import serving
from tiny_models import llama_config, save_byte_tokenizer, save_model, save_noisy_copy

PROMPT = "def f("
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
LENGTH = 24
ASCII = list(range(1, 95))  # tokens of the byte tokenizer
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# Without `strict`, vLLM lets the arguments be any JSON.
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
# A random model would write spaces without end, where a grammar lets it.
NO_SPACES = {str(189 + byte): -100.0 for byte in b" \t\n\r"}
METHODS = {
    "plain": ["method=ensemble"],
    "turns": ["method=ensemble_chef", "method.gamma=[1,3]"],
}
SERVER_ARGS = [
    *("--max-num-seqs", "8", "--return-tokens-as-token-ids"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", json.dumps(GRAMMARS)),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(257, max_position_embeddings=256), seed=0)
    other = save_noisy_copy(root / "1", first, 1, 0.02)
    for folder in (first, other):
        save_byte_tokenizer(folder)
        (Path(folder) / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    keys = [
        f"method.model={first}",
        f"method.extra_model={other}",
        # Under this target, the likeliest token is the only one with a min_p of 1.
        "method.llm.ensemble_target=raw-logits",
        "method.llm.kv_cache_memory_bytes=33554432",
        "served_model_name=tiny",
    ]
    with serving(
        {name: ([*own, *keys], SERVER_ARGS) for name, own in METHODS.items()}, root
    ) as urls:
        yield urls


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def both(urls: dict[str, str], ask: Any) -> Any:
    """The answer of both servers, which must be the same."""
    with client(urls["plain"]) as plain, client(urls["turns"]) as turns:
        expected, found = ask(plain), ask(turns)
    assert_same(found, expected)
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Equal, except that numbers may be rounded differently."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def choices(answer: Any) -> dict[str, Any]:
    """What an answer says, without its id and time."""
    content = answer.model_dump()
    kept = {"choices": content["choices"], "usage": content["usage"]}
    for choice in kept["choices"]:
        for call in (choice.get("message") or {}).get("tool_calls") or ():
            call.pop("id")
    return kept


COMPLETIONS: dict[str, dict[str, Any]] = {
    "bare": {},
    "several prompts": dict(prompt=[PROMPT, "x = ", "\n\n"]),
    "token ids": dict(prompt=[5, 6, 7]),
    "logprobs": dict(logprobs=3),
    "prompt logprobs": dict(extra_body=dict(prompt_logprobs=2)),
    "echo": dict(echo=True, logprobs=1),
    "penalties": dict(
        presence_penalty=0.5, frequency_penalty=0.5, extra_body=dict(repetition_penalty=1.2)
    ),
    "min_p": dict(temperature=1, seed=0, extra_body=dict(min_p=1.0)),
    "logit_bias": dict(logit_bias={"97": 3, "98": -100}),
    "allowed tokens": dict(extra_body=dict(allowed_token_ids=[65, 66, 67, 68])),
    "bad words": dict(extra_body=dict(bad_words=["a", "b", "e", "t"])),
    "min tokens": dict(extra_body=dict(min_tokens=20)),
    "stop token ids": dict(extra_body=dict(stop_token_ids=list(range(60, 90)))),
    "regex": dict(extra_body=dict(structured_outputs=dict(regex="[ab]{3}(c|d)[0-9]+x"))),
    "choice": dict(extra_body=dict(structured_outputs=dict(choice=["yes", "no", "perhaps"]))),
    "json": dict(max_tokens=64, extra_body=dict(structured_outputs=dict(json=SCHEMA))),
    "weights": dict(extra_body=dict(vllm_xargs=dict(ensemble_weights=[0.9, 0.1]))),
    "n": dict(n=2, temperature=1, seed=3, top_p=1e-6),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(name, urls):
    params = dict(model="tiny", prompt=PROMPT, max_tokens=LENGTH, temperature=0)
    params |= COMPLETIONS[name]
    answer = both(urls, lambda client: choices(client.completions.create(**params)))
    assert all(choice["text"] for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] > 0
    if name == "json":
        assert set(json.loads(answer["choices"][0]["text"])) == {"a", "b"}
    if name == "choice":
        assert answer["choices"][0]["text"] in ("yes", "no", "perhaps")


def test_stop_strings_across_a_windows_edge(urls):
    params = dict(model="tiny", prompt=PROMPT, max_tokens=LENGTH, temperature=0)
    params["extra_body"] = dict(allowed_token_ids=ASCII)
    whole = both(urls, lambda client: choices(client.completions.create(**params)))
    text = whole["choices"][0]["text"]
    tried = 0
    for start in range(1, 12):
        stop = text[start : start + 3]
        if text.index(stop) != start:
            continue
        tried += 1
        for include in (False, True):
            extra = dict(params["extra_body"], include_stop_str_in_output=include)
            ask = dict(params, stop=[stop], extra_body=extra)
            answer = both(urls, lambda client, ask=ask: choices(client.completions.create(**ask)))
            (choice,) = answer["choices"]
            assert choice["text"] == text[: start + (3 if include else 0)]
            assert choice["finish_reason"] == "stop"
    assert tried > 3


@pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
def test_streams(is_chat, urls):
    params = dict(model="tiny", max_tokens=LENGTH, temperature=0)

    def ask(client: OpenAI, stream: bool) -> tuple[str, Any]:
        options = dict(stream=True, stream_options={"include_usage": True}) if stream else {}
        if is_chat:
            answer = client.chat.completions.create(messages=MESSAGES, **params, **options)
        else:
            answer = client.completions.create(prompt=PROMPT, **params, **options)
        if not stream:
            (choice,) = answer.choices
            text = choice.message.content if is_chat else choice.text
            return text, answer.usage.model_dump()
        chunks = list(answer)
        deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
        parts = [delta.delta.content if is_chat else delta.text for delta in deltas]
        assert len(parts) > 3
        return "".join(part or "" for part in parts), chunks[-1].usage.model_dump()

    whole = both(urls, lambda client: list(ask(client, False)))
    assert both(urls, lambda client: list(ask(client, True))) == whole


CHATS: dict[str, dict[str, Any]] = {
    "bare": {},
    "top_logprobs": dict(logprobs=True, top_logprobs=3),
    "json schema": dict(
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    ),
    "tool": dict(
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "f"}},
        max_tokens=80,
        logit_bias=NO_SPACES,
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(name, urls):
    params = dict(model="tiny", messages=MESSAGES, max_tokens=LENGTH, temperature=0)
    params |= CHATS[name]
    answer = both(urls, lambda client: choices(client.chat.completions.create(**params)))
    (choice,) = answer["choices"]
    if name == "json schema":
        assert set(json.loads(choice["message"]["content"])) == {"a", "b"}
    if "tools" in params:
        assert choice["message"]["tool_calls"], choice
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "f"
        assert set(json.loads(call["function"]["arguments"])) == {"a", "b"}


BAD: dict[str, dict[str, Any]] = {
    "unknown key of ours": dict(extra_body=dict(vllm_xargs=dict(ensemble_no_such_key=1))),
    "negative weights": dict(extra_body=dict(vllm_xargs=dict(ensemble_weights=[-1, 2]))),
    "too long": dict(prompt=[5] * 300),
    "temperature": dict(temperature=-1),
    "structured outputs": dict(extra_body=dict(structured_outputs=dict(choice=[]))),
    "logprobs": dict(logprobs=1000),
}


@pytest.mark.parametrize("server", METHODS)
def test_a_bad_request_is_refused_alone(server, urls):
    params = dict(model="tiny", prompt=PROMPT, max_tokens=LENGTH, temperature=0)
    with client(urls[server]) as asking:
        before = choices(asking.completions.create(**params))
        for name, bad in BAD.items():
            with pytest.raises(APIStatusError) as error:
                asking.completions.create(**{**params, **bad})
            assert error.value.status_code == 400, name
            message = error.value.body["message"]
            assert message and len(message.splitlines()) == 1, (name, message)
        assert choices(asking.completions.create(**params)) == before


def test_clients_that_leave_change_nothing_for_others(urls):
    url = urls["turns"]
    params = dict(model="tiny", prompt=PROMPT, max_tokens=LENGTH, temperature=0)

    def ask(number: int) -> Any:
        if number % 3:
            with client(url) as asking:
                return choices(asking.completions.create(**params))
        body = dict(params, max_tokens=200, stream=True, ignore_eos=True, min_tokens=200)
        with (
            httpx.Client(timeout=60) as leaving,
            leaving.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            next(answer.iter_lines())  # and leave
        return None

    with client(url) as asking:
        expected = choices(asking.completions.create(**params))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(48)))
    assert all(answer == expected for answer in answers if answer is not None)
    end = time.monotonic() + 30
    while running(url):
        assert time.monotonic() < end, "requests of clients that have left still run"
        time.sleep(0.2)


def running(url: str) -> float:
    with closing(httpx.get(f"{url}/metrics")) as answer:
        lines = [line for line in answer.text.splitlines() if "num_requests_running{" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_tokens_of_a_text(urls):
    answers = [
        httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()
        for url in urls.values()
    ]
    assert answers[0] == answers[1] and answers[0]["count"] == len(PROMPT)
