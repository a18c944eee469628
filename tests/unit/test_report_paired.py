"""Paired comparisons: which samples are paired, what differs, margins from a fake engine."""

import contextlib

import pandas as pd
import pytest
from run_directories import make_config, make_run

from harness.engine import Completion, Request
from harness.errors import ConfigError
from reports import paired
from reports.command import main
from reports.runs import find_runs, read_run


class FakeEngine:
    """Answers with log-probabilities by prompt, and remembers what it was asked."""

    def __init__(self, logprobs: dict[tuple, dict[int, float]]) -> None:
        self.logprobs = logprobs
        self.configs, self.asked = [], []

    @contextlib.contextmanager
    def open(self, config):
        self.configs.append(config)
        requests = {index: Request(index, [100 + index], seed=None) for index in range(4)}
        yield self, self, requests

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)

    def generate(self, requests, batch_size):
        self.asked += requests
        for request in reversed(requests):  # in any order
            logprobs = self.logprobs[tuple(request.prompt_token_ids)]
            yield Completion(request.index, "", [0], "length", 0.0, [logprobs])


PLAIN_TOKENS = [[1, 2, 3], [4, 5, 6], [7, 8], [9]]
CHEF_TOKENS = [[1, 2, 3], [4, 5, 9], [7, 8, 8], [9]]
LOGPROBS = {
    (101, 4, 5): {6: -0.7, 9: -0.7000001, 1: -3.0},
    (102, 7, 8): {2: -0.1, 8: -0.6},
}


def make_pair(root, a=None, b=None, a_scores=(1, 0, 1, 1), b_scores=(1, 1, 1, 0)):
    a, b = a or make_config("cd_chef"), b or make_config("cd")
    make_run(root / "a", a, a_scores, CHEF_TOKENS)
    make_run(root / "b", b, b_scores, PLAIN_TOKENS)
    return read_run(root / "a"), read_run(root / "b")


