"""What `scripts/soak.py` decides: which requests, which answers are wrong, what is left behind."""

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import free_port
from tiny_models import llama_config, save_byte_tokenizer, save_model
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from harness import serving
from harness.errors import ConfigError, RunError
from soak import resources
from soak.answers import EQUAL, TIE, WRONG, Answer, PlainAnswer, compare, find_malformed
from soak.clients import (
    ANSWERED,
    CANCELLED,
    FAULT,
    MAX_FAULTS,
    REFUSED,
    Crowd,
    Outcome,
    ask_plain,
    send,
)
from soak.process import Process
from soak.requests import BAD, GREEDY, SAMPLED, SCHEMA, SHARES, Limits, Request, RequestMaker
from soak.resources import Usage, judge, measure, parse_metrics, wait_for, what_is_left
from soak.settings import PROCESSED, make_plan, plain_words
from soak.tally import Round, Tally

LIMITS = Limits(257, 512, True, (0.5, 0.5, 0), "ensemble_weights")
LENGTH = ("length", None)


def maker(seed: int = 0, limits: Limits = LIMITS, num_distinct: int = 20) -> RequestMaker:
    return RequestMaker("tiny", limits, seed, num_distinct)


class TestRequests:
    def test_a_seed_and_a_number_name_a_request(self):
        first, second = maker(), maker()
        made = [first.make(number) for number in range(50)]
        assert made == [second.make(number) for number in reversed(range(50))][::-1]
        assert made != [maker(seed=1).make(number) for number in range(50)]

    def test_there_are_all_kinds_and_parameters(self):
        made = [maker().make(number) for number in range(2000)]
        kinds = Counter(request.kind for request in made)
        for kind, share in SHARES.items():
            assert kinds[kind] / len(made) == pytest.approx(share, abs=0.05)
        asked = {key for request in made for key in request.body}
        assert asked >= {
            *("logit_bias", "min_p", "top_k", "top_p", "n", "seed", "logprobs", "prompt_logprobs"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "stop"),
            *("stop_token_ids", "vllm_xargs", "structured_outputs", "bad_words", "stream"),
            "allowed_token_ids",
        }
        assert {json.dumps(r.body["structured_outputs"]) for r in made if "json" in r.features} == {
            json.dumps({"json": SCHEMA})
        }
        leaving = [request for request in made if request.leaves_after is not None]
        assert {request.is_stream for request in leaving} == {True, False}
        lengths = [len(request.body["prompt"]) for request in made]
        assert min(lengths) < 4 and max(lengths) > 400

    def test_good_requests_fit_and_vllm_reads_them(self):
        for number in range(500):
            request = maker().make(number)
            if request.kind == BAD:
                continue
            body = request.body
            assert 1 <= body["max_tokens"] <= 512 - len(body["prompt"])
            assert all(0 < token < 257 for token in body["prompt"])
            assert (body["temperature"] == 0) == (request.kind == GREEDY)
            assert request.kind == SAMPLED or "n" not in body
            assert not (body.get("stream") and "prompt_logprobs" in body)
            read = CompletionRequest(**body)
            assert not read.model_extra
            read.to_sampling_params(body["max_tokens"], {})

    def test_greedy_requests_come_again_with_the_same_body(self):
        made = [maker().make(number) for number in range(300)]
        greedy = [request for request in made if request.kind == GREEDY]
        bodies: dict[int, set[str]] = {}
        for request in greedy:
            body = {key: value for key, value in request.body.items() if key != "stream"}
            assert body == maker().greedy(request.distinct)[0]
            bodies.setdefault(request.distinct, set()).add(json.dumps(body))
        assert len(bodies) == 20 and all(len(same) == 1 for same in bodies.values())
        assert len({same.pop() for same in bodies.values()}) == 20

    def test_some_prompts_share_a_prefix(self):
        prompts = [maker(num_distinct=100).greedy(number)[0]["prompt"] for number in range(100)]
        starts = Counter(tuple(prompt[:8]) for prompt in prompts if len(prompt) > 8)
        assert starts.most_common(1)[0][1] >= 3

    def test_texts_are_left_out_without_a_tokenizer_and_weights_without_a_function(self):
        made = [maker(limits=Limits(257, 512, False, (1, 1), None)).make(n) for n in range(500)]
        good = {key for request in made if request.kind != BAD for key in request.body}
        assert not good & {"stop", "bad_words", "structured_outputs", "vllm_xargs"}

    def test_a_member_without_weight_gets_none(self):
        for number in range(300):
            xargs = maker().make(number).body.get("vllm_xargs", {})
            if (weights := xargs.get("ensemble_weights")) and weights[0] > 0:
                assert weights[1] > 0 and weights[2] == 0

    def test_a_parameter_of_another_function(self):
        limits = Limits(257, 512, False, (1, 1), "ensemble_alpha")
        made = [maker(limits=limits).make(number) for number in range(200)]
        xargs = [r.body["vllm_xargs"] for r in made if "overrides" in r.features]
        assert xargs and all(0 <= value["ensemble_alpha"] <= 1 for value in xargs)


