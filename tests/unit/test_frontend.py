"""Sampling parameters that vLLM's front end refuses beside speculation, and takes for ensembles."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from tiny_models import llama_config, save_model
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm.chef import ensemble_args, register
from vllm.ensemble_decode import frontend
from vllm.ensemble_decode.errors import ConfigFieldError

PARAMS = [SamplingParams(min_p=0.5), SamplingParams(logit_bias={7: 4.0})]
DRAFT = {"method": "draft_model", "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "0", llama_config(), seed=0)


def check(arguments: EngineArgs, params: SamplingParams) -> None:
    """What vLLM's front end does with a request's parameters first."""
    config = arguments.create_engine_config()
    assert config.speculative_config is not None
    InputProcessor(config)._validate_params(params, ("generate",))


@pytest.mark.parametrize("params", PARAMS, ids=["min_p", "logit_bias"])
@pytest.mark.parametrize("arguments_of", [EngineArgs, AsyncEngineArgs])
@pytest.mark.parametrize("asked", [dict(gamma=2), dict(draft_model=True, gamma=2)])
def test_ensembles_take_all_parameters(model, arguments_of, asked, params):
    if "draft_model" in asked:
        asked = {**asked, "draft_model": model}
    found = ensemble_args(model, model, skip_tokenizer_init=True, **asked)
    check(arguments_of(**found), params)


@pytest.mark.parametrize("params", PARAMS, ids=["min_p", "logit_bias"])
def test_a_stock_engine_refuses_what_it_did(model, params):
    speculative = {**DRAFT, "model": model}
    # The worker makes an ensemble, not a key of this name.
    arguments = EngineArgs(
        model,
        skip_tokenizer_init=True,
        speculative_config=speculative,
        additional_config={"ensemble": {"extra_model": [model]}},
    )
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        check(arguments, params)


def test_other_parameters_are_checked_as_before(model):
    found = ensemble_args(model, model, skip_tokenizer_init=True, gamma=2)
    with pytest.raises(VLLMValidationError, match="logprobs"):
        check(EngineArgs(**found), SamplingParams(logprobs=10_000))


@pytest.mark.parametrize("asked", [{}, dict(gamma=2)])
def test_the_front_end_checks_an_ensemble_before_it_starts_an_engine(model, tmp_path, asked):
    llama_config(max_position_embeddings=32).save_pretrained(tmp_path / "short")
    found = ensemble_args(model, str(tmp_path / "short"), skip_tokenizer_init=True, **asked)
    InputProcessor(EngineArgs(**found).create_engine_config())
    config = EngineArgs(**found | dict(max_model_len=64)).create_engine_config()
    with pytest.raises(ConfigFieldError, match="^--max-model-len: 64 is beyond '.*short', whose"):
        InputProcessor(config)


@pytest.mark.parametrize(
    ("name", "file", "is_vllms"),
    [
        (None, "/env/bin/vllm", True),
        ("vllm.entrypoints.openai.api_server", "api_server.py", True),
        (None, "/home/user/vllm.py", False),
        ("pytest.__main__", "__main__.py", False),
        (None, None, False),  # a shell of Python
    ],
)
def test_vllms_own_programs_end_with_the_line_alone(
    model, tmp_path, monkeypatch, name, file, is_vllms
):
    main = ModuleType("__main__")
    main.__spec__ = None if name is None else ModuleSpec(name, None)
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    llama_config(max_position_embeddings=32).save_pretrained(tmp_path / "short")
    found = ensemble_args(
        model, str(tmp_path / "short"), skip_tokenizer_init=True, max_model_len=32
    )
    config = EngineArgs(**found).create_engine_config()
    config.model_config.max_model_len = 64
    with pytest.raises(SystemExit if is_vllms else ConfigFieldError) as caught:
        frontend.check_engine(config)
    line = str(caught.value)
    assert line.startswith("error: --max-model-len: 64" if is_vllms else "--max-model-len: 64")


def test_only_processes_with_engine_arguments_import_the_front_end(monkeypatch):
    calls = []
    monkeypatch.setattr(frontend, "allow_all_sampling_params", lambda: calls.append(1))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "vllm.engine.arg_utils")
        register()
    assert not calls
    register()
    assert calls
