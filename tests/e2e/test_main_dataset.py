"""The command line with tiny models: what a run writes and shows, and what it refuses.

All runs are real processes. Those of `Command.fork` are copies of a process that has already
imported vLLM, because the import takes longer than everything else they do.
"""

import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import OmegaConf
from quick import quick
from tiny_models import llama_config, save_byte_tokenizer, save_model, save_noisy_copy
from transformers import PretrainedConfig, T5Config

import main_dataset
from repository import ROOT

VOCAB_SIZE = 257
# Room for the longest of the first five prompts, in bytes, and for few more tokens.
CONTEXT = 520
NAMES = ("VLLM_", "TORCH_", "TRANSFORMERS_", "OMP_", "HYDRA_")

LARGE = "method=large_model method.model=llama-2-7b"
SD = "method=sd method.model=llama-2-7b method.draft_model=llama-2-7b-68m"
CD = "method=cd method.model=llama-2-7b method.amateur_model=llama-2-7b-68m"
ENSEMBLE = "method=ensemble method.model=llama-2-7b method.extra_model=llama-2-7b-68m"
# A KV cache of the default size would be 2 GiB of zeros.
CACHE = "method.llm.kv_cache_memory_bytes=33554432"
SHORT = f"dataset.size=2 method.generate.max_tokens=12 {CACHE}"


def save_config(path: Path, config: PretrainedConfig, architecture: str | None = None) -> None:
    """A model without weights, which is enough to be refused."""
    config.architectures = [architecture or "LlamaForCausalLM"]
    config.save_pretrained(path)
    save_byte_tokenizer(str(path))


def swap_two_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A MODEL_PATH with models that run, and with others that must be refused."""
    root = tmp_path_factory.mktemp("models")
    base = llama_config(VOCAB_SIZE, max_position_embeddings=CONTEXT, eos_token_id=0)
    for large, small in (("llama-2-7b", "llama-2-7b-68m"), ("smollm2-135m", "smollm2-amateur")):
        source = save_model(root / large, base, seed=1)
        save_noisy_copy(root / small, source, seed=2)
        for name in (large, small):
            assert save_byte_tokenizer(str(root / name)) == VOCAB_SIZE
    wide = llama_config(VOCAB_SIZE + 7, max_position_embeddings=CONTEXT)
    save_config(root / "wide", wide)
    save_config(root / "tuned", wide)
    save_byte_tokenizer(str(root / "tuned"), added=["<pad>"])
    save_config(root / "swapped", base)
    swap_two_tokens(root / "swapped")
    save_config(root / "short", llama_config(VOCAB_SIZE, max_position_embeddings=512))
    sizes = dict(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    save_config(root / "t5", T5Config(vocab_size=VOCAB_SIZE, **sizes), "T5ForConditionalGeneration")
    base.save_pretrained(root / "untokenized")
    return root


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str
    seconds: float


class Command:
    """`main_dataset.py` in a folder of its own, with the models of `root`."""

    def __init__(self, root: Path, cwd: Path) -> None:
        self.cwd = cwd
        clean = {k: v for k, v in os.environ.items() if not k.startswith(NAMES)}
        self.environment = {**clean, "MODEL_PATH": str(root), "HF_HUB_OFFLINE": "1"}

    def run(self, *arguments: str, entry: str = "main_dataset.py", **environment: str) -> Result:
        """Run as a user does."""
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, ROOT / entry, *arguments],
            cwd=self.cwd,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        seconds = time.perf_counter() - start
        return Result(process.returncode, process.stdout, process.stderr, seconds)

    def start(self, *arguments: str) -> multiprocessing.process.BaseProcess:
        start_forkserver()
        process = FORKSERVER.Process(
            target=call_main, args=(list(arguments), self.environment, self.cwd)
        )
        process.start()
        return process

    def fork(self, *arguments: str) -> Result:
        """Run in a process that starts with vLLM imported."""
        start = time.perf_counter()
        process = self.start(*arguments)
        process.join(timeout=120)
        assert process.exitcode is not None, "it does not end"
        return Result(
            process.exitcode,
            (self.cwd / "stdout").read_text(),
            (self.cwd / "stderr").read_text(),
            time.perf_counter() - start,
        )

    def run_directories(self) -> list[Path]:
        return [path.parent for path in self.cwd.rglob("config.yaml")]


FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    "vllm.v1.engine.llm_engine",
    "vllm.engine.arg_utils",
    "vllm.ensemble_decode.members",
    "vllm.ensemble_decode.worker",
    "vllm.v1.worker.cpu_worker",
    "main_dataset",
]


def call_main(arguments: list[str], environment: dict[str, str], cwd: Path) -> None:
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(cwd / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.chdir(cwd)
    # A suite that a shell put in the background ignores SIGINT, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["main_dataset.py", *arguments]
    main_dataset.main()


@functools.cache
def start_forkserver() -> None:
    """Start it only when a test needs a copy, because importing takes long."""
    from multiprocessing import forkserver

    from harness.engine import configure_process

    FORKSERVER.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        for name in [name for name in os.environ if name.startswith(NAMES)]:
            del os.environ[name]
        configure_process(verbose=False)
        forkserver.ensure_running()


@pytest.fixture
def command(root, tmp_path) -> Command:
    return Command(root, tmp_path)


def read_samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def check_files(run: Path, method: str, num_samples: int) -> dict:
    """Check the files that every run must write; returns the run's summary."""
    files = [".progress.json", "config.yaml", "main_dataset.log", "samples.jsonl", "summary.json"]
    assert sorted(os.listdir(run)) == files
    samples = read_samples(run)
    assert [sample["index"] for sample in samples] == list(range(num_samples))
    for sample in samples:
        assert sample["task_id"] == f"HumanEval/{sample['index']}"
        assert sample["prompt"].startswith(("from typing", "\n\ndef", "def"))
        assert isinstance(sample["completion"], str)
        assert 0 < sample["num_tokens"] == len(sample["token_ids"])
        assert all(0 <= token < VOCAB_SIZE for token in sample["token_ids"])
        assert sample["finish_reason"] in ("stop", "length")
        assert sample["latency_s"] > 0
        assert "score" in sample
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == OmegaConf.load(run / "config.yaml").method.name == method
    assert (summary["dataset"], summary["num_samples"]) == ("humaneval", num_samples)
    assert summary["num_tokens"] == sum(sample["num_tokens"] for sample in samples)
    assert summary["total_time_s"] >= max(sample["latency_s"] for sample in samples)
    rate = summary["num_tokens"] / summary["total_time_s"]
    assert summary["tokens_per_second"] == pytest.approx(rate)
    assert {"torch", "transformers", "speculative-ensemble"} < set(summary["versions"])
    assert summary["seed"] == OmegaConf.load(run / "config.yaml").seed
    assert "score" in summary
    return summary


