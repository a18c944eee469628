"""Two runs in one table: what the table says, and for which runs it says nothing."""

import pytest
from run_directories import TURNS, make_config, make_run

from harness.errors import ConfigError
from reports.runs import read_run
from reports.side_by_side import side_by_side

TOKENS = [[1, 2, 3], [4, 5, 6], [7, 8]]


def table(root, tokens=TOKENS, plain=None, turns=None, speed=150.0, parts=1, scores=(1, 0, 1)):
    summary = {**TURNS, "parts": parts}
    make_run(root / "cd", plain or make_config("cd"), scores, TOKENS)
    make_run(root / "cd_chef", turns or make_config("cd_chef"), scores, tokens, speed, summary)
    runs = (read_run(root / name, str(root / name)) for name in ("cd", "cd_chef"))
    return side_by_side(*runs)


def test_table_has_the_results_of_both_runs(tmp_path):
    lines = table(tmp_path).splitlines()
    assert lines == [
        "large + small: gsm8k (3 samples), batch size 1, temperature 0, a device",
        "",
        "                  plain   by turns",
        "method            cd      cd_chef",
        "same completions  3 of 3",
        "accuracy          0.667   0.667",
        "tokens/s          100.00  150.00",
        "acceptance                0.900, 0.600",
        "tokens a cycle            2.500",
        "ratio of speeds           1.50",
        f"files of plain    {tmp_path / 'cd'}",
        f"files of turns    {tmp_path / 'cd_chef'}",
    ]


def test_completions_that_differ_are_counted_and_the_command_that_shows_them_is_named(tmp_path):
    text = table(tmp_path, [[1, 2, 3], [4, 9], [7]])
    assert "\nsame completions  1 of 3\n" in text
    assert text.endswith(f"report.py --paired {tmp_path / 'cd_chef'} {tmp_path / 'cd'}")


@pytest.mark.parametrize(
    ("plain", "turns", "why"),
    [
        ({"method__generate__temperature": 1},) * 2 + ("temperature above 0",),
        ({"method__alpha": 0.5}, {}, "method.alpha"),
    ],
)
def test_completions_that_need_not_be_equal_are_not_compared(tmp_path, plain, turns, why):
    text = table(tmp_path, plain=make_config("cd", **plain), turns=make_config("cd_chef", **turns))
    assert f"\nsame completions  not compared ({why})\n" in text


def test_speed_of_a_continued_run_is_marked(tmp_path):
    text = table(tmp_path, parts=2)
    assert "\nratio of speeds           1.50*\n" in text
    assert "\n\n* A run was stopped and continued." in text


def test_scores_that_nobody_computed_are_named_so(tmp_path):
    assert "\naccuracy          not evaluated" in table(tmp_path, scores=(None,) * 3)


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cd_chef' is unfinished: it has no summary"):
        table(tmp_path, speed=None)
