"""The order of a run with a fake engine: files, times, scores, and early deaths."""

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import harness.command
import harness.run
import harness.session
import main_dataset
from harness.engine import Completion
from harness.errors import ConfigError
from harness.run import run
from repository import ROOT
from tasks import Example, Task

CONFIGS = ROOT / "configs"


@dataclass(frozen=True, kw_only=True)
class Letters(Task):
    """Completions are lower case; those before the letter `until` are right."""

    name = "letters"
    metric = "share"
    max_tokens = 77

    until: str = "b"

    @property
    def stop(self):
        return ("!", "?")

    def examples(self):
        return [
            Example(index=i, task_id=f"letters/{i}", prompt="ab"[: i + 1], reference=None)
            for i in range(3)
        ]

    def postprocess(self, example, text):
        return text.lower()

    def score(self, example, completion):
        return float(completion < self.until) if self.execute_code else None


class FakeEngine:
    """Says `A`, `B`, ... in reverse order; takes one second a completion, ten for the warm-up."""

    def __init__(self) -> None:
        self.calls = []
        self.now = 0.0
        self.dies_after = None
        self.counts = {}
        self.error = None

    def perf_counter(self) -> float:
        return self.now

    def warm_up(self, request) -> None:
        self.calls.append(("warm_up", request.index))
        self.now += 10

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        self.now += 0.25

    def generate(self, requests, batch_size):
        self.calls.append(("generate", batch_size))
        for count, request in enumerate(reversed(requests)):
            if count == self.dies_after:
                raise self.error
            self.now += 1
            index = request.index
            text = list(request.choices.values())[-1] if request.choices else "ABC"[index]
            logprobs = [{65: -0.5}] if request.choices else None
            yield Completion(index, text, [65 + index] * (index + 1), "stop", 0.5, logprobs)

    def proposals(self) -> dict:
        self.calls.append("proposals")
        return self.counts

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def engine(monkeypatch, tmp_path) -> FakeEngine:
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "models"))
    fake = FakeEngine()
    model_config = SimpleNamespace(max_model_len=100)

    def start(engine_config, sampling_params, takes_turns):
        assert not takes_turns
        fake.calls.append("start")
        fake.sampling_params = sampling_params
        return fake

    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))

    def make_engine_config(spec, seed, num_slots):
        fake.num_slots = num_slots
        return SimpleNamespace(model_config=model_config)

    replaced = {
        "make_engine_config": make_engine_config,
        "load_tokenizer": lambda model_config: tokenizer,
        "check_sampling_params": lambda *_: None,
        "Engine": SimpleNamespace(start=start),
        "configure_process": lambda verbose: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(harness.session, name, value)
    monkeypatch.setattr(harness.run, "time", fake)
    return fake


def overrides(tmp_path: Path, *more: str) -> list[str]:
    return [
        "method=large_model",
        "method.model=m",
        f"dataset.name='{__name__}:Letters'",
        "dataset.size=full",
        f"save_path={tmp_path / 'run'}",
        *more,
    ]


def run_letters(tmp_path: Path, *more: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("default", overrides(tmp_path, *more))
    return run(config, config.save_path)


def read_samples(tmp_path: Path) -> list[dict]:
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_files_of_a_run(engine, tmp_path, capsys):
    summary = run_letters(tmp_path, "evaluate.execute_code=true", "seed=5", "batch_size=2")
    samples = read_samples(tmp_path)
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    assert samples[1] == {
        "index": 1,
        "task_id": "letters/1",
        "prompt": "ab",
        "completion": "b",
        "token_ids": [66, 66],
        "num_tokens": 2,
        "finish_reason": "stop",
        "latency_s": 0.5,
        "elapsed_s": 2.0,
        "score": 0.0,
    }
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    expected = {
        "method": "large_model",
        "members": [str(tmp_path / "models" / "m")],
        "num_samples": 3,
        "metric": "share",
        "score": 1 / 3,
        "num_tokens": 6,
        "batch_size": 2,
        "seed": 5,
    }
    assert {key: summary[key] for key in expected} == expected
    assert {"torch", "transformers"} < set(summary["versions"])
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (config.seed, config.method.name) == (5, "large_model")
    assert config.save_path == str(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".progress.json",
        "config.yaml",
        "main_dataset.log",
        "samples.jsonl",
        "summary.json",
    }
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[-7:])
    assert (rows["share"], rows["tokens"], rows["time"]) == ("0.333", "6", "3.00 s")


def test_warm_up_is_not_timed_and_the_device_is_waited_for(engine, tmp_path):
    summary = run_letters(tmp_path)
    assert engine.calls == [
        "start",
        ("warm_up", 0),
        "proposals",
        "synchronize",
        ("generate", None),
        "proposals",  # after three of the engine's seconds
        "proposals",
        "close",
    ]
    # Until the third completion: all tokens over all of the time.
    assert summary["total_time_s"] == 3
    assert summary["tokens_per_second"] == 6 / 3


@pytest.mark.parametrize(("batch_size", "num_slots"), [("1", 1), ("2", 2), ("9", 3), ("null", 3)])
def test_engine_has_no_more_slots_than_the_run_needs(engine, tmp_path, batch_size, num_slots):
    run_letters(tmp_path, f"batch_size={batch_size}")
    assert engine.num_slots == num_slots


COUNTS = {
    "num_cycles": 4,
    "num_tokens": 7,
    "num_calls": [4, 8],
    "num_judged": [[4], []],
    "num_accepted": [[2], []],
}


def test_what_became_of_proposals_is_recorded_and_shown(engine, tmp_path, capsys):
    engine.counts = COUNTS
    summary = run_letters(tmp_path)
    expected = {
        "tokens_per_cycle": 1.75,
        "calls": [4, 8],
        "acceptance": [0.5, None],
        "acceptance_by_position": [[0.5], []],
    }
    assert {key: summary[key] for key in expected} == expected
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[0] for line in lines] == ["acceptance", "tokens a cycle", "calls"]
    assert [line.split("  ")[-1].strip() for line in lines] == ["0.500, -", "1.750", "4, 8"]


