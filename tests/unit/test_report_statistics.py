"""Intervals and tests of scores against closed forms and counts by hand."""

import math
import warnings
from itertools import product

import numpy as np
import pytest
from scipy import stats

from reports.statistics import mcnemar, mean_interval, paired_test, score_interval


@pytest.mark.parametrize(("successes", "n"), [(7, 10), (0, 5), (5, 5), (81, 263)])
def test_wilson_interval_in_closed_form(successes, n):
    z, p = stats.norm.ppf(0.975), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = score_interval([1.0] * successes + [0.0] * (n - successes))
    assert interval[:2] == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert interval.kind == "Wilson"


def test_wilson_interval_as_published():
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81 of 263.
    interval = score_interval([1] * 81 + [0] * 182)
    assert interval[:2] == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_bootstrap_of_graded_scores():
    scores = np.random.default_rng(1).beta(2, 5, size=400)
    interval = score_interval(scores)
    half = 1.96 * scores.std(ddof=1) / 20  # what the central limit theorem gives
    assert interval.kind == "BCa bootstrap"
    assert interval[:2] == pytest.approx((scores.mean() - half, scores.mean() + half), abs=2e-3)
    assert score_interval(scores) == interval  # the seed is fixed


def test_bootstrap_in_parts_is_the_same(monkeypatch):
    scores = np.random.default_rng(1).random(40)
    whole = mean_interval(scores)
    monkeypatch.setattr("reports.statistics.MAX_BATCH", 100)
    assert mean_interval(scores) == whole


@pytest.mark.parametrize("scores", [[], [0.5], [0.5, 0.5, 0.5]])
def test_no_interval_where_nothing_varies(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score_interval(scores) is None


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 5), (5, 1), (0, 3), (4, 4), (12, 2)])
def test_mcnemar_by_counting(only_a, only_b):
    n, k = only_a + only_b, min(only_a, only_b)
    by_hand = min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar(only_a, only_b) == pytest.approx(by_hand)


def test_mcnemar_of_scores_counts_discordant_pairs_only():
    a, b = [1, 1, 1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1, 1]
    test = paired_test(a, b)
    assert test.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert test.kind == "McNemar, exact (5 : 1)"
    assert paired_test([1, 0], [1, 0]).p_value == 1


def test_permutation_test_by_all_signs():
    a, b = np.array([0.9, 0.4, 0.7, 0.3, 0.8]), np.array([0.5, 0.3, 0.75, 0.1, 0.35])
    differences = a - b
    means = [np.mean(np.array(signs) * differences) for signs in product((1, -1), repeat=5)]
    by_hand = np.mean([abs(mean) >= abs(differences.mean()) - 1e-12 for mean in means])
    test = paired_test(a, b)
    assert test.kind == "permutation, exact"
    assert test.p_value == pytest.approx(by_hand)
    assert 0 < by_hand < 1


def test_drawn_permutations_agree_with_the_t_test():
    random = np.random.default_rng(3)
    a = random.random(200)
    b = a + random.normal(0.01, 0.1, size=200)
    test = paired_test(a, b)
    assert test.kind == "permutation, drawn"
    assert test.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


def test_no_pairs_no_test():
    assert paired_test([], []) is None
