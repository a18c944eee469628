"""The methods: what each one asks of vLLM, from its configuration to engine arguments.

Plain data in, plain data out. This module starts no engine and loads only model configs.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import ConfigError, one_line
from harness.models import resolve_member, resolve_model

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm.chef.turns import Turns
    from vllm.ensemble_decode import EnsembleConfig

logger = logging.getLogger(__name__)

ENSEMBLE_WORKER = "vllm.ensemble_decode.worker.EnsembleDecodeWorker"
CHEF_WORKER = "vllm.chef.worker.ChefWorker"
# Keys under method.llm that belong to the ensemble and not to vLLM.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args")
# Keys under method.llm that every run sets itself: there is one engine, and its prompts are text.
RUN_KEYS = (
    "model",
    "seed",
    "skip_tokenizer_init",
    "data_parallel_size",
    "per_request_spec_decode_metrics",
)


@dataclass(frozen=True)
class MethodSpec:
    """What a method runs.

    Args:
        name: the name of the method.
        members: the models whose distributions decide, resolved, in the user's order.
        engine_args: vLLM engine arguments by name.
        sampling_params: vLLM sampling parameters by name; only those that are set.
        parameters: the method's own parameters, for the record (alpha, weights, gamma, draft_model,
            max_gamma, turn_order).
        turns: the configuration of members that take turns; None for all other methods.
    """

    name: str
    members: tuple[str, ...]
    engine_args: dict[str, Any]
    sampling_params: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    turns: "Turns | None" = None


def make_spec(method: Mapping[str, Any]) -> MethodSpec:
    """The specification of `method`, the configuration group as plain data.

    Raises:
        ConfigError: one line that names the key and the remedy.
    """
    name = method.get("name")
    if name not in METHODS:
        raise ConfigError(f"method: unknown method '{name}'; choose one of {', '.join(METHODS)}")
    keys = {"name", *METHODS[name].keys, *COMMON_KEYS}
    for key in method:
        if key not in keys:
            raise ConfigError(
                f"method.{key}: {name} has no such key; it has {', '.join(sorted(keys))}"
            )
    # Checks without vLLM come first: importing vLLM takes longer than all checks.
    _check_temperature(method["generate"].get("temperature"))
    return METHODS[name].make_spec(method)


def _large_model(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    return _spec(method, (model,), {}, {})


def _sd(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    draft_model = resolve_model(method["draft_model"], "method.draft_model")
    gamma = _check_gamma(method["gamma"])
    speculative_config = {
        "method": "draft_model",
        "model": draft_model,
        "num_speculative_tokens": gamma,
    }
    named = [("method.model", model), ("method.draft_model", draft_model)]
    engine_args = {
        "speculative_config": speculative_config,
        **_context(method, named, (model, draft_model)),
    }
    return _spec(method, (model,), engine_args, {"draft_model": draft_model, "gamma": gamma})


def _plain(method: Mapping[str, Any]) -> MethodSpec:
    """All members score every token. A draft model, if given, proposes only and has no say."""
    named = _named_members(method)
    proposer, parameters = {}, {}
    if method.get("draft_model") is not None:
        if method["llm"].get("speculative_config") is not None:
            raise ConfigError(
                "method.draft_model: method.llm.speculative_config asks for a proposer as well; "
                "leave one of them out"
            )
        gamma = _check_gamma(method.get("gamma"))
        draft_model = resolve_model(method["draft_model"], "method.draft_model")
        parameters = {"draft_model": draft_model, "gamma": gamma}
        proposer["speculative_config"] = {
            "method": "draft_model",
            "model": draft_model,
            "num_speculative_tokens": gamma,
            # When the target samples, draws of the draft model are accepted more often than its
            # likeliest token.
            "draft_sample_method": "probabilistic",
        }
    members = _resolve_members(named)
    ensemble, recorded = _ensemble(method, members)
    models = members
    if "draft_model" in parameters:
        named, models = [*named, ("method.draft_model", draft_model)], (*members, draft_model)
    engine_args = {
        "worker_cls": ENSEMBLE_WORKER,
        "additional_config": {"ensemble": ensemble.to_dict()},
        **proposer,
        **_context(method, named, models),
    }
    return _spec(method, members, engine_args, {**recorded, **parameters})


def _by_turns(policy: str) -> Callable[[Mapping[str, Any]], MethodSpec]:
    """Members propose in turn (`chef`), or the last member always proposes (`sd`)."""

    def make_spec(method: Mapping[str, Any]) -> MethodSpec:
        named = _named_members(method)
        members = _resolve_members(named)

        from vllm.chef.config import CONFIG_KEY, SCHEDULER, ChefConfig, depth_schedule

        with _errors_of_keys():
            chef = ChefConfig(method["gamma"], policy, method.get("turn_order"))
            if chef.is_adaptive:
                chef = dataclasses.replace(chef, max_gamma=method.get("max_gamma"))
        ensemble, parameters = _ensemble(method, members)
        configs = _model_configs(method, named, members)
        turns = _make_turns(chef, configs, ensemble)
        # vLLM accepts only a draft model with the target's number of rows. vLLM loads neither
        # candidate.
        carrier = turns[-1].members[0]
        if configs[carrier].get_vocab_size() != configs[0].get_vocab_size():
            carrier = 0
        engine_args = {
            "worker_cls": CHEF_WORKER,
            "additional_config": {"ensemble": ensemble.to_dict(), CONFIG_KEY: chef.to_dict()},
            # vLLM uses this to carry the pending tokens from step to step.
            "speculative_config": {
                "method": "draft_model",
                "model": members[carrier],
                "num_speculative_tokens": turns.window,
            },
        }
        if chef.is_adaptive:
            engine_args["scheduler_cls"] = SCHEDULER
            schedule = {"num_speculative_tokens_per_batch_size": depth_schedule(turns)}
            engine_args["speculative_config"] |= schedule
        if method["llm"].get("max_model_len") is None:
            engine_args["max_model_len"] = _longest_context(configs)
        order = [(member, turn.gamma) for turn in turns for member in turn.members]
        max_gamma = chef.gamma_limit if policy == "sd" else [gamma for _, gamma in sorted(order)]
        gammas = (
            {"gamma": chef.gamma, "max_gamma": max_gamma}
            if chef.is_adaptive
            else {"gamma": max_gamma}
        )
        parameters |= {**gammas, "turn_order": [member for member, _ in order]}
        return _spec(method, members, engine_args, parameters, turns)

    return make_spec


class Method(NamedTuple):
    """How a method is made, and which keys it takes besides COMMON_KEYS."""

    make_spec: Callable[[Mapping[str, Any]], MethodSpec]
    keys: tuple[str, ...]


COMMON_KEYS = ("model", "generate", "llm")
METHODS = {
    "large_model": Method(_large_model, ()),
    "sd": Method(_sd, ("draft_model", "gamma")),
    "cd": Method(_plain, ("amateur_model", "alpha", "weights", "draft_model", "gamma")),
    "cd_sd": Method(_by_turns("sd"), ("amateur_model", "alpha", "weights", "gamma", "max_gamma")),
    "cd_chef": Method(
        _by_turns("chef"),
        ("amateur_model", "alpha", "weights", "gamma", "max_gamma", "turn_order"),
    ),
    "ensemble": Method(_plain, ("extra_model", "alpha", "weights", "draft_model", "gamma")),
    "ensemble_sd": Method(
        _by_turns("sd"), ("extra_model", "alpha", "weights", "gamma", "max_gamma")
    ),
    "ensemble_chef": Method(
        _by_turns("chef"),
        ("extra_model", "alpha", "weights", "gamma", "max_gamma", "turn_order"),
    ),
}


def _named_members(method: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The configuration key and the name of each member, in the user's order."""
    first = ("method.model", method["model"])
    if "amateur_model" in METHODS[method["name"]].keys:
        return [first, ("method.amateur_model", method["amateur_model"])]
    extra = method["extra_model"]
    names = [extra] if isinstance(extra, str) else extra
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(
            f"method.extra_model: {extra!r} names no other model; give a name or a list of names"
        )
    return [first, *(("method.extra_model", name) for name in names)]


