"""Functions as users write them, for `ensemble_fn="own_functions:NAME"`."""

from itertools import count

import torch

from vllm.ensemble_decode import capturable, row_coefficients

_calls = count()


def sharper(scores: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """A function that a graph can hold. It is tried."""
    return scores.clamp(min=0).pow(power).mean(dim=0)


@row_coefficients
def by_margin(scores: torch.Tensor) -> torch.Tensor:
    """The first member alone where it is sure, else the mean."""
    best = scores[0].topk(2, dim=-1).values
    is_sure = (best[:, 0] - best[:, 1] > 0.3)[:, None]
    alone = torch.zeros_like(is_sure.expand(-1, len(scores)), dtype=torch.float32)
    alone[:, 0] = 1.0
    return torch.where(is_sure, alone, 1.0 / len(scores))


def reads_on_the_host(scores: torch.Tensor) -> torch.Tensor:
    """It asks the host for a value, in each row."""
    weights = [0.9 if float(row.max()) > 0.5 else 0.5 for row in scores[0]]
    first = torch.tensor(weights, device=scores.device)[:, None]
    return first * scores[0] + (1 - first) * scores[1]


def counts_its_calls(scores: torch.Tensor) -> torch.Tensor:
    return scores.mean(dim=0) if next(_calls) % 2 else scores[0].clone()


def mixes_rows(scores: torch.Tensor) -> torch.Tensor:
    return scores.mean(dim=0) + scores.mean(dim=(0, 1))


@capturable
def declared(scores: torch.Tensor) -> torch.Tensor:
    return scores.mean(dim=0) if next(_calls) % 2 else scores[0].clone()


@capturable(is_so=False)
def never(scores: torch.Tensor) -> torch.Tensor:
    return scores.mean(dim=0)


@row_coefficients
def wrong_shape(scores: torch.Tensor) -> torch.Tensor:
    return scores.new_ones(len(scores))
