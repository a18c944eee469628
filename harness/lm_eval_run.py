"""One run of lm-evaluation-harness: what is checked, what lm-eval is asked, what is written.

This module knows lm-eval's evaluator and task manager. `lm_eval_model` answers the requests.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from harness.checks import (
    check_flags,
    check_groups,
    check_known,
    check_path,
    check_seed,
    check_writable,
)
from harness.engine import Engine, configure_process
from harness.engine_config import check_sampling_params
from harness.errors import ConfigError, one_line
from harness.methods import MethodSpec
from harness.proposals import fields, rows
from harness.results import table
from harness.run import device_name, versions
from harness.session import Session

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from harness.lm_eval_model import SpeculativeEnsembleLM

logger = logging.getLogger(__name__)

FLAGS = (
    "apply_chat_template",
    "fewshot_as_multiturn",
    "log_samples",
    "confirm_run_unsafe_code",
    "verbose",
)
KEYS = (
    *("method", "tasks", "include_path", "num_fewshot", "limit", "gen_kwargs", *FLAGS),
    *("system_instruction", "bootstrap_iters", "seed", "batch_size", "save_path"),
)
RESULTS, SUMMARY, CONFIG = "results.json", "summary.json", "config.yaml"
# The run writes nothing into a folder that holds one of these files, whatever run they are from.
FILES = (RESULTS, SUMMARY, CONFIG, "samples.jsonl")
# Loggers whose messages at level INFO say nothing about the run.
CHATTY = ("lm_eval", "datasets", "httpx", "evaluate")
# Stands for the number of samples, which is unknown before the data sets are read.
MANY = 1 << 16


def run(config: DictConfig, directory: str) -> dict[str, Any]:
    """Evaluate and record; returns the summary.

    Raises:
        ConfigError: bad input. The error comes before weights are loaded, and before results are
            written.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    _check(plain)
    plain["gen_kwargs"] = {k: v for k, v in plain["gen_kwargs"].items() if v is not None}
    folder = Path(directory).expanduser()
    _check_folder(folder)
    # lm-eval imports torch and the hub's client.
    configure_process(plain["verbose"])
    _quieten(plain["verbose"])
    manager, tasks = _load_tasks(plain)
    num_slots = plain["batch_size"] or _num_samples(
        plain["limit"], len(manager.load(tasks)["tasks"])
    )
    session = Session.prepare(plain["method"], plain["seed"], num_slots, plain["verbose"])
    with _model(session, folder, plain) as model:
        _check_requests(model, session, manager.load(tasks)["tasks"], plain)
        results = _evaluate(model, manager, tasks, plain)
        summary = _summarize(plain, session.spec, model, results)
        _write(folder, results, summary)
    print(_closing_lines(results, summary), flush=True)
    return summary


# What is refused


def _check(plain: Mapping[str, Any]) -> None:
    check_known(plain, KEYS)
    check_groups(plain, ("method", "gen_kwargs"))
    check_flags(plain, FLAGS)
    if not _names(plain["tasks"]):
        raise ConfigError("tasks: there are none; name some, such as tasks=[arc_easy,gsm8k]")
    for path in _names(plain["include_path"]):
        if not Path(path).is_dir():
            raise ConfigError(f"include_path: '{path}' is no folder; give one with YAML files")
    check_path(plain, "save_path")
    if not isinstance(plain["system_instruction"], (str, type(None))):
        raise ConfigError(f"system_instruction: {plain['system_instruction']!r} must be a text")
    _check_numbers(plain)