def test_without_execution_the_score_is_unknown(engine, tmp_path, capsys):
    assert run_letters(tmp_path)["score"] is None
    assert {sample["score"] for sample in read_samples(tmp_path)} == {None}
    assert "not evaluated" in capsys.readouterr().out


def test_task_says_what_the_configuration_leaves_open(engine, tmp_path):
    run_letters(tmp_path)
    assert engine.sampling_params == {"temperature": 0, "max_tokens": 77, "stop": ["!", "?"]}


def test_configuration_goes_before_the_task(engine, tmp_path):
    run_letters(tmp_path, "method.generate.max_tokens=3", "method.generate.stop=[x]")
    assert engine.sampling_params == {"temperature": 0, "max_tokens": 3, "stop": ["x"]}


def test_options_of_the_task_are_keys_of_the_data_set(engine, tmp_path):
    summary = run_letters(tmp_path, "+dataset.until=c", "evaluate.execute_code=true")
    assert summary["score"] == 2 / 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_run_that_dies_keeps_what_it_had_and_is_continued(engine, tmp_path, error):
    engine.dies_after, engine.error, engine.counts = 2, error, COUNTS
    with pytest.raises(type(error)):
        run_letters(tmp_path, "evaluate.execute_code=true")
    assert [sample["index"] for sample in read_samples(tmp_path)] == [2, 1]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert engine.calls[-1] == "close"

    engine.dies_after = None
    engine.calls.clear()
    summary = run_letters(tmp_path, "evaluate.execute_code=true")
    assert ("warm_up", 0) in engine.calls  # the only request that is left
    assert [sample["index"] for sample in read_samples(tmp_path)] == [0, 1, 2]
    assert [sample["elapsed_s"] for sample in read_samples(tmp_path)] == [3, 2, 1]
    assert [sample["score"] for sample in read_samples(tmp_path)] == [1, 0, 0]
    assert (summary["num_samples"], summary["score"]) == (3, 1 / 3)
    assert (summary["total_time_s"], summary["num_tokens"]) == (3, 6)


