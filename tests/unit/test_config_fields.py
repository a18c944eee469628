"""One mistake in two places: the engine names its field, the harness names the user's key."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from tiny_models import llama_config, save_byte_tokenizer
from vllm.engine.arg_utils import EngineArgs

from harness.engine_config import make_engine_config
from harness.errors import ConfigError
from harness.fields import Keys
from harness.methods import make_spec
from vllm.chef import ensemble_args
from vllm.chef.arguments import CHEF_WORKER, ENSEMBLE_WORKER, argument_name
from vllm.chef.config import check_chef
from vllm.ensemble_decode import ConfigFieldError
from vllm.ensemble_decode.members import check_ensemble

VOCAB_SIZE = 257
WEIGHTED = {"ensemble_fn": "weighted", "ensemble_target": "probs"}
CONTRASTIVE = {"ensemble_fn": "contrastive", "ensemble_target": "raw-logits"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models without weights.

    `brief` reads fewer tokens than the others; `foreign` has another tokenizer.
    """
    root = tmp_path_factory.mktemp("models")
    for name in ("large", "other", "small", "foreign"):
        llama_config(VOCAB_SIZE, layers=1 if name == "small" else 2).save_pretrained(root / name)
        save_byte_tokenizer(str(root / name))
    llama_config(VOCAB_SIZE, max_position_embeddings=64).save_pretrained(root / "brief")
    save_byte_tokenizer(str(root / "brief"))
    tokenizer = root / "foreign" / "tokenizer.json"
    text = tokenizer.read_text()
    assert '"a"' in text
    tokenizer.write_text(text.replace('"a"', '"@"').replace('"b"', '"a"').replace('"@"', '"b"'))
    return root


@pytest.fixture(autouse=True)
def model_path(root, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(root))


def through_the_engine(root: Path, others: list[str], asked: dict[str, Any]) -> None:
    """What `vllm serve` does with its flags before it loads weights."""
    asked = dict(asked)
    llm = dict(asked.pop("llm", {}))
    ensemble = {"extra_model": [str(root / name) for name in others], **WEIGHTED}
    ensemble |= {k: llm.pop(k) for k in list(llm) if k.startswith("ensemble_")}
    chef = {k: asked.pop(k) for k in ("gamma", "turn_order", "policy") if k in asked}
    additional: dict[str, Any] = {"ensemble": {**ensemble, **asked}}
    if chef:
        additional["chef"] = chef
        window = llm.pop("window", 2)
        llm["speculative_config"] = {
            "method": "draft_model",
            "model": str(root / others[-1]),
            "num_speculative_tokens": window,
            **llm.get("speculative_config", {}),
        }
    config = EngineArgs(
        str(root / "large"),
        worker_cls=CHEF_WORKER if chef else ENSEMBLE_WORKER,
        additional_config=additional,
        **llm,
    ).create_engine_config()
    (check_chef if chef else check_ensemble)(config)


def through_the_arguments(root: Path, others: list[str], asked: dict[str, Any]) -> None:
    paths = [str(root / name) for name in ("large", *others)]
    asked = {**WEIGHTED, **asked}
    llm = asked.pop("llm", {})
    ensemble_args(paths[0], paths[1:], **{**asked, **llm})


def through_the_harness(name: str, others: list[str], asked: dict[str, Any]) -> None:
    method = {"name": name, "model": "large", "generate": {}, **asked}
    method.pop("policy", None)
    is_cd = name.startswith("cd")
    method["amateur_model" if is_cd else "extra_model"] = others[0] if is_cd else others
    function = CONTRASTIVE if is_cd else WEIGHTED
    method["llm"] = {**function, **asked.get("llm", {})}
    make_engine_config(make_spec(method), seed=0, num_slots=4)


