"""Wording of HumanEval: worked examples in its style, and the request of a chat."""

# Our own examples in HumanEval's style, not from HumanEval: (prompt, completion).
WORKED_EXAMPLES = (
    (
        '''def clock_time(seconds: int) -> str:
    """ Write a number of seconds as hours, minutes and seconds, each of the last two
    with two digits.
    >>> clock_time(59)
    '0:00:59'
    >>> clock_time(36125)
    '10:02:05'
    """
''',
        """    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
""",
    ),
    (
        '''from typing import List


def seats_left(rows: List[str], taken: str) -> List[int]:
    """ Each string is a row of a theatre and each character a seat. Count, row by row,
    the seats that do not hold the character taken.
    >>> seats_left(['x..x', 'xxxx', ''], 'x')
    [2, 0, 0]
    >>> seats_left([], 'x')
    []
    """
''',
        """    return [len(row) - row.count(taken) for row in rows]
""",
    ),
    (
        '''def first_gap(shelf: list) -> int:
    """ Return the smallest positive number that is missing on the shelf.
    >>> first_gap([3, 1, 2, 6])
    4
    >>> first_gap([])
    1
    """
''',
        """    present = set(shelf)
    number = 1
    while number in present:
        number += 1
    return number
""",
    ),
)

INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, with its imports, in one code "
    "block.\n\n"
)
