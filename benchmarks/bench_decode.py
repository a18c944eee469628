"""What a decoded token costs: each model alone and ensembles of them, side by side in one run.

    python benchmarks/bench_decode.py --runs llama-7b llama-7b+llama-7b --batch-sizes 1 8

Dummy weights, greedy, a fixed number of tokens.  A run is one model or members joined by `+`.
The last line of the output is JSON; `--out FILE` writes it too.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from shapes import SHAPES, make_shape

ENSEMBLE_WORKER = "vllm.ensemble_decode.worker.EnsembleDecodeWorker"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=["llama-7b", "llama-7b+llama-7b"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target", default="probs", help="ensemble_target")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--kv-cache-gib", type=float, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for run in args.runs:
        for name in run.split("+"):
            if name not in SHAPES:
                parser.error(f"--runs: no shape '{name}'; there are {', '.join(SHAPES)}")
    return args


def make_engine(run: str, args: argparse.Namespace, root: Path) -> Any:
    from vllm import LLM

    first, *others = (make_shape(name, root) for name in run.split("+"))
    ensemble = {}
    if others:
        config = {"extra_model": others, "ensemble_fn": "weighted", "ensemble_target": args.target}
        ensemble = {"worker_cls": ENSEMBLE_WORKER, "additional_config": {"ensemble": config}}
    return LLM(
        first,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        enforce_eager=args.enforce_eager,
        max_model_len=args.prompt_len + args.num_tokens,
        max_num_seqs=max(args.batch_sizes),
        kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),
        enable_prefix_caching=False,
        **ensemble,
    )


def time_decoding(llm: Any, batch_size: int, num_tokens: int, prompt_len: int) -> float:
    """Seconds of one batch, prompts included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [3 + i] * prompt_len} for i in range(batch_size)]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def bench(run: str, args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Milliseconds a decode step, per batch size: a long run less one of a single token."""
    llm = make_engine(run, args, root)
    rows = []
    for batch_size in args.batch_sizes:
        time_decoding(llm, batch_size, args.num_tokens, args.prompt_len)  # warm-up
        steps = []
        for _ in range(args.repeats):
            prefill = time_decoding(llm, batch_size, 1, args.prompt_len)
            whole = time_decoding(llm, batch_size, args.num_tokens, args.prompt_len)
            steps.append(1000 * (whole - prefill) / (args.num_tokens - 1))
        row = {
            "run": run,
            "batch_size": batch_size,
            "ms_per_step": statistics.median(steps),
            "ms_per_step_min": min(steps),
            "ms_per_step_max": max(steps),
        }
        print(row, flush=True)
        rows.append(row)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each ensemble's cost over the sum of its members' alone, where they were run too."""
    cost = {(row["run"], row["batch_size"]): row["ms_per_step"] for row in rows}
    for row in rows:
        members = row["run"].split("+")
        alone = [cost.get((member, row["batch_size"])) for member in members]
        if len(members) > 1 and all(alone):
            row["ratio_to_members_alone"] = row["ms_per_step"] / sum(alone)


def device_name() -> str:
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = [row for run in args.runs for row in bench(run, args, Path(root))]
    add_ratios(rows)
    import torch
    import vllm

    document = {
        "benchmark": "bench_decode",
        "date": date.today().isoformat(),
        "device": device_name(),
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