def test_counts_of_all_parts_of_a_run_are_added(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.run, "PROGRESS_EVERY_S", 0)
    engine.dies_after, engine.error, engine.counts = 2, KeyboardInterrupt(), COUNTS
    with pytest.raises(KeyboardInterrupt):
        run_letters(tmp_path)
    engine.dies_after = None
    summary = run_letters(tmp_path)
    assert (summary["calls"], summary["parts"]) == ([8, 16], 2)


def test_line_that_was_cut_off_is_generated_again(engine, tmp_path):
    whole = run_letters(tmp_path)
    samples = tmp_path / "run" / "samples.jsonl"
    expected = samples.read_text()
    samples.write_text(expected[:-10])
    (tmp_path / "run" / "summary.json").unlink()
    engine.calls.clear()
    assert run_letters(tmp_path)["num_tokens"] == whole["num_tokens"]
    assert ("warm_up", 2) in engine.calls
    without_times = [{**json.loads(line), "elapsed_s": 0} for line in expected.splitlines()]
    assert [{**sample, "elapsed_s": 0} for sample in read_samples(tmp_path)] == without_times


def test_run_without_a_summary_is_scored_without_an_engine(engine, tmp_path):
    summary = run_letters(tmp_path, "evaluate.execute_code=true")
    (tmp_path / "run" / "summary.json").unlink()
    engine.calls.clear()
    assert run_letters(tmp_path, "evaluate.execute_code=true") == summary
    assert engine.calls == []


