"""Jobs of a sweep: their folders, their GPUs, and how each one ends."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import main_dataset
from harness import sweep
from repository import ROOT

CONFIG = {
    "method": {"name": "cd", "gamma": 5, "llm": {"tensor_parallel_size": None}},
    "dataset": {"name": "humaneval"},
    "seed": 0,
    "save_path": "a",
    "verbose": False,
}
SUMMARY = {"metric": "pass@1", "score": 0.25, "tokens_per_second": 12.0}


def use_gpus(monkeypatch, listed: str | None, visible: str | None) -> None:
    """Set the output of `nvidia-smi -L` (None: no such program) and CUDA_VISIBLE_DEVICES."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def run(command, **_):
        assert command == ["nvidia-smi", "-L"]
        if listed is None:
            raise FileNotFoundError
        return SimpleNamespace(stdout=listed)

    monkeypatch.setattr(sweep.subprocess, "run", run)


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    monkeypatch.setattr(sweep.tempfile, "gettempdir", lambda: str(tmp_path))
    use_gpus(monkeypatch, None, visible="")


# Folders


def test_a_jobs_folder_depends_on_what_it_computes():
    name = sweep.job_name(CONFIG)
    assert name.startswith("humaneval-cd-") and len(name) == len("humaneval-cd-") + 8
    assert sweep.job_name({**CONFIG, "save_path": "b", "verbose": True}) == name
    assert sweep.job_name({**CONFIG, "seed": 1}) != name
    nested = {**CONFIG, "method": {**CONFIG["method"], "gamma": 4}}
    assert sweep.job_name(nested) != name


def test_name_of_a_folder_has_no_separators():
    name = sweep.job_name({**CONFIG, "dataset": {"name": "my.tasks:Sums/../x"}})
    assert name.startswith("my.tasks_Sums_.._x-cd-")


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["method=cd", "save_path=x"], []),
        (["method=cd,sd", "--multirun"], []),
        (["--multirun", "save_path=x", "seed=1,2"], ["hydra.sweep.dir=x"]),
        (["-m", "save_path=~/x"], [f"hydra.sweep.dir={os.path.expanduser('~/x')}"]),
        (["save_path=y=z", "-m"], ["hydra.sweep.dir=y=z"]),
    ],
)
def test_folder_of_a_sweep_is_its_save_path(arguments, more):
    made = main_dataset.with_sweep_folder(arguments)
    assert [argument for argument in made if argument not in more] == arguments
    # Hydra takes no value after a flag.
    if more:
        before = made[made.index(more[0]) - 1]
        assert before.startswith("save_path=")


# Ends


def run_job(monkeypatch, tmp_path, status: int, log: str, summary: dict | None = None):
    calls = []

    def run(command, input=None, stdout=None, env=None, pass_fds=(), **_):
        if command[0] == "nvidia-smi":
            raise FileNotFoundError
        calls.append(SimpleNamespace(command=command, config=OmegaConf.create(input), env=env))
        stdout.write(log)
        if summary is not None:
            (sweep.Path(command[-1]) / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    sweep.run_job(OmegaConf.create(CONFIG), tmp_path / "sweep", ["seed=0", "method=cd"])
    (call,) = calls
    return call, tmp_path / "sweep" / sweep.job_name(CONFIG)


def test_job_runs_in_a_process_with_its_configuration(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    call, folder = run_job(monkeypatch, tmp_path, 0, "fine\n", SUMMARY)
    assert call.command == [sys.executable, "-m", "harness.sweep", str(folder)]
    assert call.config == {**CONFIG, "save_path": str(folder)}
    assert call.env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert (folder / "log.txt").read_text() == "fine\n"
    assert not (folder / "failure.json").exists()
    assert caplog.messages[-1].endswith("(seed=0 method=cd): pass@1 0.250, 12.0 tokens/s")


@pytest.mark.parametrize(
    ("status", "log", "error"),
    [
        (1, "warning\nerror: seed: -1 must be\n\n", "seed: -1 must be"),
        (1, "Traceback\nRuntimeError: no memory\n", "RuntimeError: no memory"),
        (3, "", "ended with status 3"),
        (-9, "x\n", "killed by signal 9"),
    ],
)
def test_job_that_fails_is_recorded_and_stops_nothing(monkeypatch, tmp_path, status, log, error):
    _, folder = run_job(monkeypatch, tmp_path, status, log)
    failure = json.loads((folder / "failure.json").read_text())
    assert failure == {"overrides": ["seed=0", "method=cd"], "error": error}
    run_job(monkeypatch, tmp_path, 0, "", SUMMARY)
    assert not (folder / "failure.json").exists(), "it has not failed any more"


def list_jobs(tmp_path, start: float = 0.0) -> int:
    return sweep.list_jobs(tmp_path / "sweep", start)


def test_failed_jobs_are_listed_at_the_end(monkeypatch, tmp_path, capsys):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    callback = sweep.ListJobs()
    callback.on_multirun_start(config)
    _, folder = run_job(monkeypatch, tmp_path, 1, "error: too bad\n")
    with pytest.raises(SystemExit) as exit:
        callback.on_multirun_end(config)
    assert exit.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        f"0 jobs complete, 1 failed, in {tmp_path / 'sweep'}",
        f"failed: {folder.name} (seed=0 method=cd): too bad",
    ]
    run_job(monkeypatch, tmp_path, 0, "", SUMMARY)
    callback.on_multirun_end(config)
    assert "1 jobs complete, 0 failed" in capsys.readouterr().out


def test_job_that_was_killed_with_its_launcher_is_listed(monkeypatch, tmp_path, capsys):
    _, folder = run_job(monkeypatch, tmp_path, 0, "", SUMMARY)
    (folder / "summary.json").unlink()
    assert list_jobs(tmp_path) == 1
    assert "(seed=0 method=cd): has not ended; see log.txt" in capsys.readouterr().out


def test_jobs_of_earlier_sweeps_are_not_counted(monkeypatch, tmp_path, capsys):
    _, folder = run_job(monkeypatch, tmp_path, 1, "error: too bad\n")
    os.utime(folder / "job.json", (1000, 1000))
    assert list_jobs(tmp_path, start=2000) == 0
    assert "0 jobs complete, 0 failed" in capsys.readouterr().out


def test_log_of_a_job_goes_on(monkeypatch, tmp_path):
    run_job(monkeypatch, tmp_path, -9, "first\n")
    _, folder = run_job(monkeypatch, tmp_path, 0, "second\n", SUMMARY)
    assert (folder / "log.txt").read_text() == "first\nsecond\n"


# GPUs

LISTED = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i}a)\n" for i in range(4))


