"""The methods: what each asks of vLLM, from its configuration to engine arguments.

Plain data in, plain data out; starts no engine and loads nothing but model configs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import ConfigError
from harness.models import resolve_model
from vllm.ensemble_decode import EnsembleConfig

ENSEMBLE_WORKER = "vllm.ensemble_decode.worker.EnsembleDecodeWorker"
# Keys under method.llm that are the ensemble's and not vLLM's.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args")


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
        ConfigError, ValueError: one line that names the key and the remedy.
    """
    name = method.get("name")
    if name not in METHODS:
        raise ConfigError(f"method: unknown method '{name}'; choose one of {', '.join(METHODS)}")
    return METHODS[name](method)


def _large_model(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    return _spec(method, (model,), {})


def _sd(method: Mapping[str, Any]) -> MethodSpec:
    model = resolve_model(method["model"], "method.model")
    draft_model = resolve_model(method["draft_model"], "method.draft_model")
    gamma = _check_gamma(method["gamma"])
    if method["llm"].get("speculative_config"):
        raise ConfigError(
            "method.llm.speculative_config: sd makes it from method.draft_model and "
            "method.gamma; leave it out, or use method=large_model"
        )
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
    model = resolve_model(method["model"], "method.model")
    amateur = resolve_model(method["amateur_model"], "method.amateur_model")
    return _ensemble_spec(method, (model, amateur))


def _ensemble(method: Mapping[str, Any]) -> MethodSpec:
    extra = method["extra_model"]
    names = [extra] if isinstance(extra, str) else list(extra or ())
    if not names:
        raise ConfigError("method.extra_model: an ensemble needs another model; name one or more")
    members = [resolve_model(method["model"], "method.model")]
    members += [resolve_model(name, "method.extra_model") for name in names]
    return _ensemble_spec(method, tuple(members))


METHODS: dict[str, Callable[[Mapping[str, Any]], MethodSpec]] = {
    "large_model": _large_model,
    "sd": _sd,
    "cd": _cd,
    "ensemble": _ensemble,
}


def _ensemble_spec(method: Mapping[str, Any], members: tuple[str, ...]) -> MethodSpec:
    parameters = {key: method[key] for key in ("alpha", "weights") if method.get(key) is not None}
    functions = {key: method["llm"].get(key) for key in ENSEMBLE_KEYS}
    functions["ensemble_args"] = functions["ensemble_args"] or {}
    ensemble = EnsembleConfig(extra_model=members[1:], **parameters, **functions)
    engine_args = {
        "worker_cls": ENSEMBLE_WORKER,
        "additional_config": {"ensemble": ensemble.to_dict()},
    }
    if method["llm"].get("max_model_len") is None:
        engine_args["max_model_len"] = min(_longest_context(m, method["llm"]) for m in members)
    return _spec(method, members, engine_args, {**parameters, **functions})


def _spec(
    method: Mapping[str, Any],
    members: tuple[str, ...],
    engine_args: dict[str, Any],
    parameters: dict[str, Any] | None = None,
) -> MethodSpec:
    given = {
        key: value
        for key, value in method["llm"].items()
        if value is not None and key not in ENSEMBLE_KEYS
    }
    for key in given.keys() & {"model", *engine_args}:
        raise ConfigError(f"method.llm.{key}: {method['name']} sets it itself; leave it out")
    return MethodSpec(
        name=method["name"],
        members=members,
        engine_args={"model": members[0], **_platform_defaults(), **given, **engine_args},
        sampling_params=_sampling_params(method["generate"]),
        parameters=parameters or {},
    )


def _sampling_params(generate: Mapping[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    params = {key: value for key, value in generate.items() if value is not None}
    known = SamplingParams.__struct_fields__
    for key in params:
        if key not in known or key.startswith("_"):
            raise ConfigError(f"method.generate.{key}: vLLM's SamplingParams have no '{key}'")
    temperature = params.get("temperature", 0)
    if not _is_number(temperature) or not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"method.generate.temperature: {temperature!r} is out of range; it must be 0 (greedy) "
            "or more"
        )
    if params.get("n", 1) != 1:
        raise ConfigError("method.generate.n: a run keeps one completion per example; leave it out")
    try:
        SamplingParams(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.generate: {error}") from error
    return params


def _check_gamma(gamma: object) -> int:
    if not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 1:
        raise ConfigError(f"method.gamma: {gamma!r} is out of range; it must be 1 or more")
    return gamma


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _longest_context(model: str, llm: Mapping[str, Any]) -> int:
    from vllm.config import ModelConfig

    trust = bool(llm.get("trust_remote_code"))
    return ModelConfig(model=model, trust_remote_code=trust).max_model_len


def _platform_defaults() -> dict[str, Any]:
    """Without a GPU: float32, the faster there; no compilation, which takes longer than the runs
    one makes; and a KV cache of fixed size, where vLLM would take most of the memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    return {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30}
