"""The engine's fields in the words of who configured a method.

Engine packages name a field as a user of `vllm serve` writes it (`vllm.ensemble_decode.errors`).
Here it gets the key under which it stands in `configs/`.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.ensemble_decode import ConfigFieldError

# Keys under method.llm that are the ensemble's and not vLLM's.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args")
_METHOD_KEYS = ("alpha", "weights", "gamma", "max_gamma", "turn_order")
# `--flag`, `ensemble.field` or `chef.field`, with what is inside of it behind a dot; not in a path.
_FIELD = re.compile(r"(?<![\w./-])(?:--[a-z][\w-]*|(?:ensemble|chef)\.\w+)(?:\.\w+)*")


@dataclass(frozen=True)
class Keys:
    """The keys of a method that are not the same for all.

    Args:
        others: of the members after the first.
        draft_model: of a model that proposes and has no say.
    """

    others: str
    draft_model: str

    def line(self, error: "ConfigFieldError") -> str:
        """The error in one line that begins with a key.

        Fields that the message mentions become keys as well.
        """
        message = _FIELD.sub(lambda match: self.of_field(match[0]), error.message)
        return f"{self.of_field(error.field)}: {message}"

    def of_field(self, field: str) -> str:
        """The key of a field; a field without one is left as it is."""
        whole = {
            "--model": "method.model",
            "--model/ensemble.extra_model": f"method.model/{self.others}",
            "ensemble.extra_model": f"method.{self.others}",
            "--speculative-config.model": self.draft_model,
            "draft_model": self.draft_model,
        }
        if field in whole:
            return whole[field]
        group, _, name = field.partition(".")
        if group.startswith("--"):
            return f"method.llm.{field.removeprefix('--').replace('-', '_')}"
        if name.split(".")[0] in ENSEMBLE_KEYS:
            return f"method.llm.{name}"
        return f"method.{name}" if name in _METHOD_KEYS else field