def check_screen(result: Result, summary: dict, run: Path) -> None:
    """Check that only the folder of the results, a progress bar and a table are shown."""
    assert result.status == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"results go to {run}"
    rows = dict(re.split(r"  +", line) for line in result.stdout.splitlines()[1:])
    shown = {name: rows.pop(name, None) for name in ("acceptance", "tokens a cycle", "calls")}
    if "tokens_per_cycle" in summary:
        assert shown["tokens a cycle"] == f"{summary['tokens_per_cycle']:.3f}"
        shares = shown["acceptance"].split(", ")
        assert all(0 <= float(share) <= 1 for share in shares if share != "-")
    assert (shown["acceptance"] is None) == ("acceptance" not in summary)
    assert (shown["calls"] is None) == ("calls" not in summary)
    assert rows == {
        "method": summary["method"],
        "members": ", ".join(summary["members"]),
        "data set": f"humaneval ({summary['num_samples']} samples)",
        "pass@1": "not evaluated" if summary["score"] is None else f"{summary['score']:.3f}",
        "tokens": str(summary["num_tokens"]),
        "time": f"{summary['total_time_s']:.2f} s",
        "speed": f"{summary['tokens_per_second']:.2f} tokens/s",
    }
    bars = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    assert all(bar.startswith("humaneval:") for bar in bars), result.stderr
    assert "100%" in bars[-1] and "tokens/s" in bars[-1]


# As a user calls it


