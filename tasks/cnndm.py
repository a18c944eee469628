"""CNN/DailyMail: summaries of news articles, scored by ROUGE against the data set's summary.

This module knows the prompts and which score counts. The package `rouge-score` computes it.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from tasks.base import (
    Example,
    Task,
    chat_messages,
    check_at_least,
    check_num_fewshot,
    truncate_at_stop,
)
from tasks.loading import DatasetSource, load_rows
from tasks.prompts.cnndm import ARTICLE, CHAT, INSTRUCTION

SOURCE = DatasetSource(
    hub_name="abisee/cnn_dailymail",
    config="3.0.0",
    revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
    columns={"id": str, "article": str, "highlights": str},
)

_STOP = ("\nArticle:",)


@dataclass(frozen=True, kw_only=True)
class CnnDailyMail(Task):
    """ROUGE F-measures with stemming; the reference of an example is the highlights.

    num_fewshot: worked examples, the first ones of the validation split. The train split is not
        used, because it is thirty times as large.
    max_article_words: longer articles are cut, also those of worked examples; None: not cut.
    """

    name: ClassVar[str] = "cnndm"
    metric: ClassVar[str] = "rougeL"
    max_tokens: ClassVar[int] = 128

    num_fewshot: int = 1
    max_article_words: int | None = 600

    def __post_init__(self) -> None:
        check_at_least("task.cnndm.num_fewshot", self.num_fewshot, 1)
        if self.max_article_words is not None:
            check_at_least("task.cnndm.max_article_words", self.max_article_words, 1)

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self.chat else _STOP

    def examples(self) -> list[Example]:
        worked = self._worked()
        return [
            Example(
                index=index,
                task_id=f"cnndm/test/{row['id']}",
                prompt=self._prompt(row, worked),
                reference=row["highlights"],
                messages=self._messages(row, worked),
            )
            for index, row in enumerate(load_rows(SOURCE, "test", self.path))
        ]

    def postprocess(self, example: Example, text: str) -> str:
        """In a chat the whole reply; else the first paragraph, where the summary ends."""
        if self.chat:
            return text.strip()
        paragraph, *_ = re.split(r"\n[^\S\n]*\n", truncate_at_stop(text, _STOP).strip(), maxsplit=1)
        return paragraph.strip()

    def score(self, example: Example, completion: str) -> Mapping[str, float]:
        scores = _scorer().score(target=example.reference, prediction=completion)
        return {metric: score.fmeasure for metric, score in scores.items()}

    def _worked(self) -> list[Mapping[str, Any]]:
        if not self.use_fewshot:
            return []
        rows = load_rows(SOURCE, "validation", self.path, limit=self.num_fewshot, worked=True)
        check_num_fewshot("cnndm", self.num_fewshot, len(rows), "the split validation")
        return rows

    def _prompt(self, row: Mapping[str, Any], worked: list[Mapping[str, Any]]) -> str:
        if self.chat:
            return self._fill(CHAT, row)
        solved = [f"{self._fill(ARTICLE, example)} {_summary(example)}" for example in worked]
        return "\n\n".join([INSTRUCTION, *solved, self._fill(ARTICLE, row)])

    def _messages(
        self, row: Mapping[str, Any], worked: list[Mapping[str, Any]]
    ) -> tuple[dict[str, str], ...]:
        if not self.chat:
            return ()
        requests = [(self._fill(CHAT, example), _summary(example)) for example in worked]
        return chat_messages(requests, self._fill(CHAT, row))

    def _fill(self, template: str, row: Mapping[str, Any]) -> str:
        return template.format(article=_first_words(row["article"], self.max_article_words))


@functools.cache
def _scorer() -> RougeScorer:
    # The scorer uses this tokenizer by default, but it then logs a line through the progress bar.
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))


def _first_words(article: str, count: int | None) -> str:
    """At most `count` words; the white space between them is kept."""
    if count is None:
        return article.strip()
    return re.match(rf"(?:\S+\s+){{0,{count - 1}}}\S*", article.strip())[0].strip()


def _summary(row: Mapping[str, Any]) -> str:
    # The hub's highlights have one sentence a line, with a space before each full stop.
    return " ".join(row["highlights"].split()).replace(" .", ".")
