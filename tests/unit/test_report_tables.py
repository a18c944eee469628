"""The table of a study, and the figures as files."""

import json
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest
from quick import quick
from run_directories import TURNS, make_config, make_run

from reports import figures, tables
from reports.command import main
from reports.paired import compare
from reports.records import make_records
from reports.runs import find_runs


@pytest.fixture
def study(tmp_path):
    """Two data sets with a plain ensemble and turns; one unfinished run, and one that failed."""
    for dataset in ("gsm8k", "mmlu"):
        config = {"dataset__name": dataset}
        make_run(tmp_path / dataset / "cd", make_config("cd", **config), [1, 0, 0, 0])
        chef = make_config("cd_chef", **config)
        make_run(tmp_path / dataset / "chef", chef, [1, 0, 1, 0], speed=150.0, summary=TURNS)
    late = make_config("cd_chef", dataset__name="mmlu", method__gamma=9)
    make_run(tmp_path / "late", late, [1], speed=None)
    (tmp_path / "failed").mkdir()
    failure = {"overrides": ["method=cd"], "error": "a|b is no model"}
    (tmp_path / "failed/failure.json").write_text(json.dumps(failure))
    return tmp_path


def table_of(text: str) -> pd.DataFrame:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(rows[2:], columns=rows[0])


def test_what_is_the_same_everywhere_is_said_once(study):
    text = tables.study_table(make_records(find_runs(study)))
    common = text.splitlines()[0]
    for part in ("members: large + small", "temperature: 0", "device: a device", "alpha: 0.1"):
        assert part in common
    assert list(table_of(text)) == [
        *("data set", "method", "gamma", "turn_order", "n", "score [95% interval]"),
        *("tokens/s", "speed-up", "tokens/cycle", "acceptance", "status"),
    ]


def test_rows_are_sorted_and_have_their_results(study):
    table = table_of(tables.study_table(make_records(find_runs(study))))
    assert table["data set"].tolist() == ["gsm8k", "gsm8k", "mmlu", "mmlu", "mmlu"]
    assert table["method"].tolist() == ["cd", "cd_chef", "cd", "cd_chef", "cd_chef"]
    assert table["speed-up"].tolist() == ["1.00", "1.50", "1.00", "1.50", ""]
    assert table["acceptance"][1] == "0.90, 0.60"
    assert table["tokens/s"][4] == "" and table["status"][4] == "unfinished"
    assert table["score [95% interval]"][0] == "0.250 [0.046, 0.699]"


def test_further_metrics_and_graded_scores(tmp_path):
    more = {"metric": "rougeL", "scores": {"rouge1": 0.4, "rougeL": 0.25}}
    make_run(tmp_path / "a", make_config("cd"), [0.2, 0.3, 0.25], summary=more)
    make_run(tmp_path / "b", make_config("cd_chef"), [None] * 3, summary={"metric": "rougeL"})
    runs = find_runs(tmp_path)
    records = make_records(runs)
    assert records[0]["score_interval"] == "BCa bootstrap"
    table = table_of(tables.study_table(records))
    assert table["score: rouge1"].tolist() == ["0.400", ""]
    assert "score: rougeL" not in table
    assert table["score [95% interval]"][1] == ""
    assert "BCa bootstrap (gsm8k)" in tables.report_text(runs, records, {})


