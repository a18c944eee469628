"""What requests may override of their ensemble: the check, and the coefficients by slot."""

import math
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.functions import EnsembleFunction, make_function
from vllm.ensemble_decode.request_args import SlotCoefficients, requested_coefficients

WEIGHTED = make_function("weighted", 3, {"weights": [0.7, 0.3, 0.0]})
CONTRASTIVE = make_function("contrastive", 3, {})
PROXY = make_function("proxy_tuning", 3, {})
MEAN = make_function("mean", 2, {})
PLAUSIBLE = make_function("contrastive_plausible", 2, {})
OWN = make_function("operator:itemgetter", 2, {})


@pytest.mark.parametrize(
    ("function", "extra_args", "expected"),
    [
        (WEIGHTED, None, None),
        (WEIGHTED, {}, None),
        (WEIGHTED, {"kv_transfer_params": {"a": 1}, "ensembles": "not ours"}, None),
        (OWN, {"mine": 1}, None),
        (OWN, {1: 2}, None),
        (WEIGHTED, {"ensemble_weights": [1, 0, 0]}, (1, 0, 0)),
        (WEIGHTED, {"ensemble_weights": [0.0, 2, 0], "mine": 1}, (0, 2, 0)),
        (CONTRASTIVE, {"ensemble_alpha": 0.5}, (1, -0.25, -0.25)),
        (CONTRASTIVE, {"ensemble_alpha": 0}, (1, 0, 0)),
        (PROXY, {"ensemble_scale": 2}, (1, 2, -2)),
    ],
)
def test_a_request_gets_what_it_asks_for(function, extra_args, expected):
    assert requested_coefficients(function, extra_args) == expected


@pytest.mark.parametrize(
    ("function", "extra_args", "message"),
    [
        (WEIGHTED, {"ensemble_weights": [1, 0]}, "ensemble_weights: 2 weights for 3 members"),
        (WEIGHTED, {"ensemble_weights": [0, 0, 0]}, "ensemble_weights: .* is out of range"),
        (WEIGHTED, {"ensemble_weights": [1, -1, 0]}, "ensemble_weights: .* is out of range"),
        (WEIGHTED, {"ensemble_weights": [math.nan, 1, 0]}, "ensemble_weights: .* is out of range"),
        (WEIGHTED, {"ensemble_weights": [math.inf, 1, 0]}, "ensemble_weights: .* is out of range"),
        (WEIGHTED, {"ensemble_weights": [1e300, 1, 0]}, "ensemble_weights: out of range"),
        (WEIGHTED, {"ensemble_weights": [1e-300, 0, 0]}, "ensemble_weights: out of range"),
        (WEIGHTED, {"ensemble_weights": [10**400, 1, 0]}, "ensemble_weights: out of range"),
        (WEIGHTED, {"ensemble_weights": ["1", 1, 0]}, "ensemble_weights: '1' is not a number"),
        (WEIGHTED, {"ensemble_weights": [True, 1, 0]}, "ensemble_weights: True is not a number"),
        (WEIGHTED, {"ensemble_weights": "1"}, "ensemble_weights: '1' is not a number"),
        (WEIGHTED, {"ensemble_weights": 1}, "ensemble_weights: 1 is not a list"),
        (WEIGHTED, {"ensemble_weights": None}, "ensemble_weights: None is not a number"),
        (WEIGHTED, {"ensemble_weights": [[1], 1, 0]}, "ensemble_weights: .* is not a number"),
        (
            WEIGHTED,
            {"ensemble_weights": [1, 1, 0.1]},
            r"ensemble_weights: member 2 \(counted from 0\) has weight 0",
        ),
        (WEIGHTED, {"ensemble_alpha": 0.1}, "ensemble_alpha: .*a request may set ensemble_weights"),
        (WEIGHTED, {"ensemble_wights": [1]}, "ensemble_wights: no such parameter.*ensemble_alpha"),
        (WEIGHTED, {"ensemble_": [1]}, "ensemble_: no such parameter"),
        (CONTRASTIVE, {"ensemble_alpha": 1.5}, "ensemble_alpha: 1.5 is out of range"),
        (CONTRASTIVE, {"ensemble_alpha": [0.5]}, r"ensemble_alpha: \[0.5\] is not a number"),
        (CONTRASTIVE, {"ensemble_alpha": math.nan}, "ensemble_alpha: nan is out of range"),
        (CONTRASTIVE, {"ensemble_weights": [1, 1, 1]}, "ensemble_weights: .*set ensemble_alpha"),
        (PROXY, {"ensemble_scale": -1}, "ensemble_scale: -1 is out of range"),
        (MEAN, {"ensemble_weights": [1, 1]}, r"ensemble_weights: .*\(mean\).*no such parameter"),
        (PLAUSIBLE, {"ensemble_alpha": 0.5}, "ensemble_alpha: .*contrastive_plausible.*no such"),
        (OWN, {"ensemble_weights": [1, 1]}, "ensemble_weights: .*one of your own"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(function, extra_args, message):
    with pytest.raises(ConfigFieldError, match=message) as error:
        requested_coefficients(function, extra_args)
    assert "\n" not in str(error.value)


def asking(**extra_args: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra_args or None)


def slot_coefficients(function: EnsembleFunction = WEIGHTED) -> SlotCoefficients:
    return SlotCoefficients(function, 4, torch.device("cpu"))


def test_a_slot_has_the_coefficients_of_its_latest_request():
    found = slot_coefficients()
    table = found.table
    steps = [
        ({1: asking(ensemble_weights=[1, 0, 0]), 2: asking()}, [1, 0, 0]),
        ({}, [1, 0, 0]),
        ({1: asking(ensemble_weights=[0, 3, 0])}, [0, 3, 0]),
        ({1: asking(), 3: None}, WEIGHTED.coefficients),
    ]
    for requests, expected in steps:
        for slot, params in requests.items():
            found.add_request(slot, params)
        found.apply_staged_writes()
        rows = [WEIGHTED.coefficients] * 4
        rows[1] = expected
        torch.testing.assert_close(found.table, torch.tensor(rows, dtype=torch.float32))
    assert found.table is table, "CUDA graphs know this memory"


def test_a_request_that_overrides_nothing_writes_nothing(monkeypatch):
    found = slot_coefficients()
    monkeypatch.setattr(found, "table", None)
    for params in (asking(), asking(mine=1), None, asking(ensemble_weights=[0.7, 0.3, 0])):
        found.add_request(1, params)
        found.apply_staged_writes()


def test_a_worker_never_fails_on_a_request():
    """The front end may run without our plugin."""
    found = slot_coefficients()
    found.add_request(0, asking(ensemble_weights="all"))
    found.apply_staged_writes()
    torch.testing.assert_close(found.table[0], torch.tensor(WEIGHTED.coefficients))


@pytest.mark.parametrize("function", [MEAN, PLAUSIBLE, OWN])
def test_functions_without_such_a_parameter_have_no_rows(function):
    assert slot_coefficients(function).of(torch.arange(2)) is None