# method, members after the first, what is asked, and the line up to its remedy: the engine's, the
# harness's, and that of `ensemble_args`, or None where it leaves the mistake to the engine
TABLE = [
    (
        "ensemble",
        ["other"],
        {"weights": [1, 2, 3]},
        "ensemble.weights: 3 weights for 2 members; ",
        "method.weights: 3 weights for 2 members; ",
        "weights: 3 weights for 2 members; ",
    ),
    (
        "ensemble",
        ["other"],
        {"alpha": 0.1},
        "ensemble.alpha: the ensemble function 'weighted' has no parameter 'alpha' "
        "(takes weights); remove it or choose another ensemble.ensemble_fn",
        "method.alpha: the ensemble function 'weighted' has no parameter 'alpha' "
        "(takes weights); remove it or choose another method.llm.ensemble_fn",
        "alpha: the ensemble function 'weighted' has no parameter 'alpha' "
        "(takes weights); remove it or choose another ensemble_fn",
    ),
    (
        "cd",
        ["other"],
        {"alpha": 2, "llm": CONTRASTIVE},
        "ensemble.alpha: 2 is out of range; ",
        "method.alpha: 2 is out of range; ",
        "alpha: 2 is out of range; ",
    ),
    (
        "ensemble",
        ["other"],
        {"llm": {"ensemble_fn": "nope"}},
        "ensemble.ensemble_fn: unknown function 'nope'; ",
        "method.llm.ensemble_fn: unknown function 'nope'; ",
        "ensemble_fn: unknown function 'nope'; ",
    ),
    (
        "ensemble",
        ["other"],
        {"llm": {"ensemble_args": {"x": 1}}},
        "ensemble.ensemble_args.x: the ensemble function",
        "method.llm.ensemble_args.x: the ensemble function",
        "ensemble_args.x: the ensemble function",
    ),
    (
        "ensemble",
        ["brief"],
        {"llm": {"max_model_len": 128}},
        "--max-model-len: 128 is beyond '",
        "method.llm.max_model_len: 128 is beyond '",
        None,
    ),
    (
        "ensemble",
        ["other"],
        {"llm": {"enable_lora": True}},
        "--enable-lora: LoRA adapters cannot be combined with an ensemble; leave the option out",
        "method.llm.enable_lora: LoRA adapters cannot be combined with an ensemble; leave the "
        "option out",
        None,
    ),
    (
        "ensemble",
        ["foreign"],
        {},
        "--model/ensemble.extra_model: the tokenizers of '",
        "method.model/extra_model: the tokenizers of '",
        None,
    ),
    (
        "cd",
        ["foreign"],
        {},
        "--model/ensemble.extra_model: the tokenizers of '",
        "method.model/amateur_model: the tokenizers of '",
        None,
    ),
    (
        "ensemble_chef",
        ["other", "small"],
        {"gamma": [2, 1]},
        "chef.gamma: [2, 1] has 2 entries for 3 members; ",
        "method.gamma: [2, 1] has 2 entries for 3 members; ",
        "gamma: [2, 1] has 2 entries for 3 members; ",
    ),
    (
        "cd_chef",
        ["other"],
        {"gamma": [1, 2], "turn_order": [1, 0]},
        "chef.turn_order: member 1 (counted from 0) cannot be the first",
        "method.turn_order: member 1 (counted from 0) cannot be the first",
        "turn_order: member 1 (counted from 0) cannot be the first",
    ),
    (
        "ensemble_sd",
        ["other", "small"],
        {"gamma": 2, "policy": "sd", "weights": [1, 0, 1]},
        "ensemble.weights: member 1 (counted from 0) has weight 0 and would neither score nor "
        "propose, because with policy sd only the last member proposes; leave the member out, "
        "or put it last",
        "method.weights: member 1 (counted from 0) has weight 0 and would neither score nor "
        "propose, because with policy sd only the last member proposes; leave the member out, "
        "or put it last",
        "weights: member 1 (counted from 0) has weight 0 and would neither score nor "
        "propose, because with policy sd only the last member proposes; leave the member out, "
        "or put it last",
    ),
    (
        "ensemble_chef",
        ["other", "small"],
        {"gamma": 1, "llm": {"max_num_scheduled_tokens": 9999, "max_num_seqs": 4}},
        "--max-num-scheduled-tokens: 9999 is too large for these turns; set it to ",
        "method.llm.max_num_scheduled_tokens: 9999 is too large for these turns; set it to ",
        None,
    ),
    (
        "ensemble",
        ["other"],
        {"llm": {"kv_cache_memory_bytes": 20_000}},
        "--kv-cache-memory-bytes: 20000 bytes hold 39 tokens of all members, and a request may "
        "have 128; raise it to 65536 or more, or lower --max-model-len",
        "method.llm.kv_cache_memory_bytes: 20000 bytes hold 19 tokens of all members, and a "
        "request may have 128; raise it to 131072 or more, or lower method.llm.max_model_len",
        None,
    ),
]


@pytest.mark.parametrize(("name", "others", "asked", "line", "_", "__"), TABLE)
def test_the_engine_names_its_own_field(root, name, others, asked, line, _, __):
    with pytest.raises(ConfigFieldError) as caught:
        through_the_engine(root, others, asked)
    text = str(caught.value)
    assert text.startswith(line)
    assert "\n" not in text
    assert "method." not in text


