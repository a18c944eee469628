"""What an ensemble is: its further members, its function and its target.

Plain data in `additional_config["ensemble"]`. It therefore reaches every worker process and is part
of the hash of vLLM's compile cache. This module knows no model and loads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Self

from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.functions import FIELD_PARAMETERS, EnsembleFunction, make_function
from vllm.ensemble_decode.plain_data import PlainData

ENSEMBLE_TARGETS = ("raw-logits", "logits", "probs")
CONFIG_KEY = "ensemble"


@dataclass(frozen=True)
class MemberSource:
    """A member after the first, and how it is loaded. vLLM's own options are the first member's.

    Args:
        model: a path or hub id.
        dtype, load_format, trust_remote_code: as vLLM has them. None: the first member's.
        quantization: as vLLM has it. None: what the checkpoint says. vLLM's `--quantization` is the
            first member's alone.
        revision, tokenizer_revision, hf_overrides: as vLLM has them. None: vLLM's defaults.
    """

    model: str
    dtype: str | None = None
    quantization: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    trust_remote_code: bool | None = None
    load_format: str | None = None
    hf_overrides: Mapping[str, Any] | None = None

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """From a name, or from a mapping of the arguments.

        Raises:
            ConfigFieldError: one line that names the field.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            data = {"model": data}
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigFieldError(
                    f"ensemble.extra_model.{key}", f"unknown key; known are {', '.join(known)}"
                )
        model = data.get("model")
        if not isinstance(model, str) or not model:
            raise ConfigFieldError(
                "ensemble.extra_model", f"{model!r} is not a model; give a path or a hub id"
            )
        return cls(**data)

    @property
    def options(self) -> dict[str, Any]:
        """What is set beside the name."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}
        return {name: value for name, value in given.items() if value is not None}

    def to_data(self) -> str | dict[str, Any]:
        return {"model": self.model, **self.options} if self.options else self.model


@dataclass(frozen=True)
class EnsembleConfig(PlainData):
    """An ensemble of vLLM's model (the first member) and `extra_model`, in that order.

    Args:
        extra_model: the members after the first. Each is a path, a hub id, or a mapping of the
            arguments of `MemberSource`.
        ensemble_fn: a name in `ENSEMBLE_FUNCTIONS`, or `package.module:function`.
        ensemble_target: what the function combines. `raw-logits`: raw logits, and the sampling
            parameters apply to the result. `logits`: logits after the sampling parameters. `probs`:
            the softmax of these logits.
        alpha, weights: parameters of `ensemble_fn`. None: its default.
        ensemble_args: its other parameters, by name.
        read_as: the text of the token that a member reads in place of a token that it lacks: one
            text for all members, or one for each. None: the member's unknown token, or else its end
            token.

    Raises:
        ConfigFieldError: one line that names the field, for any value that is out of range.
    """

    config_key: ClassVar[str] = CONFIG_KEY
    needed: ClassVar[str] = (
        "an ensemble worker needs "
        f'additional_config={{"{CONFIG_KEY}": {{"extra_model": [...], ...}}}}'
    )

    extra_model: tuple[MemberSource, ...]
    ensemble_fn: str = "weighted"
    ensemble_target: str = "probs"
    alpha: float | None = None
    weights: tuple[float, ...] | None = None
    ensemble_args: Mapping[str, Any] = field(default_factory=dict)
    read_as: str | tuple[str | None, ...] | None = None

    def __post_init__(self) -> None:
        extra = self.extra_model
        members = (extra,) if isinstance(extra, (str, Mapping, MemberSource)) else extra or ()
        object.__setattr__(self, "extra_model", tuple(map(MemberSource.from_data, members)))
        if not isinstance(self.ensemble_args, Mapping):
            raise ConfigFieldError(
                "ensemble.ensemble_args",
                f"{self.ensemble_args!r} does not name parameters; write {{name: value, ...}}",
            )
        if self.ensemble_target not in ENSEMBLE_TARGETS:
            raise ConfigFieldError(
                "ensemble.ensemble_target",
                f"unknown target '{self.ensemble_target}'; "
                f"choose one of {', '.join(ENSEMBLE_TARGETS)}",
            )
        if self.read_as is not None and not isinstance(self.read_as, str):
            object.__setattr__(self, "read_as", self._texts(self.read_as))
        self.make_function()

    def _texts(self, read_as: Any) -> tuple[str | None, ...]:
        is_list = isinstance(read_as, (list, tuple)) and len(read_as) == self.num_members
        if not is_list or not all(isinstance(text, (str, NoneType)) for text in read_as):
            raise ConfigFieldError(
                "ensemble.read_as",
                f"{read_as!r} is no text and no list of {self.num_members} texts; give a token, or "
                "one (or null) for each member",
            )
        return tuple(read_as)

    @property
    def read_as_of_members(self) -> tuple[str | None, ...]:
        is_one = self.read_as is None or isinstance(self.read_as, str)
        return (self.read_as,) * self.num_members if is_one else self.read_as

    @property
    def num_members(self) -> int:
        return 1 + len(self.extra_model)

    @property
    def samples_members(self) -> bool:
        """Whether the sampling parameters apply to each member before the members are combined."""
        return self.ensemble_target != "raw-logits"

    @property
    def combines_probs(self) -> bool:
        return self.ensemble_target == "probs"

    def make_function(self) -> EnsembleFunction:
        named = {key: getattr(self, key) for key in FIELD_PARAMETERS}
        args = {key: value for key, value in named.items() if value is not None}
        return make_function(self.ensemble_fn, self.num_members, {**args, **self.ensemble_args})

    def to_dict(self) -> dict[str, Any]:
        members = [source.to_data() for source in self.extra_model]
        return {**super().to_dict(), "extra_model": members}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        cls.check_keys(data)
        if "extra_model" not in data:
            raise ConfigFieldError("ensemble.extra_model", "missing; name the other members")
        return cls(**data)
