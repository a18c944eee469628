"""Acceptance set instead of measured, for benchmarks: vLLM's `rejection_sample_method="synthetic"`.

The whole verification runs as usual. vLLM's kernel then compares its random number with a rate,
instead of the probabilities of the distributions. The random number depends only on the request's
seed and the position. The output is no longer the ensemble's.
"""

import math

import torch
from vllm.config import SpeculativeConfig, get_current_vllm_config_or_none

from vllm.chef.turns import Turns
from vllm.ensemble_decode.errors import ConfigFieldError


def unconditional_rates(rate: float, num_tokens: int) -> list[float]:
    """`synthetic_acceptance_rates` that accept each token with probability `rate`.

    vLLM's entries are the probabilities that the first 1, 2, ... tokens are all accepted.
    """
    return [rate**length for length in range(1, num_tokens + 1)]


def common_rate(speculative: SpeculativeConfig) -> float | None:
    """The rate at which a synthetic verification accepts each token. None if verification is real.

    Turns fill the windows, so a place in a window does not show who proposed its token. All places
    therefore need the same rate.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    if speculative.rejection_sample_method != "synthetic":
        return None
    given = speculative.synthetic_acceptance_rates
    rate = given[0]
    # Places behind one that accepts nothing are never reached.
    rates = [
        here / before for before, here in zip([1.0, *given], given, strict=False) if before > 0
    ]
    # Entries may be rounded. The tolerance only has to detect different rates.
    if not all(math.isclose(other, rate, abs_tol=1e-3) for other in rates):
        raise ConfigFieldError(
            "--speculative-config.synthetic_acceptance_rates",
            f"turns accept all tokens at one rate a; give its powers, a, a**2, ... a**{len(given)}",
        )
    return rate


def configured_rates(
    turns: Turns, device: torch.device
) -> torch.Tensor | None:  # [window + 1], the most tokens that a decision judges
    """Conditional rates for `rejection_sample`, from vLLM's current configuration.

    None if verification is real. A benchmark may fill the tensor with another rate between any two
    steps.
    """
    speculative = _current_config()
    rate = None if speculative is None else common_rate(speculative)
    if rate is None:
        return None
    return torch.full((turns.window + 1,), rate, dtype=torch.float32, device=device)


def uses_blocks() -> bool:
    """Whether vLLM's current configuration asks for block verification."""
    speculative = _current_config()
    return speculative is not None and speculative.rejection_sample_method == "block"


def _current_config() -> SpeculativeConfig | None:
    config = get_current_vllm_config_or_none()
    return None if config is None else config.speculative_config
