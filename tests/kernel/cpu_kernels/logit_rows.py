"""Random rows of logits for the tests of CPU kernels, and the requests that the rows belong to."""

import torch
from quick import quick

VOCAB_SIZES = quick((5, 64, 1000, 1025, 3000), 5, 1025)
MAX_NUM_REQS = 6
SEEDS = torch.tensor([0, -1, 2**40 + 3, -(2**62), 12345, 7])


def make_logits(
    num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:  # [num_tokens, vocab_size], rows apart as behind a padded head
    generator = torch.Generator().manual_seed(seed)
    padded = torch.randn(num_tokens, vocab_size + 3, generator=generator) * 3
    logits = padded.to(dtype)[:, :vocab_size]
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    logits[:, 1] = 0.5  # so that no row is empty
    return logits
