"""From an ensemble to vLLM's engine arguments: the Python API.

It reads the models' configs for their costs and contexts. It loads no weights and starts no engine.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, get_args

from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.usage.usage_lib import UsageContext

from vllm.chef import config as chef_config
from vllm.chef.config import (
    AUTO,
    POLICIES,
    SCHEDULER,
    ChefConfig,
    check_chef,
    depth_schedule,
    resolve_turns,
    scheduled_tokens,
)
from vllm.chef.turns import Turns
from vllm.ensemble_decode import config as ensemble_config
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.errors import ConfigFieldError, reason
from vllm.ensemble_decode.frontend import is_ensemble
from vllm.ensemble_decode.functions import ENSEMBLE_FUNCTIONS
from vllm.ensemble_decode.members import check_ensemble, check_gamma_fits, drafts_alone

logger = init_logger(__name__)

ENSEMBLE_WORKER = "vllm.ensemble_decode.worker.EnsembleDecodeWorker"
CHEF_WORKER = "vllm.chef.worker.ChefWorker"
PLAIN = "plain"


@dataclass(frozen=True)
class ResolvedEnsemble:
    """An ensemble whose turns are known.

    Args:
        engine_args: of vLLM's `EngineArgs`, what the ensemble needs besides `model`.
        chef: the turns as resolved, gammas by member and the order of calls. None: a plain
            ensemble.
        turns: the same turns, as the engine runs them.
        is_shortened: whether the draft model has the shortest context of all models.
    """

    engine_args: dict[str, Any]
    chef: ChefConfig | None
    turns: Turns | None
    is_shortened: bool


def ensemble_args(
    model: str,
    extra_model: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    ensemble_fn: str = "weighted",
    ensemble_target: str | None = None,
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    ensemble_args: Mapping[str, Any] | None = None,
    read_as: str | Sequence[str | None] | None = None,
    policy: str | None = None,
    gamma: int | Sequence[int] | str | None = None,
    max_gamma: int | Sequence[int] | None = None,
    turn_order: Sequence[int] | None = None,
    draft_model: str | None = None,
    **engine_args: Any,
) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, `EngineArgs` or `AsyncEngineArgs` for an ensemble.

    Args:
        model: the first member, a path or hub id.
        extra_model: the other members, one or a list. Each is a path, a hub id, or a mapping of the
            arguments of `MemberSource`: `{"model": ..., "dtype": ..., "quantization": ...}`.
        ensemble_fn, alpha, weights, ensemble_args, read_as: as `EnsembleConfig` has them.
        ensemble_target: as `EnsembleConfig` has it. None: `raw-logits` for functions that
            subtract, else `probs`.
        policy: `plain`, all members run on every token; `chef`, members take turns to propose;
            `sd`, the last member always proposes. None: `chef` where gamma is given without a draft
            model, else `plain`.
        gamma, max_gamma, turn_order: as `ChefConfig` has them. A draft model's gamma is a number.
        draft_model: a model outside of the ensemble. It proposes `gamma` tokens to a plain
            ensemble, through vLLM's own speculation.
        **engine_args: further arguments of vLLM by name, which are passed through. A
            `speculative_config` may hold further options of the speculation that is set here.

    Returns:
        `model`, `worker_cls`, `additional_config`, and what turns or a draft model need.
        `max_model_len` is the longest context that all models have, unless it is given. Where turns
        need a limit of `max_num_scheduled_tokens`, it comes with `max_num_seqs` and
        `max_num_batched_tokens`: as given, or else those that vLLM has for `LLM`.

    Raises:
        ConfigFieldError: one line that names the argument and the remedy. `vllm serve` shows the
            same lines, with `ensemble.alpha` for `alpha`, and `chef.gamma` for `gamma`.
    """
    with _errors_of_arguments(engine_args):
        if policy not in (None, PLAIN, *POLICIES):
            choices = ", ".join((PLAIN, *POLICIES))
            raise ConfigFieldError(
                "chef.policy", f"unknown policy {policy!r}; choose one of {choices}"
            )
        policy = policy or (PLAIN if gamma is None or draft_model is not None else POLICIES[0])
        asked = {"gamma": gamma, "max_gamma": max_gamma, "turn_order": turn_order}
        # Turns are checked before any file of a model is opened.
        chef = draft = None
        if policy != PLAIN:
            chef = _chef(policy, draft_model, **asked)
        elif draft_model is not None:
            _check_no_turns({**asked, "gamma": None})
            draft = draft_config(draft_model, gamma)
        else:
            _check_no_turns(asked)
        parameters = {"alpha": alpha, "weights": weights, "ensemble_args": ensemble_args or {}}
        parameters["read_as"] = read_as
        target = ensemble_target or _default_target(ensemble_fn)
        ensemble = EnsembleConfig(extra_model, ensemble_fn, target, **parameters)
        resolved = resolve_ensemble(model, ensemble, chef, draft, engine_args)
        if resolved.is_shortened:
            logger.warning(context_warning(resolved.engine_args["max_model_len"], draft_model))
        arguments = {"model": model, **engine_args, **resolved.engine_args}
        return _with_limits(arguments, resolved.turns)


