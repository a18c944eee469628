"""The ensemble functions and targets as formulas on small tensors, edge cases included."""

import math

import pytest
import torch

from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.functions import ENSEMBLE_FUNCTIONS, make_function
from vllm.ensemble_decode.ops import combine

NEG_INF = -math.inf
LOGITS = torch.tensor(
    [[[2.0, 1.0, 0.0, -1.0], [0.5, 0.4, 0.3, 0.2]], [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]]]
)  # [num_members=2, num_rows=2, vocab_size=4]


def distribution(name: str, logits: torch.Tensor, probs: bool, **args) -> torch.Tensor:
    function = make_function(name, len(logits), args)
    return combine(function, logits, probs).softmax(-1)


@pytest.mark.parametrize(
    ("name", "args", "probs", "expected"),
    [
        ("weighted", {}, True, lambda x: (x[0].softmax(-1) + x[1].softmax(-1)) / 2),
        (
            "weighted",
            {"weights": [3, 1]},
            True,
            lambda x: (3 * x[0].softmax(-1) + x[1].softmax(-1)) / 4,
        ),
        # Weights of logits are not normalised: their sum is an inverse temperature.
        ("weighted", {"weights": [3, 1]}, False, lambda x: (3 * x[0] + x[1]).softmax(-1)),
        ("mean", {}, False, lambda x: ((x[0] + x[1]) / 2).softmax(-1)),
        ("product", {}, False, lambda x: (x[0] + x[1]).softmax(-1)),
        ("product", {}, True, lambda x: (x[0] + x[1]).softmax(-1)),
        ("product", {"weights": [0.5, 2]}, True, lambda x: (0.5 * x[0] + 2 * x[1]).softmax(-1)),
        ("contrastive", {"alpha": 0.3}, False, lambda x: (x[0] - 0.3 * x[1]).softmax(-1)),
        ("contrastive", {"alpha": 0}, False, lambda x: x[0].softmax(-1)),
    ],
)
def test_formulas(name, args, probs, expected):
    torch.testing.assert_close(distribution(name, LOGITS, probs, **args), expected(LOGITS))


def test_contrastive_probabilities_below_zero_count_as_none():
    p, q = LOGITS[0].softmax(-1), LOGITS[1].softmax(-1)
    difference = (p - 0.9 * q).clamp(min=0)
    assert (difference == 0).any()
    expected = difference / difference.sum(-1, keepdim=True)
    torch.testing.assert_close(distribution("contrastive", LOGITS, True, alpha=0.9), expected)


def test_contrastive_takes_the_mean_of_several_amateurs():
    logits = torch.cat([LOGITS, LOGITS[:1] * 2])
    expected = (logits[0] - 0.5 * (logits[1] + logits[2]) / 2).softmax(-1)
    torch.testing.assert_close(distribution("contrastive", logits, False, alpha=0.5), expected)


@pytest.mark.parametrize("probs", [False, True])
def test_only_plausible_tokens_keep_probability(probs):
    kept = distribution("contrastive_plausible", LOGITS, probs, alpha=0.2, plausibility=0.3) > 0
    p = LOGITS[0].softmax(-1)
    assert torch.equal(kept, p >= 0.3 * p.amax(-1, keepdim=True))


@pytest.mark.parametrize("name", ENSEMBLE_FUNCTIONS)
@pytest.mark.parametrize("probs", [False, True])
def test_removed_tokens_leave_a_distribution(name, probs):
    """Members may have lost tokens, even all that the others kept."""
    logits = LOGITS.clone()
    if name == "proxy_tuning":
        logits = torch.cat([logits, LOGITS[1:] + 1])
    logits[0, 0, 2:] = NEG_INF
    logits[1, 0, :2] = NEG_INF
    result = distribution(name, logits, probs)
    torch.testing.assert_close(result.sum(-1), torch.ones(2))
    if name.startswith("contrastive"):
        assert (result[0, 2:] == 0).all(), "what the expert removed stays removed"
    if not probs and not name.startswith("contrastive"):
        # No token in common: the first member decides alone.
        torch.testing.assert_close(result[0], logits[0, 0].softmax(-1))


def test_a_token_removed_from_the_amateur_only_does_not_take_all():
    logits = LOGITS.clone()
    logits[1, 0, 0] = NEG_INF
    result = distribution("contrastive", logits, False, alpha=0.5)
    # As if the amateur gave it its lowest remaining logit, 1.0.
    expected = (logits[0, 0] - 0.5 * torch.tensor([1.0, 1.0, 2.0, 3.0])).softmax(-1)
    torch.testing.assert_close(result[0], expected)


@pytest.mark.parametrize("probs", [False, True])
def test_proxy_tuning_adds_what_tuning_changed(probs):
    logits = torch.cat([LOGITS, LOGITS[:1].flip(-1)])
    logits[2, 0, 0] = NEG_INF  # gets the lowest logit that is left
    floored = logits[2].masked_fill(logits[2] == NEG_INF, 0.0)
    for scale in (0.0, 1.0, 2.5):
        expected = (logits[0] + scale * (logits[1] - floored)).softmax(-1)
        found = distribution("proxy_tuning", logits, probs, scale=scale)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("num_members", "args", "message"),
    [
        (2, {}, "ensemble.extra_model: proxy_tuning takes three members, not 2"),
        (3, {"scale": -1}, "ensemble.ensemble_args.scale: -1 is out of range"),
        (3, {"scale": math.inf}, "ensemble.ensemble_args.scale: inf is out of range"),
        (3, {"scale": "1"}, "ensemble.ensemble_args.scale: '1' is not a number"),
    ],
)
def test_proxy_tuning_refuses_what_it_cannot_mean(num_members, args, message):
    with pytest.raises(ConfigFieldError, match=message):
        make_function("proxy_tuning", num_members, args)


def test_a_member_of_weight_zero_has_no_say():
    logits = LOGITS.clone()
    logits[1, :, 0] = NEG_INF
    for probs in (False, True):
        result = distribution("weighted", logits, probs, weights=[1.0, 0.0])
        torch.testing.assert_close(result, logits[0].softmax(-1))


def test_half_precision_logits_are_combined_in_float32():
    function = make_function("mean", 2, {})
    result = combine(function, LOGITS.bfloat16() + 1e-3, combines_probs=False)
    assert result.dtype == torch.float32


def _nan_function(scores):
    return scores[0] * float("nan")


def test_own_function_that_gives_nan_falls_back_to_the_first_member():
    result = distribution("test_ensemble_functions:_nan_function", LOGITS, False)
    torch.testing.assert_close(result, LOGITS[0].softmax(-1))


def test_product_of_experts_survives_low_temperatures():
    """If the members' probabilities vanish in float32, their product does not."""
    logits = torch.tensor([[[12.0, 0.5, 0.0]], [[0.0, 0.5, 12.0]]]) / 0.1
    expected = torch.tensor([[0.5, 0.0, 0.5]])
    for probs in (False, True):
        torch.testing.assert_close(distribution("product", logits, probs), expected)
