"""The methods: what each asks of vLLM, from its configuration to engine arguments.

Plain data in, plain data out; starts no engine and loads nothing but model configs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from harness.errors import ConfigError, one_line
from harness.models import resolve_member, resolve_model

ENSEMBLE_WORKER = "vllm.ensemble_decode.worker.EnsembleDecodeWorker"
# Keys under method.llm that are the ensemble's and not vLLM's.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args")
# Keys under method.llm that every run decides: one engine, whose prompts are text.
RUN_KEYS = ("model", "seed", "skip_tokenizer_init", "data_parallel_size")


@dataclass(frozen=True)
class MethodSpec:
    """What a method runs.

    Args:
        name: of the method.
        members: the models whose distributions decide, resolved, in the user's order.
        engine_args: vLLM engine arguments by name.
        sampling_params: vLLM sampling parameters by name, only those that are set.
        parameters: the method's own, for the record (alpha, weights, gamma, draft_model).
    """

    name: str
    members: tuple[str, ...]
    engine_args: dict[str, Any]
    sampling_params: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)


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
    # What needs no vLLM comes first: importing it takes longer than all checks.
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
    return _spec(
        method,
        (model,),
        {"speculative_config": speculative_config},
        {"draft_model": draft_model, "gamma": gamma},
    )


def _cd(method: Mapping[str, Any]) -> MethodSpec:
    return _ensemble_spec(
        method,
        [("method.model", method["model"]), ("method.amateur_model", method["amateur_model"])],
    )


def _ensemble(method: Mapping[str, Any]) -> MethodSpec:
    extra = method["extra_model"]
    names = [extra] if isinstance(extra, str) else extra
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(
            f"method.extra_model: {extra!r} names no other model; give a name or a list of names"
        )
    others = [("method.extra_model", name) for name in names]
    return _ensemble_spec(method, [("method.model", method["model"]), *others])


class Method(NamedTuple):
    """How a method is made, from which keys besides COMMON_KEYS."""

    make_spec: Callable[[Mapping[str, Any]], MethodSpec]
    keys: tuple[str, ...]


COMMON_KEYS = ("model", "generate", "llm")
METHODS = {
    "large_model": Method(_large_model, ()),
    "sd": Method(_sd, ("draft_model", "gamma")),
    "cd": Method(_cd, ("amateur_model", "alpha", "weights")),
    "ensemble": Method(_ensemble, ("extra_model", "alpha", "weights")),
}


def _ensemble_spec(method: Mapping[str, Any], named: list[tuple[str, Any]]) -> MethodSpec:
    """`named`: the configuration key and the name of each member."""
    members = tuple(resolve_member(name, key) for key, name in named)
    parameters = {key: method[key] for key in ("alpha", "weights") if method.get(key) is not None}
    functions = {key: method["llm"].get(key) for key in ENSEMBLE_KEYS}
    functions["ensemble_args"] = functions["ensemble_args"] or {}
    engine_args = {
        "worker_cls": ENSEMBLE_WORKER,
        "additional_config": {"ensemble": _ensemble_config(members, **parameters, **functions)},
    }
    if method["llm"].get("max_model_len") is None:
        engine_args["max_model_len"] = min(
            _longest_context(key, member, method["llm"])
            for (key, _), member in zip(named, members, strict=True)
        )
    return _spec(method, members, engine_args, {**parameters, **functions})


def _ensemble_config(members: tuple[str, ...], **parameters: Any) -> dict[str, Any]:
    from vllm.ensemble_decode import EnsembleConfig

    try:
        return EnsembleConfig(extra_model=members[1:], **parameters).to_dict()
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _longest_context(key: str, model: str, llm: Mapping[str, Any]) -> int:
    from vllm.config import ModelConfig

    trust = bool(llm.get("trust_remote_code"))
    try:
        return ModelConfig(model=model, trust_remote_code=trust).max_model_len
    except ValueError as error:
        raise ConfigError(f"{key}: '{model}': {one_line(error)}") from error


def _spec(
    method: Mapping[str, Any],
    members: tuple[str, ...],
    engine_args: dict[str, Any],
    parameters: dict[str, Any],
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
    )


def _speculative_config(config: object) -> dict[str, Any]:
    key = "method.llm.speculative_config"
    if not isinstance(config, dict):
        raise ConfigError(f"{key}: {config!r} does not name parameters; write {{name: value, ...}}")
    if config.get("model") is None:
        return config
    return {**config, "model": resolve_model(config["model"], f"{key}.model")}


def _set_only(group: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is left to vLLM."""
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
    """Without a GPU: float32, the faster there; no compilation, which takes longer than the runs
    one makes; and a KV cache of fixed size, where vLLM would take most of the memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    return {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30}
