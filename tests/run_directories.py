"""Run directories made by hand, in the form that a run leaves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PLAIN_SPEED = 100.0


def make_config(name: str = "cd", **changes: Any) -> dict[str, Any]:
    """A resolved configuration; `changes` are by dotted key, with '__' for the dot."""
    llm = {"dtype": None, "gpu_memory_utilization": None}
    method = {"name": name, "model": "org/large", "generate": {"temperature": 0}, "llm": llm}
    if name.startswith(("cd", "ensemble")):
        fn = "contrastive" if name.startswith("cd") else "weighted"
        llm |= {"ensemble_fn": fn, "ensemble_target": "raw-logits", "ensemble_args": {}}
        method |= {"alpha": 0.1, "weights": None}
        method |= {"amateur_model" if name.startswith("cd") else "extra_model": "org/small"}
    if name == "sd":
        method["draft_model"] = "org/small"
    if name.endswith(("sd", "chef")):
        method |= {"gamma": 3, "max_gamma": 5}
    dataset = {"name": "gsm8k", "size": 10, "path": None, "seed": None, "indices": None}
    dataset |= {"use_fewshot": False, "chat": False}
    config = OmegaConf.create(
        {
            "method": method,
            "dataset": dataset,
            "task": {"gsm8k": {"num_fewshot": 8}, "mmlu": {"mode": "generate"}},
            "evaluate": {"execute_code": False},
            "seed": 0,
            "batch_size": 1,
            "save_path": "somewhere",
            "verbose": False,
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(config)


def make_run(
    path: Path,
    config: dict[str, Any],
    scores: Sequence[float | None] = (1, 0),
    tokens: Sequence[Sequence[int]] | None = None,
    speed: float | None = PLAIN_SPEED,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run; without `speed` it is unfinished. `summary` adds to summary.json."""
    path.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    tokens = tokens or [[1, 2, 3]] * len(scores)
    with (path / "samples.jsonl").open("w") as file:
        for index, (score, ids) in enumerate(zip(scores, tokens, strict=True)):
            sample = {"index": index, "task_id": f"t/{index}", "token_ids": ids, "score": score}
            file.write(json.dumps({**sample, "completion": "text", "num_tokens": len(ids)}) + "\n")
    if speed is not None:
        known = [score for score in scores if score is not None]
        content = {
            "method": config["method"]["name"],
            "metric": "accuracy",
            "num_samples": len(scores),
            "score": sum(known) / len(known) if known else None,
            "tokens_per_second": speed,
            "device": "a device",
            "versions": {"vllm": "0.32.0"},
        }
        (path / "summary.json").write_text(json.dumps({**content, **(summary or {})}))
    return path


TURNS = {
    "gamma": [1, 3],
    "turn_order": [0, 1],
    "tokens_per_cycle": 2.5,
    "acceptance": [0.9, 0.6],
    "acceptance_by_position": [[0.9], [0.7, 0.6, None]],
}
