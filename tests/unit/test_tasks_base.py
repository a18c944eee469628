"""The registry, the choice of examples and the means. This module knows no data set."""

import json
import random
import re
from collections import Counter
from dataclasses import fields

import pytest
from omegaconf import OmegaConf
from scipy.stats import chisquare

from repository import ROOT
from tasks import TASKS, Example, Task, load_task, select, task_name, task_options
from tasks.base import chat_messages, check_at_least, truncate_at_stop

EXAMPLES = [Example(index=i, task_id=f"t/{i}", prompt=str(i), reference=-i) for i in range(250)]


class Parrot(Task):
    name = "parrot"
    metric = "accuracy"
    max_tokens = 4

    def examples(self):
        return EXAMPLES

    def postprocess(self, example, text):
        return text

    def score(self, example, completion):
        return float(completion == example.prompt)


@pytest.mark.parametrize(
    ("size", "count"),
    [("tiny", 5), ("small", 200), ("full", 250), (1, 1), (7, 7), (250, 250), (10**9, 250)],
)
def test_select_takes_the_first_in_order(size, count):
    assert select(EXAMPLES, size) == EXAMPLES[:count]


@pytest.mark.parametrize("size", ["small", "full"])
def test_select_from_a_set_smaller_than_the_size(size):
    assert select(EXAMPLES[:3], size) == EXAMPLES[:3]


@pytest.mark.parametrize("size", [0, -1, True, False, 2.0, "big", "5", "", "Tiny", None, [5]])
def test_select_names_the_key_of_a_bad_size(size):
    with pytest.raises(ValueError, match=r"dataset\.size=.*tiny, small, full") as caught:
        select(EXAMPLES, size)
    assert repr(size) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_select_leaves_its_argument_alone():
    examples = list(EXAMPLES)
    select(examples, "full").clear()
    assert examples == EXAMPLES


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_seed_shuffles_before_the_size_cuts(seed):
    everything = select(EXAMPLES, "full", seed)
    assert everything != EXAMPLES
    assert sorted(everything, key=lambda example: example.index) == EXAMPLES
    assert all(e.reference == -int(e.prompt) == -e.index for e in everything)
    for size, count in (("tiny", 5), ("small", 200), (3, 3)):
        assert select(EXAMPLES, size, seed) == everything[:count]
    assert select(EXAMPLES, "full", seed) == everything
    assert select(EXAMPLES, "full", seed + 1) != everything


def test_a_seed_gives_the_same_order_on_every_machine_and_version():
    # random.Random(0).random() begins 0.84, 0.76, 0.42, 0.26, 0.51, 0.40.
    assert [example.index for example in select(EXAMPLES[:6], "full", 0)] == [3, 5, 2, 4, 1, 0]


def test_every_order_is_equally_likely():
    counts = Counter(
        tuple(example.index for example in select(EXAMPLES[:3], "full", seed))
        for seed in range(6000)
    )
    assert len(counts) == 6
    assert chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True])
def test_select_names_the_key_of_a_bad_seed(seed):
    with pytest.raises(ValueError, match=r"^dataset\.seed=.*null, or an integer >= 0"):
        select(EXAMPLES, "tiny", seed)


@pytest.mark.parametrize("size", ["tiny", 1, "full"])
@pytest.mark.parametrize("indices", [[0], [3, 1, 2], list(range(249, -1, -1)), (7,)])
def test_indices_give_examples_and_order_whatever_the_size(size, indices):
    assert [example.index for example in select(EXAMPLES, size, None, indices)] == list(indices)


@pytest.mark.parametrize(
    ("indices", "why"),
    [
        ([250], "250 is not a position in the data set: use integers from 0 to 249"),
        ([0, -1], "-1 is not a position"),
        ([True], "True is not a position"),
        ([1.0], "1.0 is not a position"),
        (["1"], "'1' is not a position"),
        ([[1]], r"\[1\] is not a position"),
        ([4, 5, 4], "4 stands there twice"),
        ([], "is not a list of positions"),
        (5, "is not a list of positions"),
        ("1,2", "is not a list of positions"),
        ({1: 2}, "is not a list of positions"),
    ],
)
def test_select_names_the_key_of_bad_indices(indices, why):
    with pytest.raises(ValueError, match=rf"^dataset\.indices.*{why}") as caught:
        select(EXAMPLES, "full", None, indices)
    assert "\n" not in str(caught.value)


def test_indices_and_a_seed_contradict_each_other():
    with pytest.raises(ValueError, match=r"^dataset\.seed: dataset\.indices .*leave one"):
        select(EXAMPLES, "full", 0, [1])


def test_references_stay_with_their_prompts_in_any_order():
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert [e.index for e in shuffled] != [e.index for e in EXAMPLES]
    assert all(e.reference == -int(e.prompt) == -e.index for e in select(shuffled, "small"))


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ([], None),
        ([None, None], None),
        ([0.0], 0.0),
        ([1.0, 0.0, 0.0, 1.0], 0.5),
        ([None, 1.0, None, 0.0, 1.0, 1.0], 0.75),
        (iter([1.0, 0.5]), 0.75),
    ],
)
def test_aggregate_is_the_mean_of_what_was_evaluated(scores, mean):
    assert Parrot().aggregate(scores) == mean


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("abc", (), "abc"),
        ("abc", ("x", "y"), "abc"),
        ("abcabc", ("c",), "ab"),
        ("one two three", ("three", "two"), "one "),  # the earliest, not the first listed
        ("stop", ("stop",), ""),
        ("", ("stop",), ""),
        ("aXXb", ("XXb", "XX"), "a"),
    ],
)
def test_truncate_at_stop(text, stop, kept):
    assert truncate_at_stop(text, stop) == kept
    assert truncate_at_stop(kept, stop) == kept


