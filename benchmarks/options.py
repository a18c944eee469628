"""Options that the benchmarks of engines share, and what is refused before an engine starts.

This module knows command lines. It knows neither cells nor loads.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.plans import Run
from benchmarks.shapes import SHAPES
from repository import model_root, read_env


def add_shared(parser: argparse.ArgumentParser, kv_cache: str) -> None:
    """Add the options of engines, of their models, and of the call.

    `kv_cache` says how large the KV cache is by default.
    """
    read_env()
    add = parser.add_argument
    add("--target", default="probs", help="ensemble_target of weighted ensembles")
    add("--dtype", default="bfloat16")
    add("--enforce-eager", action="store_true")
    add("--kv-cache-gib", type=float, help=f"default: {kv_cache}")
    add("--engine-args", type=json_object, default={}, metavar="JSON", help="of vLLM's EngineArgs")
    add("--models", type=Path, default=model_root(), help="folder of real members")
    add("--prompts", type=Path, help="JSON lines with `prompt`; default: HumanEval's")
    add("--out", type=Path)
    add("--resume", action="store_true", help="keep what --out has, and measure the rest")
    add("--time-limit", type=float, help="seconds after which no engine is started any more")
    add("--engine-timeout", type=float, default=600, help="seconds to start, and to measure")
    add(
        "--engines-at-once",
        type=int,
        default=1,
        metavar="N",
        help="start N engines together, then measure one by one; all need memory meanwhile",
    )


def check_shared(args: argparse.Namespace) -> None:
    """Raises ValueError with one line that begins with the option."""
    if args.engines_at_once < 1:
        raise ValueError("--engines-at-once: must be 1 or more")
    if args.resume and not args.out:
        raise ValueError("--resume: needs the --out of the run that it goes on with")


def json_object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def check_models(runs: Iterable[str], models: Path) -> None:
    """Refuse missing models, and runs that mix shapes with real models.

    A mixed run has no prompts: shapes have no tokenizer, and real models need real text.
    """
    for run in runs:
        names = Run.parse(run).models
        real = [name for name in names if name not in SHAPES]
        if 0 < len(real) < len(names):
            raise ValueError(f"'{run}' mixes shapes ({', '.join(SHAPES)}) with other models")
        for name in real:
            if not (models / name / "config.json").exists():
                raise ValueError(
                    f"no model '{name}' in '{models}', and no such shape ({', '.join(SHAPES)}); "
                    "scripts/prepare_models.py makes the default models"
                )
