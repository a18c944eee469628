"""The two runs of a comparison: what is run, and how it ends. The runs are stand-ins."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from run_directories import make_config, make_run

import main_compare
from harness import comparison
from harness.errors import ConfigError
from repository import ROOT


@pytest.fixture(autouse=True)
def missing_protections(monkeypatch) -> list[str]:
    """What programs are not kept from, as far as the comparison knows."""
    missing: list[str] = []
    monkeypatch.setattr(comparison, "find_missing_protections", lambda: missing)
    return missing


def keys_of(job: comparison.Job) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in job.arguments)


def test_by_default_two_runs_of_the_weighted_ensemble_differ_in_method_and_folder():
    plain, turns = comparison.make_jobs([])
    assert (plain.folder.name, turns.folder.name) == ("ensemble", "ensemble_chef")
    assert plain.folder.parent == turns.folder.parent
    assert plain.folder.parent.parent == Path("outputs/side-by-side")
    first, second = keys_of(plain), keys_of(turns)
    assert {key for key in first if first[key] != second[key]} == {"method", "save_path"}
    assert first["method"] == "ensemble" and second["method"] == "ensemble_chef"
    assert first["dataset.name"] == "humaneval"


def test_keys_reach_both_runs():
    given = ["method=cd", "dataset.size=3", "+method.llm.seed=1", "method.generate.stop=[a=b]"]
    for job, method in zip(
        comparison.make_jobs([*given, "save_path=it's"]), ("cd", "cd_chef"), strict=True
    ):
        keys = keys_of(job)
        assert keys["method"] == method and job.folder == Path("it's") / method
        assert keys["save_path"] == f"'it\\'s/{method}'"
        assert set(given[1:]) <= set(job.arguments)
        assert len(keys) == len(job.arguments)


@pytest.mark.parametrize(
    ("missing", "given", "executes"),
    [
        ([], [], "true"),
        (["files"], [], "false"),
        ([], ["evaluate.execute_code=false"], "false"),
        (["files"], ["evaluate.execute_code=true"], "true"),
    ],
)
def test_code_is_executed_where_it_is_confined_or_asked_for(
    missing_protections, missing, given, executes
):
    missing_protections += missing
    for job in comparison.make_jobs(given):
        assert keys_of(job)["evaluate.execute_code"] == executes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=sd", "method: 'sd' cannot be compared by turns; choose one of ensemble, cd"),
        ("--multirun", "'--multirun' is not of the form key=value"),
        ("--config-name=x", "'--config-name=x' is not of the form key=value"),
    ],
)
def test_bad_arguments_are_refused(argument, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        comparison.make_jobs([argument])


# The command


def call_main(monkeypatch, run, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["main_compare.py", *arguments])
    monkeypatch.setattr(comparison, "run", run)
    main_compare.compare()


@pytest.mark.parametrize("device", ["cpu", "a GPU"])
def test_command_ends_with_the_table(monkeypatch, tmp_path, capsys, device):
    def run(job: comparison.Job) -> int:
        make_run(job.folder, make_config(job.folder.name), summary={"device": device})
        return 0

    call_main(monkeypatch, run, "method=cd", f"save_path={tmp_path}")
    out = capsys.readouterr().out
    assert out.startswith("[1 of 2] method=cd\n[2 of 2] method=cd_chef\n")
    assert "\nsame completions  2 of 2\n" in out and f" {tmp_path}/cd_chef\n" in out
    assert (main_compare.CPU_NOTE in out) == (device == "cpu")


def test_command_that_is_stopped_says_how_it_is_continued(monkeypatch, tmp_path, capsys):
    jobs = []

    def run(job: comparison.Job) -> int:
        jobs.append(job)
        return 130 if len(jobs) == 2 else 0

    arguments = ["method=cd", "dataset.indices=[1, 2]"]
    with pytest.raises(SystemExit) as caught:
        call_main(monkeypatch, run, *arguments)
    assert caught.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    script, *words = shlex.split(line.partition("continues it: python ")[2])
    assert script == "main_compare.py" and words[:-1] == arguments
    assert comparison.make_jobs(words)[1].folder == jobs[1].folder


def test_bad_arguments_end_the_command_with_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="^error: method: 'sd' cannot be compared by turns"):
        call_main(monkeypatch, None, "method=sd")


# The processes


def stand_in(root: Path, body: str) -> comparison.Job:
    """A job whose `main_dataset.py` is `body`."""
    (root / "main_dataset.py").write_text(textwrap.dedent(body))
    return comparison.Job(root / "run", ["a=1", "b=x y"])


def test_a_run_gets_its_arguments_and_its_exit_status_is_returned(tmp_path, monkeypatch):
    job = stand_in(tmp_path, "import sys; sys.exit(3 if sys.argv[1:] == ['a=1', 'b=x y'] else 1)")
    monkeypatch.setattr(comparison, "ROOT", tmp_path)
    assert comparison.run(job) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_sent_to_the_run", [True, False])
def test_a_run_ends_with_the_comparison(tmp_path, number, is_sent_to_the_run):
    """As Ctrl-C from a terminal, and as a signal to the comparison alone."""
    stand_in(
        tmp_path,
        """
        import os, pathlib, signal, sys, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
        time.sleep(60)
        """,
    )
    code = f"""
        import signal, sys
        from pathlib import Path
        from harness import comparison
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        comparison.ROOT, comparison.GRACE_S = Path({str(tmp_path)!r}), 0.2
        sys.exit(comparison.run(comparison.Job(Path("run"), [])))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    pid_file = tmp_path / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    send = os.killpg if is_sent_to_the_run else os.kill
    send(process.pid, number)
    assert process.wait(timeout=20) == 130
    wait_until(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
