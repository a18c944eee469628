"""Bad input: one clear line that names the key and the remedy, before weights are loaded."""


class ConfigError(ValueError):
    """Something in the configuration that cannot be meant. Its text is one line."""


def one_line(error: Exception) -> str:
    """The message of an error as one line.

    pydantic spreads its errors over several lines; the first tells the field and the reason.
    """
    if hasattr(error, "errors"):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first.get("loc", ()))
        return f"method.llm{'.' + field if field else ''}: {first['msg']}"
    return " ".join(str(error).split())
