"""Frozen configurations as plain data under a key of vLLM's `additional_config`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

from vllm.ensemble_decode.errors import ConfigFieldError


class PlainData:
    """How a configuration, a frozen dataclass, is made from plain data and turned into it."""

    config_key: ClassVar[str]
    # For the error if it is missing: what needs it, and how it looks.
    needed: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data. The inverse of `from_dict`."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in data.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The configuration.

        Raises:
            ConfigFieldError: one line that names a key which is unknown.
        """
        cls.check_keys(data)
        return cls(**data)

    @classmethod
    def check_keys(cls, data: Mapping[str, Any]) -> None:
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise ConfigFieldError(
                    f"{cls.config_key}.{key}", f"unknown key; known are {', '.join(sorted(known))}"
                )

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        """The configuration under its key.

        Raises:
            ConfigFieldError: one line, if the configuration is missing.
        """
        given = additional_config if isinstance(additional_config, dict) else {}
        data = given.get(cls.config_key)
        if not isinstance(data, Mapping):
            raise ConfigFieldError(cls.config_key, f"missing; {cls.needed}")
        return cls.from_dict(data)
