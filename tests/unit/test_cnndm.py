"""CNN/DailyMail: prompts, what is kept of a text, and scores equal to rouge-score's."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tasks import cnndm, load_task, select
from tasks.cnndm import CnnDailyMail

HIGHLIGHTS = [
    "The film will premiere on Memorial Day .\nIt opened last year's Cannes Film Festival .",
    "Theia, a bully breed mix, was hit by a car .\nShe deserves a good life, says Sara Mellado .",
    "Storms closed {two} airports on Monday .",
    "Prices fell 3.5% in March .\nAnalysts had expected a rise .",
]
ROWS = [
    {
        "id": f"row{i}",
        "article": f"  (CNN) -- Article {i}.\tIts words run on. " + f"word{i} " * 30,
        "highlights": highlights,
    }
    for i, highlights in enumerate(HIGHLIGHTS)
]
VALIDATION = [
    {
        "id": f"v{i}",
        "article": f"Old news {i}: " + "more " * 30,
        "highlights": f"Brief {i} .\nEnd .",
    }
    for i in range(3)
]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("test", ROWS), ("validation", VALIDATION)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"cnn_dailymail_{split}.jsonl").write_text("".join(lines))
    return str(tmp_path)


# Scores

COMPLETIONS = [
    "The film premieres on Memorial Day. It opened the Cannes Film Festival last year.",
    "A dog named Theia was hit by cars and deserves good lives.",
    "Film film film film",
    "Airports closed; storms! 3.5% (Monday)",
    "",
    "...",
    "Ünïcödé – ‘quotes’ only",
]


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_scores_equal_those_of_the_package(folder, completion):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    task = CnnDailyMail(path=folder)
    for example, highlights in zip(task.examples(), HIGHLIGHTS, strict=True):
        theirs = scorer.score(target=highlights, prediction=completion)
        assert task.score(example, completion) == {
            "rouge1": theirs["rouge1"].fmeasure,
            "rouge2": theirs["rouge2"].fmeasure,
            "rougeL": theirs["rougeL"].fmeasure,
        }
        assert task.metric in task.score(example, completion)


def test_scoring_logs_nothing(folder, caplog):
    caplog.set_level("DEBUG", logger="absl")
    RougeScorer(["rougeL"])
    assert "tokenizer" in caplog.text  # the package does, left to itself
    caplog.clear()
    cnndm._scorer.cache_clear()
    task = CnnDailyMail(path=folder)
    task.score(task.examples()[0], "A film")
    assert caplog.text == ""


def test_a_score_that_can_be_counted_by_hand(folder):
    task = CnnDailyMail(path=folder)
    # The reference "Storms closed {two} airports on Monday" has six words. It contains all three
    # words here (with stems), in this order, with one pair side by side: 2 * 1 * 3/6 / (1 + 3/6).
    scores = task.score(task.examples()[2], "Storm closes Monday")
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 2 / 7, "rougeL": 2 / 3})


def test_references_stay_aligned_in_any_order_and_thread(folder):
    task = CnnDailyMail(path=folder)
    examples = select(task.examples(), "full", seed=1)
    assert [example.index for example in examples] != [0, 1, 2, 3]
    completions = [example.reference.lower() for example in examples]
    one = {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(task.score, examples * 25, completions * 25)) == [one] * 100
        shifted = completions[1:] + completions[:1]
        assert all(scores["rougeL"] < 0.5 for scores in pool.map(task.score, examples, shifted))


# Prompts


def test_zero_shot_gives_the_article_and_leaves_the_summary_open(folder):
    for example, row in zip(CnnDailyMail(path=folder).examples(), ROWS, strict=True):
        assert example.prompt.endswith(f"Article: {row['article'].strip()}\n\nSummary:")
        assert example.prompt.count("Article: ") == 1
        assert example.task_id == f"cnndm/test/{row['id']}"
        assert example.reference == row["highlights"]


def test_fewshot_shows_the_first_rows_of_the_validation_split(folder):
    zero_shot = CnnDailyMail(path=folder, max_article_words=4).examples()
    task = CnnDailyMail(path=folder, max_article_words=4, use_fewshot=True, num_fewshot=2)
    for example, alone in zip(task.examples(), zero_shot, strict=True):
        instruction, question = alone.prompt.split("\n\n", maxsplit=1)
        assert example.prompt == (
            f"{instruction}\n\n"
            "Article: Old news 0: more\n\nSummary: Brief 0. End.\n\n"
            "Article: Old news 1: more\n\nSummary: Brief 1. End.\n\n" + question
        )


@pytest.mark.parametrize("use_fewshot", [False, True])
def test_chat_turns_alternate_and_end_with_the_article(folder, use_fewshot):
    task = CnnDailyMail(path=folder, chat=True, use_fewshot=use_fewshot)
    assert task.stop == ()
    for example, row in zip(task.examples(), ROWS, strict=True):
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * use_fewshot + ["user"]
        assert example.messages[-1]["content"].endswith(row["article"].strip())
        assert example.prompt == example.messages[-1]["content"]


@pytest.mark.parametrize(
    ("count", "end"),
    [
        (1, "(CNN)"),
        (3, "(CNN) -- Article"),
        (5, "(CNN) -- Article 0.\tIts"),
        (38, ROWS[0]["article"].strip()),
        (37, ROWS[0]["article"].strip().removesuffix(" word0")),
        (10**6, ROWS[0]["article"].strip()),
        (None, ROWS[0]["article"].strip()),
    ],
)
def test_articles_are_cut_after_a_number_of_words(folder, count, end):
    example = CnnDailyMail(path=folder, max_article_words=count).examples()[0]
    assert example.prompt.endswith(f"Article: {end}\n\nSummary:")


# What is kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        (" A film opens. It is good.", "A film opens. It is good."),
        (" A film opens.\nIt is good.\n", "A film opens.\nIt is good."),
        (" A film opens.\n\nComments (3)", "A film opens."),
        ("\n\nA film opens.\n \t\nMore", "A film opens."),
        (" A film opens.\nArticle: Another", "A film opens."),
        (" An Article: no", "An Article: no"),
        ("\nArticle: Another", ""),
    ],
)
def test_postprocess_keeps_the_first_paragraph(folder, text, kept):
    task = CnnDailyMail(path=folder)
    assert task.postprocess(None, text) == kept
    assert task.postprocess(None, kept) == kept


def test_a_chats_reply_is_kept_whole(folder):
    task = CnnDailyMail(path=folder, chat=True)
    assert task.postprocess(None, "\nA film.\n\nIt opens.\nArticle: x \n") == (
        "A film.\n\nIt opens.\nArticle: x"
    )


# What is refused


@pytest.mark.parametrize("option", ["num_fewshot", "max_article_words"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "all", True])
def test_bad_numbers_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^task\.cnndm\.{option}: .*at least 1"):
        load_task("cnndm", **{option: value})


def test_too_few_worked_examples(folder):
    with pytest.raises(ValueError, match=r"^task\.cnndm\.num_fewshot: 4 .* the 3 rows"):
        CnnDailyMail(path=folder, use_fewshot=True, num_fewshot=4).examples()
