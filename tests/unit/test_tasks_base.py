"""The registry, the choice of examples and the means. Knows no data set."""

import random
import re
from pathlib import Path

import pytest

from tasks import TASKS, Example, Task, load_task, select
from tasks.base import truncate_at_stop

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


def test_unknown_option_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"no option 'shots'.*use_fewshot.*timeout_s"):
        load_task("humaneval", shots=3)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_listed_task_keeps_the_interface(name):
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
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    (tmp_path / "documented_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("documented_task:Sums", use_fewshot=True)
    example = task.examples()[47]
    assert example.prompt == "4 + 7 ="
    assert task.score(example, task.postprocess(example, " 11\n5 + 7 = 12")) == 1.0
    assert task.score(example, task.postprocess(example, " 12\n")) == 0.0