def resolve_ensemble(
    model: str,
    ensemble: EnsembleConfig,
    chef: ChefConfig | None,
    draft: Mapping[str, Any] | None,
    engine_args: Mapping[str, Any],
) -> ResolvedEnsemble:
    """The turns and the engine arguments, without the limits of a step.

    Those limits depend on values that may be set later.

    Args:
        chef: the turns as asked for; None: a plain ensemble.
        draft: the speculation of a draft model outside a plain ensemble (`draft_config`), or None.
        engine_args: the user's. They are read and not passed through.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    check_types(engine_args)
    configs = [model_config(model, "--model", engine_args)]
    shared = {"trust_remote_code": engine_args.get("trust_remote_code")}
    configs += [
        model_config(source.model, "ensemble.extra_model", {**shared, **source.options})
        for source in ensemble.extra_model
    ]
    own_args: dict[str, Any] = {"worker_cls": ENSEMBLE_WORKER}
    additional = {ensemble_config.CONFIG_KEY: ensemble.to_dict()}
    drafts, turns, speculative = [], None, draft
    if draft is not None:
        drafts = [model_config(draft["model"], "draft_model", shared)]
    if chef is not None:
        chef, turns = resolve_turns(chef, ensemble, configs)
        own_args["worker_cls"] = CHEF_WORKER
        additional[chef_config.CONFIG_KEY] = chef.to_dict()
        speculative = _carrier(model, ensemble, configs, turns)
        own_args["scheduler_cls"] = SCHEDULER
        if chef.is_adaptive:
            speculative["num_speculative_tokens_per_batch_size"] = depth_schedule(turns)
    if any(config.is_hybrid for config in configs):
        _add_cache_of_states(own_args, engine_args, configs[0])
    if configs[0].is_multimodal_model:
        own_args["language_model_only"] = True
    for name in ("worker_cls", "scheduler_cls", "language_model_only"):
        given = engine_args.get(name)
        # "auto" is vLLM's default of `worker_cls`.
        if name in own_args and given not in (None, "auto", own_args[name]):
            raise ConfigFieldError(
                f"--{name.replace('_', '-')}",
                f"{given!r} contradicts the ensemble, which has its own; leave it out",
            )
    own_args["additional_config"] = _additional_config(engine_args, additional)
    if speculative is not None:
        own_args["speculative_config"] = _speculative_config(engine_args, speculative)
    is_shortened = False
    if engine_args.get("max_model_len") is None:
        own_args["max_model_len"], is_shortened = common_context(configs, drafts)
    longest = {**engine_args, **own_args}["max_model_len"]
    if speculative is not None:
        is_adaptive = chef is not None and chef.is_adaptive
        check_gamma_fits(
            speculative["num_speculative_tokens"],
            longest,
            "chef.max_gamma" if is_adaptive else "chef.gamma",
        )
    return ResolvedEnsemble(own_args, chef, turns, is_shortened)


def check_types(engine_args: Mapping[str, Any]) -> None:
    """Refuse arguments that are no numbers or mappings where vLLM takes such.

    vLLM checks the types of most arguments itself, but it computes with some of them before.

    Raises:
        ConfigFieldError: one line that names the argument.
    """
    for name in ("additional_config", "speculative_config"):
        _given_mapping(engine_args, name)
    for field in fields(EngineArgs):
        value, kinds = engine_args.get(field.name), {*get_args(field.type)} or {field.type}
        if value is None or not kinds <= {int, float, bool, type(None)}:
            continue
        takes = Real if float in kinds else Integral if int in kinds else bool
        if not isinstance(value, takes) or (isinstance(value, bool) and bool not in kinds):
            words = {Real: "a number", Integral: "an integer", bool: "true or false"}[takes]
            raise ConfigFieldError(
                f"--{field.name.replace('_', '-')}", f"{value!r} must be {words}"
            )


def _add_cache_of_states(
    own_args: dict[str, Any], engine_args: Mapping[str, Any], first: ModelConfig
) -> None:
    """Arguments that vLLM would set itself if its own model had recurrent layers."""
    if engine_args.get("enable_prefix_caching") is None:
        own_args["enable_prefix_caching"] = False
    elif (
        engine_args["enable_prefix_caching"]
        and engine_args.get("mamba_cache_mode") is None
        and not first.is_hybrid
    ):
        own_args["mamba_cache_mode"] = "align"


def model_config(path: str, field: str, engine_args: Mapping[str, Any]) -> ModelConfig:
    """vLLM's configuration of a model. No weights are loaded.

    Raises:
        ConfigFieldError: of `field`, where there is no such model, or none that vLLM knows.
    """
    if _is_visual(path) and importlib.util.find_spec("torchvision") is None:
        # vLLM would print pages before it fails.
        raise ConfigFieldError(
            field, f"'{path}' is multimodal, for which vLLM needs torchvision; install it"
        )
    try:
        return ModelConfig(
            model=path,
            trust_remote_code=bool(engine_args.get("trust_remote_code")),
            revision=engine_args.get("revision"),
            hf_overrides=engine_args.get("hf_overrides") or {},
            language_model_only=True,
        )
    except (ValueError, OSError) as error:  # OSError: files of a model that are missing
        raise ConfigFieldError(field, f"'{path}': {reason(error)}") from error


def _is_visual(path: str) -> bool:
    try:
        config = get_hf_file_to_dict("config.json", path) or {}
    except (ValueError, OSError):  # `ModelConfig` says why there is none
        return False
    return any(key.endswith("vision_config") for key in config)


def common_context(
    configs: Sequence[ModelConfig], drafts: Sequence[ModelConfig]
) -> tuple[int, bool]:
    """The longest context that all models have, and whether it is a draft model's alone.

    A draft model counts as well: it would read past its last position.
    """
    of_members = min(config.max_model_len for config in configs)
    longest = min([of_members, *(config.max_model_len for config in drafts)])
    return longest, longest < of_members


def context_warning(max_model_len: int, draft_model: str) -> str:
    return (
        f"the draft model '{draft_model}' limits the context to {max_model_len} tokens; for a "
        "longer context, choose another draft model"
    )


def draft_config(draft_model: str, gamma: int | None) -> dict[str, Any]:
    """vLLM's `speculative_config` of a draft model outside of an ensemble.

    Raises:
        ConfigFieldError: of `chef.gamma`, the tokens that it proposes at a time.
    """
    if type(gamma) is not int or gamma < 1:
        raise ConfigFieldError(
            "chef.gamma", f"{gamma!r} is out of range; with a draft model it must be 1 or more"
        )
    # Where tokens are sampled, draws are accepted more often than the likeliest token.
    return {**speculation(draft_model, gamma), "draft_sample_method": "probabilistic"}


def speculation(draft_model: str, num_tokens: int) -> dict[str, Any]:
    """vLLM's `speculative_config` of a draft model, with vLLM's own defaults."""
    return {"method": "draft_model", "model": draft_model, "num_speculative_tokens": num_tokens}


@contextmanager
def _errors_of_arguments(engine_args: Mapping[str, Any]) -> Iterator[None]:
    """Let errors of bad input name the arguments of `ensemble_args`."""
    try:
        yield
    except ConfigFieldError as error:
        names_model = "model" in (engine_args.get("speculative_config") or ())
        renamed = error.renamed(partial(argument_name, has_draft_model=not names_model))
        raise renamed from error.__cause__


def argument_name(field: str, has_draft_model: bool) -> str:
    """The argument of `ensemble_args` that sets a field of the engine.

    Args:
        has_draft_model: whether the argument `draft_model` names a model that only proposes; else
            it is the model of the user's `speculative_config`.
    """
    if field == "--speculative-config.model" and has_draft_model:
        return "draft_model"
    names = (name.removeprefix("ensemble.").removeprefix("chef.") for name in field.split("/"))
    return "/".join(
        name.removeprefix("--").replace("-", "_") if name.startswith("--") else name
        for name in names
    )


def _default_target(ensemble_fn: object) -> str:
    known = ENSEMBLE_FUNCTIONS.get(ensemble_fn) if isinstance(ensemble_fn, str) else None
    return "raw-logits" if known is not None and known.subtracts else "probs"


def _check_no_turns(asked: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if value is not None:
            raise ConfigFieldError(
                f"chef.{name}",
                f"{value!r} has no effect with policy '{PLAIN}', which has no turns; leave it out, "
                f"or choose one of {', '.join(POLICIES)}",
            )


def _chef(
    policy: str,
    draft_model: str | None,
    gamma: int | Sequence[int] | str | None,
    max_gamma: int | Sequence[int] | None,
    turn_order: Sequence[int] | None,
) -> ChefConfig:
    if draft_model is not None:
        raise ConfigFieldError(
            "draft_model",
            f"'{draft_model}' cannot be combined with policy '{policy}'; leave one of them out",
        )
    config = ChefConfig(gamma, policy, turn_order, max_gamma)
    if max_gamma is not None and not config.is_adaptive:
        raise ConfigFieldError(
            "chef.max_gamma",
            f'{max_gamma!r} has no effect, because gamma is {gamma!r} and not "{AUTO}"; '
            "leave it out",
        )
    return config


def _carrier(
    model: str, ensemble: EnsembleConfig, configs: Sequence[ModelConfig], turns: Turns
) -> dict[str, Any]:
    """How vLLM carries the tokens that are pending from step to step."""
    found = speculation(_carrying_model(model, ensemble, configs, turns), turns.window)
    if any(turns.max_tokens(turns.decidable(turn)) > 1 for turn in range(len(turns))):
        # At temperatures above 0, more is accepted if tokens are judged together.
        found["rejection_sample_method"] = "block"
    return found


def _carrying_model(
    model: str, ensemble: EnsembleConfig, configs: Sequence[ModelConfig], turns: Turns
) -> str:
    """A member that vLLM can take for a draft model: the last one, if possible.

    vLLM requires that the draft model has as many rows as the target. vLLM knows no options of it,
    and does not load it here.
    """
    names = [model, *(None if s.options else s.model for s in ensemble.extra_model)]
    last, rows = turns[-1].members[0], configs[0].get_vocab_size()
    for member in (last, *range(len(configs))):
        config = configs[member]
        if names[member] and config.get_vocab_size() == rows and drafts_alone(config):
            return names[member]
    raise ConfigFieldError(
        "--model/ensemble.extra_model",
        "turns need a member that vLLM can take for a draft model, with as many rows as the first "
        f"member; vLLM takes '{model}' for layers that predict several tokens; add a member of "
        "another architecture, or use a plain ensemble",
    )


def _additional_config(engine_args: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    given = _given_mapping(engine_args, "additional_config")
    for key in (ensemble_config.CONFIG_KEY, chef_config.CONFIG_KEY):
        if key in given:
            raise ConfigFieldError(
                f"--additional-config.{key}", "the arguments of the ensemble set it; leave it out"
            )
    return {**given, **ours}


def _given_mapping(engine_args: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = engine_args.get(name) or {}
    if not isinstance(given, Mapping):
        raise ConfigFieldError(
            f"--{name.replace('_', '-')}", f"{given!r} is not a mapping of options to values"
        )
    return given


def _speculative_config(engine_args: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The speculation that carries proposals, with further options of the user's."""
    given = _given_mapping(engine_args, "speculative_config")
    for key in given:
        is_set = key in ours and key not in ("draft_sample_method", "rejection_sample_method")
        if is_set and given[key] != ours[key]:
            raise ConfigFieldError(
                f"--speculative-config.{key}",
                f"{given[key]!r} contradicts the ensemble, which sets {ours[key]!r}; leave it out",
            )
    return {**ours, **given}