def _resolve_members(named: list[tuple[str, Any]]) -> tuple[str, ...]:
    return tuple(resolve_member(name, key) for key, name in named)


def _ensemble(
    method: Mapping[str, Any], members: tuple[str, ...]
) -> tuple["EnsembleConfig", dict[str, Any]]:
    """The ensemble, and its parameters for the record."""
    from vllm.ensemble_decode import EnsembleConfig

    parameters = {key: method[key] for key in ("alpha", "weights") if method.get(key) is not None}
    parameters |= {key: method["llm"].get(key) for key in ENSEMBLE_KEYS}
    parameters["ensemble_args"] = parameters["ensemble_args"] or {}
    with _errors_of_keys():
        return EnsembleConfig(extra_model=members[1:], **parameters), parameters


def _model_configs(
    method: Mapping[str, Any], named: list[tuple[str, Any]], members: tuple[str, ...]
) -> list["ModelConfig"]:
    from vllm.config import ModelConfig

    trust = bool(method["llm"].get("trust_remote_code"))
    configs = []
    for (key, _), member in zip(named, members, strict=True):
        with _errors_of_keys(f"{key}: '{member}': "):
            configs.append(ModelConfig(model=member, trust_remote_code=trust))
    return configs


def _context(
    method: Mapping[str, Any], named: list[tuple[str, Any]], models: tuple[str, ...]
) -> dict[str, int]:
    """The longest context that all models have, as an engine argument, unless the user set one.

    A draft model counts as well: it would otherwise read past its last position.
    """
    if method["llm"].get("max_model_len") is not None:
        return {}
    configs = _model_configs(method, named, models)
    longest = _longest_context(configs)
    if named[-1][0] == "method.draft_model" and longest < _longest_context(configs[:-1]):
        logger.warning(
            "the context is %d tokens, that of the draft model '%s'; method.llm.max_model_len sets "
            "it, and a draft model of a longer context allows more",
            longest,
            models[-1],
        )
    return {"max_model_len": longest}