@pytest.mark.slow
def test_command_line_of_the_readme(command, root):
    result = command.run(
        "dataset.name=humaneval",
        "dataset.size=tiny",
        "method=sd",
        'method.model="llama-2-7b"',
        'method.draft_model="llama-2-7b-68m"',
        "method.gamma=5",
        "method.generate.temperature=0",
    )
    assert result.status == 0, result.stderr
    (run,) = command.run_directories()
    assert run.parent == command.cwd / "outputs" / "humaneval-sd"
    summary = check_files(run, "sd", num_samples=5)
    assert summary["members"] == [str(root / "llama-2-7b")]
    assert summary["draft_model"] == str(root / "llama-2-7b-68m")
    assert summary["gamma"] == 5
    assert 0 <= summary["acceptance"] <= 1 <= summary["tokens_per_cycle"] <= 6
    assert len(summary["acceptance_by_position"]) == 5
    assert summary["score"] is None
    assert summary["generate"]["temperature"] == 0
    check_screen(result, summary, run.relative_to(command.cwd))


@pytest.mark.slow
def test_without_arguments_two_default_models_run_cd(command, root):
    # A relative MODEL_PATH starts at the repository, wherever the command is called.
    result = command.run(MODEL_PATH=os.path.relpath(root, ROOT))
    assert result.status == 0, result.stderr
    (run,) = command.run_directories()
    assert run.parent == command.cwd / "outputs" / "humaneval-cd"
    summary = check_files(run, "cd", num_samples=5)
    names = [Path(member).resolve() for member in summary["members"]]
    assert names == [root / "smollm2-135m", root / "smollm2-amateur"]
    assert (summary["alpha"], summary["ensemble_fn"]) == (0.1, "contrastive")
    check_screen(result, summary, run.relative_to(command.cwd))


@pytest.mark.slow  # two engines; test_comparison.py has the table without one
def test_comparison_ends_with_a_table_of_both_runs(command):
    result = command.run(*f"method=cd {SHORT} save_path=both".split(), entry="main_compare.py")
    assert result.status == 0, result.stderr
    plain, turns = (
        check_files(command.cwd / "both" / method, method, num_samples=2)
        for method in ("cd", "cd_chef")
    )
    assert plain["score"] == turns["score"] == 0.0  # executed, because it is confined here
    table = result.stdout.split("smollm2-135m + smollm2-amateur: humaneval (2 samples)")[1]
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in table.splitlines() if "  " in line)
    assert rows["same completions"] == "2 of 2"
    assert rows["tokens/s"].split() == [f"{s['tokens_per_second']:.2f}" for s in (plain, turns)]
    ratio = turns["tokens_per_second"] / plain["tokens_per_second"]
    assert rows["ratio of speeds"] == f"{ratio:.2f}"
    assert rows["acceptance"] == ", ".join(f"{share:.3f}" for share in turns["acceptance"])
    assert rows["pass@1"].split() == ["0.000", "0.000"]
    assert (rows["files of plain"], rows["files of turns"]) == ("both/cd", "both/cd_chef")


# Runs


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory) -> dict[str, Path]:
    """Run directories of short runs, by name."""
    jobs = {
        "large_model": LARGE,
        "sd": f"{SD} method.gamma=3",
        "cd": f"{CD} method.alpha=0.4",
        "cd with a draft model": f"{CD} method.alpha=0.4 method.draft_model=llama-2-7b "
        "method.gamma=2",
        "cd_chef": f"{CD} method=cd_chef method.alpha=0.4 method.gamma=3",
        "cd_chef of its own depth": f"{CD} method=cd_chef method.alpha=0.4 method.gamma=auto",
        # The distribution of `cd`, so that the text shows whether it is right.
        "ensemble_sd": f"{ENSEMBLE} method=ensemble_sd method.llm.ensemble_fn=contrastive "
        "method.llm.ensemble_target=raw-logits method.alpha=0.4 method.gamma=2",
        "cd of alpha 0": f"{CD} method.alpha=0 batch_size=1 evaluate.execute_code=true",
        "ensemble": f"{ENSEMBLE} method.weights=[0.7,0.3] method.generate.temperature=1 seed=3",
        "ensemble again": f"{ENSEMBLE} method.weights=[0.7,0.3] method.generate.temperature=1 "
        "seed=3 batch_size=1",
        "other seed": f"{ENSEMBLE} method.weights=[0.7,0.3] method.generate.temperature=1 seed=30",
    }
    commands = {name: Command(root, tmp_path_factory.mktemp("run")) for name in jobs}

    def run(name: str) -> Result:
        return commands[name].fork(*f"{jobs[name]} {SHORT} save_path=run".split())

    start_forkserver()  # before there are threads
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, result in zip(jobs, pool.map(run, jobs), strict=True):
            assert result.status == 0, f"{name}: {result.stderr}"
            check_output(result, commands[name].cwd / "run")
    return {name: command.cwd / "run" for name, command in commands.items()}


