"""The tasks by name. This module knows where each task is defined and which options it takes.

A task's module is imported only when the task is loaded: a run needs the packages of its own task
only.
"""

import importlib
from dataclasses import fields

from tasks.base import Example, Task, select

__all__ = ["TASKS", "Example", "Task", "load_task", "select", "task_name", "task_options"]

# `dataset.name` -> "module:class"
TASKS = {
    "humaneval": "tasks.humaneval:HumanEval",
    "gsm8k": "tasks.gsm8k:Gsm8k",
    "mmlu": "tasks.mmlu:Mmlu",
    "cnndm": "tasks.cnndm:CnnDailyMail",
}


def load_task(name: str, **options) -> Task:
    """The task called `name`, or the class at `name` = "package.module:Class".

    `options` are the fields of the task class: the fields of every task (`tasks.base.Task`), and
    those that this task adds.

    Raises:
        ValueError: there is no such task, the path leads to no task, or the value of an option is
            bad.
        TypeError: the task has no such option; see `task_options`.
    """
    return _find_class(name)(**options)


def task_options(name: str) -> list[str]:
    """The options of the task that `load_task` finds by `name`.

    Raises:
        ValueError: there is no such task, or the path leads to no task.
    """
    return [field.name for field in fields(_find_class(name))]


def task_name(name: str) -> str:
    """The name of the task that `load_task` finds by `name`: its group below the key `task`.

    Raises:
        ValueError: there is no such task, or the path leads to no task.
    """
    return name if isinstance(name, str) and name in TASKS else _find_class(name).name


def _find_class(name: str) -> type[Task]:
    module_name, _, class_name = (
        TASKS.get(name, name) if isinstance(name, str) else str(name)
    ).partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ValueError(
            f"dataset.name={name!r} is not a task: known are {', '.join(sorted(TASKS))}, "
            "or give your own as package.module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The missing module is either this one or a package that its data set needs. The error says
        # which.
        raise ValueError(f"dataset.name={name!r}: cannot import {module_name}: {error}") from error
    task_class = getattr(module, class_name, None)
    if not (isinstance(task_class, type) and issubclass(task_class, Task)):
        raise ValueError(f"dataset.name={name!r}: {module_name} has no Task class {class_name!r}")
    return task_class
