"""MMLU: which option an answer names, the prompts, and the two ways to answer."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from timing import assert_linear

from tasks import load_task, select
from tasks.mmlu import LETTERS, Mmlu, extract_letter

# Extraction: (text, options, letter)

BONES = (
    "The first pharyngeal arch",
    "The first and second pharyngeal arches",
    "The second arch",
    "The second and third arches",
)
NUMBERS = ("4", "24", "0.4", "-4")
TRUTH = ("True, True", "False, False", "True, False", "False, True")
KEYS = ("C major", "D major", "A minor", "B flat")
CASES = [
    # the letter alone
    ("B", BONES, "B"),
    (" B", BONES, "B"),
    ("B\n", BONES, "B"),
    ("B.", BONES, "B"),
    ("(B)", BONES, "B"),
    ("B)", BONES, "B"),
    ("**B**", BONES, "B"),
    ("`B`", BONES, "B"),
    ("[B]", BONES, "B"),
    ("'B'", BONES, "B"),
    ("b", BONES, "B"),
    ("(b)", BONES, "B"),
    ("a", BONES, "A"),
    ("A", BONES, "A"),
    (r"\boxed{C}", BONES, "C"),
    (r"$\boxed{\text{C}}$", BONES, "C"),
    ("#### D", BONES, "D"),
    # more text after the letter
    ("B) The first and second pharyngeal arches", BONES, "B"),
    ("B. The first and second pharyngeal arches", BONES, "B"),
    ("B The first and second pharyngeal arches", BONES, "B"),
    ("**B.** The hyoid bone comes from two arches, not from A or C.", BONES, "B"),
    ("B\n\nThe second arch alone is not enough, so C is wrong.", BONES, "B"),
    ("B, because two arches take part", BONES, "B"),
    ("D: False, True", TRUTH, "D"),
    ("A 4", NUMBERS, "A"),
    # announced
    ("The answer is B", BONES, "B"),
    ("The answer is (B).", BONES, "B"),
    ("The answer is: B", BONES, "B"),
    ("Answer: **B**", BONES, "B"),
    ("Answer: B. The first", BONES, "B"),
    ("**Answer**: (c)", BONES, "C"),
    ("the correct answer is option D.", BONES, "D"),
    ("The answer is b.", BONES, "B"),
    ("The answer is a.", BONES, "A"),
    ("The answer is A because it is", BONES, "A"),
    ("The correct option is C", BONES, "C"),
    ("The best choice would be D, as said.", BONES, "D"),
    ("I choose B", BONES, "B"),
    ("I would go with option C", BONES, "C"),
    ("So it is D.", BONES, "D"),
    ("The answer is the second arch.", BONES, "C"),
    ("The answer is -4", NUMBERS, "D"),
    ("The answer is 0.4.", NUMBERS, "C"),
    ("The answer is D major.", KEYS, "B"),
    ("The answer is D.", KEYS, "D"),
    ("The answer is most likely B", BONES, "B"),
    ("The answer is probably B", BONES, "B"),
    ("Answer B", BONES, "B"),
    ("### Answer\nB", BONES, "B"),
    ("Therefore, D.", BONES, "D"),
    ("thus D", BONES, "D"),
    ("I'll pick D", BONES, "D"),
    ("Hence the answer: C", BONES, "C"),
    # weighed first
    ("It cannot be A. So B.", BONES, "B"),
    ("It cannot be A.", BONES, None),
    ("The answer is not A but B.", BONES, "B"),
    ("The answer is not A, but rather B.", BONES, "B"),
    ("The answer is not A.", BONES, None),
    ("The answer is A, B is wrong", BONES, "A"),
    ("The answer is A, B and C are wrong", BONES, "A"),
    ("A: That is early, it is wrong. B: It is right. The answer is B", BONES, "B"),
    ("B. Two arches.\n\nA. One arch is wrong.", BONES, "B"),
    ("A is wrong, so the answer is C", BONES, "C"),
    ("(A) is wrong. (B) is wrong too. The answer is (D).", BONES, "D"),
    ("A and B are wrong. The correct answer is D.", BONES, "D"),
    ("The answer is not A. The answer is B.", BONES, "B"),
    ("The answer cannot be A, so it is D.", BONES, "D"),
    ("At first I thought the answer is A, but the answer is C.", BONES, "C"),
    ("B is correct.", BONES, "B"),
    ("Option B is the correct answer", BONES, "B"),
    ("(C) is right, A is not correct", BONES, "C"),
    ("B is incorrect, C is correct", BONES, "C"),
    ("It must be (C)", BONES, "C"),
    ("Option D", BONES, "D"),
    ("I think it is B", BONES, "B"),
    # an article is no answer
    ("A bone such as this comes from the second arch", BONES, "C"),
    ("A cell divides", BONES, None),
    ("a mammal", BONES, None),
    ("The answer is a bone", BONES, None),
    ("A", NUMBERS, "A"),
    ("A minor", KEYS, "C"),
    ("C major", KEYS, "A"),
    # vitamins and the like
    ("A lack of vitamin C", BONES, None),
    ("hepatitis B and D", BONES, None),
    ("Hepatitis B is correct", BONES, None),
    ("Vitamin C is the best answer", BONES, None),
    ("I think that B is correct", BONES, "B"),
    ("So A cell divides", BONES, None),
    # the text of an option
    ("True, False", TRUTH, "C"),
    ("true, false.", TRUTH, "C"),
    ('"False, True"', TRUTH, "D"),
    ("24", NUMBERS, "B"),
    ("It has order 24, I believe", NUMBERS, "B"),
    ("-4", NUMBERS, "D"),
    ("From the first and second pharyngeal arches, of course", BONES, "B"),
    ("Either the second arch or the second and third arches", BONES, None),
    # nothing, or too much
    ("", BONES, None),
    ("   \n", BONES, None),
    ("I do not know.", BONES, None),
    ("E", BONES, None),
    ("It is either (A) or (C)", BONES, None),
    ("Between option B and option C", BONES, None),
    ("Because", BONES, None),
    ("Dogs", BONES, None),
    ("The answer is unclear", BONES, None),
    ("A or B", BONES, None),
    ("A\nB", BONES, None),
    ("A\nB\nC\nD", BONES, None),
    ("Answer: A, B", BONES, None),
    ("Answer: A, C and D", BONES, None),
    ("The answer is A and B.", BONES, None),
    ("The answer is (A) and (B).", BONES, None),
    ("The answer is either A or B", BONES, None),
    ("The answer is option B, and D because", BONES, None),
    ("Neither A nor B is correct", BONES, None),
    ("B\n\nB\n\nB", BONES, "B"),
    ("The answer is A or B", ("C", "A or B", "A", "B"), "B"),
    ("The answer is B, A cell", ("One", "A cell", "Two", "A bone"), "B"),
    ("A, B and C are wrong; the answer is D", BONES, "D"),
    (
        "A. The first pharyngeal arch\nB. The first and second pharyngeal arches\n"
        "C. The second arch\nD. The second and third arches\nThe answer is C.",
        BONES,
        "C",
    ),
    ("A) too early\nB) right\nC) too late\nD) too late\nSo B is correct.", BONES, "B"),
]


@pytest.mark.parametrize(("text", "choices", "letter"), CASES)
def test_extraction(text, choices, letter):
    assert extract_letter(text, choices) == letter


# Rows of the validation split, unchanged, and one whose options are hard to tell apart.
ROWS = [
    {
        "question": "The cyclic subgroup of Z_24 generated by 18 has order",
        "subject": "abstract_algebra",
        "choices": ["4", "8", "12", "6"],
        "answer": 0,
    },
    {
        "question": "Find the order of the factor group Z_6/<3>.",
        "subject": "abstract_algebra",
        "choices": ["2", "3", "6", "12"],
        "answer": 1,
    },
    {
        "question": "Which of {x}? \n",
        "subject": "world_religions",
        "choices": ["A or B", "a {x}", " B ", "C, not D"],
        "answer": 3,
    },
]
DEV = [
    {"question": f"{subject} {i}", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
    for i in range(5)
    for subject in ("world_religions", "abstract_algebra", "anatomy")
]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("test", ROWS), ("validation", ROWS[:1]), ("dev", DEV)):
        (tmp_path / f"mmlu_{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return str(tmp_path)


FORMS = [
    "{letter}",
    " {letter}",
    "{letter}. {text}",
    "({letter}) {text}",
    "The answer is {letter}.",
    "The answer is ({letter}) {text}.",
    "Answer: **{letter}**",
    "Let us see. {letter} is correct.",
    "I would choose {letter}",
    "Answer {letter}",
    "Therefore, {letter}.",
    "The answer is most likely option {letter}, {text}",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_answer_finds_its_option_whatever_the_options(form):
    for row in ROWS[:2] + DEV[:1]:
        for letter, text in zip(LETTERS, row["choices"], strict=True):
            assert extract_letter(form.format(letter=letter, text=text), row["choices"]) == letter


@pytest.mark.slow
def test_a_text_without_end_is_read_in_linear_time():
    for part in ("A ", "answer ", "the answer is ", "I would ", "(", "**", "\n", "so it is "):
        assert_linear(lambda text: extract_letter(text, ROWS[0]["choices"]), part)


# Scores


@pytest.mark.parametrize(
    ("completion", "score"),
    [(" A", 1.0), ("A", 1.0), ("4", 1.0), (" B", 0.0), ("8", 0.0), ("", 0.0), ("Why?", 0.0)],
)
def test_scores(folder, completion, score):
    task = Mmlu(path=folder)
    assert task.score(task.examples()[0], completion) == score


def test_references_stay_aligned_in_any_order_and_thread(folder):
    task = Mmlu(path=folder)
    examples = select(task.examples(), "full", seed=0)
    assert [example.index for example in examples] != [0, 1, 2]
    completions = [f" {example.reference['answer']}" for example in examples]
    with ThreadPoolExecutor(max_workers=3) as pool:
        assert list(pool.map(task.score, examples, completions)) == [1.0] * 3
        shifted = completions[1:] + completions[:1]
        assert list(pool.map(task.score, examples, shifted)) == [0.0] * 3


# Prompts


def test_zero_shot_gives_question_and_options_and_asks_for_a_letter(folder):
    examples = Mmlu(path=folder).examples()
    assert examples[0].prompt.startswith("Each question on abstract algebra ")
    assert examples[0].prompt.endswith(
        "Question: The cyclic subgroup of Z_24 generated by 18 has order\n"
        "A. 4\nB. 8\nC. 12\nD. 6\nAnswer:"
    )
    assert examples[2].prompt.endswith(
        "Question: Which of {x}?\nA. A or B\nB. a {x}\nC. B\nD. C, not D\nAnswer:"
    )
    assert [example.reference["answer"] for example in examples] == ["A", "B", "D"]
    assert [example.reference["subject"] for example in examples] == [
        row["subject"] for row in ROWS
    ]
    assert [example.task_id for example in examples] == [
        "mmlu/test/0",
        "mmlu/test/1",
        "mmlu/test/2",
    ]


@pytest.mark.parametrize("count", [1, 5])
def test_fewshot_shows_the_first_dev_rows_of_the_questions_subject(folder, count):
    zero_shot = Mmlu(path=folder).examples()
    examples = Mmlu(path=folder, use_fewshot=True, num_fewshot=count).examples()
    for example, alone, row in zip(examples, zero_shot, ROWS, strict=True):
        instruction, *worked, question = example.prompt.split("\n\n")
        assert f"{instruction}\n\n{question}" == alone.prompt
        assert worked == [
            f"Question: {row['subject']} {i}\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCDA'[i]}"
            for i in range(count)
        ]


def test_a_worked_example_that_equals_the_question_is_left_out(folder):
    asked = {**DEV[3], "question": f" {DEV[3]['question']}"}
    other = {**asked, "choices": list("wxyv")}
    with open(f"{folder}/mmlu_test.jsonl", "w") as file:
        file.write(json.dumps(asked) + "\n" + json.dumps(other) + "\n")
    shown = {
        count: [
            example.prompt.count("Question: ")
            for example in Mmlu(path=folder, use_fewshot=True, num_fewshot=count).examples()
        ]
        for count in (1, 2, 4, 5)
    }
    assert shown == {1: [2, 2], 2: [3, 3], 4: [5, 5], 5: [5, 6]}
    example, _ = Mmlu(path=folder, use_fewshot=True).examples()
    assert example.prompt.count(f"Question: {DEV[3]['question']}\n") == 1
    example, _ = Mmlu(path=folder, use_fewshot=True, chat=True).examples()
    assert len(example.messages) == 9


@pytest.mark.parametrize("use_fewshot", [False, True])
def test_chat_turns_alternate_and_end_with_the_question(folder, use_fewshot):
    task = Mmlu(path=folder, chat=True, use_fewshot=use_fewshot)
    assert task.stop == ()
    for example, row in zip(task.examples(), ROWS, strict=True):
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (5 * use_fewshot) + ["user"]
        assert [m["content"] for m in example.messages[1::2]] == list("ABCDA")[: len(roles) // 2]
        assert row["question"].strip() in example.messages[-1]["content"]
        assert example.prompt == example.messages[-1]["content"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ""), (" B", " B"), (" B\n\nQuestion: What", " B\n"), ("\nB", "\nB")],
)
def test_postprocess_ends_at_the_next_question(folder, text, kept):
    task = Mmlu(path=folder)
    assert task.postprocess(None, text) == kept
    assert task.postprocess(None, kept) == kept


# By log-probability


def test_choices_are_the_letters_where_probabilities_decide(folder):
    task = Mmlu(path=folder, mode="logprob")
    example = task.examples()[1]
    assert task.choices(example) == (" A", " B", " C", " D")
    scores = [task.score(example, task.postprocess(example, c)) for c in task.choices(example)]
    assert scores == [0.0, 1.0, 0.0, 0.0]
    chat = Mmlu(path=folder, mode="logprob", chat=True)
    assert chat.choices(example) == ("A", "B", "C", "D")
    assert Mmlu(path=folder).choices(example) == ()


# Options


def test_subjects_and_splits(folder):
    examples = Mmlu(path=folder, subjects=["world_religions"]).examples()
    assert [(example.index, example.task_id) for example in examples] == [(0, "mmlu/test/2")]
    (example,) = Mmlu(path=folder, split="validation").examples()
    assert example.task_id == "mmlu/validation/0"


def test_where_only_the_validation_split_lies_the_error_names_the_option(tmp_path, folder):
    shutil.copy(f"{folder}/mmlu_validation.jsonl", tmp_path / "validation.jsonl")
    (tmp_path / "mmlu_test.jsonl").unlink()
    (tmp_path / "mmlu_validation.jsonl").unlink()
    path = str(tmp_path)
    with pytest.raises(
        ValueError, match=r"^dataset\.path: no split 'test' .*task\.mmlu\.split=validation$"
    ):
        Mmlu(path=path).examples()
    assert len(Mmlu(path=path, split="validation").examples()) == 1
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="no split 'validation'") as caught:
        Mmlu(path=path, split="validation").examples()
    assert "task.mmlu.split" not in str(caught.value)


def test_unknown_subjects_are_named_with_the_known(folder):
    with pytest.raises(
        ValueError, match=r"^task\.mmlu\.subjects: no alchemy, 3 in .*abstract_algebra, world_rel"
    ):
        Mmlu(path=folder, subjects=["alchemy", "world_religions", 3]).examples()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("mode", "logprobs", "generate or logprob"),
        ("mode", None, "generate or logprob"),
        ("split", "train", "test or validation"),
        ("subjects", "anatomy", "must be a list"),
        ("subjects", [], "must be a list"),
        ("subjects", 3, "must be a list"),
        ("num_fewshot", 0, "at least 1"),
    ],
)
def test_bad_options_are_named(option, value, why):
    with pytest.raises(ValueError, match=rf"^task\.mmlu\.{option}: .*{why}"):
        load_task("mmlu", **{option: value})


def test_too_few_dev_rows(folder):
    with pytest.raises(
        ValueError, match=r"^task\.mmlu\.num_fewshot: 6 .* the 5 rows of subject abs"
    ):
        Mmlu(path=folder, use_fewshot=True, num_fewshot=6).examples()


@pytest.mark.parametrize(
    "change", [{"answer": 4}, {"answer": -1}, {"choices": ["a"] * 3}, {"choices": [1, 2, 3, 4]}]
)
def test_a_row_that_is_no_question_with_four_options_is_named(tmp_path, change):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({**ROWS[0], **change}) + "\n")
    with pytest.raises(ValueError, match=r"^dataset\.path: the question 'The cyclic"):
        Mmlu(path=str(file)).examples()
