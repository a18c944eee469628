"""vLLM's configuration for a method, with every possible check before weights are loaded.

This module knows the checks of vLLM and of the ensemble. It also knows which of our keys an error
is about.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError, one_line, shortened
from harness.fields import Keys
from harness.methods import MethodSpec, keys_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROPOSER = "--speculative-config.model"
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def make_engine_config(spec: MethodSpec, seed: int, num_slots: int) -> "VllmConfig":
    """The configuration of an engine that runs `spec`. No weight is loaded.

    Args:
        num_slots: the most requests in flight. If the user leaves `max_num_seqs` open, vLLM need
            not make room for more.

    Raises:
        ConfigError: vLLM or the ensemble cannot run this.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm.chef.arguments import check_types, engine_config
    from vllm.ensemble_decode import ConfigFieldError
    from vllm.ensemble_decode.frontend import is_ensemble
    from vllm.ensemble_decode.members import check_draft_model, check_drafts_alone
    from vllm.ensemble_decode.recurrent import check_speculation

    arguments = {"use_tqdm_on_load": False, **spec.engine_args, "seed": seed}
    _check_known("method.llm", arguments, EngineArgs.__dataclass_fields__)
    if "speculative_config" in arguments and spec.turns is None:
        arguments["per_request_spec_decode_metrics"] = "detailed"
    try:
        check_types(arguments)
        engine_args = EngineArgs(**arguments)
        if "max_num_seqs" not in arguments:
            _, defaults = EngineArgs.get_batch_defaults(world_size=1)
            num_slots = min(num_slots, defaults[UsageContext.LLM_CLASS])
            engine_args.max_num_seqs = max(num_slots, _num_depths(arguments))
        config = engine_config(engine_args, spec.turns)
        if not is_ensemble(config) and config.speculative_config is not None:
            if arguments["speculative_config"].get("method") == "draft_model":
                check_drafts_alone(config)
            check_draft_model(config)
            check_speculation(config, [config.model_config], "--model")
            _check_stock_draft(config, _keys(spec).of_field(PROPOSER))
    except ConfigFieldError as error:
        raise ConfigError(shortened(_keys(spec).line(error))) from error
    except Exception as error:  # vLLM's checks raise what they like
        raise ConfigError(_with_key(error, spec)) from error
    if config.model_config.runner_type != "generate" or config.model_config.is_encoder_decoder:
        raise ConfigError(
            f"method.model: '{config.model_config.model}' is no decoder-only language model; "
            "choose one that generates text from a prompt"
        )
    return config


def check_sampling_params(params: Mapping[str, Any], config: "VllmConfig", tokenizer: Any) -> None:
    """Raise ConfigError for sampling parameters that an engine of `config` would refuse."""
    from vllm import SamplingParams

    from vllm.ensemble_decode.frontend import is_ensemble

    # With an ensemble no parameter is refused because of speculation; see
    # vllm.ensemble_decode.frontend.
    speculative_config = None if is_ensemble(config) else config.speculative_config

    def check(params: Mapping[str, Any]) -> None:
        SamplingParams(**params).verify(
            config.model_config,
            speculative_config,
            config.structured_outputs_config,
            tokenizer,
        )

    known = [key for key in SamplingParams.__struct_fields__ if not key.startswith("_")]
    _check_known("method.generate", params, known)
    try:
        check(params)
    except Exception as error:  # vLLM's own errors, and those that a value of a wrong type causes
        culprit = _culprit(check, params)
        key = "" if culprit is None else f".{culprit}"
        why = one_line(error) or f"vLLM does not take {params.get(culprit)!r}"
        raise ConfigError(f"method.generate{key}: {why}") from error


def _num_depths(arguments: Mapping[str, Any]) -> int:
    """How many depths `gamma: auto` chooses from; vLLM prepares one per number of requests."""
    speculative = arguments.get("speculative_config") or {}
    return len(speculative.get("num_speculative_tokens_per_batch_size") or [])


def _check_stock_draft(config: "VllmConfig", key: str) -> None:
    """Find what vLLM's own speculation cannot do; an ensemble loads drafts differently."""
    from vllm import ModelRegistry

    if config.speculative_config.method != "draft_model":
        return
    draft = config.speculative_config.draft_model_config
    if draft.is_moe and not config.model_config.is_moe:
        raise ConfigError(
            f"{key}: '{draft.model}' has experts, which vLLM's speculation does not prepare for a "
            "model without; choose a draft model without experts"
        )
    model_cls, _ = ModelRegistry.resolve_model_cls(draft.architectures, draft)
    _, *parameters = inspect.signature(model_cls.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in _BY_NAME]
    if set(needed) - {"input_ids", "positions"}:
        raise ConfigError(
            f"{key}: vLLM's speculation cannot call '{model_cls.__name__}', which has no default "
            f"for {needed[-1]}; choose a draft model of another architecture"
        )


def _keys(spec: MethodSpec) -> Keys:
    # If members take turns, the draft model that vLLM sees is one of them.
    return keys_of(spec.name, "draft_model" in spec.parameters or spec.turns is not None)


def _with_key(error: Exception, spec: MethodSpec) -> str:
    """An error of vLLM in one line that begins with one of our keys; vLLM does not know these."""
    from vllm.chef.arguments import named_argument

    if isinstance(error, ConfigError):
        return one_line(error)
    # Errors of values that nobody has checked say little without their kind.
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    text = f"{kind}{one_line(error)}"
    # Otherwise the key comes from the class of the configuration.
    if field := named_argument(error, spec.engine_args):
        return f"method.llm.{field}: {text}"
    draft = "method.llm.speculative_config"
    if "draft_model" in spec.parameters:
        draft = "method.draft_model"
    elif spec.turns is not None:  # the draft model that vLLM sees is a member
        draft = _keys(spec).of_field("--model/ensemble.extra_model")
    classes = {"ModelConfig": "method.model", "SpeculativeConfig": draft}
    return f"{classes.get(getattr(error, 'title', ''), 'method.llm')}: {text}"


def _check_known(prefix: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{prefix}.{key}: vLLM has no such parameter; leave it out")


def _culprit(check: Callable[[Mapping[str, Any]], None], params: Mapping[str, Any]) -> str | None:
    """The parameter whose removal lets the check pass."""
    for culprit in params:
        try:
            check({key: value for key, value in params.items() if key != culprit})
        except Exception:
            continue
        return culprit
    return None