def answer(*token_ids: int, reason: Any = LENGTH, text: str = "") -> Answer:
    return Answer(token_ids, text, reason)


PLAIN = PlainAnswer(answer(5, 6, 7), [{5: -0.1, 9: -3.0}, {6: -0.7, 8: -0.7005}, {7: -0.2, 4: -2}])


class TestCompare:
    @pytest.mark.parametrize(
        ("found", "kind", "position"),
        [
            (answer(5, 6, 7), EQUAL, None),
            (answer(5, 6, reason=None), EQUAL, None),
            (answer(5, 8, 1), TIE, 1),
            (answer(5, 8, 1, 1, 1), TIE, 1),
            (answer(9, 6, 7), WRONG, 0),
            (answer(9, reason=None), WRONG, 0),
            (answer(5, 6, 3), WRONG, 2),
            (answer(5, 6), WRONG, 2),
            (answer(5, 6, 7, 7), WRONG, 3),
            (answer(5, 6, 7, 7, reason=None), WRONG, 3),
            (answer(5, 6, 7, reason=("stop", 7)), WRONG, 3),
            (answer(5, 6, 7, text="a"), WRONG, 3),
        ],
    )
    def test_up_to_the_first_tie(self, found, kind, position):
        verdict = compare(found, PLAIN, 1e-3)
        assert (verdict.kind, verdict.position) == (kind, position)
        assert (verdict.why is not None) == (kind == WRONG)

    def test_the_line_names_tokens_and_gap(self):
        assert compare(answer(9), PLAIN, 1e-3).why == (
            "token 0 is 9, the plain ensemble's is 5, whose log-probability is 2.9 higher"
        )
        assert "3 is not among its 2 likeliest" in compare(answer(5, 6, 3), PLAIN, 10.0).why

    def test_the_tolerance_decides(self):
        assert compare(answer(5, 8), PLAIN, 1e-4).kind == WRONG
        assert compare(answer(9), PLAIN, 3.0).kind == TIE

    @pytest.mark.parametrize(
        ("answers", "body", "problem"),
        [
            ([answer(1, 2)], {"max_tokens": 2}, None),
            ([answer(1, reason=("stop", 1))], {"max_tokens": 2}, None),
            ([answer(1, 2)] * 2, {"max_tokens": 2}, "2 answers, 1 were asked for"),
            ([answer(1, 2)], {"max_tokens": 3}, "at 2 tokens, max_tokens is 3"),
            ([answer(1, 2)], {"max_tokens": 1}, "at 2 tokens, max_tokens is 1"),
            ([answer(1, reason=None)], {"max_tokens": 1}, "it ended by None"),
            ([answer(1, reason=("stop", 1))], {"max_tokens": 3, "min_tokens": 2}, "min_tokens"),
            ([answer(1, 2)], {"max_tokens": 2, "allowed_token_ids": [2]}, "token 1 is not"),
            (
                [answer(1, 2, reason=("stop", 2))],
                {"max_tokens": 3, "allowed_token_ids": [1]},
                None,
            ),
        ],
    )
    def test_malformed_answers(self, answers, body, problem):
        found = find_malformed(answers, body)
        assert found is None if problem is None else problem in found


METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 0.0
vllm:num_requests_running{engine="1"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
"""
USAGE = Usage(1000, 50, 3, 2000)


class TestResources:
    def test_rest(self):
        metrics = parse_metrics(METRICS)
        left = what_is_left(metrics)
        assert left == "2 requests run, 0 wait, 25.0% of the KV cache is in use"
        assert what_is_left(dict.fromkeys(metrics, 0.0)) is None
        assert what_is_left({}) == "/metrics has no vllm:num_requests_running"

    def test_waiting_is_bounded(self, monkeypatch):
        monkeypatch.setattr(resources, "EVERY_S", 0.01)
        problems = iter(["busy", "busy", None])
        assert wait_for(lambda: next(problems), 10) is None
        assert wait_for(lambda: "busy", 0.05) == "busy"

    @pytest.mark.parametrize(
        ("after", "named"),
        [
            (Usage(1064, 51, 3, 2064), []),
            (Usage(1065, 51, 3, 2064), ["memory: 1000 MiB"]),
            (Usage(1000, 52, 3, 2000), ["file handles: 50"]),
            (Usage(1000, 50, 2, 2000), ["processes: 3"]),
            (Usage(1000, 50, 3, 2065), ["GPU memory: 2000 MiB"]),
            (Usage(2000, 60, 3, 3000), ["file handles", "memory", "GPU memory"]),
            (Usage(900, 40, 3, None), []),
        ],
    )
    def test_what_was_not_given_back(self, after, named):
        faults = judge(USAGE, after, 64, 1)
        assert len(faults) == len(named)
        assert all(fault.startswith(name) for fault, name in zip(faults, named, strict=True))

    def test_a_process_is_measured(self):
        before = measure(os.getpid())
        with contextlib.ExitStack() as stack:
            for _ in range(7):
                stack.enter_context(open(os.devnull))
            kept = bytearray(os.urandom(64 << 20))
            after = measure(os.getpid())
        assert after.handles == before.handles + 7
        assert after.memory_mb > before.memory_mb + 32
        assert before.memory_mb > 0 and len(kept)


def reply(token_ids: list[int], index: int = 0, reason: str | None = "length") -> dict[str, Any]:
    return {
        "index": index,
        "text": "x" * len(token_ids),
        "token_ids": token_ids,
        "finish_reason": reason,
        "stop_reason": None,
    }


class Slow(httpx.AsyncByteStream):
    """A stream of one token every few milliseconds."""

    def __init__(self, chunks: list[Any], seconds: float = 0.0) -> None:
        self.chunks, self.seconds, self.num_read = chunks, seconds, 0

    async def __aiter__(self):
        for chunk in self.chunks:
            await asyncio.sleep(self.seconds)
            self.num_read += 1
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield b"data: [DONE]\n\n"


def sent(
    request: Request, respond: Callable[[httpx.Request], Any], timeout_s: float = 5
) -> Outcome:
    """The outcome with a server that is a function."""

    async def respond_later(asked: httpx.Request) -> httpx.Response:
        response = respond(asked)
        if isinstance(response, float):
            await asyncio.sleep(response)
            response = httpx.Response(200, json={"choices": []})
        return response

    async def ask() -> Outcome:
        transport = httpx.MockTransport(respond_later)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as client:
            return await send(client, request, timeout_s)

    return asyncio.run(ask())


def request(kind: str = GREEDY, leaves_after: float | None = None, **body: Any) -> Request:
    distinct = 0 if kind == GREEDY else None
    return Request(0, kind, (), {"max_tokens": 2, **body}, distinct, leaves_after)


def broken(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("gone")


class TestClients:
    def test_a_whole_answer(self):
        whole = httpx.Response(200, json={"choices": [reply([4, 5])]})
        outcome = sent(request(), lambda _: whole)
        assert outcome.kind == ANSWERED
        assert outcome.answers == (Answer((4, 5), "xx", LENGTH),)

    def test_a_stream_of_two_choices(self):
        parts = [reply([4], 0, None), reply([7], 1, None), reply([8], 1), reply([5], 0)]
        stream = Slow([{"choices": [part]} for part in parts])
        outcome = sent(
            request(SAMPLED, stream=True, n=2), lambda _: httpx.Response(200, stream=stream)
        )
        assert outcome.kind == ANSWERED
        assert [answer.token_ids for answer in outcome.answers] == [(4, 5), (7, 8)]

    @pytest.mark.parametrize("chunks", [0, 1, 3])
    def test_a_client_leaves_a_stream(self, chunks):
        stream = Slow([{"choices": [reply([n], 0, None)]} for n in range(9)])
        outcome = sent(
            request(leaves_after=chunks, stream=True, max_tokens=9),
            lambda _: httpx.Response(200, stream=stream),
        )
        assert outcome.kind == CANCELLED
        assert [a.token_ids for a in outcome.answers] == [tuple(range(chunks))] * bool(chunks)
        assert all(a.reason is None for a in outcome.answers)
        assert stream.num_read <= chunks + 1

    def test_a_client_leaves_before_a_whole_answer(self):
        assert sent(request(leaves_after=0.05), lambda _: 5.0).kind == CANCELLED

    def test_what_takes_too_long_is_a_fault(self):
        outcome = sent(request(), lambda _: 5.0, timeout_s=0.05)
        assert (outcome.kind, outcome.why) == (FAULT, "it has no whole answer after 0.05 s")

    @pytest.mark.parametrize(
        ("asked", "status", "content", "kind"),
        [
            (request(BAD), 400, {"error": {"message": "no"}}, REFUSED),
            (request(BAD, stream=True), 400, {"error": {"message": "no"}}, REFUSED),
            (request(BAD), 400, {"error": {"message": "two\nlines"}}, FAULT),
            (request(BAD), 400, {}, FAULT),
            (request(BAD), 200, {"choices": [reply([1, 2])]}, FAULT),
            (request(BAD, stream=True), 200, {}, FAULT),
            (request(BAD), 500, {"error": {"message": "no"}}, FAULT),
            (request(), 400, {"error": {"message": "no"}}, FAULT),
            (request(stream=True), 500, {}, FAULT),
            (request(), 200, {"choices": [reply([1, 2, 3])]}, FAULT),
        ],
    )
    def test_refusals(self, asked, status, content, kind):
        outcome = sent(asked, lambda _: httpx.Response(status, json=content))
        assert outcome.kind == kind
        assert (outcome.why is not None) == (kind == FAULT)

    def test_an_error_within_a_stream_and_a_broken_connection(self):
        stream = Slow([{"error": {"message": "EngineDead"}}])
        outcome = sent(request(stream=True), lambda _: httpx.Response(200, stream=stream))
        assert outcome.kind == FAULT and "EngineDead" in outcome.why
        assert "gone" in sent(request(), broken).why

    def test_the_plain_servers_log_probabilities(self):
        def respond(asked: httpx.Request) -> httpx.Response:
            body = json.loads(asked.content)
            assert body["return_tokens_as_token_ids"] and body["logprobs"] == 20
            choice = reply([4]) | {"logprobs": {"top_logprobs": [{"token_id:4": -0.1}]}}
            return httpx.Response(200, json={"choices": [choice]})

        transport = httpx.MockTransport(respond)
        with httpx.Client(base_url="http://server", transport=transport) as client:
            plain = ask_plain(client, {"prompt": [1]})
        assert plain == PlainAnswer(Answer((4,), "x", LENGTH), [{4: -0.1}])

    def test_a_crowd_stops_at_its_number_its_time_and_when_all_fails(self):
        made: list[int] = []
        noted: list[Outcome] = []

        def crowd(is_alive: Callable[[], bool] = lambda: True) -> Crowd:
            make = lambda number: made.append(number) or request()  # noqa: E731
            # Nothing listens at port 1.
            return Crowd("http://127.0.0.1:1", 3, 5, make, noted.append, is_alive)

        counting = crowd()
        counting.run(30, 5)
        counting.run(30, 4)
        assert sorted(made) == list(range(9)) and len(noted) == 9
        assert not counting.has_given_up
        counting.run(30, None)
        assert counting.has_given_up and MAX_FAULTS <= len(noted) < MAX_FAULTS + 3
        made.clear()
        crowd(lambda: False).run(30, None)
        crowd().run(0, None)
        assert not made


def test_the_tally_counts_equal_answers_once():
    tally = Tally()
    for _ in range(3):
        tally.note(Outcome(request(), ANSWERED, (answer(4, 5),)))
    tally.note(Outcome(request(leaves_after=1), CANCELLED, (answer(4, reason=None),)))
    tally.note(Outcome(request(leaves_after=0.1), CANCELLED))
    tally.note(Outcome(request(SAMPLED), FAULT, (), "it broke"))
    assert {a: g.count for a, g in tally.greedy[0].items()} == {
        answer(4, 5): 3,
        answer(4, reason=None): 1,
    }
    assert tally.num_requests == 6 and tally.num_tokens == 7
    assert tally.faults == ["request 0 (sampled): it broke"]
    tally.rounds += [Round(3, 1.0, 2, USAGE), Round(3, 1.0, 4, USAGE)]
    plain = json.loads(json.dumps(tally.plain()))
    assert plain["requests"]["greedy"] == dict(answered=3, cancelled=2, refused=0, fault=0)
    assert plain["num_preemptions"] == 6
    assert "3 answered, 2 cancelled" in tally.table() and "GPU memory" in tally.table()


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    saved = [save_model(root / name, llama_config(257), seed=0) for name in "ab"]
    for member in saved:
        save_byte_tokenizer(member)
    return [f"method.model={saved[0]}", f"method.extra_model={saved[1]}"]


HEALTHY = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
print("it serves", flush=True)
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


class TestProcess:
    def start(self, code: str, folder: Path, port: int = 1) -> Process:
        command = [sys.executable, "-c", code]
        url = f"http://127.0.0.1:{port}"
        return Process("plain", command, os.environ, url, folder / "log", 5)

    @pytest.mark.parametrize("status", [0, 3])
    def test_a_server_answers_and_ends(self, status, tmp_path):
        port = free_port()
        code = HEALTHY.replace("PORT", str(port)).replace("STATUS", str(status))
        with self.start(code, tmp_path, port) as process:
            process.wait_until_it_answers(30)
            assert process.is_alive()
            fault = process.end()
        assert not process.is_alive()
        said = f"the plain server ended with status {status}: it serves (all in {process.log})"
        assert fault == (said if status else None)

    def test_a_server_that_does_not_start(self, tmp_path):
        with (
            self.start("print('no weights\\n'); exit(1)", tmp_path) as process,
            pytest.raises(RunError, match="^the plain server does not start: no weights"),
        ):
            process.wait_until_it_answers(30)

    def test_a_server_that_does_not_answer_is_ended(self, tmp_path):
        with (
            self.start("import time; time.sleep(60)", tmp_path) as process,
            pytest.raises(RunError, match="does not answer 1 s after its start; raise start_s"),
        ):
            process.wait_until_it_answers(1)
        assert not process.is_alive()


@pytest.mark.parametrize(("num_rounds", "before"), [(2, 0), (3, 1), (5, 2), (6, 2)])
def test_the_first_half_of_the_rounds_is_the_warm_up(num_rounds, before):
    tally = Tally()
    tally.rounds += [Round(1, 1.0, 0, Usage(n, 1, 1)) for n in range(num_rounds)]
    assert [usage.memory_mb for usage in tally.usages()] == [before, num_rounds - 1]


class TestSettings:
    @pytest.fixture(autouse=True)
    def any_port(self, monkeypatch):
        monkeypatch.setattr(serving, "check_free", lambda address: None)

    @pytest.fixture
    def keys(self, members, tmp_path) -> list[str]:
        return [*members, "method.llm.max_model_len=128", f"save_path={tmp_path / 'run'}"]

    def test_both_servers_have_the_same_members(self, keys):
        plan = make_plan([*keys, "method.gamma=[1,3]", "method.weights=[0.3,0.7]"], [], 8000)
        turns, plain = plan.turns.command(), plan.plain.command()
        assert "vllm.chef.worker.ChefWorker" in turns
        assert "vllm.ensemble_decode.worker.EnsembleDecodeWorker" in plain
        ours = [
            json.loads(c[c.index("--additional-config") + 1])["ensemble"] for c in (turns, plain)
        ]
        assert ours[0] == ours[1] and ours[0]["weights"] == [0.3, 0.7]
        assert "--speculative-config" not in plain
        assert "processed_logprobs" in plain and "processed_logprobs" not in turns
        for command in (turns, plain):
            assert command[command.index("--num-gpu-blocks-override") + 1] == "41"
            assert command[-2:] == ["--port", "8000"]

    def test_the_plain_servers_keys(self):
        typed = ["method=cd_chef", "method.gamma=5", "method.turn_order=[0,1]", "method.alpha=0.2"]
        typed += ["+method.llm.max_logprobs=30", "clients=2"]
        kept = ["method.alpha=0.2", "+method.llm.max_logprobs=30", "clients=2"]
        own = ["method.weights=[1,2]"]
        assert plain_words(typed, "cd", own) == [*kept, "method=cd", *own, PROCESSED]

    @pytest.mark.parametrize(
        ("key", "said"),
        [
            ("clients=0", "clients: 0 must be an integer of 1 or more"),
            ("duration_s=soon", "duration_s: 'soon' must be a number of 1 or more"),
            ("rounds=1", "rounds: 1 must be an integer of 2 or more"),
            ("num_requests=1", "num_requests: 1 must be an integer of 6 or more"),
            ("tolerance=-1", "tolerance: -1 must be a number of 0 or more"),
            ("plain_keys=['clients=2']", "plain_keys:"),
            ("method=sd", "method: members of 'sd' do not propose"),
            ("+no_such=1", "no_such: unknown key"),
            ("seed=-1", "seed:"),
            ("plain_keys=['method.weights=[1,2,3]']", "the plain server: method.weights:"),
        ],
    )
    def test_bad_keys(self, key, said, keys):
        words = [word for word in keys if not (key == "method=sd" and "extra_model" in word)]
        with pytest.raises(ConfigError) as error:
            make_plan([*words, key], [], 8000)
        assert str(error.value).startswith(said)
        assert len(str(error.value).splitlines()) == 1

    def test_arguments_that_the_script_sets(self, keys):
        with pytest.raises(ConfigError, match="^--port: this script sets it"):
            make_plan(keys, ["--port=80"], 8000)
