"""`ensemble_args`: from members, function and turns to vLLM's engine arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from tiny_models import llama_config, save_byte_tokenizer
from transformers import LlavaConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from vllm.chef import config as chef_config
from vllm.chef import ensemble_args
from vllm.chef.arguments import CHEF_WORKER, ENSEMBLE_WORKER
from vllm.chef.config import SCHEDULER, check_chef, engine_turns
from vllm.ensemble_decode import ConfigFieldError
from vllm.ensemble_decode.members import check_ensemble


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Model folders without weights.

    `small` is the cheapest; it reads 64 tokens, the others read 128.
    """
    root = tmp_path_factory.mktemp("models")
    for name in ("large", "other"):
        llama_config().save_pretrained(root / name)
    llama_config(layers=1, max_position_embeddings=64).save_pretrained(root / "small")
    llama_config(vocab_size=99, layers=1).save_pretrained(root / "wide")
    return root


@pytest.fixture
def made(root):
    def make(*others: str, **arguments):
        extra_model = [str(root / name) for name in others]
        if "draft_model" in arguments:
            arguments["draft_model"] = str(root / arguments["draft_model"])
        # The models have no tokenizers.
        return ensemble_args(
            str(root / "large"), extra_model, skip_tokenizer_init=True, **arguments
        )

    return make


def engine_config(arguments: dict):
    return EngineArgs(**arguments).create_engine_config()


def test_a_plain_ensemble(root, made):
    found = made("other", weights=[0.7, 0.3])
    assert found == {
        "model": str(root / "large"),
        "worker_cls": ENSEMBLE_WORKER,
        "additional_config": {
            "ensemble": {
                "extra_model": [str(root / "other")],
                "ensemble_fn": "weighted",
                "ensemble_target": "probs",
                "weights": [0.7, 0.3],
                "ensemble_args": {},
            }
        },
        "max_model_len": 128,
        "skip_tokenizer_init": True,
    }
    check_ensemble(engine_config(found))


def test_one_extra_model_may_be_a_name(root):
    found = ensemble_args(str(root / "large"), str(root / "other"), skip_tokenizer_init=True)
    assert found["additional_config"]["ensemble"]["extra_model"] == [str(root / "other")]


@pytest.mark.parametrize(
    ("function", "target"),
    [
        ("weighted", "probs"),
        ("mean", "probs"),
        ("contrastive", "raw-logits"),
        ("contrastive_plausible", "raw-logits"),
        ("proxy_tuning", "raw-logits"),
        ("math:prod", "probs"),
    ],
)
def test_the_target_is_by_default_the_functions(made, function, target):
    others = ["other", "small"] if function == "proxy_tuning" else ["other"]
    found = made(*others, ensemble_fn=function)["additional_config"]["ensemble"]
    assert found["ensemble_target"] == target
    found = made(*others, ensemble_fn=function, ensemble_target="logits")
    assert found["additional_config"]["ensemble"]["ensemble_target"] == "logits"


