"""How the time of a function grows with its input."""

import time
from collections.abc import Callable


def assert_linear(read: Callable[[str], object], part: str, short: int = 500) -> None:
    """The time that `read` takes for `part` many times over grows like its length.

    Ten times the text takes ten times as long, and 100 times if the time is quadratic. The limit
    between them leaves room for a busy machine.
    """
    seconds, ten_times = (
        min(_seconds(read, part * count) for _ in range(3)) for count in (short, 10 * short)
    )
    assert ten_times < 30 * seconds + 0.01, part


def _seconds(read: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    read(text)
    return time.process_time() - start
