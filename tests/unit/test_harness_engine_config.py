"""vLLM's configuration of a method: slots, and the budget of a step whose members take turns."""

from pathlib import Path

import pytest
from families import FAMILIES, inspect_here
from tiny_models import llama_config, save_byte_tokenizer
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from harness.engine_config import make_engine_config
from harness.errors import ConfigError
from harness.methods import make_spec

VOCAB_SIZE = 257
GROUP = {
    "cd": {"alpha": 0.1, "llm": {"ensemble_fn": "contrastive", "ensemble_target": "raw-logits"}},
    "ensemble": {"llm": {"ensemble_fn": "weighted", "ensemble_target": "probs"}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models without weights; the vocabulary of `wide` is different."""
    root = tmp_path_factory.mktemp("models")
    for name, layers, vocab_size in (
        ("large", 3, VOCAB_SIZE),
        ("other", 2, VOCAB_SIZE),
        ("small", 1, VOCAB_SIZE),
        ("wide", 1, VOCAB_SIZE + 7),
    ):
        llama_config(vocab_size, layers).save_pretrained(root / name)
        save_byte_tokenizer(str(root / name))
    others = {
        "brief": llama_config(VOCAB_SIZE, max_position_embeddings=64),
        "experts": FAMILIES["mixtral"].config(vocab_size=VOCAB_SIZE),
    }
    for name, model_config in others.items():
        model_config.save_pretrained(root / name)
        save_byte_tokenizer(str(root / name))
    inspect_here("MixtralForCausalLM")
    return root


@pytest.fixture(autouse=True)
def model_path(root, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(root))


def config(name: str, num_slots: int = 4, llm: dict | None = None, **method):
    group = GROUP.get(name.split("_")[0], {"llm": {}})
    group = {"name": name, "model": "large", "generate": {}, **group, **method}
    group["llm"] = {**group["llm"], **(llm or {})}
    return make_engine_config(make_spec(group), seed=0, num_slots=num_slots)


def test_slots_are_those_that_a_run_needs_and_never_more_than_vllms_own():
    _, defaults = EngineArgs.get_batch_defaults(world_size=1)
    most = defaults[UsageContext.LLM_CLASS]
    assert config("large_model", 3).scheduler_config.max_num_seqs == 3
    assert config("large_model", 10 * most).scheduler_config.max_num_seqs == most
    given = config("large_model", 3, {"max_num_seqs": 7})
    assert given.scheduler_config.max_num_seqs == 7


@pytest.mark.parametrize(
    ("name", "method", "level"),
    [
        ("large_model", {}, "none"),
        ("sd", {"draft_model": "small", "gamma": 2}, "detailed"),
        ("cd", {"amateur_model": "other"}, "none"),
        ("cd", {"amateur_model": "other", "draft_model": "small", "gamma": 2}, "detailed"),
        # Its workers count.
        ("cd_chef", {"amateur_model": "small", "gamma": 2}, "none"),
    ],
)
def test_vllm_counts_what_a_proposer_outside_proposes(name, method, level):
    observability = config(name, **method).observability_config
    assert observability.per_request_spec_decode_metrics == level


THREE = {"extra_model": ["other", "small"], "gamma": 1}


def test_budget_leaves_room_for_what_members_propose_in_the_step():
    def scheduler(name, **kwargs):
        return config(name, **kwargs).scheduler_config

    plain = scheduler("ensemble", **THREE).max_num_batched_tokens
    # Two tokens are proposed before the last of three members. That is one more than vLLM expects.
    three = scheduler("ensemble_chef", **THREE)
    assert (three.max_num_batched_tokens, three.max_num_scheduled_tokens) == (plain, plain - 4)
    two = scheduler("cd_chef", amateur_model="small", gamma=5)
    assert two.max_num_scheduled_tokens == two.max_num_batched_tokens
    given = scheduler("ensemble_chef", **THREE, llm={"max_num_scheduled_tokens": 9})
    assert given.max_num_scheduled_tokens == 9


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "ensemble_chef",
            {**THREE, "llm": {"max_num_batched_tokens": 4}},
            r"^method\.llm\.max_num_scheduled_tokens: no value is possible with these turns",
        ),
        (
            "ensemble_chef",
            {**THREE, "llm": {"max_num_scheduled_tokens": 9999}},
            r"^method\.llm\.max_num_scheduled_tokens: 9999 is too large .* set it to \d+ or less",
        ),
        (
            "cd",
            {"amateur_model": "small", "draft_model": "wide", "gamma": 2},
            r"^method\.draft_model: .*same vocabulary size",
        ),
    ],
)
def test_refusals_name_the_key(name, method, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(name, **method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ensemble_sd", {"extra_model": ["other", "wide"], "gamma": 2}),
        ("cd_chef", {"amateur_model": "wide", "gamma": 2}),
        ("cd_chef", {"model": "wide", "amateur_model": "other", "gamma": 2}),
        ("ensemble", {"extra_model": "wide"}),
    ],
)
def test_members_may_be_padded_to_different_numbers_of_rows(name, method):
    first = config(name, **method).model_config
    wide = VOCAB_SIZE + 7
    assert first.get_vocab_size() == (wide if method.get("model") == "wide" else VOCAB_SIZE)


def test_a_draft_model_of_a_shorter_context_is_refused():
    message = r"^method\.llm\.max_model_len: 128 is beyond the draft model '.*brief', .* is 64; set"
    with pytest.raises(ConfigError, match=message):
        config("sd", draft_model="brief", gamma=2, llm={"max_model_len": 128})
    assert config("sd", draft_model="brief", gamma=2).model_config.max_model_len == 64


@pytest.mark.parametrize("asked", [{}, {"max_model_len": 64}])
def test_stock_speculation_refuses_more_tokens_than_a_context_holds(asked):
    message = r"^method\.gamma: 500 tokens do not fit into the context of (64|128) tokens; choose"
    with pytest.raises(ConfigError, match=message):
        config("sd", draft_model="small", gamma=500, llm=asked)


def test_stock_speculation_refuses_a_draft_model_that_it_cannot_prepare():
    message = r"^method\.draft_model: '.*experts' has experts, .*; choose a draft model without"
    with pytest.raises(ConfigError, match=message):
        config("sd", draft_model="experts", gamma=2)


class NeedsMore:
    def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        raise NotImplementedError


def test_stock_speculation_refuses_a_draft_model_that_it_cannot_call(monkeypatch):
    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *args: (NeedsMore, "NeedsMore"))
    message = r"^method\.draft_model: .*'NeedsMore', which has no default for intermediate_tensors;"
    with pytest.raises(ConfigError, match=message):
        config("sd", draft_model="small", gamma=2)
    # Beside an ensemble, a draft model is called like any model.
    config("cd", amateur_model="other", draft_model="small", gamma=2)
