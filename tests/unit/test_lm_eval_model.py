"""lm-eval's requests with an engine that looks up its log-probabilities in a table."""

from types import SimpleNamespace

import pytest
import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from harness.engine import Completion
from harness.errors import ConfigError
from harness.lm_eval_model import NAME, SCORING, SpeculativeEnsembleLM

BOS, EOS, VOCAB_SIZE = 256, 257, 258
MAX_LEN = 12
# log p(next | last): a text has one score, however it is cut into windows.
TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
TABLE = dict(enumerate(TABLE.log_softmax(-1).tolist()))
LIKELIEST = [max(range(VOCAB_SIZE), key=row.__getitem__) for row in TABLE.values()]


class ByteTokenizer:
    """Bytes, after a BOS token if it has one."""

    name_or_path = "some/tokenizer"
    bos_token, bos_token_id, eos_token_id = "<s>", BOS, EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokens = []
        while text.startswith("<s>"):
            tokens, text = [*tokens, BOS], text.removeprefix("<s>")
        begin = [BOS] if add_special_tokens and self.bos_token_id is not None else []
        return [*begin, *tokens, *text.encode()]

    def apply_chat_template(self, messages, tokenize, **how) -> str:
        assert not tokenize
        if messages[0]["role"] == "system":
            raise TemplateError("system role\nnot supported")
        assert how["continue_final_message"] != how["add_generation_prompt"]
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return "<s>" + text + ("[assistant]" if how["add_generation_prompt"] else "")


class TableEngine:
    """Finishes requests in reverse order; its completion is the seed of the request."""

    def __init__(self, says: str = "") -> None:
        self.says = says
        self.calls, self.requests = [], []
        self.counts = {"num_cycles": 2, "num_tokens": 3, "num_judged": [4], "num_accepted": [1]}

    def warm_up(self, request) -> None:
        self.calls.append("warm_up")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def proposals(self) -> dict:
        return self.counts

    def generate(self, requests, batch_size):
        self.calls.append(("generate", len(requests), batch_size))
        self.requests += requests
        for request in reversed(requests):
            prompt, params = request.prompt_token_ids, request.sampling_params
            assert 0 < len(prompt) <= MAX_LEN - params["max_tokens"]
            rows = None
            if params.get("prompt_logprobs") is not None:
                rows = [None, *map(self.row, prompt[:-1], prompt[1:])]
            text = f"{request.seed}{self.says}"
            yield Completion(
                request.index, text, [1] * len(text), "stop", 0.1, prompt_logprobs=rows
            )

    def row(self, last: int, token: int) -> dict[int, float]:
        return {t: TABLE[last][t] for t in (token, LIKELIEST[last])}


@pytest.fixture
def engine() -> TableEngine:
    return TableEngine()


def make_model(engine, params=None, batch_size=None, tokenizer=None) -> SpeculativeEnsembleLM:
    tokenizer = tokenizer or ByteTokenizer()
    return SpeculativeEnsembleLM(lambda: engine, tokenizer, MAX_LEN, params, 5, batch_size)


@pytest.fixture
def model(engine) -> SpeculativeEnsembleLM:
    return make_model(engine)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def score(*tokens: int) -> float:
    return sum(TABLE[a][b] for a, b in zip(tokens[:-1], tokens[1:], strict=True))


def test_model_has_a_name():
    assert get_model(NAME) is SpeculativeEnsembleLM


# Scores


def test_scores_are_those_of_the_continuations_in_the_order_asked(model, engine):
    pairs = [("ab", "cd"), ("a", " b"), ("xyz", "!")]
    expected = [score(*b"bcd"), score(*b"a b"), score(*b"z!")]
    answers = model.loglikelihood(instances("loglikelihood", *pairs))
    assert [answer for answer, _ in answers] == pytest.approx(expected)
    # All at once, after a BOS token that the tokenizer adds.
    assert engine.calls == [("generate", 3, None)]
    assert [r.prompt_token_ids for r in engine.requests] == [
        [BOS, *b"abcd"],
        [BOS, *b"a b"],
        [BOS, *b"xyz!"],
    ]


def test_spaces_behind_the_context_are_scored_with_the_continuation(model):
    ((answer, _),) = model.loglikelihood(instances("loglikelihood", ("ab  ", "c")))
    assert answer == pytest.approx(score(*b"b  c"))


@pytest.mark.parametrize(("bos", "prefix"), [(BOS, BOS), (None, EOS)])
def test_text_without_context_depends_on_the_prefix_token(engine, bos, prefix):
    tokenizer = ByteTokenizer()
    tokenizer.bos_token_id = bos
    model = make_model(engine, tokenizer=tokenizer)
    answers = model.loglikelihood(instances("loglikelihood", ("", "ab"), ("  ", "ab")))
    assert [a for a, _ in answers] == pytest.approx(
        [score(prefix, *b"ab"), score(prefix, *b"  ab")]
    )


