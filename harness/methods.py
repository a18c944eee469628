"""The methods: what each one asks of vLLM, from its configuration to engine arguments.

Plain data in, plain data out. This module starts no engine and loads only model configs.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import ConfigError, shortened
from harness.fields import ENSEMBLE_KEYS, Keys
from harness.models import resolve_model

if TYPE_CHECKING:
    from vllm.chef.arguments import ResolvedEnsemble
    from vllm.chef.config import ChefConfig
    from vllm.chef.turns import Turns

logger = logging.getLogger(__name__)

# Keys under method.llm that decide other arguments of an ensemble.
READ_KEYS = (
    "max_model_len",
    "trust_remote_code",
    "revision",
    "hf_overrides",
    "enable_prefix_caching",
    "mamba_cache_mode",
)
# Keys under method.llm that every run sets itself. A run has one engine, and its prompts are text.
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
    if name is None:  # a configuration that others build on, such as `_cd`
        raise ConfigError(f"method: this is no method; choose one of {', '.join(METHODS)}")
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method: unknown method {name!r}; choose one of {', '.join(METHODS)}")
    keys = {"name", *METHODS[name].keys, *COMMON_KEYS}
    for key in method:
        if key not in keys:
            raise ConfigError(
                f"method.{key}: {name} has no such key; it has {', '.join(sorted(keys))}"
            )
    # Checks without vLLM come first: importing vLLM takes longer than all checks.
    try:
        _check_temperature(method["generate"].get("temperature"))
        return METHODS[name].make_spec(method)
    except KeyError as error:
        if (key := error.args[0]) in keys and key not in method:
            raise ConfigError(f"method.{key}: the key is missing; see configs/method/") from None
        raise


def _large_model(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    return _spec(method, (model,), {}, {})


def _sd(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    draft_model = resolve_model(method["draft_model"], "method.draft_model")
    gamma = _check_gamma(method["gamma"])

    from vllm.chef.arguments import speculation
    from vllm.ensemble_decode.members import check_gamma_fits

    engine_args = {
        "speculative_config": speculation(draft_model, gamma),
        **_context(method, model, draft_model),
    }
    longest = engine_args.get("max_model_len", method["llm"].get("max_model_len"))
    with _errors_of_keys(method):
        check_gamma_fits(gamma, longest, "chef.gamma")
    return _spec(method, (model,), engine_args, {"draft_model": draft_model, "gamma": gamma})


def _plain(method: Mapping[str, Any]) -> MethodSpec:
    """All members score every token. A draft model, if given, only proposes."""
    named = _named_members(method)
    parameters = {}
    if method.get("draft_model") is not None:
        if method["llm"].get("speculative_config") is not None:
            raise ConfigError(
                "method.draft_model: method.llm.speculative_config asks for a proposer as well; "
                "leave one of them out"
            )
        gamma = _check_gamma(method.get("gamma"))
        draft_model = resolve_model(method["draft_model"], "method.draft_model")
        parameters = {"draft_model": draft_model, "gamma": gamma}
    members = _resolve_members(named)

    from vllm.chef.arguments import draft_config

    draft = draft_config(draft_model, gamma) if parameters else None
    resolved = _resolve(method, members, None, draft)
    parameters = {**_recorded(method), **parameters}
    return _spec(method, members, resolved.engine_args, parameters)


def _by_turns(policy: str) -> Callable[[Mapping[str, Any]], MethodSpec]:
    """Members take turns to propose (`chef`), or the last member always proposes (`sd`)."""

    def make_spec(method: Mapping[str, Any]) -> MethodSpec:
        members = _resolve_members(_named_members(method))

        from vllm.chef.config import AUTO, ChefConfig

        # configs/ has a max_gamma even if gamma is not auto.
        max_gamma = method.get("max_gamma") if method["gamma"] == AUTO else None
        with _errors_of_keys(method):
            chef = ChefConfig(method["gamma"], policy, method.get("turn_order"), max_gamma)
        resolved = _resolve(method, members, chef, None)
        order = [member for turn in resolved.turns for member in turn.members]
        limit = resolved.chef.gamma_limit
        limit = limit if policy == "sd" else list(limit)
        gammas = {"gamma": AUTO, "max_gamma": limit} if chef.is_adaptive else {"gamma": limit}
        parameters = {**_recorded(method), **gammas, "turn_order": order}
        return _spec(method, members, resolved.engine_args, parameters, resolved.turns)

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
    names = [extra] if isinstance(extra, (str, Mapping)) else extra
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(
            f"method.extra_model: {extra!r} names no other model; give a name or a list of names"
        )
    return [first, *(("method.extra_model", name) for name in names)]


def _resolve_members(named: list[tuple[str, Any]]) -> tuple[str | dict[str, Any], ...]:
    """Each member's name, or the mapping that says how it is loaded, with its name resolved."""
    return tuple(_resolve_member(entry, key) for key, entry in named)


