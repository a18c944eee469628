"""What a user is told in one clear line.

Bad input is told before weights are loaded, with the key and the remedy.
"""

import textwrap

MAX_LENGTH = 400


class ConfigError(ValueError):
    """A value of the configuration is not valid. The text is one line."""


class RunError(RuntimeError):
    """Something outside of this program ends a run: its engine died, or a disk is full. The text is
    one line.
    """


REPORTED = (ConfigError, RunError)


def one_line(error: Exception) -> str:
    """The message of an error as one line of limited length.

    pydantic spreads its errors over several lines; the first line has the reason. Python quotes the
    text of a KeyError.
    """
    text = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    return shortened(text.removeprefix("Value error, "))


def shortened(text: str) -> str:
    """`text` as one line of limited length."""
    return textwrap.shorten(text, MAX_LENGTH, placeholder=" ...")