def test_text_that_begins_with_the_prefix_token_gets_no_second_one(model, engine):
    ((answer, _),) = model.loglikelihood(instances("loglikelihood", ("", "<s>ab")))
    assert answer == pytest.approx(score(BOS, *b"ab"))
    assert engine.requests[0].prompt_token_ids == [BOS, *b"ab"]


def test_tokenizer_without_a_prefix_token_is_refused_only_where_one_is_needed(engine):
    tokenizer = ByteTokenizer()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    model = make_model(engine, tokenizer=tokenizer)
    model.loglikelihood(instances("loglikelihood", ("a", "b")))
    with pytest.raises(ConfigError, match=r"^method\.model: texts without context need a BOS or"):
        model.loglikelihood(instances("loglikelihood", ("", "b")))


def test_greedy_are_continuations_whose_tokens_are_all_the_likeliest(model, monkeypatch):
    first = LIKELIEST[7]
    second = LIKELIEST[first]
    other = (second + 1) % VOCAB_SIZE
    requests = [
        (None, [3, 7], [first, second]),
        (None, [3, 7], [first, other]),
        (None, [3, 7], [other, LIKELIEST[other]]),
        (None, [3], [first]),  # the likeliest after another token
    ]
    answers = model._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in answers] == [True, False, False, False]
    # No other token exceeds one that ties with the likeliest.
    monkeypatch.setitem(TABLE, first, list(TABLE[first]))
    TABLE[first][other] = TABLE[first][second]
    assert model._loglikelihood_tokens(requests)[1][1]


def test_nothing_to_score_is_certain(model, engine):
    answers = model._loglikelihood_tokens([(None, [1], []), (None, [1], [2])])
    assert answers[0] == (0.0, True)
    assert answers[1][0] == pytest.approx(TABLE[1][2])
    assert len(engine.requests) == 1


def test_sampling_parameters_of_the_run_do_not_reach_scores(engine):
    model = make_model(engine, {"temperature": 0.7, "min_tokens": 5, "stop": ["b"]}, batch_size=2)
    model.loglikelihood(instances("loglikelihood", ("a", "b")))
    (request,) = engine.requests
    assert request.sampling_params == SCORING
    assert engine.calls == [("generate", 1, 2)]


def test_long_contexts_lose_their_beginnings_with_one_warning(model, engine, caplog):
    long = "0123456789" * 3
    pairs = [(long, "ab"), ("short", "ab"), (long, "cd")]
    answers = model.loglikelihood(instances("loglikelihood", *pairs))
    expected = [score(*b"9ab"), score(*b"tab"), score(*b"9cd")]
    assert [a for a, _ in answers] == pytest.approx(expected)
    # A token is generated after the prompt, so one less than the members read.
    assert [len(r.prompt_token_ids) for r in engine.requests] == [11, 8, 11]
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 prompts are longer than the 12 tokens that")


def test_continuation_without_room_is_refused_before_the_engine_starts(model):
    longest = [*range(MAX_LEN - 2)]
    with pytest.raises(
        ConfigError, match=r"^tasks: 11 tokens are to be scored, .* room for 10; raise"
    ):
        model._loglikelihood_tokens([(None, [1], [2]), (None, [1], [*longest, 1])])
    assert not model.is_started
    ((answer, _),) = model._loglikelihood_tokens([(None, [1, 7], longest)])
    assert answer == pytest.approx(score(7, *longest))
    assert model.is_started


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 12, 19, 20, 21, 57])
def test_rolling_scores_every_token_once(model, engine, length):
    text = "".join(chr(97 + i % 23) for i in range(length))
    other = instances("loglikelihood_rolling", ("before",), (text,), ("after",))
    totals = model.loglikelihood_rolling(other)
    expected = [score(BOS, *t.encode()) for t in ("before", text, "after")]
    assert totals == pytest.approx(expected)
    assert len(engine.calls) == 1


# Generated texts


def test_texts_come_in_the_order_asked_and_are_cut_at_the_first_stop(engine):
    engine.says = " answer. Question: next"
    model = make_model(engine, batch_size=3)
    requests = instances(
        "generate_until",
        ("abc", {"until": ["Question:", "."], "max_gen_toks": 4}),
        ("d", {"until": "nothing", "max_gen_toks": 5}),
        ("", {"until": [""], "max_gen_toks": 6}),
    )
    whole = " answer. Question: next"
    assert model.generate_until(requests) == ["5 answer", f"6{whole}", f"7{whole}"]
    assert engine.calls == ["warm_up", "synchronize", ("generate", 3, 3)]
    assert [r.prompt_token_ids for r in engine.requests] == [[BOS, *b"abc"], [BOS, *b"d"], [BOS]]
    assert [r.sampling_params["stop"] for r in engine.requests] == [
        ["Question:", "."],
        ["nothing"],
        None,
    ]
    assert [r.sampling_params["max_tokens"] for r in engine.requests] == [4, 5, 6]
    assert model.num_tokens == 3 * (1 + len(whole))
    assert model.time_s > 0


