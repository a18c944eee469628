"""The benchmark under load from its command line to its document, with tiny dummy models."""

import json
import subprocess
import sys

import pytest

from benchmarks.loads import Load, load_of
from benchmarks.plans import LOADS
from repository import ROOT

PLAIN, TURNS, STOCK = (LOADS["smoke"][at] for at in (0, 1, 4))


@pytest.mark.slow
def test_a_load_is_measured(tmp_path):
    out = tmp_path / "load.json"
    runs = [PLAIN, TURNS, STOCK]
    options = ["--preset", "smoke", "--runs", *runs, "--engines-at-once", "3", "--out", out]
    options += ["--engine-args", json.dumps({"gpu_memory_utilization": 0.05})]
    command = [sys.executable, ROOT / "benchmarks/bench_load.py", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 0
    document = json.loads(out.read_text())
    assert document == json.loads(done.stdout.splitlines()[-1])
    assert [entry["status"] for entry in document["configurations"]] == ["done"] * 3
    rows = document["results"]
    loads = [Load(2), Load(4), Load(rate=0.5)]
    assert [(row["run"], load_of(row)) for row in rows] == [(r, at) for r in runs for at in loads]
    for row in rows:
        check(row, rows)
    assert "in flight" in done.stdout and "TTFT" in done.stdout


def check(row: dict, rows: list[dict]) -> None:
    plain = next(r for r in rows if r["run"] == PLAIN and load_of(r) == load_of(row))
    # Every run has the same requests, and all of their tokens come.
    assert (row["num_requests"], row["num_tokens"]) == (plain["num_requests"], plain["num_tokens"])
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        times = row[name]
        assert 0 < times["p50"] <= times["p99"]
    assert row["latency_ms"]["mean"] > row["ttft_ms"]["mean"]
    if row["in_flight"]:
        assert 0.5 * row["in_flight"] < row["mean_in_flight"] <= row["in_flight"]
    else:
        fullest = next(r for r in rows if r["run"] == PLAIN and r["in_flight"] == 4)
        assert row["requests_per_s_offered"] == pytest.approx(0.5 * fullest["requests_per_s"])
    assert (row["over_plain"] is None) == (row["run"] == PLAIN)
    assert row["acceptance_set"] == (None if row["run"] == PLAIN else 0.8)
    if row["run"] == PLAIN:
        assert "acceptance" not in row
    else:
        assert 1 < row["tokens_per_cycle"] <= 4
        # Some dozens of proposals are judged.
        assert all(0.4 < rate <= 1 for rate in row["acceptance"] if rate is not None)