def _check_numbers(plain: Mapping[str, Any]) -> None:
    optional = ("num_fewshot", "batch_size")
    lowest = {"num_fewshot": 0, "batch_size": 1, "bootstrap_iters": 0}
    for key, least in lowest.items():
        value = plain[key]
        if value is None and key in optional:
            continue
        if type(value) is not int or value < least:
            or_null = ", or null" if key in optional else ""
            raise ConfigError(f"{key}: {value!r} must be an integer from {least}{or_null}")
    check_seed(plain["seed"])
    limit = plain["limit"]
    if limit is None:
        return
    if type(limit) not in (int, float) or limit <= 0 or (limit > 1 and limit != int(limit)):
        raise ConfigError(
            f"limit: {limit!r} must be a number of samples, a share below 1, or null for all"
        )


def _names(value: Any) -> list[str]:
    """A string, or a list of strings, as a list."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"tasks, include_path: {value!r} must be a name or a list of names")
    return names


def _check_folder(folder: Path) -> None:
    for name in FILES:
        if (folder / name).exists():
            raise ConfigError(f"save_path: '{folder}' already holds {name}; choose another folder")
    check_writable(folder)


def _check_requests(
    model: "SpeculativeEnsembleLM",
    session: Session,
    tasks: Mapping[str, Any],
    plain: dict[str, Any],
) -> None:
    """Find errors that would otherwise appear when weights are loaded, or in mid-run."""
    from harness.lm_eval_model import SCORING

    if not session.engine_config.model_config.logprobs_mode.endswith("logprobs"):
        raise ConfigError("method.llm.logprobs_mode: logits are no scores; leave it out")
    if plain["apply_chat_template"] and not getattr(session.tokenizer, "chat_template", None):
        raise ConfigError("apply_chat_template: the tokenizer has no template; set it to false")
    check_sampling_params(SCORING, session.engine_config, session.tokenizer)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not plain["confirm_run_unsafe_code"]:
            raise ConfigError(
                f"tasks: '{name}' executes what is generated, and nothing confines it; set "
                "confirm_run_unsafe_code=true to allow it"
            )
        if task.OUTPUT_TYPE == "generate_until":
            gen_kwargs = {**(task.config.generation_kwargs or {}), **plain["gen_kwargs"]}
            params = model.sampling_params(gen_kwargs)
            try:
                check_sampling_params(params, session.engine_config, session.tokenizer)
            except ConfigError as error:
                named = str(error).removeprefix("method.generate.")
                raise ConfigError(f"tasks: generation_kwargs of '{name}': {named}") from error


# What lm-eval is asked


def _quieten(verbose: bool) -> None:
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def _load_tasks(plain: Mapping[str, Any]) -> tuple["TaskManager", list[Any]]:
    """Tasks and groups with their data sets; this may have to ask the hub."""
    from lm_eval.tasks import TaskManager

    patterns, folders = _names(plain["tasks"]), _names(plain["include_path"])
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(patterns) <= set(manager.all_subtasks):
        # lm-eval has fourteen thousand tasks of its own, and finding them takes seconds.
        manager = TaskManager(include_path=folders)
    names = [name for pattern in patterns for name in _matches(manager, pattern)]
    loaded: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            there = manager.load(name)
        except Exception as error:  # from data sets, the hub's client, or a task's own code
            raise ConfigError(f"tasks: '{name}' cannot be loaded: {_advised(error)}") from error
        # All other groups are parts of the first one.
        groups = list(there["groups"].values())
        loaded += groups[:1] or there["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:  # a task appears twice
        raise ConfigError(f"tasks: {one_line(error)}; name it once") from error
    return manager, loaded


def _matches(manager: "TaskManager", pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if names := manager.match_tasks([pattern]):
        return names
    close = difflib.get_close_matches(pattern, manager.all_tasks)
    meant = f"choose another, such as {' or '.join(close)}" if close else "choose another"
    raise ConfigError(
        f"tasks: there is no '{pattern}'; {meant}, or set include_path to the folder that has it"
    )


def _advised(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, OSError):
        return (
            f"{text}; let it be downloaded once with HF_HUB_OFFLINE unset, or copy the hub's cache "
            "of a machine that has it (HF_HOME), or name another task"
        )
    return f"{text}; mend the task, or name another"


def _num_samples(limit: float | None, num_tasks: int) -> int:
    return int(limit) * num_tasks if limit is not None and limit >= 1 else MANY


@contextlib.contextmanager
def _model(
    session: Session, folder: Path, plain: dict[str, Any]
) -> Iterator["SpeculativeEnsembleLM"]:
    from harness.lm_eval_model import SpeculativeEnsembleLM

    bare = dataclasses.replace(session.spec, sampling_params={})
    with contextlib.ExitStack() as stack:

        def start() -> Engine:
            stack.enter_context(_claimed(folder, plain))
            return stack.enter_context(dataclasses.replace(session, spec=bare).start())

        yield SpeculativeEnsembleLM(
            start,
            session.tokenizer,
            session.max_model_len,
            session.spec.sampling_params,
            plain["seed"],
            plain["batch_size"],
        )


def _evaluate(
    model: "SpeculativeEnsembleLM",
    manager: "TaskManager",
    tasks: Sequence[Any],
    plain: Mapping[str, Any],
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from harness.lm_eval_model import NAME

    same = (
        *("num_fewshot", "batch_size", "limit", "bootstrap_iters", "log_samples"),
        *("system_instruction", "apply_chat_template", "fewshot_as_multiturn"),
        "confirm_run_unsafe_code",
    )
    try:
        results = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            gen_kwargs=plain["gen_kwargs"] or None,
            **{key: plain[key] for key in same},
        )
    except ConfigError:
        raise
    except Exception as error:
        if model.is_started:
            raise
        # lm-eval makes the requests from the data sets. This can fail for many reasons, such as too
        # few examples or a bad template.
        raise ConfigError(f"tasks: lm-eval cannot ask them: {one_line(error)}") from error
    results["config"] |= {"model": NAME, "model_args": plain["method"]}
    return results


# What is written


def _summarize(
    plain: Mapping[str, Any],
    spec: MethodSpec,
    model: "SpeculativeEnsembleLM",
    results: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "method": spec.name,
        "members": list(spec.members),
        **spec.parameters,
        "tasks": results["results"],
        "num_fewshot": results["n-shot"],
        "num_samples": {name: n["effective"] for name, n in results["n-samples"].items()},
        # These figures cover generated texts only, because scoring generates nothing.
        "tokens_per_second": model.num_tokens / model.time_s if model.num_tokens else None,
        "total_time_s": model.time_s,
        "num_tokens": model.num_tokens,
        **fields(model.counts),
        "batch_size": plain["batch_size"],
        "generate": spec.sampling_params,
        "versions": {**versions(), "lm-eval": results["lm_eval_version"]},
        "device": device_name(),
        "seed": plain["seed"],
    }


@contextlib.contextmanager
def _claimed(folder: Path, plain: dict[str, Any]) -> Iterator[None]:
    """Keep other runs out of the folder during the run. A run that fails leaves no file there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG
    try:
        with file.open("x", encoding="utf-8") as config:
            config.write(OmegaConf.to_yaml(OmegaConf.create(plain)))
    except FileExistsError:
        raise ConfigError(f"save_path: another process writes '{folder}'; choose another") from None
    logger.info("results go to %s", folder)
    try:
        yield
    except BaseException:
        file.unlink()
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
        raise


def _write(folder: Path, results: dict[str, Any], summary: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    for name, content in ((RESULTS, results), (SUMMARY, summary)):
        text = json.dumps(content, indent=2, default=handle_non_serializable)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _closing_lines(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    lines = {"method": summary["method"], "members": ", ".join(summary["members"])}
    if summary["num_tokens"]:
        lines |= {
            "tokens": summary["num_tokens"],
            "time": f"{summary['total_time_s']:.2f} s",
            "speed": f"{summary['tokens_per_second']:.2f} tokens/s",
        }
    return "\n".join([*tables, table({**lines, **rows(summary)})])