@pytest.mark.parametrize(
    "name", ["humanevil", "HumanEval", "", "tasks.humaneval", None, 3, ":", "a:"]
)
def test_unknown_task_names_the_key_and_the_known_names(name):
    with pytest.raises(ValueError, match=r"dataset\.name=.*is not a task.*humaneval") as caught:
        load_task(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_package.tasks:Mine", "No module named 'no_such_package'"),
        ("tasks.humaneval:Nothing", "has no Task class 'Nothing'"),
        ("tasks.humaneval:check_program", "has no Task class"),
        ("json:JSONDecoder", "has no Task class"),
    ],
)
def test_path_that_leads_to_no_task(name, why):
    with pytest.raises(ValueError, match=r"dataset\.name=") as caught:
        load_task(name)
    assert why in str(caught.value)


def test_options_of_a_task_are_those_of_every_task_and_its_own():
    every = task_options("tasks.base:Task")
    assert {"path", "use_fewshot", "chat"} <= {*every}
    assert task_options("mmlu")[: len(every)] == every
    assert "mode" in task_options("mmlu") and "mode" not in every
    with pytest.raises(ValueError, match=r"dataset\.name='nope'"):
        task_options("nope")


def test_task_name_is_the_name_of_the_group_of_options():
    assert [task_name(name) for name in TASKS] == list(TASKS)
    assert task_name("tasks.mmlu:Mmlu") == "mmlu"
    with pytest.raises(ValueError, match=r"^dataset\.name='humanevil' is not a task"):
        task_name("humanevil")


# One row that fits every task's columns.
ROW = {
    "question": "2 + 2?",
    "subject": "anatomy",
    "choices": ["1", "2", "3", "4"],
    "id": "0",
    "article": "Two and two are four.",
    "highlights": "It is four.",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """DATASET_PATH with the same row in all splits of all data sets."""
    answers = {"gsm8k": "2 + 2 = 4\n#### 4", "mmlu": 3, "cnn_dailymail": None}
    for name, answer in answers.items():
        for split in ("train", "dev", "validation", "test"):
            row = json.dumps({**ROW, "answer": answer}) + "\n"
            (tmp_path / f"{name}_{split}.jsonl").write_text(row * 5)
    lines = [json.dumps({**ROW, "id": str(i)}) + "\n" for i in range(5)]
    (tmp_path / "cnn_dailymail_test.jsonl").write_text("".join(lines))
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))


def test_the_configuration_lists_the_options_of_every_task_with_their_defaults():
    config = OmegaConf.load(ROOT / "configs" / "default.yaml")
    groups = OmegaConf.to_container(config.task)
    assert sorted(groups) == sorted(TASKS)
    common = {field.name for field in fields(Task)}
    for name, options in groups.items():
        task = load_task(name)
        own = {field.name for field in fields(task)} - common
        assert options == {option: getattr(task, option) for option in own}


@pytest.mark.parametrize("use_fewshot", [False, True])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_end_where_an_answer_can_begin(data, name, use_fewshot):
    for example in load_task(name, use_fewshot=use_fewshot).examples():
        assert not example.prompt[-1].isspace()
    for example in load_task(name, use_fewshot=use_fewshot, chat=True).examples():
        assert set().union(*example.messages) == {"role", "content"}
        assert example.messages[-1]["role"] == "user"


def test_by_default_an_answer_is_generated():
    assert Parrot().choices(EXAMPLES[0]) == ()


def test_chat_messages_alternate():
    assert [tuple(turn.values()) for turn in chat_messages([("1?", "1"), ("2?", "2")], "3?")] == [
        ("user", "1?"),
        ("assistant", "1"),
        ("user", "2?"),
        ("assistant", "2"),
        ("user", "3?"),
    ]
    assert chat_messages([], "3?") == ({"role": "user", "content": "3?"},)


def test_check_at_least_names_the_key():
    check_at_least("task.x.y", 3, 3)
    for value in (2, 3.0, "3", None, True):
        with pytest.raises(ValueError, match=r"^task\.x\.y: .*an integer of at least 3"):
            check_at_least("task.x.y", value, 3)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_listed_task_keeps_the_interface(data, name):
    task = load_task(name, use_fewshot=False, chat=False, execute_code=False)
    examples = task.examples()
    assert task.name == name
    assert task.metric
    assert task.max_tokens > 0
    assert isinstance(task.stop, tuple)
    assert all(task.stop)
    assert [example.index for example in examples] == list(range(len(examples)))
    assert len({example.task_id for example in examples}) == len(examples)
    assert all(example.prompt and not example.messages for example in examples)
    chat = load_task(name, chat=True).examples()
    assert [example.reference for example in chat] == [example.reference for example in examples]
    assert all(example.messages[-1]["role"] == "user" for example in chat)


def test_examples_and_tasks_are_frozen():
    with pytest.raises(AttributeError):
        EXAMPLES[0].prompt = "other"
    with pytest.raises(AttributeError):
        Parrot().chat = True


def test_the_task_in_the_documentation_runs(tmp_path, monkeypatch):
    page = ROOT / "docs" / "tasks.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    (tmp_path / "documented_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("documented_task:Sums", use_fewshot=True)
    example = task.examples()[47]
    assert example.prompt == "4 + 7 ="
    assert task.score(example, task.postprocess(example, " 11\n5 + 7 = 12")) == 1.0
    assert task.score(example, task.postprocess(example, " 12\n")) == 0.0
