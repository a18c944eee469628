"""Bad input of an engine: one line that names the field as the engine's user wrote it.

Other users reach the same engine through other doors: a Python function, a configuration file. They
know its fields by other names. `ConfigFieldError.renamed` puts an error into their words.
"""

import re
from collections.abc import Callable
from typing import Self

# `--flag`, `ensemble.field` or `chef.field`, with inner names after a dot. Names in a path do not
# count.
_FIELD = re.compile(r"(?<![\w./-])(?:--[a-z][\w-]*|(?:ensemble|chef)\.\w+)(?:\.\w+)*")


class ConfigFieldError(ValueError):
    """A value that an engine cannot use.

    `str` of it is one line, `field: message`. vLLM sends an exception between processes pickled or
    as text, and both keep that line.

    Args:
        field: `ensemble.alpha` or `chef.gamma` for values in `additional_config`; a flag such as
            `--max-model-len` for engine arguments, with inner names after a dot, such as
            `--speculative-config.model`; `draft_model` for that argument of `ensemble_args`.
        message: the reason and the remedy. Other fields in it are written in the same way.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"

    def renamed(self, name_of: Callable[[str], str]) -> Self:
        """The same error, with other names for its field and for the fields in its message."""
        message = _FIELD.sub(lambda match: name_of(match[0]), self.message)
        return type(self)(name_of(self.field), message)


def reason(error: Exception) -> str:
    """The message of an error as one line; pydantic spreads its errors over several."""
    text = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    return " ".join(text.removeprefix("Value error, ").split())
