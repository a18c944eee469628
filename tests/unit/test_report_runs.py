"""Reading run directories, whole or damaged; which plain ensemble a run is compared with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from run_directories import make_config, make_run

from harness.errors import ConfigError
from reports.command import main
from reports.paired import plain_config
from reports.records import make_records, short_names
from reports.runs import Run, differing_keys, find_runs, iterate_samples, plain_runs, read_run
from repository import ROOT

CONFIGS = ROOT / "configs"


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


def test_settings_of_any_types_can_be_sorted(tmp_path):
    values = [None, 3, "auto", [1, 3], ["auto", 1], [2], {"a": 1}, 0.5, True]
    for key in ("method__gamma", "method__alpha", "seed", "dataset__size", "batch_size"):
        for i, value in enumerate(values):
            make_run(tmp_path / f"{key}{i}", make_config("cd_chef", **{key: value}), speed=None)
    records = make_records(find_runs(tmp_path))
    assert len(records) == 5 * len(values)
    known = {f"method__gamma{i}" for i in (1, 2, 3, 4, 5)}
    gammas = [r["settings"]["gamma"] for r in records if r["run"] in known]
    assert gammas == [[1, 3], [2], 3, "auto", ["auto", 1]]


def composed(path: Path, *overrides: str) -> Run:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("default", [*overrides, f"save_path={path}"])
    make_run(path, OmegaConf.to_container(config, resolve=True))
    return read_run(path)


@pytest.mark.parametrize("gamma", ["3", "auto"])
@pytest.mark.parametrize(
    ("method", "plain"),
    [
        *((f"cd{by}", "cd") for by in ("", "_sd", "_chef")),
        *((f"ensemble{by}", "ensemble") for by in ("", "_sd", "_chef")),
        ("sd", "large_model"),
    ],
)
def test_every_key_of_who_proposes_is_free_in_the_real_configurations(
    tmp_path, method, plain, gamma
):
    baseline = composed(tmp_path / "plain", f"method={plain}")
    draft = ["method.draft_model=org/draft"] if method in ("cd", "ensemble") else []
    run = composed(tmp_path / "run", f"method={method}", f"method.gamma={gamma}", *draft)
    # A null key is ignored, so all keys that the plain ensemble lacks get a value.
    own = run.config["method"].keys() - baseline.config["method"].keys()
    given = {key: run.config["method"][key] or "given" for key in own}
    run = replace(run, config={**run.config, "method": {**run.config["method"], **given}})
    assert not run.is_plain and baseline.is_plain
    assert differing_keys(run, baseline) == []
    assert plain_runs(run, [run, baseline]) == [baseline]
    method = plain_config(run.config, run.family)["method"]
    assert method.keys() <= baseline.config["method"].keys()


@pytest.mark.parametrize("group", ["letters", "gsm8k"])  # a class may inherit a built-in's name
def test_options_of_a_users_own_task_must_be_equal_and_are_shown(tmp_path, group):
    own = {"dataset__name": "mine:Letters"}
    run = make_config("cd_chef", **own, **{f"task__{group}__until": "c"})
    runs = runs_of(
        tmp_path,
        run=run,
        plain=make_config("cd", **own, **{f"task__{group}__until": "c"}),
        other=make_config("cd", **own, **{f"task__{group}__until": "d"}),
    )
    assert differing_keys(runs["run"], runs["other"]) == [f"task.{group}.until"]
    assert plain_runs(runs["run"], list(runs.values())) == [runs["plain"]]
    (record,) = (r for r in make_records(list(runs.values())) if r["run"] == "run")
    assert record["settings"][f"task.{group}.until"] == "c"


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("summary.json", "{}", "has no number at tokens_per_second"),
        ("summary.json", '{"tokens_per_second": NaN}', "has no number at tokens_per_second"),
        ("summary.json", '{"tokens_per_second": 1, "score": "x"}', "at score"),
        ("summary.json", '{"tokens_per_second": 1, "parts": null}', "at parts"),
        ("summary.json", "[]", "does not hold a JSON object"),
        ("summary.json", b"\xff\xfe", "is not JSON"),
        ("samples.jsonl", "null\n", "line 1 is no sample"),
        ("samples.jsonl", '{"score": 1}\n', "line 1 is no sample"),
        ("samples.jsonl", '{"index": "0", "task_id": "t", "token_ids": []}\n', "line 1 is no"),
        ("samples.jsonl", '{"index": 0, "task_id": "t", "token_ids": 1}\n', "line 1 is no"),
        ("samples.jsonl", '{"index": 0, "task_id": "t", "token_ids": [], "score": "x"}\n', "line"),
        ("samples.jsonl", "\0\0\n\0\n", "line 1 is not JSON"),
    ],
)
def test_what_is_no_summary_or_sample_is_one_line(tmp_path, file, content, error):
    make_run(tmp_path / "good", make_config())
    bad = make_run(tmp_path / "bad", make_config())
    (bad / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    run, good = find_runs(tmp_path)
    assert (run.status, good.status) == ("unreadable", "finished")
    assert error in run.error and file in run.error and "\n" not in run.error
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert error in (tmp_path / "out/report.md").read_text()


def test_job_that_was_killed_before_it_began_is_listed(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text('{"overrides": ["method=cd"]}')
    (run,) = find_runs(tmp_path)
    assert (run.name, run.overrides, run.unreadable) == ("job", ["method=cd"], False)
    assert run.error.startswith("has not begun to generate, or was killed")
