"""Reading run directories, whole or not; which plain ensemble a run is compared with."""

import json

import pytest
from run_directories import make_config, make_run

from harness.errors import ConfigError
from reports.records import make_records, short_names
from reports.runs import differing_keys, find_runs, iterate_samples, plain_runs, read_run


def runs_of(tmp_path, **configs) -> dict:
    for name, config in configs.items():
        make_run(tmp_path / name, config)
    return {run.name: run for run in find_runs(tmp_path)}


def test_runs_are_found_at_any_depth_with_their_status(tmp_path):
    make_run(tmp_path / "a/b/finished", make_config())
    make_run(tmp_path / "unfinished", make_config(), speed=None)
    (tmp_path / "failed").mkdir()
    failure = {"overrides": ["method=cd", "alpha=x"], "error": "method.alpha: no number"}
    (tmp_path / "failed/failure.json").write_text(json.dumps(failure))
    (tmp_path / "nothing").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/failure.json").write_text("{}")
    runs = {run.name: run for run in find_runs(tmp_path)}
    assert {name: run.status for name, run in runs.items()} == {
        "a/b/finished": "finished",
        "unfinished": "unfinished",
        "failed": "failed",
    }
    assert runs["failed"].error == "method.alpha: no number"
    assert runs["failed"].overrides == ["method=cd", "alpha=x"]
    assert runs["unfinished"].scores == {0: 1, 1: 0}


def test_the_directory_itself_may_be_the_run(tmp_path):
    make_run(tmp_path / "run", make_config())
    assert [run.name for run in find_runs(tmp_path / "run")] == ["run"]


def test_a_run_that_finished_at_the_second_attempt_is_finished(tmp_path):
    path = make_run(tmp_path / "run", make_config())
    (path / "failure.json").write_text(json.dumps({"overrides": [], "error": "earlier"}))
    assert (read_run(path).status, read_run(path).error) == ("finished", None)


@pytest.mark.parametrize("torn", ['{"index": 2, "sco', '{"index": 2, "task_id": "é\n'])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = make_run(tmp_path / "run", make_config(), speed=None)
    with (path / "samples.jsonl").open("a") as file:
        file.write(torn)
    assert [sample["index"] for sample in iterate_samples(path)] == [0, 1]
    assert read_run(path).status == "unfinished"


def test_a_damaged_run_does_not_hide_the_others(tmp_path):
    make_run(tmp_path / "good", make_config())
    for name in ("samples.jsonl", "summary.json", "config.yaml"):
        path = make_run(tmp_path / f"bad_{name}", make_config())
        (path / name).write_text("{\n" + (path / name).read_text())
    runs = find_runs(tmp_path)
    assert [run.status for run in runs] == [*["unreadable"] * 3, "finished"]
    assert "line 1 is not JSON" in next(r.error for r in runs if r.name == "bad_samples.jsonl")
    assert all("\n" not in run.error for run in runs[:3])