def _longest_context(configs: list["ModelConfig"]) -> int:
    return min(config.max_model_len for config in configs)


def _make_turns(chef: Any, configs: list["ModelConfig"], ensemble: "EnsembleConfig") -> "Turns":
    from vllm.chef.config import relative_cost

    with _errors_of_keys():
        return chef.make_turns(
            [relative_cost(config) for config in configs], ensemble.make_function().counted
        )


@contextlib.contextmanager
def _errors_of_keys(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError into a ConfigError; its text, after `prefix`, begins with the key."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{one_line(error)}") from error


def _spec(
    method: Mapping[str, Any],
    members: tuple[str, ...],
    engine_args: dict[str, Any],
    parameters: dict[str, Any],
    turns: "Turns | None" = None,
) -> MethodSpec:
    given = {k: v for k, v in _set_only(method["llm"]).items() if k not in ENSEMBLE_KEYS}
    for key in given.keys() & {*RUN_KEYS, *engine_args}:
        raise ConfigError(f"method.llm.{key}: a run of {method['name']} sets it; leave it out")
    if "speculative_config" in given:
        given["speculative_config"] = _speculative_config(given["speculative_config"])
    generate = _set_only(method["generate"])
    if generate.get("n", 1) != 1:
        raise ConfigError("method.generate.n: a run keeps one completion per example; leave it out")
    return MethodSpec(
        name=method["name"],
        members=members,
        engine_args={"model": members[0], **_platform_defaults(), **given, **engine_args},
        sampling_params=generate,
        parameters=parameters,
        turns=turns,
    )


def _speculative_config(config: object) -> dict[str, Any]:
    key = "method.llm.speculative_config"
    if not isinstance(config, dict):
        raise ConfigError(f"{key}: {config!r} does not name parameters; write {{name: value, ...}}")
    if config.get("model") is None:
        return config
    return {**config, "model": resolve_model(config["model"], f"{key}.model")}


def _set_only(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group without the keys that are left to vLLM."""
    return {key: value for key, value in group.items() if value is not None}


def _check_temperature(temperature: object) -> None:
    if temperature is None:
        return
    if not _is_number(temperature) or not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"method.generate.temperature: {temperature!r} is out of range; it must be 0 (greedy) "
            "or more"
        )


def _check_gamma(gamma: object) -> int:
    if not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 1:
        raise ConfigError(f"method.gamma: {gamma!r} is out of range; it must be 1 or more")
    return gamma


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _platform_defaults() -> dict[str, Any]:
    """Defaults for a machine without a GPU; none with one.

    - float32: it is faster on a CPU.
    - no compilation: compiling takes longer than the usual runs on a CPU.
    - a KV cache of fixed size: vLLM would otherwise take most of the memory.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    return {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30}