def test_graded_scores_are_no_counts_even_if_all_are_zero(tmp_path):
    more = {"metric": "rougeL", "scores": {"rouge1": 0.1, "rougeL": 0.0}}
    make_run(tmp_path / "a", make_config("cd"), [0.0, 0.0], summary=more)
    make_run(tmp_path / "b", make_config("cd_chef"), [0.0, 0.0], summary=more)
    runs = find_runs(tmp_path)
    assert [r["score_interval"] for r in make_records(runs)] == [None, None]
    assert compare(*runs).test.kind == "permutation, exact"
    # An unfinished run has only its samples to show it.
    (tmp_path / "a/summary.json").unlink()
    sample = {"index": 0, "task_id": "t/0", "token_ids": [1], "score": 0.0}
    sample["scores"] = {"rougeL": 0.0}
    (tmp_path / "a/samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert find_runs(tmp_path)[0].is_graded


def test_speeds_that_rest_on_a_continued_run_are_marked(tmp_path):
    make_run(tmp_path / "cd", make_config("cd"), speed=100.0, summary={"parts": 2})
    make_run(tmp_path / "chef", make_config("cd_chef"), speed=150.0, summary={"parts": 1})
    other = {"dataset__name": "mmlu"}
    make_run(tmp_path / "mmlu_cd", make_config("cd", **other), speed=100.0)
    make_run(tmp_path / "mmlu_chef", make_config("cd_chef", **other), speed=150.0)
    make_run(tmp_path / "late", make_config("cd_chef", **other, method__gamma=9), speed=None)
    runs = find_runs(tmp_path)
    records = make_records(runs)
    text = tables.study_table(records)
    table = table_of(text)
    assert table["tokens/s"].tolist() == ["100.0*", "150.0", "100.0", "150.0", ""]
    assert table["speed-up"].tolist() == ["1.00*", "1.50*", "1.00", "1.50", ""]
    assert text.endswith(tables.CONTINUED_NOTE)
    (axis,) = figures.speed_up(records, "#000000").axes
    assert [label.get_text() for label in axis.texts] == ["1.50*", "1.50"]
    tables.write_csv(runs, records, tmp_path / "report.csv")
    written = pd.read_csv(tmp_path / "report.csv").set_index("run")
    assert written["parts"].drop("late").to_dict() == {
        **{"cd": 2, "chef": 1},
        **{"mmlu_cd": 1, "mmlu_chef": 1},
    }
    unbroken = [record for record in records if record["dataset"] == "mmlu"]
    assert tables.CONTINUED_NOTE not in tables.study_table(unbroken)


def test_a_figure_of_all_panels_fits_a_page(tmp_path):
    for i in range(figures.MAX_PANELS):
        config = make_config("cd_chef", dataset__name=f"set_{i}")
        make_run(tmp_path / f"chef_{i}", config, summary=TURNS)
        make_run(tmp_path / f"cd_{i}", make_config("cd", dataset__name=f"set_{i}"))
    records = make_records(find_runs(tmp_path))
    for name, (draw, _) in figures.FIGURES.items():
        width, height = draw(records, "#000000").get_size_inches()
        assert width <= 8 and height <= 10, name


def test_a_score_that_is_no_mean_of_the_samples_has_no_interval(tmp_path):
    make_run(tmp_path / "a", make_config("cd"), [1, 0], summary={"score": 0.9})
    (record,) = make_records(find_runs(tmp_path))
    assert (record["score"], record["score_interval"]) == (0.9, None)


def test_one_run_is_a_table(tmp_path):
    make_run(tmp_path / "a", make_config("cd"), [1, 0])
    table = table_of(tables.study_table(make_records(find_runs(tmp_path))))
    assert table[["data set", "method", "members"]].values.tolist() == [
        ["gsm8k", "cd", "large + small"]
    ]


def test_report_names_runs_that_failed(study):
    runs = find_runs(study)
    text = tables.report_text(runs, make_records(runs), {})
    assert "6 runs: 1 failed, 4 finished, 1 unfinished." in text
    assert r"a\|b is no model" in text and "method=cd" in text


@pytest.mark.slow
def test_csv_has_all_runs_and_all_columns(study):
    assert main([str(study)]) == 0
    table = pd.read_csv(study / "report/report.csv").set_index("run")
    assert len(table) == 6
    assert table.loc["gsm8k/chef", "speed_up"] == 1.5
    assert json.loads(table.loc["gsm8k/chef", "acceptance"]) == [0.9, 0.6]
    assert table.loc["gsm8k/chef", "config.method.alpha"] == 0.1
    assert table.loc["gsm8k/chef", "summary.versions.vllm"] == "0.32.0"
    assert table.loc["failed", "error"] == "a|b is no model"


@pytest.mark.slow
def test_figures_are_pictures_in_both_themes(study):
    assert main([str(study)]) == 0
    text = (study / "report/report.md").read_text()
    for name in figures.FIGURES:
        for theme, (foreground, _, background) in figures.THEMES.items():
            svg = (study / f"report/{name}_{theme}.svg").read_text()
            root = ElementTree.fromstring(svg)
            assert root.tag.endswith("svg") and len(list(root.iter())) > 50
            assert foreground in svg and background in svg
        assert f'media="(prefers-color-scheme: dark)" srcset="{name}_dark.svg"' in text
        assert f'src="{name}_light.svg"' in text


@pytest.mark.slow
def test_the_same_results_make_the_same_files(study):
    main([str(study), "--output", str(study / "report")])
    main([str(study), "--output", str(study / "second")])
    assert len(list((study / "report").iterdir())) == 8
    for file in (study / "report").iterdir():
        assert file.read_bytes() == (study / "second" / file.name).read_bytes(), file.name


def test_no_figure_without_data(tmp_path):
    make_run(tmp_path / "a", make_config("cd"), [None, None], speed=None)
    assert main([str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.csv",
        "report.md",
    ]


def test_a_sweep_of_which_all_jobs_failed(tmp_path):
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed/failure.json").write_text('{"overrides": ["x=1"], "error": "no x"}')
    assert main([str(tmp_path)]) == 0
    assert "no x" in (tmp_path / "report/report.md").read_text()


def test_bars_are_means_of_configurations(tmp_path):
    make_run(tmp_path / "cd", make_config("cd"), speed=100.0)
    for gamma, speed in ((1, 120.0), (3, 180.0)):
        make_run(tmp_path / f"{gamma}", make_config("cd_chef", method__gamma=gamma), speed=speed)
    records = make_records(find_runs(tmp_path))
    figure = figures.speed_up(records, "#000000")
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([1.5])
    assert [text.get_text() for text in axis.texts] == ["1.50"]


def test_lines_end_where_nothing_was_judged(tmp_path):
    turns = {**TURNS, "acceptance_by_position": [[None], [0.0, 0.5, None]]}
    make_run(tmp_path / "a", make_config("cd_chef"), summary=turns)
    longer = {**TURNS, "acceptance_by_position": [[None], [0.5, None, None, None]]}
    make_run(tmp_path / "b", make_config("cd_chef", method__gamma=4), summary=longer)
    (line,) = figures._lines(make_records(find_runs(tmp_path)))
    assert line == ("cd_chef", 1, "small", [0.25, 0.5])


@pytest.mark.parametrize("num_runs", quick([1, 40], 1))
def test_any_study_can_be_drawn(tmp_path, num_runs):
    for i in range(num_runs):
        config = make_config(
            ("cd_chef", "cd_sd", "ensemble_chef", "sd", "cd")[i % 5],
            method__model="org/$a_very_long_name_" + "x" * 60 + str(i % 3),
            method__generate__temperature=i % 2,
            dataset__name=f"dataset_{i % 4}",
            seed=i,
        )
        zero = {**TURNS, "acceptance_by_position": [[0.0], [0.0] * (1 + i)]}
        if config["method"]["name"] == "sd":
            zero["acceptance_by_position"] = [0.0] * 3
        make_run(tmp_path / str(i), config, [[1, 0], [None, None]][i % 2], summary=zero)
    records = make_records(find_runs(tmp_path))
    captions = figures.draw_all(records, tmp_path)
    assert "acceptance_by_position" in captions and "score_against_speed" in captions
    for file in tmp_path.glob("*.svg"):
        ElementTree.fromstring(file.read_text())
