"""GSM8K: what counts as a result, the prompts, and scores of the data set's own rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from timing import assert_linear

from tasks import load_task, select
from tasks.gsm8k import Gsm8k, extract_number

# Rows of the test split, unchanged.
ROWS = [
    {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many "
        "bolts in total does it take?",
        "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is "
        "2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
    },
    {
        "question": "James decides to run 3 sprints 3 times a week.  He runs 60 meters each "
        "sprint.  How many total meters does he run a week?",
        "answer": "He sprints 3*3=<<3*3=9>>9 times\nSo he runs 9*60=<<9*60=540>>540 meters\n"
        "#### 540",
    },
    {
        "question": "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning "
        "and bakes muffins for her friends every day with four. She sells the remainder at the "
        "farmers' market daily for $2 per fresh duck egg. How much in dollars does she make every "
        "day at the farmers' market?",
        "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = "
        "$<<9*2=18>>18 every day at the farmer’s market.\n#### 18",
    },
]
# Rows in the same form: results with a separator, a sign, a fraction; braces of no template.
MADE = [
    {"question": "What do 85 tins at $25 cost?", "answer": "85*25=<<85*25=2125>>2,125\n#### 2,125"},
    {"question": "It was {3} degrees and fell by 8?", "answer": "3-8=<<3-8=-5>>-5\n#### -5"},
    {"question": "Half of 2.5 litres?", "answer": "2.5/2=<<2.5/2=1.25>>1.25\n#### 1.25"},
]
TRAIN = [
    {"question": f"{i}+{i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
    for i in range(9)
]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("test", ROWS + MADE), ("train", TRAIN)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


# Extraction

CASES = [  # (text, its result)
    # announced
    ("The answer is 18.", "18"),
    ("The answer is 18", "18"),
    ("the answer is: 18.", "18"),
    ("So the final answer is $1,234.50.", "1234.5"),
    ("The correct answer would be 7 apples.", "7"),
    ("The answer is **42**.", "42"),
    ("The answer is:\n\n42", "42"),
    ("#### 18", "18"),
    ("####18", "18"),
    ("9 * 2 = 18\n#### 1,450,000", "1450000"),
    ("#### $5.00", "5"),
    ("#### -5", "-5"),
    ("Answer: 18", "18"),
    ("**Answer:** 18 eggs", "18"),
    ("**Final Answer**: $18", "18"),
    ("Final answer (in dollars): 18", "18"),
    ("Answer:\n18", "18"),
    ("Answer = -2.5", "-5/2"),
    (r"\boxed{18}", "18"),
    (r"The answer is $\boxed{1{,}234}$.", "1234"),
    (r"$$\boxed{\frac{3}{4}}$$", "3/4"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
    (r"\boxed{18\text{ m}^2}", "18"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{5\%}", "5"),
    # the announcement wins over other numbers, and the last one over earlier ones
    ("The answer is 18 eggs per 7 days.", "18"),
    ("The answer is 18. She sells them for $2 each, 7 days a week.", "18"),
    ("The answer is 5. No, I forgot 3 of them. The answer is 8.", "8"),
    ("The answer to 3 + 4 is 7.", "7"),
    ("The answer for the 3rd day is 12.", "12"),
    ("The answer is 5 + 3 = 8.", "8"),
    ("The answer is 5 because 2 + 4 = 6 and 6 - 1 = 5, not 6", "5"),
    ("The answer is x = 12", "12"),
    ("Answer: She has 16 eggs and eats 3.\nSo 13 are left.", "13"),
    ("#### Step 1\n2 + 3 = 5\n#### Step 2\n5 * 2 = 10", "10"),
    ("#### 2. Total\nShe pays $30", "30"),
    ("What is the answer? She has 4 + 5 = 9 cats", "9"),
    # the outcome of a calculation
    (r"The answer is $9 \times 2 = 18$.", "18"),
    (r"\boxed{9 \times 2 = 18}", "18"),
    (r"9 \cdot 2 = 18", "18"),
    (r"The answer is \(9 \cdot 2 = 18\).", "18"),
    (r"The answer is 36 \div 2 = 18", "18"),
    (r"Answer: \(9 \times 2 = 18\)", "18"),
    ("The answer is 9 times 2 = 18", "18"),
    ("The answer is 9x2 = 18", "18"),
    ("The answer is 2^3 = 8.", "8"),
    ("The answer is 2(40+9) = 98", "98"),
    ("The answer is 60/6 = 10", "10"),
    ("The answer is 16-3-4=9, 9*2=18", "18"),
    ("The answer is 60 minutes - 15 minutes = 45 minutes.", "45"),
    ("The answer is 5 dollars/egg * 4 eggs = 20 dollars.", "20"),
    ("The answer is that she had 16 eggs, and sells 9 * 2 = $18 of them.", "18"),
    ("The answer is Janet's 16 eggs minus 7 = 9, times $2 = $18.", "18"),
    ("The answer is 3 + 5 * 2 = 13 for 2 people", "13"),
    ("The answer is 5 + 3 = 8, not 4 + 3 = 7", "8"),
    ("Answer: 9 * 2 = 18", "18"),
    ("#### 9 * 2 = 18", "18"),
    ("Answer: 16 - 7 = 9 eggs.\n9 * 2 = 18", "18"),
    ("Answer: 16 - 7 = 9 eggs. 9 * 2 = 18 dollars.\n\nCheck: 18 / 2 = 9", "18"),
    ("Answer: x = 5 of the 24", "5"),
    ("Answer: x = 5. Out of 24", "5"),
    ("The answer is 18 (9 eggs * $2 = $18).", "18"),
    ("The answer is 5 (2 + 4 = 6 less 1)", "5"),
    ("The answer is 18 - note that 2 * 5 = 10.", "18"),
    ("The answer is that Janet makes $18.", "18"),
    # reasons are not an announcement; a repetition may be cut off
    ("The answer is not 20 but 18.", "18"),
    ("The answer is 18.\n\nThis answer is correct because she has 16 eggs.", "18"),
    ("The answer is 18.\nNote: The answer is based on 16 eggs.", "18"),
    ("The answer is 18.\n\nThe answer is 18.\n\nThe answer is 1", "18"),
    ("The answer is $1,234.\n\nThe answer is $1,", "1234"),
    ("The answer is $1,234.\n\nThe answer is $1,2", "1234"),
    ("The answer is 18. No, the answer is 1.", "1"),
    ("The answer is 18. No, the answer is 2", "2"),
    ("The answer is 18. The answer is 180", "180"),
    # units, currency, separators
    ("18 eggs", "18"),
    ("It costs $1,234.50", "1234.5"),
    ("1,000,000", "1000000"),
    ("1\u202f234 euros", "1234"),
    ("€5", "5"),
    ("USD5", "5"),
    ("12km", "12"),
    ("He runs 12km/h", "12"),
    ("5%", "5"),
    ("50 percent", "50"),
    ("the area is 25 m^2", "25"),
    ("the area is 25 m²", "25"),
    ("She saves 5 tons of CO2", "5"),
    ("£2.50p", "2.5"),
    # signs
    ("-5", "-5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("10 - 5", "5"),
    ("10-5", "5"),
    ("3–5 days", "5"),
    ("(10)-5", "5"),
    ("a loss of -3.5 dollars", "-7/2"),
    ("- 7 apples", "7"),
    ("COVID-19 took 5 days", "5"),
    # decimals and full stops
    ("3.", "3"),
    ("2.50", "2.5"),
    ("2.50.", "2.5"),
    (".5", "1/2"),
    ("18.0", "18"),
    ("007", "7"),
    # fractions
    ("3/4", "3/4"),
    ("1 1/2", "3/2"),
    ("1½ cups", "3/2"),
    ("½", "1/2"),
    ("2 and 1/3 hours", "7/3"),
    ("1/2 of 10 is 5", "5"),
    ("He eats 3/4 of the 8 pies, so 6 pies", "6"),
    ("5/0", None),
    # numbers that are not the result
    ("He earns 50 dollars working 24/7", "50"),
    ("24/7", "24/7"),
    ("She has 40 people at 5:00", "40"),
    ("He arrives at 5:00 PM", "5"),
    ("They leave with 12 bags at 3:30", "12"),
    ("3:30", None),
    ("She had 12 on the 3rd day", "12"),
    ("He was 6th", "6"),
    ("9 + 6 = 15 liters of water out of the 24 liters.", "15"),
    ("On 5/10/2020 he had 8 left", "8"),
    ("He was born in 1990", "1990"),
    ("She had 5 cats. It is 2020", "2020"),  # a year may be asked for: the last number counts
    ("Step 1: 2 + 3 = 5\nStep 2: that is all", "5"),
    ("1. 2 + 3 = 5 apples\n2. Done", "5"),
    ("She makes 9 * 2 = $<<9*2=18>>18 every day", "18"),
    # nothing
    ("", None),
    ("I do not know", None),
    ("eighteen", None),
    ("1" * 5000, None),
    ("x2 + y3", None),
]


@pytest.mark.parametrize(("text", "number"), CASES)
def test_extraction(text, number):
    assert extract_number(text) == (None if number is None else Fraction(number))


@pytest.mark.slow
def test_a_text_without_end_is_read_in_linear_time():
    for part in (
        "1,",
        "answer ",
        "answer is ",
        "answer: 1 + ",
        "answer\n",
        "5 ",
        "= ",
        "\\\\boxed{",
        "#### ",
        "1/",
        "-",
    ):
        assert_linear(extract_number, part)


# Scores


def test_the_data_sets_own_solutions_score_one(folder):
    task = Gsm8k(path=folder)
    examples = task.examples()
    assert [example.reference for example in examples] == ["3", "540", "18", "2,125", "-5", "1.25"]
    for example, row in zip(examples, ROWS + MADE, strict=True):
        assert task.score(example, task.postprocess(example, row["answer"])) == 1.0


@pytest.mark.parametrize(
    ("index", "completion", "score"),
    [
        (2, " She makes 9 * 2 = 18.\nThe answer is 18.", 1.0),
        (2, "The answer is $18.00.", 1.0),
        (2, "The answer is 18.01.", 0.0),
        (2, "The answer is -18.", 0.0),
        (2, "The answer is 180.", 0.0),
        (2, "", 0.0),
        (2, "I give up.", 0.0),
        (2, "The answer is 36/2.", 1.0),
        (3, "The answer is 2125.", 1.0),
        (3, "The answer is $2,125.00", 1.0),
        (3, "The answer is 2.125", 0.0),
        (4, "#### −5", 1.0),
        (4, "The answer is 5.", 0.0),
        (5, "The answer is 1 1/4 litres.", 1.0),
        (5, "The answer is 1¼.", 1.0),
        (5, "The answer is 1.3.", 0.0),
    ],
)
def test_scores_compare_exact_numbers(folder, index, completion, score):
    task = Gsm8k(path=folder)
    assert task.score(task.examples()[index], completion) == score


def test_references_stay_aligned_in_any_order_and_thread(folder):
    task = Gsm8k(path=folder)
    examples = select(task.examples(), "full", seed=3)
    assert [example.index for example in examples] != list(range(len(examples)))
    completions = [f"The answer is {example.reference}." for example in examples]
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(task.score, examples, completions)) == [1.0] * len(examples)
        shifted = completions[1:] + completions[:1]
        assert list(pool.map(task.score, examples, shifted)) == [0.0] * len(examples)


# Prompts


def test_zero_shot_asks_the_question_and_leaves_the_answer_open(folder):
    for example, row in zip(Gsm8k(path=folder).examples(), ROWS + MADE, strict=True):
        assert row["question"] in example.prompt
        assert example.prompt.endswith("\nSolution:")
        assert example.prompt.count("Problem:") == 1
        assert example.messages == ()


def test_fewshot_shows_the_first_training_rows_as_we_ask_for_them(folder):
    zero_shot = Gsm8k(path=folder).examples()
    task = Gsm8k(path=folder, use_fewshot=True, num_fewshot=3)
    for example, alone in zip(task.examples(), zero_shot, strict=True):
        *worked, last = example.prompt.split("Problem: ")[1:]
        assert alone.prompt.endswith(f"Problem: {last}")
        assert worked == [
            f"{i}+{i}?\nSolution: {i}+{i}={2 * i}\nThe answer is {2 * i}.\n\n" for i in range(3)
        ]
        assert example.reference == alone.reference
    # the score reads the end of a worked solution
    assert task.postprocess(zero_shot[0], " 1+1=2\nThe answer is 2.\n\nProblem: 3") == (
        " 1+1=2\nThe answer is 2.\n"
    )
    assert extract_number(worked[1]) == 2


@pytest.mark.parametrize("use_fewshot", [False, True])
def test_chat_turns_alternate_and_end_with_the_question(folder, use_fewshot):
    task = Gsm8k(path=folder, chat=True, use_fewshot=use_fewshot)
    assert task.stop == ()
    for example, row in zip(task.examples(), ROWS + MADE, strict=True):
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (5 * use_fewshot) + ["user"]
        assert example.messages[-1]["content"].endswith(row["question"])
        assert example.prompt == example.messages[-1]["content"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        (" 2 + 2 = 4\nThe answer is 4.", " 2 + 2 = 4\nThe answer is 4."),
        (" The answer is 4.\n\nProblem: 5", " The answer is 4.\n"),
        (" The answer is 4.\nQuestion: What is 5?", " The answer is 4."),
        (" The answer is 4.\n\nQ: 5", " The answer is 4.\n"),
        (" Problem: none. The Question: no.", " Problem: none. The Question: no."),
    ],
)
def test_postprocess_ends_at_the_next_problem(folder, text, kept):
    task = Gsm8k(path=folder)
    assert task.postprocess(None, text) == kept
    assert task.postprocess(None, kept) == kept
    assert Gsm8k(path=folder, chat=True).postprocess(None, text) == text


# What is refused


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_the_number_of_worked_examples_is_checked(count):
    with pytest.raises(ValueError, match=r"^task\.gsm8k\.num_fewshot: .*at least 1"):
        load_task("gsm8k", num_fewshot=count)


def test_too_few_training_rows(folder):
    with pytest.raises(ValueError, match=r"^task\.gsm8k\.num_fewshot: 10 .* the 9 rows"):
        Gsm8k(path=folder, use_fewshot=True, num_fewshot=10).examples()


@pytest.mark.parametrize("answer", ["18", "She has #### many", "#### ", "#### 1 2", "####3-4"])
def test_a_row_without_a_result_is_named(tmp_path, answer):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    with pytest.raises(ValueError, match=r"^dataset\.path: the answer .*'#### NUMBER'"):
        Gsm8k(path=str(file)).examples()