def test_equal_requests_that_are_sampled_have_seeds_of_their_own(model, engine):
    model.generate_until(instances("generate_until", ("a", {"max_gen_toks": 1})) * 3)
    assert [request.seed for request in engine.requests] == [5, 6, 7]


def test_long_prompts_leave_room_for_what_is_generated(model, engine, caplog):
    requests = instances("generate_until", ("0123456789", {"max_gen_toks": 8}))
    model.generate_until(requests)
    assert engine.requests[0].prompt_token_ids == [*b"6789"]
    assert caplog.records[0].getMessage().startswith("1 of 1 prompts")
    with pytest.raises(ConfigError, match=r"^tasks: 12 tokens are .* smaller gen_kwargs\.max_gen_"):
        model.generate_until(instances("generate_until", ("0", {"max_gen_toks": 12})))


def test_counts_of_proposals_are_those_of_generated_texts(model):
    requests = instances("generate_until", ("a", {"max_gen_toks": 1}))
    model.loglikelihood(instances("loglikelihood", ("a", "b")))
    assert model.counts == {}
    model.generate_until(requests)
    model.generate_until(requests)
    assert model.counts == {
        "num_cycles": 4,
        "num_tokens": 6,
        "num_judged": [8],
        "num_accepted": [2],
    }


GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.6}


@pytest.mark.parametrize(
    ("run", "gen_kwargs", "expected"),
    [
        # The task decides.
        ({}, {}, {"temperature": 0, "max_tokens": 256, "stop": None}),
        ({}, {"until": ["\n", ""]}, {"stop": ["\n"]}),
        ({}, {"max_new_tokens": 7}, {"max_tokens": 7}),
        (SAMPLED, {"do_sample": False}, GREEDY),
        (SAMPLED, {"temperature": 0.0}, GREEDY),
        (GREEDY, {"temperature": 0.6}, SAMPLED),
        (GREEDY, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SAMPLED | {"top_p": 0.9}),
        ({"max_tokens": 3, "stop": ["x"]}, {"until": ["y"], "max_gen_toks": 9}, {"stop": ["y"]}),
        # The run decides what the task leaves open, and then lm-eval.
        (SAMPLED, {}, SAMPLED),
        (SAMPLED, {"do_sample": True}, SAMPLED),
        (GREEDY, {"do_sample": True}, {"temperature": 1}),
        ({"max_tokens": 3, "stop": ["x"]}, {}, {"max_tokens": 3, "stop": ["x"]}),
        ({"top_p": 0.5, "seed": 9}, {"until": ["y"]}, {"top_p": 0.5, "seed": 9}),
        ({}, {"num_beams": 1}, {"skip_special_tokens": False}),
    ],
)
def test_parameters_of_generated_texts(engine, run, gen_kwargs, expected):
    model = SpeculativeEnsembleLM(lambda: engine, ByteTokenizer(), 1000, run)
    given = dict(gen_kwargs)
    params = model.sampling_params(gen_kwargs)
    assert {key: params[key] for key in expected} == expected
    known = {"temperature", "max_tokens", "stop", "skip_special_tokens"}
    assert params.keys() <= known | {"spaces_between_special_tokens", "top_p", "seed"}
    # lm-eval uses them as a key to cache answers.
    assert gen_kwargs == given


# What lm-eval does with a model


def test_answers_are_cached_under_what_was_asked(engine, tmp_path):
    requests = {
        "loglikelihood": instances("loglikelihood", ("a", "b"), ("", "c")),
        "loglikelihood_rolling": instances("loglikelihood_rolling", ("abcdefghijklmnop",)),
        "generate_until": instances("generate_until", ("a", {"until": ["."], "max_gen_toks": 3})),
    }
    model = make_model(engine)
    # Without its own wrapper, so that only what the model hands over is there.
    CachingLM(model, str(tmp_path / "cache.db"))
    answers = {kind: getattr(model, kind)(asked) for kind, asked in requests.items()}
    model.cache_hook.dbdict.close()

    unable = make_model(SimpleNamespace())
    cached = CachingLM(unable, str(tmp_path / "cache.db"))
    for kind, asked in requests.items():
        assert getattr(cached, kind)(asked) == answers[kind]
    assert not unable.is_started


def test_chats_go_through_the_template(model, engine):
    chat = [{"role": "user", "content": "a"}]
    text = model.apply_chat_template(chat)
    assert text == "<s>[user]a[assistant]"
    assert model.tok_encode(text) == [BOS, *b"[user]a[assistant]"]
    begun = [*chat, {"role": "assistant", "content": "b"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == (
        "<s>[user]a[assistant]b"
    )
    with pytest.raises(ConfigError, match="^apply_chat_template: system role not supported; set i"):
        model.apply_chat_template([{"role": "system", "content": "x"}])


def test_template_and_tokenizer_have_names(model):
    assert model.tokenizer_name == "some__tokenizer"
    model.tokenizer.chat_template = "{{ messages }}"
    assert model.chat_template(True) == "{{ messages }}"
    assert (model.eot_token_id, model.max_length) == (EOS, MAX_LEN)
