"""The engine's fields in the words of who configured a method.

Engine packages name a field as a user of `vllm serve` writes it (`vllm.ensemble_decode.errors`).
Here it gets the key under which it stands in `configs/`.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.ensemble_decode import ConfigFieldError

# Keys under method.llm that are the ensemble's and not vLLM's.
ENSEMBLE_KEYS = ("ensemble_fn", "ensemble_target", "ensemble_args")
_METHOD_KEYS = ("alpha", "weights", "gamma", "max_gamma", "turn_order")
# `--flag`, `ensemble.field` or `chef.field`, with what is inside of it behind a dot; not in a path.
_FIELD = re.compile(r"(?<![\w./-])(?:--[a-z][\w-]*|(?:ensemble|chef)\.\w+)(?:\.\w+)*")


def in_keys(error: "ConfigFieldError", method: Mapping[str, Any]) -> str:
    """The error in one line that begins with a key of `method`, the configuration group.

    Fields that the message mentions become keys as well.
    """
    message = _FIELD.sub(lambda match: key_of(match[0], method), error.message)
    return f"{key_of(error.field, method)}: {message}"


def key_of(field: str, method: Mapping[str, Any]) -> str:
    """The key of a field; fields without a key of their own are left as they are."""
    others = "amateur_model" if "amateur_model" in method else "extra_model"
    whole = {
        "--model": "method.model",
        "--model/ensemble.extra_model": f"method.model/{others}",
        "ensemble.extra_model": f"method.{others}",
        "draft_model": "method.draft_model",
    }
    if method["llm"].get("speculative_config") is None:
        whole["--speculative-config.model"] = "method.draft_model"
    if field in whole:
        return whole[field]
    group, _, name = field.partition(".")
    if group.startswith("--"):
        return f"method.llm.{field.removeprefix('--').replace('-', '_')}"
    if group == "ensemble" and name.split(".")[0] in ENSEMBLE_KEYS:
        return f"method.llm.{name}"
    return f"method.{name}" if name in _METHOD_KEYS else field
