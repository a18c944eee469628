"""`EnsembleConfig`: what it takes, what it refuses, and that it survives the way to a worker."""

import json

import pytest
from tiny_models import llama_config, save_model
from vllm.config.watermarking import WatermarkConfig
from vllm.engine.arg_utils import EngineArgs

from vllm.ensemble_decode import ConfigFieldError, EnsembleConfig
from vllm.ensemble_decode.config import MemberSource
from vllm.ensemble_decode.member_config import loading_config
from vllm.ensemble_decode.members import check_ensemble


def test_round_trip_through_json():
    config = EnsembleConfig(
        extra_model=("a", "b"),
        ensemble_fn="contrastive_plausible",
        ensemble_target="logits",
        alpha=0.2,
        ensemble_args={"plausibility": 0.3},
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert EnsembleConfig.from_additional_config({"ensemble": data}) == config


def test_one_extra_model_may_be_a_string():
    assert EnsembleConfig(extra_model="a").extra_model == (MemberSource("a"),)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (dict(ensemble_fn="no_such"), "ensemble.ensemble_fn"),
        (dict(ensemble_fn="no.such.module:f"), "ensemble.ensemble_fn"),
        (dict(ensemble_fn="math:pi"), "ensemble.ensemble_fn"),
        (dict(ensemble_fn=None), "ensemble.ensemble_fn"),
        (dict(ensemble_fn=["weighted"]), "ensemble.ensemble_fn"),
        (dict(ensemble_args="power"), "ensemble.ensemble_args"),
        (dict(read_as=["a"]), "ensemble.read_as"),
        (dict(read_as=["a", 3]), "ensemble.read_as"),
        (dict(read_as=3), "ensemble.read_as"),
        (dict(ensemble_fn="product", ensemble_args={"x": 1}), "ensemble.ensemble_args.x"),
        (dict(ensemble_target="logit"), "ensemble.ensemble_target"),
        (dict(weights=(0.5, 0.3, 0.2)), "ensemble.weights"),
        (dict(weights=(-1, 2)), "ensemble.weights"),
        (dict(weights=(0, 0)), "ensemble.weights"),
        (dict(weights=("x", "y")), "ensemble.weights"),
        (dict(weights=(float("nan"), 1)), "ensemble.weights"),
        (dict(alpha=0.1), "ensemble.alpha"),  # "weighted" has no alpha
        (dict(ensemble_fn="contrastive", alpha=-0.1), "ensemble.alpha"),
        (dict(ensemble_fn="contrastive", alpha=1.1), "ensemble.alpha"),
        (dict(ensemble_fn="contrastive", alpha="big"), "ensemble.alpha"),
        (dict(ensemble_fn="contrastive", weights=(1, 1)), "ensemble.weights"),
        (
            dict(ensemble_fn="contrastive_plausible", ensemble_args={"plausibility": 0}),
            "ensemble.ensemble_args.plausibility",
        ),
        (dict(extra_model=()), "ensemble.extra_model"),
    ],
)
def test_bad_values_name_their_key_in_one_line(arguments, key):
    with pytest.raises(ValueError) as error:
        EnsembleConfig(**{"extra_model": ("a",), **arguments})
    assert str(error.value).startswith(f"{key}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("additional", [{}, None, {"ensemble": 3}, {"ensemble": {}}])
def test_a_missing_config_is_refused(additional):
    with pytest.raises(ValueError, match=r"^ensemble(\.extra_model)?: missing; "):
        EnsembleConfig.from_additional_config(additional)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"^ensemble\.weight: unknown key"):
        EnsembleConfig.from_dict({"extra_model": ["a"], "weight": [1, 1]})


def test_a_model_and_its_second_self_are_compiled_apart(tmp_path):
    """vLLM stores compiled code by the configuration's hash, which includes the names of layers."""
    path = save_model(tmp_path / "llama", llama_config(), seed=0)
    arguments = EngineArgs(
        model=path,
        skip_tokenizer_init=True,
        additional_config={"ensemble": {"extra_model": [path, path]}},
    )
    config = arguments.create_engine_config()
    _, members = check_ensemble(config)
    hashes = {config.compute_hash()}
    hashes |= {
        loading_config(config, members[index], {"member": index}).compute_hash() for index in (1, 2)
    }
    assert len(hashes) == 3


def test_traces_are_not_replayed_under_speculation(tmp_path):
    """vLLM refuses that for each request; our front end would let it through."""
    path = save_model(tmp_path / "llama", llama_config(), seed=0)
    arguments = dict(
        skip_tokenizer_init=True, additional_config={"ensemble": {"extra_model": [path]}}
    )
    draft = {"method": "draft_model", "model": path, "num_speculative_tokens": 1}
    check_ensemble(EngineArgs(path, **arguments, enable_trace_replay=True).create_engine_config())
    config = EngineArgs(
        path, **arguments, enable_trace_replay=True, speculative_config=draft
    ).create_engine_config()
    with pytest.raises(ValueError, match=r"^--enable-trace-replay: .*; leave"):
        check_ensemble(config)


def test_watermarks_are_refused(tmp_path):
    path = save_model(tmp_path / "llama", llama_config(), seed=0)
    config = EngineArgs(
        path, skip_tokenizer_init=True, additional_config={"ensemble": {"extra_model": [path]}}
    ).create_engine_config()
    check_ensemble(config)
    config.watermark_config = WatermarkConfig(key=1)
    with pytest.raises(ValueError, match=r"^--watermark-config: watermarks cannot be combined"):
        check_ensemble(config)


def test_members_that_are_loaded_in_a_way_of_their_own():
    options = {"dtype": "float16", "quantization": "fp8", "revision": "abc"}
    config = EnsembleConfig(["a", {"model": "b", **options}, {"model": "c"}])
    assert [source.model for source in config.extra_model] == ["a", "b", "c"]
    assert [source.options for source in config.extra_model] == [{}, options, {}]
    data = config.to_dict()
    assert data["extra_model"] == ["a", {"model": "b", **options}, "c"]
    assert EnsembleConfig.from_dict(data) == config
    assert EnsembleConfig({"model": "b", **options}).extra_model == (config.extra_model[1],)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"model": "a", "dtyp": "x"},
            r"ensemble\.extra_model\.dtyp: unknown key; known are model",
        ),
        ({"dtype": "float16"}, r"ensemble\.extra_model: None is not a model; give a path or"),
        (5, r"ensemble\.extra_model: 5 is not a model; give a path or a hub id"),
        ("", r"ensemble\.extra_model: '' is not a model"),
    ],
)
def test_entries_that_are_no_members(entry, line):
    with pytest.raises(ConfigFieldError, match=f"^{line}"):
        EnsembleConfig([entry])
