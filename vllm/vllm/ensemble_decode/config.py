"""What an ensemble is: its further members, its function and its target.

Plain data that travels in `additional_config["ensemble"]`, so that it reaches every worker
process and takes part in the hash of vLLM's compile cache.  Knows no model and loads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.ensemble_decode.functions import METHOD_KEYS, EnsembleFunction, make_function

ENSEMBLE_TARGETS = ("raw-logits", "logits", "probs")
CONFIG_KEY = "ensemble"


@dataclass(frozen=True)
class EnsembleConfig:
    """An ensemble of vLLM's model (the first member) and `extra_model`, in that order.

    Args:
        extra_model: paths or hub ids of the members after the first.
        ensemble_fn: a name in `ENSEMBLE_FUNCTIONS`, or `package.module:function`.
        ensemble_target: what the function combines. `raw-logits`: raw logits, and the
            sampling parameters apply to the result; `logits`: logits after the sampling
            parameters; `probs`: the softmax of those.
        alpha, weights: parameters of `ensemble_fn`; None leaves its default.
        ensemble_args: its other parameters by name.

    Raises:
        ValueError: one line that names the key, for any value that cannot be meant.
    """

    extra_model: tuple[str, ...]
    ensemble_fn: str = "weighted"
    ensemble_target: str = "probs"
    alpha: float | None = None
    weights: tuple[float, ...] | None = None
    ensemble_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        extra = self.extra_model
        members = (extra,) if isinstance(extra, str) else tuple(extra or ())
        object.__setattr__(self, "extra_model", members)
        if not isinstance(self.ensemble_args, Mapping):
            raise ValueError(
                f"method.llm.ensemble_args: {self.ensemble_args!r} does not name parameters; "
                "write {name: value, ...}"
            )
        if self.ensemble_target not in ENSEMBLE_TARGETS:
            raise ValueError(
                f"method.llm.ensemble_target: unknown target '{self.ensemble_target}'; "
                f"choose one of {', '.join(ENSEMBLE_TARGETS)}"
            )
        self.make_function()

    @property
    def num_members(self) -> int:
        return 1 + len(self.extra_model)

    @property
    def samples_members(self) -> bool:
        """Whether the sampling parameters apply to each member, before the combination."""
        return self.ensemble_target != "raw-logits"

    @property
    def combines_probs(self) -> bool:
        return self.ensemble_target == "probs"

    def make_function(self) -> EnsembleFunction:
        named = {key: getattr(self, key) for key in METHOD_KEYS}
        args = {key: value for key, value in named.items() if value is not None}
        return make_function(self.ensemble_fn, self.num_members, {**args, **self.ensemble_args})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of `from_dict`."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in data.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EnsembleConfig":
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise ValueError(
                    f"additional_config.{CONFIG_KEY}.{key}: unknown key; "
                    f"known are {', '.join(sorted(known))}"
                )
        if "extra_model" not in data:
            raise ValueError(
                f"additional_config.{CONFIG_KEY}.extra_model: missing; name the other members"
            )
        return cls(**data)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "EnsembleConfig":
        data = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
        if not isinstance(data, Mapping):
            raise ValueError(
                f"additional_config.{CONFIG_KEY}: missing; an ensemble worker needs "
                f'additional_config={{"{CONFIG_KEY}": {{"extra_model": [...], ...}}}}'
            )
        return cls.from_dict(data)
