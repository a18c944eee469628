"""The noise of draws, bit for bit that of vLLM's kernel under Triton's interpreter."""

import pytest
import torch
from quick import quick
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample


@pytest.mark.parametrize("vocab_size", quick([5, 1025]))
def test_draws_over_seeds_and_positions(compare, vocab_size):
    """With noise and without logits, the draw is the noise; 150 draws must be the same."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = 150
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_tokens,), generator=generator)
    pos = torch.randint(0, 2**20, (num_tokens,), generator=generator)

    def launch():
        logits = torch.zeros(num_tokens, vocab_size)
        mapping = torch.arange(num_tokens, dtype=torch.int32)
        return gumbel_sample(logits, mapping, torch.ones(num_tokens), seeds, pos, False, False)

    stock, ours = compare("sample.gumbel._gumbel_sample_kernel", launch)
    assert torch.equal(stock, ours)
    assert stock.unique().numel() > min(vocab_size, 110) * 0.9  # they are draws, not a constant