def check_output(result: Result, run: Path) -> None:
    method = OmegaConf.load(run / "config.yaml").method.name
    summary = check_files(run, method, num_samples=2)
    if summary["score"] is not None:  # with a warning before the bar
        warning, _, result.stdout = result.stdout.partition("\n")
        assert warning.startswith("evaluate.execute_code=true: code written by a language model")
    check_screen(result, summary, Path("run"))


def completions(run: Path) -> list[str]:
    return [sample["completion"] for sample in read_samples(run)]


def tokens(run: Path) -> list[list[int]]:
    return [sample["token_ids"] for sample in read_samples(run)]


@pytest.mark.slow
def test_members_and_parameters_are_recorded(runs, root):
    summaries = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    both = [str(root / "llama-2-7b"), str(root / "llama-2-7b-68m")]
    assert summaries["large_model"]["members"] == summaries["sd"]["members"] == both[:1]
    assert summaries["cd"]["members"] == summaries["ensemble"]["members"] == both
    assert summaries["ensemble"]["weights"] == [0.7, 0.3]
    assert summaries["cd"]["alpha"] == 0.4


@pytest.mark.slow
def test_at_temperature_0_only_the_ensemble_changes_the_text(runs):
    plain = completions(runs["large_model"])
    assert completions(runs["sd"]) == plain
    assert completions(runs["cd of alpha 0"]) == plain
    assert completions(runs["cd"]) != plain
    assert tokens(runs["sd"]) == tokens(runs["cd of alpha 0"]) == tokens(runs["large_model"])


@pytest.mark.slow
def test_at_temperature_0_who_proposes_does_not_change_the_text(runs):
    plain = tokens(runs["cd"])
    for name in ("cd with a draft model", "cd_chef", "cd_chef of its own depth", "ensemble_sd"):
        assert tokens(runs[name]) == plain, name
        assert completions(runs[name]) == completions(runs["cd"])


@pytest.mark.slow
def test_what_became_of_proposals_is_recorded(runs, root):
    fields = {"gamma", "turn_order", "tokens_per_cycle", "calls", "acceptance"}
    summaries = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    assert not {*fields, "draft_model"} & summaries["cd"].keys()

    drafted = summaries["cd with a draft model"]
    assert (drafted["draft_model"], drafted["gamma"]) == (str(root / "llama-2-7b"), 2)
    assert 0 <= drafted["acceptance"] <= 1 <= drafted["tokens_per_cycle"] <= 3

    chef = summaries["cd_chef"]
    assert chef["members"] == summaries["cd"]["members"]
    # If two members cost the same, the last one counts as the cheaper.
    assert (chef["gamma"], chef["turn_order"]) == ([1, 3], [0, 1])
    assert all(0 <= acceptance <= 1 for acceptance in chef["acceptance"])
    assert [len(positions) for positions in chef["acceptance_by_position"]] == [1, 3]
    assert chef["calls"][1] == 3 * chef["calls"][0]
    cycles = chef["calls"][0]
    # Tokens decided past the end of a request count as well.
    assert 1 <= chef["num_tokens"] / cycles <= chef["tokens_per_cycle"] + 1e-9 <= 5

    auto = summaries["cd_chef of its own depth"]
    assert (auto["gamma"], auto["max_gamma"]) == ("auto", [1, 5])
    assert auto["calls"][0] <= auto["calls"][1] <= 5 * auto["calls"][0]

    sd = summaries["ensemble_sd"]
    assert (sd["gamma"], sd["turn_order"]) == (2, [0, 1])
    assert sd["acceptance"][0] is None and 0 <= sd["acceptance"][1] <= 1
    assert [len(positions) for positions in sd["acceptance_by_position"]] == [0, 2]


@pytest.mark.slow
def test_seed_decides_and_batches_do_not(runs):
    assert tokens(runs["ensemble"]) == tokens(runs["ensemble again"])
    first, second = tokens(runs["ensemble"])
    other_first, other_second = tokens(runs["other seed"])
    assert first != other_first and second != other_second


