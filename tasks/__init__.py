"""The tasks by name. Knows where each one is defined and which options it takes, nothing more.

Task modules are imported when asked for: a run needs the packages of its own task only.
"""

import importlib
from dataclasses import fields

from tasks.base import Example, Task, select

__all__ = ["TASKS", "Example", "Task", "load_task", "select", "task_name"]

# `dataset.name` -> "module:class"
TASKS = {
    "humaneval": "tasks.humaneval:HumanEval",
    "gsm8k": "tasks.gsm8k:Gsm8k",
    "mmlu": "tasks.mmlu:Mmlu",
    "cnndm": "tasks.cnndm:CnnDailyMail",
}


def load_task(name: str, **options) -> Task:
    """The task called `name`, or the class at `name` = "package.module:Class".

    `options` are the fields of the task class: those of every task (`tasks.base.Task`), and those
    that the task adds.

    Raises:
        ValueError: no such task, a path that leads to no task, an option that it does not have,
            or a bad value of one.
    """
    task_class = _find_class(name)
    known = [field.name for field in fields(task_class)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"dataset.name={name} has no option {option!r}: it has {', '.join(known)}"
            )
    return task_class(**options)


def task_name(name: str) -> str:
    """The name of the task that `load_task` finds by `name`: its group below `task`.

    Raises:
        ValueError: no such task, or a path that leads to no task.
    """
    return name if name in TASKS else _find_class(name).name


def _find_class(name: str) -> type[Task]:
    module_name, _, class_name = TASKS.get(name, str(name)).partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ValueError(
            f"dataset.name={name!r} is not a task: known are {', '.join(sorted(TASKS))}, "
            "or give your own as package.module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Either the module itself or a package that its data set needs: the error says which.
        raise ValueError(f"dataset.name={name!r}: cannot import {module_name}: {error}") from error
    task_class = getattr(module, class_name, None)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise ValueError(f"dataset.name={name!r}: {module_name} has no Task class {class_name!r}")
    return task_class