def _with_limits(arguments: dict[str, Any], turns: Turns | None) -> dict[str, Any]:
    """The engine arguments, with the limits of a step that turns need.

    vLLM's defaults depend on what starts the engine. So where turns need a limit, all three are
    set together.

    Raises:
        ConfigFieldError: what vLLM or the ensemble would refuse when the engine starts.
    """
    try:
        config = engine_config(EngineArgs(**arguments), turns)
    except ConfigFieldError:
        raise
    except ValueError as error:
        is_speculative = getattr(error, "title", "") == "SpeculativeConfig"
        default = "speculative_config" if is_speculative else "model"
        name = named_argument(error, arguments) or default
        raise ConfigFieldError(f"--{name.replace('_', '-')}", reason(error)) from error
    return arguments | step_limits(arguments, config, turns)


def step_limits(
    arguments: Mapping[str, Any], config: VllmConfig, turns: Turns | None
) -> dict[str, Any]:
    """The engine arguments that limit a step, where turns need a limit and `arguments` have none.

    Args:
        config: the configuration that `arguments` give (`engine_config`).
    """
    is_open = arguments.get("max_num_scheduled_tokens") is None
    if turns is None or not is_open or turns.num_new(len(turns) - 1) <= 1:
        return {}
    names = ("max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens")
    return {name: getattr(config.scheduler_config, name) for name in names}