@pytest.mark.slow
def test_executed_code_is_scored(runs):
    # Random models write no programs.
    assert [sample["score"] for sample in read_samples(runs["cd of alpha 0"])] == [0.0, 0.0]
    assert json.loads((runs["cd of alpha 0"] / "summary.json").read_text())["score"] == 0.0
    assert {sample["score"] for sample in read_samples(runs["cd"])} == {None}


@pytest.mark.slow
def test_one_request_at_a_time_does_not_wait_for_others(runs):
    run = runs["cd of alpha 0"]
    summary = json.loads((run / "summary.json").read_text())
    latencies = [sample["latency_s"] for sample in read_samples(run)]
    assert summary["batch_size"] == 1
    assert sum(latencies) <= summary["total_time_s"]


# Runs that are continued


def stop(process: multiprocessing.process.BaseProcess, run: Path, number: int) -> None:
    """Send a signal as soon as there are samples, and wait for the end."""
    samples = run / "samples.jsonl"
    deadline = time.monotonic() + 60
    while not samples.exists() or not samples.read_bytes():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_continued_run_equals_an_unbroken_one(command, number):
    arguments = f"{CD} method=cd_chef method.gamma=2 dataset.size=8 batch_size=1 {CACHE} "
    arguments += "method.generate.max_tokens=48 method.generate.temperature=1 "
    run, unbroken = command.cwd / "run", command.cwd / "unbroken"
    process = command.start(*f"{arguments} save_path=run".split())
    stop(process, run, number)
    assert 1 <= len(read_samples(run)) < 8
    assert not (run / "summary.json").exists()
    if number == signal.SIGINT:
        assert process.exitcode == 130
        last = (command.cwd / "stderr").read_text().splitlines()[-1]
        assert last.startswith("interrupted; the run directory keeps the finished samples")
    else:
        with (run / "samples.jsonl").open("a") as file:  # as if the run had died while writing
            file.write('{"index": 7, "comple')

    continued = command.fork(*f"{arguments} save_path=run".split())
    assert continued.status == 0, continued.stderr
    assert re.search(r"^continued: \d of 8 samples are there already$", continued.stdout, re.M)
    assert command.fork(*f"{arguments} save_path=unbroken".split()).status == 0
    assert tokens(run) == tokens(unbroken)
    assert completions(run) == completions(unbroken)
    summary = check_files(run, "cd_chef", num_samples=8)
    assert summary["parts"] == 2
    assert summary["num_tokens"] == check_files(unbroken, "cd_chef", num_samples=8)["num_tokens"]


@pytest.mark.slow
def test_complete_run_is_shown_again(command, runs):
    before = {file.name: file.read_bytes() for file in runs["cd"].iterdir()}
    arguments = f"{CD} method.alpha=0.4 {SHORT} save_path={runs['cd']} verbose=true"
    result = command.run(*arguments.split())
    assert result.status == 0, result.stderr
    assert f"{runs['cd']} is complete: nothing is left to do" in result.stdout
    assert result.seconds < 10
    assert before == {file.name: file.read_bytes() for file in runs["cd"].iterdir()}


# Other data sets