@pytest.mark.parametrize(
    ("others", "asked", "chef", "window", "carrier"),
    [
        (["small"], dict(gamma=5), dict(gamma=[1, 5], turn_order=[0, 1]), 5, "small"),
        (["small"], dict(gamma=[2, 1]), dict(gamma=[2, 1], turn_order=[1, 0]), 2, "large"),
        (
            ["small", "other"],
            dict(gamma=[2, 3, 1], turn_order=[2, 0, 1]),
            dict(gamma=[2, 3, 1], turn_order=[2, 0, 1]),
            5,
            "small",
        ),
        (["other", "small"], dict(gamma=4, policy="sd"), dict(gamma=4), 4, "small"),
        # vLLM accepts only a draft model with as many rows as the first model.
        (["wide"], dict(gamma=2), dict(gamma=[1, 2], turn_order=[0, 1]), 2, "large"),
    ],
)
def test_turns_travel_as_resolved(root, made, others, asked, chef, window, carrier):
    found = made(*others, **asked)
    assert found["worker_cls"] == CHEF_WORKER
    policy = asked.get("policy", "chef")
    assert found["additional_config"]["chef"] == {"policy": policy, **chef}
    expected = {
        "method": "draft_model",
        "model": str(root / carrier),
        "num_speculative_tokens": window,
    }
    if window > len(others) or policy == "sd":
        expected["rejection_sample_method"] = "block"
    assert found["speculative_config"] == expected
    assert found["scheduler_cls"] == SCHEDULER


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        (dict(), [1, 5]),
        (dict(max_gamma=3), [1, 3]),
        (dict(max_gamma=[1, 2]), [1, 2]),
        (dict(policy="sd"), 5),
        (dict(policy="sd", max_gamma=2), 2),
    ],
)
def test_gamma_that_is_chosen_as_it_goes(made, asked, limit):
    found = made("small", gamma="auto", **asked)
    chef = found["additional_config"]["chef"]
    assert (chef["gamma"], chef["max_gamma"]) == ("auto", limit)
    assert found["scheduler_cls"] == SCHEDULER
    window = limit if isinstance(limit, int) else limit[1]
    schedule = found["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert [depth for _, _, depth in schedule] == list(range(window, -1, -1))
    check_chef(engine_config(found))


def test_an_engine_derives_nothing_again(made, monkeypatch):
    found = made("other", "small", gamma=3)
    as_asked = {**found["additional_config"], "chef": {"gamma": 3}}
    expected = engine_turns(engine_config({**found, "additional_config": as_asked}))
    assert expected.max_gammas == (1, 1, 3)
    monkeypatch.setattr(chef_config, "relative_cost", None)
    config = engine_config(found)
    assert check_chef(config)[2] == expected
    monkeypatch.setattr(chef_config, "member_configs", None)
    assert engine_turns(config) == expected


@pytest.mark.parametrize("arguments_of", [EngineArgs, AsyncEngineArgs])
def test_a_limit_that_turns_need_holds_whatever_starts_the_engine(made, arguments_of):
    two = made("other", gamma=5)
    assert "max_num_scheduled_tokens" not in two
    three = made("other", "small", gamma=1)
    arguments = arguments_of(**three)
    check_chef(arguments.create_engine_config())
    spare = three["max_num_batched_tokens"] - three["max_num_scheduled_tokens"]
    assert spare == three["max_num_seqs"]
    given = made("other", "small", gamma=1, max_num_seqs=4, max_num_batched_tokens=50)
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (4, 50)
    assert given["max_num_scheduled_tokens"] == 46
    given = made("other", "small", gamma=1, max_num_scheduled_tokens=9)
    assert given["max_num_scheduled_tokens"] == 9
    assert "max_num_seqs" not in given


def test_a_draft_model_proposes_to_a_plain_ensemble(root, made):
    found = made("other", draft_model="small", gamma=3)
    assert found["worker_cls"] == ENSEMBLE_WORKER
    assert "chef" not in found["additional_config"]
    assert found["speculative_config"] == {
        "method": "draft_model",
        "model": str(root / "small"),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    assert found["max_model_len"] == 64  # the draft model's
    assert made("other", draft_model="small", gamma=3, max_model_len=32)["max_model_len"] == 32


def test_engine_arguments_are_passed_through(made):
    found = made("other", dtype="bfloat16", max_num_seqs=3, max_model_len=32, seed=5)
    expected = {"dtype": "bfloat16", "max_num_seqs": 3, "max_model_len": 32, "seed": 5}
    assert {key: found[key] for key in expected} == expected
    own = {"method": "ngram", "num_speculative_tokens": 2}
    assert made("other", speculative_config=own)["speculative_config"] == own
    found = made("other", additional_config={"mine": 1}, gamma=1)
    assert found["additional_config"].keys() == {"mine", "ensemble", "chef"}
    rates = [0.5, 0.25]
    options = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    found = made("other", gamma=2, speculative_config=options)["speculative_config"]
    assert (found["num_speculative_tokens"], found["rejection_sample_method"]) == (2, "synthetic")


def test_the_arguments_are_plain_data_and_the_callers_are_left_alone(made):
    weights, options = [0.5, 0.5], {"additional_config": {"mine": {}}}
    made("other", weights=weights, gamma=1, **options)
    assert (weights, options) == ([0.5, 0.5], {"additional_config": {"mine": {}}})


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (dict(policy="best", gamma=1), "policy: unknown policy 'best'; choose one of"),
        (dict(policy="chef"), "gamma: None is out of range"),
        (dict(gamma=0), "gamma: 0 is out of range"),
        (dict(gamma=[1, 2, 3]), "gamma: [1, 2, 3] has 3 entries for 2 members"),
        (dict(gamma=2, max_gamma=3), "max_gamma: 3 has no effect, because gamma is 2 and not"),
        (
            dict(policy="plain", gamma=2),
            "gamma: 2 has no effect with policy 'plain', which has no turns",
        ),
        (dict(turn_order=[0, 1]), "turn_order: [0, 1] has no effect with policy 'plain'"),
        (dict(gamma=1, turn_order=[0, 0]), "turn_order: [0, 0] must name each"),
        (dict(draft_model="small"), "gamma: None is out of range; with a draft model"),
        (dict(draft_model="small", gamma=[1, 2]), "gamma: [1, 2] is out of range"),
        (
            dict(draft_model="small", gamma=1, max_gamma=2),
            "max_gamma: 2 has no effect with policy 'plain'",
        ),
        (dict(draft_model="nope", gamma=1), "draft_model: '"),
        (dict(draft_model="small", policy="sd", gamma=1), "draft_model: '"),
        (dict(alpha=0.1), "alpha: the ensemble function 'weighted' has no"),
        (dict(weights=[1]), "weights: 1 weights for 2 members"),
        (dict(ensemble_fn="no_such"), "ensemble_fn: unknown function 'no_such'"),
        (dict(ensemble_args=5), "ensemble_args: 5 does not name parameters"),
        (
            dict(gamma=1, weights=[1, 0]),
            "weights: only member 0 (counted from 0) has a weight above 0",
        ),
        (dict(additional_config={"chef": {}}), "additional_config.chef: the arguments of"),
        (dict(additional_config="x"), "additional_config: 'x' is not a mapping"),
        (dict(gamma=1, speculative_config="x"), "speculative_config: 'x' is not a mapping"),
        (dict(policy="best"), "policy: unknown policy 'best'; choose one of plain, chef, sd"),
        (dict(worker_cls="my.W"), "worker_cls: 'my.W' contradicts the ensemble"),
        (dict(gamma=1, scheduler_cls="my.S"), "scheduler_cls: 'my.S' contradicts the ensemble"),
        (
            dict(gamma=2, speculative_config={"num_speculative_tokens": 3}),
            "speculative_config.num_speculative_tokens: 3 contradicts the ensemble, which sets 2",
        ),
        # What the engine would refuse when it starts.
        (dict(gamma="auto", max_num_seqs=2), "max_num_seqs: gamma auto with these turns needs 6"),
        (dict(gamma=1, dtype="float3"), "dtype: "),
        (
            dict(gamma=2, speculative_config={"rejection_sample_method": "synthetic"}),
            "speculative_config: rejection_sample_method='synthetic' requires",
        ),
        (
            dict(gamma=2, speculative_config={"rejection_sample_method": "bogus"}),
            "speculative_config.rejection_sample_method: Input should be",
        ),
        (dict(kv_cache_dtype="x"), "kv_cache_dtype: Input should be"),
        (dict(pipeline_parallel_size=2, gamma=1), "pipeline_parallel_size: "),
        # What no context and no memory holds.
        (dict(gamma=500, max_model_len=64), "gamma: 500 tokens do not fit into the context of 64"),
        (
            dict(gamma="auto", max_gamma=500, max_model_len=64),
            "max_gamma: 500 tokens do not fit into the context of 64",
        ),
        (
            dict(gamma=500, draft_model="small", max_model_len=64),
            "gamma: 500 tokens do not fit into the context of 64",
        ),
        (
            dict(gamma=50, max_num_seqs=10_000_000, max_num_batched_tokens=10_000_000),
            "gamma: turns would keep ",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(made, asked, line):
    with pytest.raises(ConfigFieldError) as caught:
        made("other", **asked)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert not re.search(r"--\w|(?:ensemble|chef)\.\w", str(caught.value))


@pytest.mark.parametrize("members", [("large", "read"), ("read", "large")])
def test_a_member_without_a_tokenizer_is_told_in_one_line(root, tmp_path, members):
    """`large` has none."""
    read = tmp_path / "read"
    llama_config(257).save_pretrained(read)
    save_byte_tokenizer(str(read))
    paths = [str({"read": read, "large": root / "large"}[name]) for name in members]
    with pytest.raises(ConfigFieldError) as caught:
        ensemble_args(*paths, gamma=1)
    line = f"model/extra_model: the tokenizer of '{root / 'large'}' cannot be read: "
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{}, dict(gamma=1)], ids=["plain", "turns"])
@pytest.mark.parametrize(
    ("option", "value"), [("enable_lora", True), ("pipeline_parallel_size", 2)]
)
def test_what_no_ensemble_does_is_refused(made, option, value, asked):
    line = f"^{option}: .* cannot be combined with an ensemble"
    with pytest.raises(ConfigFieldError, match=line):
        made("other", **{option: value}, **asked)


@pytest.mark.parametrize("members", [("small", "sees"), ("sees", "small")])
def test_a_member_that_vllm_cannot_import_is_told_in_one_line(root, monkeypatch, members):
    LlavaConfig(text_config=llama_config(257), architectures=["Llava"]).save_pretrained(
        root / "sees"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigFieldError) as caught:
        ensemble_args(*(str(root / name) for name in members), gamma=1)
    assert str(caught.value) == (
        f"{'model' if members[0] == 'sees' else 'extra_model'}: '{root / 'sees'}' is multimodal, "
        "for which vLLM needs torchvision; install it"
    )


@pytest.fixture(scope="module")
def predictor(root) -> str:
    """Of an architecture that vLLM takes for layers of another model, as a draft model."""
    path = root / "predictor"
    config = FAMILIES["glm4_moe"].config()
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(path)
    return str(path)


def test_another_member_carries_the_window_if_vllm_would_change_the_last_one(root, predictor):
    for members in (("small", predictor), (predictor, "small")):
        paths = [str(root / name) for name in members]
        found = ensemble_args(*paths, gamma=1, turn_order=[0, 1], skip_tokenizer_init=True)
        assert found["speculative_config"]["model"] == str(root / "small")
        assert found["speculative_config"]["method"] == "draft_model"
    with pytest.raises(ConfigFieldError, match="^model/extra_model: turns need a member that vLLM"):
        ensemble_args(predictor, predictor, gamma=1, skip_tokenizer_init=True)


def test_a_draft_model_that_vllm_would_change_is_told_in_one_line(root, predictor):
    with pytest.raises(ConfigFieldError, match="^draft_model: vLLM takes '.*predictor' for layers"):
        ensemble_args(
            str(root / "small"), str(root / "small"), draft_model=predictor, gamma=1,
            skip_tokenizer_init=True,
        )  # fmt: skip


@pytest.mark.parametrize("others", [[], ["nope"]])
def test_members_that_are_not_there(made, others, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigFieldError, match=r"^extra_model: ") as caught:
        made(*others)
    assert "\n" not in str(caught.value)


# Prints the status of a fork that uses several threads, as vLLM's engine process may be one. A fork
# that waits for threads which it does not have is ended by the alarm.
IN_A_FORK = """
import os, signal, sys
import torch
from vllm.chef import ensemble_args

ensemble_args(*sys.argv[1:], gamma=1, skip_tokenizer_init=True)
child = os.fork()
if not child:
    signal.alarm(20)
    torch.ones(2, 200_000).log_softmax(-1)
    os._exit(0)
print("status", os.waitpid(child, 0)[1])
"""


@pytest.mark.slow  # in a process of its own, which imports vLLM again
def test_the_process_can_still_be_forked(tmp_path):
    """On CUDA vLLM forks the process of `LLM(**ensemble_args(...))`."""
    for name in ("0", "1"):
        llama_config(vocab_size=200_000).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", IN_A_FORK, str(tmp_path / "0"), str(tmp_path / "1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "status 0"