@pytest.mark.parametrize(("name", "others", "asked", "_", "line", "__"), TABLE)
def test_the_harness_names_the_key(name, others, asked, _, line, __):
    with pytest.raises(ConfigError) as caught:
        through_the_harness(name, others, asked)
    text = str(caught.value)
    assert text.startswith(line)
    assert "\n" not in text
    assert not [word for word in text.split() if word.startswith(("--", "ensemble.", "chef."))]


@pytest.mark.parametrize(
    ("name", "others", "asked", "line"), [(*row[:3], row[5]) for row in TABLE if row[5]]
)
def test_ensemble_args_names_its_argument(root, name, others, asked, line):
    with pytest.raises(ConfigFieldError) as caught:
        through_the_arguments(root, others, asked)
    text = str(caught.value)
    assert text.startswith(line)
    assert "\n" not in text
    assert not [word for word in text.split() if word.startswith(("--", "ensemble.", "chef."))]


def test_flags_in_the_engines_remedy_are_keys_in_the_harnesss(root):
    asked = {"gamma": 1, "llm": {"max_num_scheduled_tokens": 9999, "max_num_seqs": 4}}
    with pytest.raises(ConfigFieldError, match="lower --max-num-seqs or raise --max-num-batched"):
        through_the_engine(root, ["other", "small"], asked)
    keys = r"lower method\.llm\.max_num_seqs or raise method\.llm\.max_num_batched_tokens$"
    with pytest.raises(ConfigError, match=keys):
        through_the_harness("ensemble_chef", ["other", "small"], asked)


def test_wrong_speculation_is_told_by_the_flag(root):
    for asked, line in (
        ({"gamma": 2, "llm": {"window": 3}}, "--speculative-config: turns need "),
        (
            {"gamma": 2, "llm": {"speculative_config": {"kv_cache_dtype": "fp8"}}},
            "--speculative-config.kv_cache_dtype: turns make no use of it; leave it out",
        ),
        ({"gamma": "auto", "llm": {"window": 5}}, "chef.gamma: auto needs --speculative-config."),
    ):
        with pytest.raises(ConfigFieldError) as caught:
            through_the_engine(root, ["small"], asked)
        assert str(caught.value).startswith(line)


# A field, the key of the harness, and the argument of `ensemble_args`.
NAMES = [
    ("--model", "method.model", "model"),
    ("--model/ensemble.extra_model", "method.model/amateur_model", "model/extra_model"),
    ("--max-num-seqs", "method.llm.max_num_seqs", "max_num_seqs"),
    (
        "--speculative-config.num_speculative_tokens",
        "method.llm.speculative_config.num_speculative_tokens",
        "speculative_config.num_speculative_tokens",
    ),
    ("--speculative-config.model", "method.draft_model", "draft_model"),
    ("draft_model", "method.draft_model", "draft_model"),
    ("ensemble.extra_model", "method.amateur_model", "extra_model"),
    (
        "ensemble.ensemble_args.plausibility",
        "method.llm.ensemble_args.plausibility",
        "ensemble_args.plausibility",
    ),
    ("chef.max_gamma", "method.max_gamma", "max_gamma"),
    ("VLLM_USE_V2_MODEL_RUNNER",) * 3,
]


@pytest.mark.parametrize(("field", "key", "_"), NAMES)
def test_keys_of_fields(field, key, _):
    keys = Keys(others="amateur_model", draft_model="method.draft_model")
    assert keys.of_field(field) == key
    # Names in a path are not fields.
    error = ConfigFieldError(field, "see /models/--max-num-seqs and org/chef.gamma, or chef.gamma")
    told = "see /models/--max-num-seqs and org/chef.gamma, or method.gamma"
    assert keys.line(error) == f"{key}: {told}"


@pytest.mark.parametrize(("field", "_", "argument"), NAMES)
def test_arguments_of_fields(field, _, argument):
    assert argument_name(field, has_draft_model=True) == argument
    given = argument_name("--speculative-config.model", has_draft_model=False)
    assert given == "speculative_config.model"


def test_the_line_survives_on_its_way_between_processes():
    error = ConfigFieldError("chef.gamma", "0 is out of range")
    for copy in (pickle.loads(pickle.dumps(error)), ValueError(str(error))):
        assert str(copy) == "chef.gamma: 0 is out of range"
    assert pickle.loads(pickle.dumps(error)).field == "chef.gamma"