def test_without_gpus_nothing_is_said_of_them():
    with sweep._devices(1) as devices:
        assert devices == ({}, ())


def test_every_job_has_gpus_of_its_own(monkeypatch):
    use_gpus(monkeypatch, LISTED, visible="3,1,GPU-7a")
    with sweep._devices(2) as first, sweep._devices(1) as second:
        assert first.environment == {"CUDA_VISIBLE_DEVICES": "3,1"}
        assert second.environment == {"CUDA_VISIBLE_DEVICES": "GPU-7a"}
    with sweep._devices(1) as again:
        assert again.environment == {"CUDA_VISIBLE_DEVICES": "3"}


def test_locks_are_named_by_what_a_gpu_is_and_not_by_its_number(monkeypatch):
    use_gpus(monkeypatch, LISTED, visible="3")
    with sweep._devices(1):
        # Another job of the cluster, which sees only one GPU: the last, or another.
        use_gpus(monkeypatch, "GPU 0: NVIDIA H200 (UUID: GPU-3a)\n", visible="0")
        assert sweep._lock(sweep._visible_devices(), 1) == {}
        use_gpus(monkeypatch, "GPU 0: NVIDIA H200 (UUID: GPU-0a)\n", visible="0")
        with sweep._devices(1) as devices:
            assert devices.environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_job_waits_for_a_gpu_and_holds_none_meanwhile(monkeypatch):
    use_gpus(monkeypatch, LISTED, visible="0,1")
    got = threading.Event()

    def wait_for_two():
        with sweep._devices(2) as devices:
            assert devices.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
            got.set()

    with sweep._devices(1):
        waiting = threading.Thread(target=wait_for_two)
        waiting.start()
        assert not got.wait(0.1)
        deadline = time.monotonic() + 5
        while not (free := sweep._lock({"1": "GPU-1a"}, 1)):  # the waiting job must not keep it
            assert time.monotonic() < deadline
        free["1"].close()
    waiting.join(timeout=5)
    assert got.is_set()


def test_job_that_outlives_its_sweep_keeps_its_gpu(monkeypatch):
    use_gpus(monkeypatch, LISTED, visible="0")
    popen = subprocess.Popen
    with sweep._devices(1) as devices:
        fds = [file.fileno() for file in devices.locks]
        job = popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=fds)
    assert sweep._lock(sweep._visible_devices(), 1) == {}
    job.communicate(b"\n")
    free = sweep._lock(sweep._visible_devices(), 1)
    assert [*free] == ["0"]
    free["0"].close()


def test_gpus_are_those_that_the_driver_lists(monkeypatch):
    use_gpus(monkeypatch, LISTED, visible=None)
    assert sweep._visible_devices() == {str(i): f"GPU-{i}a" for i in range(4)}


def test_without_a_driver_there_are_none(monkeypatch):
    use_gpus(monkeypatch, None, visible=None)
    assert sweep._visible_devices() == {}