def test_folders_of_other_programs_are_no_runs(tmp_path):
    make_run(tmp_path / "run", make_config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("tasks: [arc_easy]\nmethod: {name: cd, model: m}\n")
    (tmp_path / "other/summary.json").write_text("{}")
    assert [run.name for run in find_runs(tmp_path)] == ["run"]


def test_nothing_found_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^no results in '.*': no folder"):
        find_runs(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        find_runs(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "plain"),
    [("cd_chef", "cd"), ("cd_sd", "cd"), ("ensemble_chef", "ensemble"), ("sd", "large_model")],
)
def test_plain_ensemble_of_each_method(tmp_path, name, plain):
    others = {other: make_config(other) for other in ("cd", "ensemble", "large_model")}
    runs = runs_of(tmp_path, run=make_config(name), **others)
    assert [run.name for run in plain_runs(runs["run"], list(runs.values()))] == [plain]


@pytest.mark.parametrize(
    "change",
    [
        {"method__model": "org/other"},
        {"method__amateur_model": "org/other"},
        {"method__alpha": 0.2},
        {"method__weights": [0.5, 0.5]},
        {"method__generate__temperature": 1},
        {"method__generate__top_p": 0.9},
        {"method__llm__ensemble_fn": "contrastive_plausible"},
        {"method__llm__ensemble_target": "probs"},
        {"method__llm__ensemble_args": {"plausibility": 0.1}},
        {"method__llm__dtype": "bfloat16"},
        {"dataset__name": "mmlu"},
        {"dataset__size": 20},
        {"dataset__path": "copy"},
        {"dataset__seed": 1},
        {"dataset__indices": [1, 2]},
        {"dataset__use_fewshot": True},
        {"dataset__chat": True},
        {"task__gsm8k__num_fewshot": 4},
        {"batch_size": None},
        {"method__draft_model": "org/draft"},
        {"method__llm__speculative_config": {"method": "ngram"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_no_baseline(tmp_path, change):
    runs = runs_of(tmp_path, run=make_config("cd_chef"), plain=make_config("cd", **change))
    assert plain_runs(runs["run"], list(runs.values())) == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"verbose": True},
        {"save_path": "elsewhere"},
        {"method__gamma": 9},
        {"method__turn_order": [1, 0]},
        {"method__max_gamma": 7},
        {"method__llm__gpu_memory_utilization": 0.5},
        {"method__generate__temperature": 0.0},
        {"evaluate__execute_code": True},
        {"task__mmlu__mode": "logprob"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_may_differ_from_the_baseline(tmp_path, change):
    runs = runs_of(tmp_path, run=make_config("cd_chef", **change), plain=make_config("cd"))
    assert [run.name for run in plain_runs(runs["run"], list(runs.values()))] == ["plain"]


def test_one_other_model_is_a_name_or_a_list(tmp_path):
    chef = make_config("ensemble_chef", method__extra_model=["org/small"])
    runs = runs_of(tmp_path, run=chef, plain=make_config("ensemble"))
    assert differing_keys(runs["run"], runs["plain"]) == []


def test_differing_keys_are_named(tmp_path):
    other = make_config("cd", method__alpha=0.3, dataset__seed=1)
    runs = runs_of(tmp_path, a=make_config("cd_chef"), b=other)
    assert differing_keys(runs["a"], runs["b"]) == ["dataset.seed", "method.alpha"]


def speed_ups(tmp_path) -> dict:
    return {r["run"]: r["speed_up"] for r in make_records(find_runs(tmp_path))}


def test_speed_up_is_over_the_mean_of_the_plain_runs(tmp_path):
    make_run(tmp_path / "plain_0", make_config("cd"), speed=100.0)
    make_run(tmp_path / "plain_1", make_config("cd", seed=1), speed=60.0)
    make_run(tmp_path / "plain_2", make_config("cd", seed=2), speed=None)
    make_run(tmp_path / "chef", make_config("cd_chef"), speed=120.0)
    make_run(tmp_path / "alone", make_config("cd_chef", method__alpha=0.5), speed=120.0)
    assert speed_ups(tmp_path) == pytest.approx(
        {"plain_0": 1.25, "plain_1": 0.75, "plain_2": None, "chef": 1.5, "alone": None}
    )


@pytest.mark.parametrize("other", [{"device": "another"}, {"versions": {"vllm": "0.33.0"}}])
def test_speeds_of_other_devices_and_builds_are_not_compared(tmp_path, other):
    make_run(tmp_path / "plain", make_config("cd"), summary=other)
    make_run(tmp_path / "chef", make_config("cd_chef"))
    assert speed_ups(tmp_path) == {"plain": 1.0, "chef": None}


def test_models_have_their_last_name_unless_two_share_it():
    assert short_names(["a/x", "/models/y/", "z"]) == {"a/x": "x", "/models/y/": "y", "z": "z"}
    assert short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
