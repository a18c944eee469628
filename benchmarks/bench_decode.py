"""What a decoded token costs: each model alone and ensembles of them, side by side in one run.

    python benchmarks/bench_decode.py --runs llama-7b llama-7b+llama-7b --batch-sizes 1 8
    python benchmarks/bench_decode.py --runs llama-7b+llama-68m llama-7b+llama-68m@1,5

Dummy weights, greedy, a fixed number of tokens.  A run is one model or members joined by `+`; with
the gammas of all members after an `@` they take turns.  What dummy weights accept is chance: the
figure to compare is `ms_per_cycle`.
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

CHEF_WORKER = "vllm.chef.worker.ChefWorker"
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
        for name in members_of(run):
            if name not in SHAPES:
                parser.error(f"--runs: no shape '{name}'; there are {', '.join(SHAPES)}")
    return args


def members_of(run: str) -> list[str]:
    return run.split("@")[0].split("+")


def gammas_of(run: str) -> list[int]:
    """Of all members, in their order; empty where they do not take turns."""
    return [int(gamma) for gamma in run.partition("@")[2].split(",") if gamma]


def make_engine(run: str, args: argparse.Namespace, root: Path) -> Any:
    from vllm import LLM

    first, *others = (make_shape(name, root) for name in members_of(run))
    ensemble = {}
    if others:
        config = {"extra_model": others, "ensemble_fn": "weighted", "ensemble_target": args.target}
        ensemble = {"worker_cls": ENSEMBLE_WORKER, "additional_config": {"ensemble": config}}
    if gammas := gammas_of(run):
        ensemble["worker_cls"] = CHEF_WORKER
        ensemble["additional_config"]["chef"] = {"gamma": gammas}
        ensemble |= {"max_num_batched_tokens": 8192, "max_num_scheduled_tokens": 4096}
        ensemble["speculative_config"] = {
            "method": "draft_model",
            "model": others[-1],
            "num_speculative_tokens": sum(gammas) - 1,
        }
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
    """Milliseconds a token of each request, per batch size: a long run less one of one token."""
    llm = make_engine(run, args, root)
    rows = []
    for batch_size in args.batch_sizes:
        time_decoding(llm, batch_size, args.num_tokens, args.prompt_len)  # warm-up
        steps = []
        takes_turns = bool(gammas_of(run))
        if takes_turns:
            llm.collective_rpc("reset_turn_stats")
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
        if takes_turns:
            row |= cycles(llm.collective_rpc("turn_stats")[0], row["ms_per_step"])
        print(row, flush=True)
        rows.append(row)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return rows


def cycles(stats: dict[str, Any], ms_per_token: float) -> dict[str, Any]:
    tokens_per_cycle = stats["num_tokens"] / stats["num_cycles"]
    judged = [sum(row) for row in stats["num_judged"]]
    accepted = [sum(row) for row in stats["num_accepted"]]
    return {
        "tokens_per_cycle": tokens_per_cycle,
        "ms_per_cycle": ms_per_token * tokens_per_cycle,
        "acceptance": [a / j if j else None for a, j in zip(accepted, judged, strict=True)],
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each ensemble's cost over the sum of its members' alone, and the speed of turns over the
    plain ensemble, where those were run too."""
    cost = {(row["run"], row["batch_size"]): row["ms_per_step"] for row in rows}
    for row in rows:
        members = members_of(row["run"])
        alone = [cost.get((member, row["batch_size"])) for member in members]
        if gammas_of(row["run"]):
            plain = cost.get(("+".join(members), row["batch_size"]))
            row["speed_over_plain"] = plain / row["ms_per_step"] if plain else None
        elif len(members) > 1 and all(alone):
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
