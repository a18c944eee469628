"""The two runs of a comparison: what is run, and how the command ends. The runs are stand-ins."""

import shlex
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from run_directories import make_config, make_run

import main_compare
from harness import comparison
from harness.errors import ConfigError
from reports.runs import flatten


@pytest.fixture(autouse=True)
def missing_protections(monkeypatch) -> list[str]:
    """Protections that are missing, as the comparison sees them."""
    missing: list[str] = []
    monkeypatch.setattr(comparison, "find_missing_protections", lambda: missing)
    return missing


def make_flat(*arguments: str) -> list[dict]:
    configs = comparison.make_configs(arguments)
    return [flatten(OmegaConf.to_container(config, resolve=True)) for config in configs]


def test_by_default_two_runs_of_the_weighted_ensemble_differ_in_method_and_folder():
    plain, turns = make_flat()
    assert (plain["method.name"], turns["method.name"]) == ("ensemble", "ensemble_chef")
    assert plain["dataset.name"] == "humaneval"
    of_turns = {"method.gamma", "method.max_gamma", "save_path", "method.name"}
    assert {key for key in plain | turns if plain.get(key) != turns.get(key)} <= of_turns
    folders = [Path(flat["save_path"]) for flat in (plain, turns)]
    assert [folder.name for folder in folders] == ["ensemble", "ensemble_chef"]
    assert folders[0].parent == folders[1].parent
    assert folders[0].parent.parent == Path("outputs/side-by-side")


def test_keys_reach_both_runs():
    given = ["method=cd", "dataset.size=3", "+method.llm.max_logprobs=50", "save_path=it's=here"]
    for flat, method in zip(make_flat(*given), ("cd", "cd_chef"), strict=True):
        assert flat["method.name"] == method
        assert flat["dataset.size"] == 3 and flat["method.llm.max_logprobs"] == 50
        assert flat["save_path"] == f"it's=here/{method}"


@pytest.mark.parametrize(
    ("missing", "given", "executes"),
    [
        ([], [], True),
        (["files"], [], False),
        ([], ["evaluate.execute_code=false"], False),
        (["files"], ["evaluate.execute_code=true"], True),
    ],
)
def test_code_is_executed_where_it_is_confined_or_asked_for(
    missing_protections, missing, given, executes
):
    missing_protections += missing
    for flat in make_flat(*given):
        assert flat["evaluate.execute_code"] is executes


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
        comparison.make_configs([argument])


def test_a_key_that_one_of_the_methods_lacks_is_refused():
    with pytest.raises(HydraException, match="Could not override 'method.turn_order'"):
        comparison.make_configs(["method.turn_order=[0,1]"])


# The command


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Folders of the runs so far; each run is a stand-in that writes what a run leaves."""
    folders: list[str] = []

    def run(config, directory: str) -> None:
        folders.append(directory)
        summary = {"device": "cpu" if config.seed == 0 else "a GPU"}
        make_run(Path(directory), make_config(config.method.name), summary=summary)

    monkeypatch.setattr(main_compare, "run", run)
    return folders


def call_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["main_compare.py", *arguments])
    main_compare.compare()


@pytest.mark.parametrize("seed", [0, 1])
def test_command_ends_with_the_table(monkeypatch, tmp_path, capsys, runs, seed):
    call_main(monkeypatch, "method=cd", f"save_path={tmp_path}", f"seed={seed}")
    assert runs == [f"{tmp_path}/cd", f"{tmp_path}/cd_chef"]
    out = capsys.readouterr().out
    assert out.startswith("[1 of 2] method=cd\n[2 of 2] method=cd_chef\n")
    assert "\nsame completions  2 of 2\n" in out and f" {tmp_path}/cd_chef\n" in out
    assert (main_compare.CPU_NOTE in out) == (seed == 0)


def test_command_that_is_stopped_says_how_it_is_continued(monkeypatch, capsys):
    stopped = []

    def run(config, directory: str) -> None:
        stopped.append(directory)
        if len(stopped) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(main_compare, "run", run)
    arguments = ["method=cd", "dataset.indices=[1, 2]"]
    with pytest.raises(KeyboardInterrupt):
        call_main(monkeypatch, *arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    script, *words = shlex.split(line.partition("continues it: python ")[2])
    assert script == "main_compare.py" and words[:-1] == arguments
    assert comparison.make_configs(words)[1].save_path == stopped[1]


def test_bad_arguments_end_the_command_with_one_line(monkeypatch, runs):
    with pytest.raises(SystemExit, match="^error: method: 'sd' cannot be compared by turns"):
        call_main(monkeypatch, "method=sd")
    assert runs == []
