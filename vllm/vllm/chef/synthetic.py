"""Acceptance set instead of measured, for benchmarks: vLLM's `rejection_sample_method="synthetic"`.

All of a verification runs as ever; vLLM's kernel then compares its random number, which depends on
the request's seed and the position alone, with a rate and not with what the distributions say.
The output is no longer the ensemble's.
"""

import math

import torch
from vllm.config import SpeculativeConfig, get_current_vllm_config_or_none

from vllm.chef.turns import Turns


def unconditional_rates(rate: float, num_tokens: int) -> list[float]:
    """`synthetic_acceptance_rates` that accept each token with probability `rate`.

    vLLM's entries are the probabilities that the first 1, 2, ... tokens are all accepted.
    """
    return [rate**length for length in range(1, num_tokens + 1)]


def common_rate(speculative: SpeculativeConfig) -> float | None:
    """The rate at which a synthetic verification accepts each token; None where it is a real one.

    Windows are filled by turns, so that a place in one says nothing about who proposed the token:
    all places need the same rate.

    Raises:
        ValueError: one line that names the key and the remedy.
    """
    if speculative.rejection_sample_method != "synthetic":
        return None
    given = speculative.synthetic_acceptance_rates
    rate = given[0]
    # What lies behind a place that accepts nothing is not reached.
    rates = [
        here / before for before, here in zip([1.0, *given], given, strict=False) if before > 0
    ]
    # Entries may be rounded: what matters is that nobody asks for different rates.
    if not all(math.isclose(other, rate, abs_tol=1e-3) for other in rates):
        raise ValueError(
            "method.llm.speculative_config.synthetic_acceptance_rates: turns accept all tokens at "
            f"one rate a; give its powers, a, a**2, ... a**{len(given)}"
        )
    return rate


def configured_rates(
    turns: Turns, device: torch.device
) -> torch.Tensor | None:  # [max tokens that a decision may judge]
    """What `rejection_sample` takes as conditional rates, by vLLM's configuration at hand.

    A benchmark may fill the tensor with another rate at any time between two steps.
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.speculative_config is None:
        return None
    rate = common_rate(config.speculative_config)
    if rate is None:
        return None
    return torch.full((turns.window + 1,), rate, dtype=torch.float32, device=device)