@pytest.mark.slow
def test_number_is_found_in_a_generated_answer(command):
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"#### {2 * n}"} for n in range(4)]
    (command.cwd / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = f"{ENSEMBLE} dataset.name=gsm8k dataset.path=. dataset.indices=[3,1] {CACHE}"
    result = command.fork(*arguments.split(), "method.generate.max_tokens=8", "save_path=run")
    assert result.status == 0, result.stderr
    samples = read_samples(command.cwd / "run")
    assert [sample["index"] for sample in samples] == [1, 3]
    assert {sample["score"] for sample in samples} <= {0.0, 1.0}
    assert "accuracy" in result.stdout


@pytest.mark.slow
def test_letters_are_compared_under_the_distribution_of_the_ensemble(command, root):
    vocabulary = json.loads((root / "llama-2-7b" / "tokenizer.json").read_text())["model"]["vocab"]
    row = {
        "question": "Which is a bird?",
        "subject": "zoology",
        "choices": ["ox", "owl", "asp", "ant"],
    }
    rows = [{**row, "answer": letter} for letter in (1, 0)]
    (command.cwd / "mmlu_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = f"dataset.name=mmlu dataset.path=. task.mmlu.mode=logprob {CACHE}".split()
    samples = {}
    for name in ("cd", "cd_chef"):
        run = f"method={name} save_path={name} method.alpha=0.3".split()
        result = command.fork(*CD.split(), *run, *shared)
        assert result.status == 0, result.stderr
        samples[name] = read_samples(command.cwd / name)
    for plain, chef in zip(samples["cd"], samples["cd_chef"], strict=True):
        (logprobs,) = plain["logprobs"]
        likeliest = max("ABCD", key=lambda letter: logprobs[str(vocabulary[letter])])
        assert plain["completion"] == chef["completion"] == f" {likeliest}"
        assert chef["logprobs"][0] == pytest.approx(logprobs, abs=1e-4)
    scores = [sample["score"] for sample in samples["cd"]]
    letter = samples["cd"][0]["completion"].strip()
    assert scores == [float(letter == right) for right in "BA"]


# Sweeps


@pytest.mark.slow
def test_sweep_runs_every_job_and_lists_those_that_fail(command):
    arguments = [
        *f"--multirun {LARGE} dataset.size=1 batch_size=0,1 {CACHE}".split(),
        "method.generate.max_tokens=6",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "save_path=sweep",
    ]
    result = command.run(*arguments)
    assert result.status == 1, result.stderr
    lines = result.stdout.splitlines()
    at = lines.index("1 jobs complete, 1 failed, in sweep")
    (failed,) = lines[at + 1 :]
    reason = "batch_size: 0 must be 1 or more"
    assert re.match(rf"failed: humaneval-large_model-.*batch_size=0.*: {reason}", failed)
    folders = [folder for folder in (command.cwd / "sweep").iterdir() if folder.is_dir()]
    assert len(folders) == 2
    assert all(re.fullmatch(r"humaneval-large_model-[0-9a-f]{8}", f.name) for f in folders)
    (done,) = [folder for folder in folders if (folder / "summary.json").exists()]
    assert len(tokens(done)) == 1

    # Once more: complete jobs are not run again.
    before = (done / "samples.jsonl").stat().st_mtime_ns
    result = command.run(*arguments)
    assert "1 jobs complete, 1 failed, in sweep" in result.stdout
    assert before == (done / "samples.jsonl").stat().st_mtime_ns


# Bad input

# Refused before vLLM is imported, which takes seconds.
AT_ONCE = {
    "method=nope": r"method: there is no 'nope'; choose one of cd, cd_chef, cd_sd, ensemble, ",
    "dataset.name=nope": r"dataset\.name='nope' is not a task: known are cnndm, gsm",
    "dataset.size=huge": r"dataset\.size='huge' is not a size: use tiny, small, full",
    "batch_size=0": r"batch_size: 0 must be 1 or more, or null",
    "foo=1": r"Could not override 'foo'",
    "+foo=1": r"foo: unknown key; known are method",
    "method.gama=5": r"Could not override 'method\.gama'",
    "method.model": r"Error parsing override 'method\.model'",
    f"{LARGE} method.model=nope": r"method\.model: no model 'nope': looked for .*MODEL_PATH.*hub",
    f"{SD} method.gamma=0": r"method\.gamma: 0 is out of range; it must be",
    f"{CD} method.generate.temperature=-0.1": r"method\.generate\.temperature: -0\.1 is out of",
    f"{CD} save_path=/dev/null/run": r"save_path: '/dev/null/run' cannot be made.*choose another",
}

QUICK = list(AT_ONCE.items())[:3]

# Refused by checks of vLLM or the ensemble, before weights are loaded.
BY_THE_ENGINE = {
    f"{ENSEMBLE} method.llm.ensemble_fn=nope": r"method\.llm\.ensemble_fn: unknown function 'nope'"
    r"; choose one of weighted",
    f"{ENSEMBLE} method.llm.ensemble_fn=no.module:f": r"method\.llm\.ensemble_fn: .* not import",
    f"{ENSEMBLE} method.llm.ensemble_target=nope": r"method\.llm\.ensemble_target: unknown target "
    r"'nope'; choose one of raw-logits, logits, probs",
    f"{ENSEMBLE} method.extra_model=[llama-2-7b-68m,tuned]": r"method\.model/extra_model: "
    r"'.*tuned' has token 257, beyond the 257 rows of '.*llama-2-7b', .*; begin with the member",
    f"{CD} method.amateur_model=swapped": r"method\.model/amateur_model: the tokenizers of .* "
    r"disagree: 10 is '.' in one and '.' in the other; members must share one",
    f"{SD} method.draft_model=wide": r"method\.draft_model: .*same vocabulary size",
    f"{ENSEMBLE} method.weights=[1,1,1]": r"method\.weights: 3 weights for 2 members; give one",
    f"{ENSEMBLE} method.weights=[-1,2]": r"method\.weights: .* out of range; weights must be",
    f"{CD} method.alpha=1.1": r"method\.alpha: 1\.1 is out of range; it must be at least 0 and at",
    f"{CD} method.amateur_model=short method.llm.max_model_len=515": r"method\.llm\.max_model_len: "
    r"515 is beyond '.*short', whose longest context is 512; set it to that or less",
    f"{CD} method.llm.max_model_len=9999": r"method\.llm\.max_model_len: .*9999.* is greater than",
    f"{LARGE} method.llm.max_model_len=100": r"method\.llm\.max_model_len: example 0 has 347",
    f"{CD} method=cd_chef method.gamma=[2,3]": r"method\.gamma: \[2, 3\] has no 1; .*gamma 1",
    f"{CD} method=cd_chef method.amateur_model=swapped": r"method\.model/amateur_model: the token",
    f"{CD} method.draft_model=wide": r"method\.draft_model: .*same vocabulary size",
    f"{CD} +method.llm.pipeline_parallel_size=2": r"method\.llm\.pipeline_parallel_size: .*leave",
    f"{CD} method.amateur_model=t5": r"method\.model/amateur_model: '.*t5' cannot be a member "
    r"\(encoder-decoder\); members must be",
    f"{LARGE} method.model=t5": r"method\.model: '.*t5' is no decoder-only language model; choose",
    f"{LARGE} method.model=untokenized": r"method\.model: '.*untokenized' has no tokenizer",
    f"{CD} +method.generate.foo=1": r"method\.generate\.foo: vLLM has no such parameter; leave",
    f"{CD} method.generate.top_p=1.5": r"method\.generate\.top_p: .*must be in \(0, 1\]",
    f"{CD} method.generate.stop_token_ids=[999]": r"method\.generate\.stop_token_ids: .*999",
    f"{LARGE} method.llm.gpu_memory_utilization=7": r"method\.llm\.gpu_memory_utilization: .*less",
    f"{LARGE} method.llm.quantization=nope": r"method\.llm\.quantization: Unknown .* nope",
    f"{CD} dataset.chat=true": r"dataset\.chat: .*set it to false",
    f"{CD} +method.llm.foo=1": r"method\.llm\.foo: vLLM has no such parameter; leave it out",
}


def check_refused(command: Command, result: Result, message: str) -> None:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert re.match(f"error: {message}", lines[0]), lines[0]
    assert result.status != 0
    assert result.stdout == ""
    assert {path.name for path in command.cwd.iterdir()} <= {"stdout", "stderr"}


@pytest.mark.parametrize(("arguments", "message"), quick(AT_ONCE.items(), *QUICK))
def test_bad_input_is_refused_at_once(command, arguments, message):
    result = command.run(*arguments.split())
    check_refused(command, result, message)
    assert result.seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), BY_THE_ENGINE.items())
def test_bad_input_is_refused_before_weights_are_loaded(command, arguments, message):
    check_refused(command, command.fork(*arguments.split()), message)


@pytest.mark.slow
def test_bad_input_is_refused_as_a_user_sees_it(command):
    result = command.run(*f"{CD} +method.llm.enable_lora=true".split())
    check_refused(command, result, r"method\.llm\.enable_lora: LoRA adapters .*leave the option")


@pytest.mark.slow
def test_run_of_another_configuration_is_refused_and_kept(command, runs):
    before = {file.name: file.read_bytes() for file in runs["cd"].iterdir()}
    result = command.run(*f"{CD} method.alpha=0.5 {SHORT} save_path={runs['cd']}".split())
    message = (
        r"save_path: '.*run' holds a run that differs in method\.alpha \(0\.4 there, 0\.5 here\)"
    )
    check_refused(command, result, message)
    assert before == {file.name: file.read_bytes() for file in runs["cd"].iterdir()}
