"""Confidence intervals and tests of scores. scipy computes them; this module chooses among them.

It knows numbers only, no runs. Sources are in docs/reports.md.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
SEED = 0
# The limit of numbers that one vectorised step of resampling holds: 24 MB.
MAX_BATCH = 3_000_000


class Interval(NamedTuple):
    low: float
    high: float
    kind: str


class Test(NamedTuple):
    p_value: float
    kind: str


def is_binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def score_interval(scores: Sequence[float], is_graded: bool = False) -> Interval | None:
    """The interval of the mean: Wilson's if every score is 0 or 1, otherwise by bootstrap.

    `is_graded` scores never count as right or wrong, even if all are 0 or 1. Returns None without
    scores, or if a bootstrap is not possible.
    """
    if len(scores) and is_binary(scores) and not is_graded:
        test = stats.binomtest(int(sum(scores)), len(scores))
        low, high = test.proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(low), float(high), "Wilson")
    return mean_interval(scores)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The interval of the mean, by bootstrap: BCa, or percentiles where BCa is undefined.

    Returns None for fewer than two values, or for equal values, which resampling cannot vary.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            low, high = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=CONFIDENCE,
                n_resamples=NUM_RESAMPLES,
                batch=max(1, MAX_BATCH // len(values)),
                method=method,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Interval(float(low), float(high), f"{method} bootstrap")


def paired_test(a: Sequence[float], b: Sequence[float], is_graded: bool = False) -> Test | None:
    """Whether paired scores differ, two-sided; None without pairs.

    The test is exact McNemar if every score is 0 or 1 and the scores are not `is_graded`. Otherwise
    it is a permutation test of the mean difference.
    """
    if not len(a):
        return None
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if is_binary(a) and is_binary(b) and not is_graded:
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        return Test(mcnemar(only_a, only_b), f"McNemar, exact ({only_a} : {only_b})")
    # scipy tries all 2 ** n exchanges within pairs, if they are at most NUM_RESAMPLES. Otherwise
    # it draws NUM_RESAMPLES of them at random.
    exact = 2 ** len(a) <= NUM_RESAMPLES
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_BATCH // len(a)),
        rng=np.random.default_rng(SEED),
    )
    return Test(float(result.pvalue), "permutation, " + ("exact" if exact else "drawn"))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact p-value for these numbers of discordant pairs; 1 if there are none."""
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