def engine_config(engine_args: EngineArgs, turns: Turns | None) -> VllmConfig:
    """vLLM's configuration of an engine, checked; for an ensemble, with the limits of its turns.

    Args:
        engine_args: of an ensemble, or of any other engine.
        turns: of the ensemble (`ResolvedEnsemble.turns`). None: there are none.

    Raises:
        ConfigFieldError: what the ensemble would refuse when the engine starts.
        ValueError: what vLLM would refuse.
    """
    config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
    if turns is not None:
        if engine_args.max_num_scheduled_tokens is None:
            limit = scheduled_tokens(config, turns)
            config.scheduler_config.max_num_scheduled_tokens = limit
        check_chef(config)
    elif is_ensemble(config):
        check_ensemble(config)
    return config


def named_argument(error: Exception, engine_args: Mapping[str, Any]) -> str | None:
    """The engine argument that an error of vLLM is about. None if the error does not tell.

    pydantic names the field of a configuration. Other errors may mention an argument in their text.
    """
    names = sorted(engine_args.keys() - {"model"}, key=len, reverse=True)
    details = error.errors()[0] if hasattr(error, "errors") else {}
    field = next(iter(details.get("loc", ())), None)
    if field is None:
        return next((name for name in names if name in reason(error)), None)
    if error.title == "SpeculativeConfig":
        return f"speculative_config.{field}"
    # Some arguments have a longer name than their field: `kv_cache_dtype` for `cache_dtype`.
    return next((name for name in names if name.endswith(f"_{field}")), field)