def _resolve_member(entry: Any, key: str) -> str | dict[str, Any]:
    if not isinstance(entry, Mapping) or key == "method.model":
        return resolve_model(entry, key)
    return {**entry, "model": resolve_model(entry.get("model"), f"{key}.model")}


def _resolve(
    method: Mapping[str, Any],
    members: tuple[str | dict[str, Any], ...],
    chef: "ChefConfig | None",
    draft: dict[str, Any] | None,
) -> "ResolvedEnsemble":
    from vllm.chef.arguments import context_warning, resolve_ensemble
    from vllm.ensemble_decode import EnsembleConfig

    read = {key: method["llm"].get(key) for key in READ_KEYS}
    with _errors_of_keys(method):
        ensemble = EnsembleConfig(extra_model=members[1:], **_recorded(method))
        resolved = resolve_ensemble(members[0], ensemble, chef, draft, read)
    if resolved.is_shortened:
        logger.warning(context_warning(resolved.engine_args["max_model_len"], draft["model"]))
    return resolved


def _recorded(method: Mapping[str, Any]) -> dict[str, Any]:
    """The ensemble's parameters, for the record."""
    parameters = {key: method[key] for key in ("alpha", "weights") if method.get(key) is not None}
    parameters |= {key: method["llm"].get(key) for key in ENSEMBLE_KEYS}
    parameters["ensemble_args"] = parameters["ensemble_args"] or {}
    if parameters["read_as"] is None:
        del parameters["read_as"]
    return parameters


def _context(method: Mapping[str, Any], model: str, draft_model: str) -> dict[str, int]:
    """The longest context that both models have, as an engine argument, unless the user set one."""
    if method["llm"].get("max_model_len") is not None:
        return {}
    from vllm.chef.arguments import common_context, context_warning, model_config

    with _errors_of_keys(method):
        target = model_config(model, "--model", method["llm"])
        shared = {"trust_remote_code": method["llm"].get("trust_remote_code")}
        draft = model_config(draft_model, "draft_model", shared)
    longest, is_shortened = common_context([target], [draft])
    if is_shortened:
        logger.warning(context_warning(longest, draft_model))
    return {"max_model_len": longest}


@contextlib.contextmanager
def _errors_of_keys(method: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of bad input into a ConfigError that names the keys of `method`."""
    from vllm.ensemble_decode import ConfigFieldError

    try:
        yield
    except ConfigFieldError as error:
        keys = keys_of(method["name"], method["llm"].get("speculative_config") is None)
        raise ConfigError(shortened(keys.line(error))) from error


def keys_of(name: str, has_draft_key: bool) -> Keys:
    """The keys of method `name`.

    Args:
        has_draft_key: whether `method.draft_model` names the proposer; else it is the model of
            vLLM's own `speculative_config`.
    """
    is_cd = "amateur_model" in METHODS[name].keys
    return Keys(
        others="amateur_model" if is_cd else "extra_model",
        draft_model=(
            "method.draft_model" if has_draft_key else "method.llm.speculative_config.model"
        ),
    )


def _spec(
    method: Mapping[str, Any],
    members: tuple[str | dict[str, Any], ...],
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
        members=tuple(m if isinstance(m, str) else m["model"] for m in members),
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
