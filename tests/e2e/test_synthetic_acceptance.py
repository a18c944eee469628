"""The counts show a set acceptance, and the tokens per cycle are what theory expects.

The tests use the benchmarks' own engine, worker extension and loop, with tiny dummy models, for
every proposer that the benchmarks know. One engine per case measures all rates.
"""

import math
from argparse import Namespace
from pathlib import Path

import engines  # noqa: F401 - its settings of this process, before vLLM is imported
import pytest
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from benchmarks.bench_engine import BenchEngine
from benchmarks.plans import Plan, Run
from benchmarks.ratios import complete, expected_tokens, turns_of

TINY = "llama-tiny"
RATES = (0.0, 0.7, 1.0)
BATCH_SIZE = 32
CASES = {
    "chef-1-1": f"{TINY}+{TINY}@1,1",
    "chef-1-5": f"cd0.1:{TINY}+{TINY}@1,5",
    "chef-3": f"{TINY}+{TINY}+{TINY}@1,1,1",
    "sd": f"cd0:{TINY}+{TINY}@sd3",
    "outside": f"{TINY}+{TINY}/{TINY}@3",
    "stock": f"{TINY}/{TINY}@3",
}
# Standard deviations of bounds that are wide themselves: a sound engine does not fail.
SIGMAS = 4


@pytest.fixture
def settings() -> Namespace:
    return Namespace(
        dtype="float32",
        enforce_eager=True,
        engine_args={"gpu_memory_utilization": 0.05},  # vLLM wants that much to be free
        engines_at_once=1,
        requests=None,
        sampling=[{}],
        kv_cache_gib=0.0625,
        models=Path("models"),
        prompts=None,
        prompt_len=4,
        num_tokens=24,
        skip=2,
        repeats=1,
        min_cycles=1500,
        cell_seconds=20,
        target="probs",
        temperature=[0.0],
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_acceptance_is_what_was_set(case, settings, tmp_path):
    run = Run.parse(CASES[case])
    settings.temperature = [1.0 if case in ("chef-1-1", "outside") else 0.0]
    engine = BenchEngine(Plan(run.text, RATES, (BATCH_SIZE,), (BATCH_SIZE,)), settings, tmp_path)
    try:
        entry = engine.describe()
        rows = list(engine.cells())
    finally:
        engine.close()
        cleanup_dist_env_and_memory()
    assert [row["acceptance_set"] for row in rows] == list(RATES)
    for row in rows:
        check(row, run, entry)
    complete({"results": rows, "configurations": [entry]})
    assert all(row["theory"]["tokens_per_cycle"] for row in rows)


def check(row: dict, run: Run, entry: dict) -> None:
    rate, found = row["acceptance_set"], [a for a in row["acceptance"] if a is not None]
    assert row["requests_per_step"] == BATCH_SIZE
    for acceptance in found:
        # At least one proposal is judged per cycle, and all members have similar shares.
        spread = math.sqrt(rate * (1 - rate) / (row["num_cycles"] / len(run.members)))
        assert acceptance == pytest.approx(rate, abs=SIGMAS * spread + 1e-9), row
    tokens = expected_tokens(run, turns_of(entry), [rate] * len(run.models))
    # A cycle emits 1 to window + 1 tokens; half of this range bounds the spread.
    spread = run.window / 2 / math.sqrt(row["num_cycles"]) if 0 < rate < 1 else 0.0
    print(rate, row["acceptance"], row["tokens_per_cycle"], tokens, row["num_cycles"])
    # A small extra: the first timed cycles still show that the window was empty.
    assert row["tokens_per_cycle"] == pytest.approx(tokens, abs=SIGMAS * spread + 0.02), row
