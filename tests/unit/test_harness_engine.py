"""The window of requests in flight, latencies, and the requests that examples become."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from types import SimpleNamespace

import pytest
from vllm.logprobs import Logprob

from harness import engine as engine_module
from harness import proposals
from harness.engine import Engine, Request
from harness.errors import ConfigError, RunError
from harness.prompts import make_requests
from harness.session import Session
from repository import ROOT
from tasks import Example, Task

TURN_STATS = {
    "num_cycles": 4,
    "num_tokens": 10,
    "num_calls": [4, 12],
    "num_judged": [[2], [4, 3, 0]],
    "num_accepted": [[1], [3, 0, 0]],
}


class Clock:
    """Stands in for `time` in the engine's module: one second passes with every step."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeLLMEngine:
    """A request with prompt `[n]` takes n steps, and its tokens are 1 to n."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.running = {}
        self.params = {}
        self.most_in_flight = 0
        self.calls = []
        self.metrics = self.logprobs = self.prompt_logprobs = None
        self.engine_core = SimpleNamespace(
            shutdown=lambda timeout: self.calls.append(f"shutdown after {timeout} s")
        )

    def add_request(self, request_id, prompt, params) -> None:
        assert request_id not in self.params, "a request id was used twice"
        self.running[request_id] = [0, prompt["prompt_token_ids"][0]]
        self.params[request_id] = params
        self.most_in_flight = max(self.most_in_flight, len(self.running))

    def step(self) -> list:
        assert self.running, "a step with nothing to do"
        self.clock.now += 1
        outputs = []
        for request_id, state in list(self.running.items()):
            state[0] += 1
            done, needed = state
            completion = SimpleNamespace(
                text="x" * done,
                token_ids=tuple(range(1, done + 1)),
                finish_reason="length",
                spec_decode_metrics=self.metrics,
                logprobs=self.logprobs,
            )
            outputs.append(
                SimpleNamespace(
                    request_id=request_id,
                    finished=done == needed,
                    outputs=[completion],
                    prompt_logprobs=self.prompt_logprobs,
                )
            )
            if done == needed:
                del self.running[request_id]
        return outputs

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def collective_rpc(self, method: str) -> list:
        self.calls.append(method)
        return [TURN_STATS, TURN_STATS] if method == "turn_stats" else [None, None]


@pytest.fixture
def fake(monkeypatch) -> FakeLLMEngine:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    return FakeLLMEngine(clock)


def requests(*steps: int) -> list[Request]:
    return [Request(index, [n], seed=100 + index) for index, n in enumerate(steps)]


@pytest.mark.parametrize(
    ("batch_size", "finished", "latencies"),
    [
        # one at a time: in order, and none waits for another
        (1, [0, 1, 2, 3], [5, 1, 2, 1]),
        # 0 and 1 start; when 1 ends, 2 moves up, then 3
        (2, [1, 2, 3, 0], [1, 2, 1, 5]),
        (3, [1, 2, 3, 0], [1, 2, 1, 5]),
        (4, [1, 3, 2, 0], [1, 1, 2, 5]),
        (9, [1, 3, 2, 0], [1, 1, 2, 5]),
        (None, [1, 3, 2, 0], [1, 1, 2, 5]),
    ],
)
def test_window_slides_and_latency_starts_with_submission(fake, batch_size, finished, latencies):
    completions = list(Engine(fake, {}).generate(requests(5, 1, 2, 1), batch_size))
    assert [completion.index for completion in completions] == finished
    assert [completion.latency_s for completion in completions] == latencies
    assert fake.most_in_flight == min(batch_size or 4, 4)
    by_index = {completion.index: completion for completion in completions}
    assert by_index[2].token_ids == [1, 2]
    assert by_index[2].text == "xx"
    assert by_index[2].finish_reason == "length"


def test_completions_are_handed_out_while_others_run(fake):
    completions = Engine(fake, {}).generate(requests(3, 1), None)
    assert next(completions).index == 1
    assert fake.running


def test_nothing_to_do_is_done(fake):
    assert list(Engine(fake, {}).generate([], None)) == []


def test_every_request_has_its_seed_unless_one_is_set(fake):
    list(Engine(fake, {"temperature": 0.5}).generate(requests(1, 1), None))
    assert [params.seed for params in fake.params.values()] == [100, 101]
    assert {params.temperature for params in fake.params.values()} == {0.5}
    fake.params.clear()
    list(Engine(fake, {"seed": 7}).generate(requests(1, 1), None))
    assert [params.seed for params in fake.params.values()] == [7, 7]


def test_warm_up_is_short_and_leaves_no_prefix(fake):
    engine = Engine(fake, {"max_tokens": 500, "min_tokens": 400})
    engine.warm_up(requests(2)[0])
    (params,) = fake.params.values()
    assert (params.max_tokens, params.min_tokens) == (8, 0)
    assert fake.calls == ["reset_prefix_cache"]
    list(engine.generate(requests(1), None))  # with its own id


def test_what_waits_for_an_engine_that_was_killed_is_ended(monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setattr(engine_module, "WATCH_EVERY_S", 0.01)
    core = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False),
        outputs_queue=Queue(),
        utility_results={1: Future(), 2: Future()},
    )
    core.utility_results[2].set_result("done")
    watch = Thread(target=engine_module._watch, args=[core], daemon=True)
    watch.start()
    time.sleep(0.05)
    assert core.outputs_queue.empty() and not core.utility_results[1].done()
    core.resources.engine_dead = True
    assert isinstance(core.outputs_queue.get(timeout=10), EngineDeadError)
    with pytest.raises(EngineDeadError):
        core.utility_results[1].result(timeout=10)
    watch.join(10)
    assert core.utility_results[2].result() == "done"


def session(verbose: bool = False) -> Session:
    return Session(SimpleNamespace(turns=None, sampling_params={}), None, None, 0, verbose)


@pytest.mark.parametrize("verbose", [False, True])
def test_engine_that_does_not_start_is_told_in_one_line(monkeypatch, verbose):
    def fail(*args):
        raise ValueError("no memory\nat all")

    monkeypatch.setattr(Engine, "start", fail)
    line = "no memory\nat all" if verbose else "the engine did not start: no memory at all (verb"
    with pytest.raises(ValueError if verbose else RunError) as caught, session(verbose).start():
        pass
    assert str(caught.value).startswith(line)


def test_engine_that_dies_is_told_in_one_line(monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    closed = []
    engine = SimpleNamespace(close=lambda: closed.append(1))
    monkeypatch.setattr(Engine, "start", lambda *args: engine)
    with pytest.raises(RunError, match="^the engine's process has died; ") as caught:
        with session().start():
            raise EngineDeadError()
    assert closed and "\n" not in str(caught.value)


def test_device_is_waited_for_in_the_workers(fake):
    from vllm.v1.worker.worker_base import WorkerBase

    Engine(fake, {}).synchronize()
    assert fake.calls == ["synchronize_device"]
    assert callable(getattr(WorkerBase, fake.calls[0]))


def test_close_gives_the_engine_time(fake):
    Engine(fake, {}).close()
    assert fake.calls == [f"shutdown after {engine_module.SHUTDOWN_TIMEOUT_S} s"]


def test_request_has_the_last_word_on_its_sampling_parameters(fake):
    request = Request(0, [1], seed=3, sampling_params={"temperature": 0.25, "stop": ["x"]})
    list(Engine(fake, {"temperature": 0.5, "top_k": 7}).generate([request], None))
    (params,) = fake.params.values()
    assert (params.temperature, params.top_k, params.stop, params.seed) == (0.25, 7, ["x"], 3)


def test_choices_are_compared_and_nothing_is_generated(fake):
    fake.logprobs = [{5: Logprob(-2.0), 6: Logprob(-0.5), 9: Logprob(-3.0)}]
    request = Request(0, [1], seed=3, choices={5: " A", 6: " B", 9: " C"})
    run = {"max_tokens": 50, "min_tokens": 4, "stop": ["x"], "logprobs": 2}
    (completion,) = Engine(fake, run).generate([request], None)
    assert completion.text == " B"
    assert completion.logprobs == [{5: -2.0, 6: -0.5, 9: -3.0}]
    (params,) = fake.params.values()
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (1, 0, None)
    assert (params.logprob_token_ids, params.stop) == ([5, 6, 9], [])


def test_log_probabilities_are_plain_numbers(fake):
    fake.logprobs = [{1: Logprob(-1.0)}]
    fake.prompt_logprobs = [None, {2: Logprob(-2.0)}]
    (completion,) = Engine(fake, {}).generate(requests(1), None)
    assert completion.logprobs == [{1: -1.0}]
    assert completion.prompt_logprobs == [None, {2: -2.0}]


# What became of proposals


def test_proposals_in_turns_are_the_workers_counts_after_the_warm_up(fake):
    engine = Engine(fake, {}, takes_turns=True)
    engine.warm_up(requests(2)[0])
    assert fake.calls == ["reset_prefix_cache", "reset_turn_stats"]
    assert proposals.fields(engine.proposals()) == {
        "tokens_per_cycle": 2.5,
        "calls": [4, 12],
        "acceptance": [1 / 2, 3 / 7],
        "acceptance_by_position": [[1 / 2], [3 / 4, 0, None]],
    }


def test_worker_answers_what_is_asked():
    from vllm.chef.worker import ChefWorker

    assert callable(ChefWorker.turn_stats) and callable(ChefWorker.reset_turn_stats)


def test_member_that_never_proposes_has_no_acceptance():
    stats = {**TURN_STATS, "num_judged": [[], [4]], "num_accepted": [[], [4]]}
    fields = proposals.fields(stats)
    assert (fields["acceptance"], fields["acceptance_by_position"]) == ([None, 1], [[], [1]])


def test_proposals_of_a_draft_model_are_counted_by_vllm_after_the_warm_up(fake):
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    fake.metrics = RequestSpecDecodeMetrics.new(3)
    fake.metrics.observe(3, 3, detailed=True)  # in the warm-up
    engine = Engine(fake, {})
    engine.warm_up(requests(1)[0])
    fake.metrics = RequestSpecDecodeMetrics.new(3)
    # All accepted; one accepted and the second rejected; two offered and both accepted.
    for num_drafted, num_accepted in ((3, 3), (3, 1), (2, 2)):
        fake.metrics.observe(num_drafted, num_accepted, detailed=True)
    list(engine.generate(requests(1), None))
    fields = proposals.fields(engine.proposals())
    assert fields == {
        "tokens_per_cycle": 9 / 3,
        "acceptance": 6 / 7,
        "acceptance_by_position": [3 / 3, 2 / 3, 1 / 1],
    }
    assert proposals.rows(fields) == {"acceptance": "0.857", "tokens a cycle": "3.000"}


def test_without_proposals_nothing_is_said(fake):
    engine = Engine(fake, {})
    list(engine.generate(requests(1), None))
    assert engine.proposals() == proposals.fields({}) == proposals.rows({}) == {}


def test_counts_of_two_parts_are_added():
    doubled = {
        "num_cycles": 8,
        "num_tokens": 20,
        "num_calls": [8, 24],
        "num_judged": [[4], [8, 6, 0]],
        "num_accepted": [[2], [6, 0, 0]],
    }
    assert proposals.add(TURN_STATS, TURN_STATS) == doubled
    assert proposals.add({}, TURN_STATS) == proposals.add(TURN_STATS, {}) == TURN_STATS


# Requests of examples


class Words(Task):
    name = "words"

    def examples(self):
        return []

    def postprocess(self, example, text):
        return text

    def score(self, example, completion):
        return None


TASK = Words()


class FakeTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages, add_generation_prompt, return_dict) -> list[int]:
        assert add_generation_prompt and not return_dict
        if "template" not in vars(self):
            raise ValueError("there is\n no chat template")
        return list(self.template.format(**messages[-1]).encode())


def example(index: int, prompt: str, **kwargs) -> Example:
    return Example(index=index, task_id=f"t/{index}", prompt=prompt, reference=None, **kwargs)


def test_each_example_has_a_seed_that_does_not_depend_on_the_others():
    examples = [example(index, "ab") for index in range(5)]
    all_of_them = make_requests(TASK, examples, FakeTokenizer(), 100, seed=3)
    assert [request.seed for request in all_of_them] == [3, 4, 5, 6, 7]
    assert make_requests(TASK, examples[2:3], FakeTokenizer(), 100, seed=3) == all_of_them[2:3]
    assert all_of_them[0].prompt_token_ids == [97, 98]


def test_prompt_without_room_for_a_token_is_refused():
    examples = [example(0, "abc"), example(7, "abcd")]
    assert len(make_requests(TASK, examples, FakeTokenizer(), 5, seed=0)) == 2
    with pytest.raises(ConfigError, match="^method.llm.max_model_len: example 7 has 4 prompt tok"):
        make_requests(TASK, examples, FakeTokenizer(), 4, seed=0)


def test_tokenizer_that_makes_nothing_is_refused():
    with pytest.raises(ConfigError, match="^method.model: its tokenizer makes no tokens of exampl"):
        make_requests(TASK, [example(0, "")], FakeTokenizer(), 5, seed=0)


def test_chat_goes_through_the_template():
    tokenizer = FakeTokenizer()
    chat = example(0, "unused", messages=({"role": "user", "content": "hi"},))
    with pytest.raises(ConfigError, match="^dataset.chat: there is no chat template; set it to f"):
        make_requests(TASK, [chat], tokenizer, 100, seed=0)
    tokenizer.template = "<{role}>{content}"
    (request,) = make_requests(TASK, [chat], tokenizer, 100, seed=0)
    assert bytes(request.prompt_token_ids) == b"<user>hi"


class Letters(Words):
    """One of three letters answers every example."""

    def choices(self, example):
        return (" A", " B", " C")


def test_choices_are_told_by_their_last_token():
    (request,) = make_requests(Letters(), [example(0, "Answer:")], FakeTokenizer(), 100, seed=0)
    assert bytes(request.prompt_token_ids) == b"Answer: "
    assert request.choices == {65: " A", 66: " B", 67: " C"}


def test_choices_follow_the_template_of_a_chat():
    tokenizer = FakeTokenizer()
    tokenizer.template = "<{role}>{content}"
    chat = example(0, "unused", messages=({"role": "user", "content": "hi"},))
    (request,) = make_requests(Letters(), [chat], tokenizer, 100, seed=0)
    assert bytes(request.prompt_token_ids) == b"<user>hi "
    assert list(request.choices) == [65, 66, 67]


@pytest.mark.parametrize("texts", [("A", "BC"), ("xA", "yA"), ("AB", "CB")])
def test_choices_that_differ_in_more_than_their_last_token_are_refused(texts, monkeypatch):
    monkeypatch.setattr(Letters, "choices", lambda self, example: texts)
    with pytest.raises(ConfigError, match="^method.model: its tokenizer makes more than one token"):
        make_requests(Letters(), [example(0, "Answer:")], FakeTokenizer(), 100, seed=0)


# The process


def run_python(program: str, **environment: str) -> dict:
    names = ("VLLM_", "TORCH_", "TRANSFORMERS_", "OMP_", "HF_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_nothing_that_reads_the_environment_is_imported_before_it_is_set():
    program = "import json, sys, main_dataset\nprint(json.dumps([name for name in sys.modules]))"
    early = {"torch", "vllm", "transformers", "huggingface_hub"} & set(run_python(program))
    assert not early


PROCESS = """
import json, os, sys
from harness import engine
engine.is_cpu_build = lambda: {cpu}
engine._num_cores = lambda: 4
engine.configure_process({verbose})
print(json.dumps(dict(os.environ)))
"""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("cpu", [False, True])
def test_settings_of_the_process(verbose, cpu):
    environment = run_python(PROCESS.format(cpu=cpu, verbose=verbose))
    assert all((environment.get(name) == value) != verbose for name, value in QUIET.items())
    assert environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == ("0" if cpu else None)
    assert environment.get("OMP_NUM_THREADS") == ("3" if cpu else None)


def test_settings_of_the_user_are_kept():
    given = dict.fromkeys([*QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"], "1")
    environment = run_python(PROCESS.format(cpu=True, verbose=False), **given)
    assert {name: environment[name] for name in given} == given
