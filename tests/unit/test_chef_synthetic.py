"""The one rate at which turns accept tokens if a benchmark sets the acceptance."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import SpeculativeConfig

from vllm.chef.config import CARRIER_OPTIONS, _check_carrier
from vllm.chef.synthetic import common_rate, configured_rates, unconditional_rates
from vllm.chef.turns import chef_turns

TURNS = chef_turns([1, 3], [2, 1], (True, True))


def carrier(**options) -> SimpleNamespace:
    speculative = {**CARRIER_OPTIONS, "rejection_sample_method": "standard"}
    speculative |= {"method": "draft_model", "num_speculative_tokens": 3}
    return SimpleNamespace(**speculative | {"synthetic_acceptance_rates": None} | options)


def synthetic(rates: list[float]) -> SimpleNamespace:
    return carrier(rejection_sample_method="synthetic", synthetic_acceptance_rates=rates)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_vllm_takes_the_rates_and_we_find_the_one_rate_again(rate):
    rates = unconditional_rates(rate, 3)
    assert SpeculativeConfig._resolve_synthetic_acceptance_rates(3, rates, None) == rates
    assert common_rate(synthetic(rates)) == rate
    assert common_rate(synthetic([round(entry, 3) for entry in rates])) == rate
    _check_carrier(SimpleNamespace(speculative_config=synthetic(rates)), TURNS, False)


@pytest.mark.parametrize("rates", [[0.8, 0.8, 0.8], [0.8, 0.64, 0.3], [1.0, 0.5, 0.0]])
def test_rates_that_differ_by_place_are_refused(rates):
    with pytest.raises(ValueError, match="acceptance_rates: .* give its powers") as error:
        _check_carrier(SimpleNamespace(speculative_config=synthetic(rates)), TURNS, False)
    assert "\n" not in str(error.value)


def test_a_length_is_one_rate_only_at_its_ends():
    for length, rate in ((1.0, 0.0), (4.0, 1.0)):
        rates = SpeculativeConfig._resolve_synthetic_acceptance_rates(3, None, length)
        assert common_rate(synthetic(rates)) == rate
    rates = SpeculativeConfig._resolve_synthetic_acceptance_rates(3, None, 2.5)
    with pytest.raises(ValueError, match="one rate"):
        common_rate(synthetic(rates))


def test_all_other_options_are_refused_as_before():
    _check_carrier(
        SimpleNamespace(speculative_config=carrier(rejection_sample_method="block")), TURNS, False
    )
    with pytest.raises(ValueError, match="turns make no use of it"):
        _check_carrier(
            SimpleNamespace(speculative_config=carrier(quantization="fp8")), TURNS, False
        )
    options = vars(synthetic(unconditional_rates(0.5, 3))) | {"kv_cache_dtype": "fp8"}
    with pytest.raises(
        ValueError, match=r"^--speculative-config\.kv_cache_dtype: turns make no use"
    ):
        _check_carrier(SimpleNamespace(speculative_config=SimpleNamespace(**options)), TURNS, False)


def test_rates_cover_all_that_a_decision_may_judge(monkeypatch):
    import vllm.chef.synthetic as module

    def configured(speculative):
        config = None if speculative is None else SimpleNamespace(speculative_config=speculative)
        monkeypatch.setattr(module, "get_current_vllm_config_or_none", lambda: config)
        return configured_rates(TURNS, torch.device("cpu"))

    assert configured(None) is None
    assert configured(carrier()) is None
    rates = configured(synthetic(unconditional_rates(0.8, 3)))
    most = TURNS.max_tokens(range(len(TURNS)))
    assert rates.tolist() == pytest.approx([0.8] * most)
    assert rates.dtype == torch.float32