def test_complete_run_is_shown_again_and_nothing_is_done(engine, tmp_path, capsys):
    summary = run_letters(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    shown = capsys.readouterr().out.splitlines()[-7:]
    engine.calls.clear()
    assert run_letters(tmp_path, "verbose=true") == summary
    assert engine.calls == []
    assert capsys.readouterr().out.splitlines()[-7:] == shown
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_run_of_another_configuration_is_refused_with_what_differs(engine, tmp_path):
    run_letters(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    message = r"^save_path: .* differs in method.generate.top_k \(None there, 5 here\), seed \(0 th"
    with pytest.raises(ConfigError, match=message):
        run_letters(tmp_path, "method.generate.top_k=5", "seed=1")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_run_whose_data_has_changed_is_refused(engine, tmp_path, monkeypatch):
    run_letters(tmp_path)
    changed = [Example(index=i, task_id="t", prompt="other", reference=None) for i in range(3)]
    monkeypatch.setattr(Letters, "examples", lambda self: changed)
    with pytest.raises(ConfigError, match="^save_path: sample 0 of .* not of this data set"):
        run_letters(tmp_path)


def test_log_of_the_job_stands_beside_its_results(engine, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run_letters(tmp_path)
    log = (tmp_path / "run" / "main_dataset.log").read_text()
    assert f"[harness.run][INFO] - results go to {tmp_path / 'run'}" in log
    assert not any(
        isinstance(h, logging.FileHandler) and h.baseFilename.endswith("main_dataset.log")
        for h in logging.getLogger().handlers
    )


def test_interrupted_command_ends_in_one_line(engine, tmp_path, monkeypatch, capsys):
    engine.dies_after, engine.error = 1, KeyboardInterrupt()
    monkeypatch.setattr(harness.command, "read_env", lambda: None)
    monkeypatch.setattr(sys, "argv", ["main_dataset.py", *overrides(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        main_dataset.main()
    assert exit.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted; the run directory keeps the finished samples"
    assert len(read_samples(tmp_path)) == 1


@dataclass(frozen=True, kw_only=True)
class Several(Letters):
    """Letters with two metrics."""

    name = "several"

    def score(self, example, completion):
        return {"share": float(completion < "c"), "length": 0.25}


@dataclass(frozen=True, kw_only=True)
class Choices(Letters):
    """Letters as choices."""

    name = "choices"

    def choices(self, example):
        return ("A", "B")


def test_several_metrics_are_recorded_and_shown(engine, tmp_path, capsys):
    summary = run_letters(tmp_path, f"dataset.name='{__name__}:Several'")
    assert summary["score"] == summary["scores"]["share"] == pytest.approx(2 / 3)
    assert summary["scores"]["length"] == 0.25
    assert read_samples(tmp_path)[2]["scores"] == {"share": 0.0, "length": 0.25}
    assert re.search(r"^length +0\.250$", capsys.readouterr().out, re.MULTILINE)


def test_choice_is_completed_and_scored_as_text(engine, tmp_path):
    name = f"dataset.name='{__name__}:Choices'"
    summary = run_letters(tmp_path, name, "+task.choices.until=c", "evaluate.execute_code=true")
    assert summary["score"] == 1
    assert {sample["completion"] for sample in read_samples(tmp_path)} == {"b"}
    assert read_samples(tmp_path)[0]["logprobs"] == [{"65": -0.5}]


def test_running_score_and_speed_are_on_the_bar(engine, tmp_path, capsys):
    run_letters(tmp_path, "evaluate.execute_code=true")
    assert re.search(r"2\.0 tokens/s, share 0\.\d{3}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+foo=1", "^foo: unknown key; known are method"),
        ("+dataset.foo=1", "^dataset.foo: .*Letters has no such key; it has .*use_fewshot"),
        ("+evaluate.foo=1", "^evaluate.foo: .* has no such key; it has "),
        ("+task.letters.foo=1", "^task.letters.foo: .* has no such key; it has "),
        ("+task.letters=5", "^task.letters: 5 is not a group of keys"),
        ("+method.foo=1", "^method.foo: large_model has no such key"),
        ("method.llm=null", "^method.llm: None is not a group"),
        ("method.generate=5", "^method.generate: 5 is not a group"),
        ("dataset=null", "^dataset: None is not a group"),
        ("dataset.name=nope", "^dataset.name='nope' is not a task"),
        ("dataset.size=huge", "^dataset.size='huge' is not a size"),
        ("dataset.size=0", "^dataset.size=0 is not a size"),
        ("dataset.chat=1", "^dataset.chat: 1 must be true or false"),
        ("dataset.use_fewshot=no", "^dataset.use_fewshot: 'no' must be true or false"),
        ("evaluate.execute_code=no", "^evaluate.execute_code: 'no' must be true or false"),
        ("verbose=no", "^verbose: 'no' must be true or false"),
        ("seed=-1", "^seed: -1 must be an integer from 0"),
        ("seed=2147483648", "^seed: 2147483648 must be an integer from 0"),
        ("seed=true", "^seed: True must be"),
        ("batch_size=0", "^batch_size: 0 must be 1 or more, or null"),
        ("batch_size=1.5", "^batch_size: 1.5 must be"),
        ("batch_size=true", "^batch_size: True must be"),
        ("save_path=null", "^save_path: None must be a path"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(engine, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run_letters(tmp_path, override)
    assert engine.calls == []
    assert not (tmp_path / "run").exists()


def test_prompt_that_is_too_long_is_refused_before_the_engine_starts(engine, tmp_path, monkeypatch):
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=2))
    monkeypatch.setattr(harness.session, "make_engine_config", lambda *_: config)
    with pytest.raises(ConfigError, match="^method.llm.max_model_len: example 1 has 2 prompt"):
        run_letters(tmp_path)
    assert engine.calls == []
    assert not (tmp_path / "run").exists()
