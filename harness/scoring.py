"""Computes scores of finished samples while other samples are generated.

This module knows the form of a score in `samples.jsonl`. The task computes the scores.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tasks import Example, Task


class Scorer:
    """Fills in `score` of samples, and `scores` if a task has more than one metric.

    Threads on half of the cores compute the scores, because a score may take long. An example is a
    program that is executed. The other cores are left to the engine.
    """

    def __init__(self, task: Task, examples: Sequence[Example]) -> None:
        self._task = task
        self._examples = {example.index: example for example in examples}
        self._pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2))
        self._pending: list[Future] = []

    def submit(self, sample: dict[str, Any]) -> None:
        self._pending.append(self._pool.submit(self._score, sample))

    def running(self) -> float | None:
        """The mean of the scores so far; None if there are none."""
        done = [future.result() for future in self._pending if future.done()]
        return self._task.aggregate(sample["score"] for sample in done)

    def finish(self) -> list[dict[str, Any]]:
        """All submitted samples with their scores, in the order of the data set.

        An error that a score raised is raised again here.
        """
        samples = [future.result() for future in self._pending]
        return sorted(samples, key=lambda sample: sample["index"])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _score(self, sample: dict[str, Any]) -> dict[str, Any]:
        score = self._task.score(self._examples[sample["index"]], sample["completion"])
        if isinstance(score, Mapping):
            return {**sample, "score": score[self._task.metric], "scores": dict(score)}
        return {**sample, "score": score}


def means(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The summary's field `scores`, if there are several metrics: the mean of each one."""
    scores = [sample["scores"] for sample in samples if "scores" in sample]
    if not scores:
        return {}
    return {"scores": {m: sum(s[m] for s in scores) / len(scores) for m in scores[0]}}
