"""The engine's fields, translated into the keys that the user of a method wrote.

The engine packages name a field as a user of `vllm serve` writes it
(`vllm.ensemble_decode.errors`). This module finds the field's key in `configs/`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.ensemble_decode import ConfigFieldError

# Keys under method.llm that belong to the ensemble and not to vLLM.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args", "read_as")
_METHOD_KEYS = ("alpha", "weights", "gamma", "max_gamma", "turn_order")


@dataclass(frozen=True)
class Keys:
    """The keys that differ between methods.

    Args:
        others: the key of the members after the first.
        draft_model: the key of a model that only proposes.
    """

    others: str
    draft_model: str

    def line(self, error: "ConfigFieldError") -> str:
        """The error in one line that begins with a key and names only keys."""
        return str(error.renamed(self.of_field))

    def of_field(self, field: str) -> str:
        """The key of a field; a field without a key is returned unchanged."""
        whole = {
            "--model": "method.model",
            "--model/ensemble.extra_model": f"method.model/{self.others}",
            "ensemble.extra_model": f"method.{self.others}",
            "--speculative-config.model": self.draft_model,
            "draft_model": self.draft_model,
        }
        if field in whole:
            return whole[field]
        if field.startswith("ensemble.extra_model."):
            return field.replace("ensemble.extra_model", f"method.{self.others}")
        group, _, name = field.partition(".")
        if group.startswith("--"):
            return f"method.llm.{field.removeprefix('--').replace('-', '_')}"
        if name.split(".")[0] in ENSEMBLE_KEYS:
            return f"method.llm.{name}"
        return f"method.{name}" if name in _METHOD_KEYS else field
