"""`scripts/soak.py` with tiny models. `SOAK_S` sets its length: ten minutes if it is not set."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import ENVIRONMENT
from tiny_models import llama_config, save_byte_tokenizer, save_model, save_noisy_copy

from repository import ROOT

SOAK_S = float(os.environ.get("SOAK_S", 600))
CONTEXT = 512
# Besides the requests: two servers start, and the plain one answers.
MORE_S = 1800

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    config = llama_config(257, max_position_embeddings=CONTEXT, eos_token_id=0)
    first = save_model(root / "0", config, seed=0)
    other = save_noisy_copy(root / "1", first, 1, 0.02)
    for folder in (first, other):
        save_byte_tokenizer(folder)
    return [
        f"method.model={first}",
        f"method.extra_model={other}",
        "method.gamma=[1,3]",
        "+method.llm.kv_cache_memory_bytes=33554432",
    ]


def soak(keys: list[str], folder: Path, *more: str) -> tuple[int, list[str], dict[str, Any]]:
    """Status, lines and result of a run."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/soak.py"), *keys, f"save_path={folder}", *more],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=SOAK_S + MORE_S,
    )
    assert (folder / "result.json").exists(), done.stdout + done.stderr
    return (
        done.returncode,
        done.stdout.splitlines(),
        json.loads((folder / "result.json").read_text()),
    )


def test_nothing_is_wrong_and_nothing_is_left(keys, tmp_path):
    # What a batch's shape needs for the first time is not all there after a short warm-up.
    allowance = 64 if SOAK_S >= 300 else 256
    more = (f"duration_s={SOAK_S}", f"memory_allowance_mb={allowance}")
    status, lines, result = soak(keys, tmp_path, *more)
    assert (status, result["faults"]) == (0, []), "\n".join(lines)
    assert result["num_preemptions"] > 0
    requests = result["requests"]
    assert all(requests[kind]["cancelled"] > 0 for kind in ("greedy", "sampled"))
    assert all(requests[kind]["answered"] > 0 for kind in ("greedy", "sampled"))
    assert requests["bad"]["refused"] > 0
    greedy = result["greedy"]
    assert greedy["wrong"] == 0 and greedy["equal"] > 10 * greedy["tie"]
    assert greedy["num_equal_tokens"] > greedy["equal"] > 0
    assert any(line.startswith("preemptions") for line in lines)


def test_a_plain_server_with_other_weights_is_found(keys, tmp_path):
    """What the comparison calls equal must be able to differ."""
    more = (
        "plain_keys=['method.weights=[0.05,0.95]']",
        "num_requests=60",
        "rounds=2",
        "distinct=20",
    )
    status, lines, result = soak(keys, tmp_path, *more)
    assert status == 1
    assert result["greedy"]["wrong"] > 0
    wrong = [line for line in lines if "the plain ensemble's is" in line]
    assert wrong and all(line.startswith("fault: request ") for line in wrong)