@pytest.mark.parametrize(
    ("a", "b", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_first_divergence(a, b, position):
    assert paired.first_divergence(a, b) == position
    assert paired.first_divergence(b, a) == position


def test_scores_are_paired_by_example(tmp_path):
    a, b = make_pair(tmp_path)
    comparison = paired.compare(a, b)
    assert (comparison.counts, comparison.num_both, comparison.num_scored) == ((4, 4), 4, 4)
    assert comparison.means == (0.75, 0.75)
    assert comparison.test.kind == "McNemar, exact (1 : 1)"
    assert comparison.test.p_value == 1


def test_order_and_missing_samples_do_not_misalign(tmp_path):
    a, b = make_pair(tmp_path, a_scores=(1, 0, None, 1))
    file = tmp_path / "a/samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines[1:])) + lines[0][:20])  # the first is torn
    comparison = paired.compare(read_run(tmp_path / "a"), b)
    assert (comparison.counts, comparison.num_both, comparison.num_scored) == ((3, 4), 3, 2)
    assert comparison.means == (0.5, 0.5)
    assert [d.index for d in comparison.divergences] == [1, 2]


def test_divergences_have_the_first_place_and_both_tokens(tmp_path):
    divergences = paired.compare(*make_pair(tmp_path)).divergences
    assert [(d.index, d.task_id, d.position, d.tokens, d.prefix) for d in divergences] == [
        (1, "t/1", 2, (9, 6), (4, 5)),
        (2, "t/2", 2, (8, None), (7, 8)),
    ]


@pytest.mark.parametrize(
    ("a", "b", "differing"),
    [
        ({"method__generate__temperature": 1}, {"method__generate__temperature": 1}, []),
        ({"method__generate__temperature": None}, {"method__generate__temperature": None}, []),
        ({"method__alpha": 0.5}, {}, ["method.alpha"]),
    ],
)
def test_completions_are_compared_only_where_they_should_be_equal(tmp_path, a, b, differing):
    runs = make_pair(tmp_path, make_config("cd_chef", **a), make_config("cd", **b))
    comparison = paired.compare(*runs)
    assert comparison.divergences is None
    assert comparison.differing == differing
    assert comparison.test is not None
    assert "not compared: " in paired.text([comparison])


def test_runs_of_other_data_are_refused(tmp_path):
    a, b = make_pair(tmp_path)
    file = tmp_path / "b/samples.jsonl"
    file.write_text(file.read_text().replace("t/2", "u/2"))
    with pytest.raises(ConfigError, match=r"^sample 2 is t/2 in '.*a' and u/2 in '.*b'"):
        paired.compare(a, b)
    file.write_text(file.read_text().splitlines()[3].replace('"index": 3', '"index": 9'))
    with pytest.raises(ConfigError, match="no sample in common$"):
        paired.compare(a, b)


def test_pairs_of_a_study(tmp_path):
    make_run(tmp_path / "plain", make_config("cd"))
    make_run(tmp_path / "plain_seed_1", make_config("cd", seed=1))
    make_run(tmp_path / "chef", make_config("cd_chef"))
    make_run(tmp_path / "chef_seed_1", make_config("cd_chef", seed=1))
    make_run(tmp_path / "chef_seed_2", make_config("cd_chef", seed=2), speed=None)
    make_run(tmp_path / "other", make_config("cd_sd", method__alpha=0.7))
    make_run(tmp_path / "empty", make_config("cd_sd"), [], speed=None)
    pairs, alone = paired.find_pairs(find_runs(tmp_path))
    assert {(a.name, b.name) for a, b in pairs} == {
        ("chef", "plain"),
        ("chef_seed_1", "plain_seed_1"),
        ("chef_seed_2", "plain"),
    }
    assert [run.name for run in alone] == ["other"]


def test_margins_come_from_the_plain_ensemble_after_the_common_prefix(tmp_path):
    comparison = paired.compare(*make_pair(tmp_path))
    engine = FakeEngine(LOGPROBS)
    (measured,) = paired.add_margins([comparison], engine.open, say=lambda line: None)
    tie, clear = measured.divergences
    assert tie.margin == pytest.approx(1e-7) and tie.top == (6, 9)
    assert tie.below_steps == ["float32", "bfloat16"]
    assert tie.texts == ("<9>", "<6>")
    assert clear.margin == pytest.approx(0.5) and clear.below_steps == []
    assert clear.texts == ("<8>", "")
    (config,) = engine.configs
    assert config["method"]["name"] == "cd"
    assert not {"gamma", "max_gamma", "turn_order", "draft_model"} & config["method"].keys()
    assert [request.sampling_params["logprobs"] for request in engine.asked] == [2, 2]
    text = paired.text([measured])
    assert "1e-07" in text and "float32, bfloat16" in text and "neither" in text
    assert "9 `` '<9>' ``" in text and "(end)" in text


@pytest.mark.parametrize(("name", "family"), [("sd", "large_model"), ("ensemble_sd", "ensemble")])
def test_plain_configuration_is_one_that_its_method_takes(tmp_path, name, family):
    from harness.methods import COMMON_KEYS, METHODS

    make_run(tmp_path / "a", make_config(name, method__llm__speculative_config={"method": "x"}))
    run = read_run(tmp_path / "a")
    method = paired.plain_config(run.config, run.family)["method"]
    assert method["name"] == family
    assert method.keys() <= {"name", *METHODS[family].keys, *COMMON_KEYS}
    assert method["llm"]["speculative_config"] is None


def test_one_engine_serves_all_runs_of_an_ensemble(tmp_path):
    a, b = make_pair(tmp_path)
    make_run(tmp_path / "c", make_config("cd_sd"), (1, 1, 1, 1), CHEF_TOKENS)
    comparisons = [paired.compare(a, b), paired.compare(read_run(tmp_path / "c"), b)]
    engine = FakeEngine(LOGPROBS)
    measured = paired.add_margins(comparisons, engine.open, say=lambda line: None)
    assert len(engine.configs) == 1
    assert [[d.index for d in c.divergences] for c in measured] == [[1, 2], [1, 2]]
    assert all(d.margin is not None for c in measured for d in c.divergences)


def test_without_models_the_comparison_stands(tmp_path):
    def fails(config):
        raise ConfigError("method.model: 'org/large' is not there")

    (comparison,) = paired.add_margins(
        [paired.compare(*make_pair(tmp_path))], fails, say=lambda line: None
    )
    assert comparison.note == "no margins: method.model: 'org/large' is not there"
    assert comparison.note in paired.text([comparison])
    assert comparison.divergences[0].margin is None


def test_no_engine_where_nothing_differs(tmp_path):
    make_run(tmp_path / "a", make_config("cd_chef"))
    make_run(tmp_path / "b", make_config("cd"))
    engine = FakeEngine({})
    comparison = paired.compare(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    assert paired.add_margins([comparison], engine.open) == [comparison]
    assert engine.configs == []


@pytest.mark.parametrize("arguments", [["a", "b"], ["."]])
def test_command_writes_tables_and_strict_sets_the_status(tmp_path, monkeypatch, capsys, arguments):
    make_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["--paired", *arguments, "--no-margins", "--output", "out"]
    assert main(command) == 0
    assert main([*command, "--strict"]) == 1
    (row,) = pd.read_csv("out/paired.csv").to_dict("records")
    assert (row["samples_a"], row["samples_b"], row["completions_equal"]) == (4, 4, 2)
    assert pd.read_csv("out/divergences.csv")["position"].tolist() == [2, 2]
    assert "2 of 4" in (tmp_path / "out/paired.md").read_text()
    assert "2 of 4" in capsys.readouterr().out


def test_strict_is_content_with_equal_completions(tmp_path):
    make_run(tmp_path / "a", make_config("cd_chef"))
    make_run(tmp_path / "b", make_config("cd"))
    assert main(["--paired", str(tmp_path), "--strict"]) == 0
    assert pd.read_csv(tmp_path / "report/divergences.csv").empty


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent"], "report: 'absent' is not a directory"),
        (["--paired", "empty"], "report: no results in 'empty'"),
        (["--paired", "a", "empty"], "report: 'empty' holds no samples"),
        (["--paired", "b"], "report: 'b' holds no run in which tokens are proposed"),
        (["--paired", "a"], "report: 'a' holds no run in which tokens are proposed"),
        (["a", "b"], "2"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, line):
    make_pair(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
