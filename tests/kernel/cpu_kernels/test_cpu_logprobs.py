"""Log-probabilities and ranks, against vLLM's kernels under Triton's interpreter."""

import pytest
import torch
from logit_rows import VOCAB_SIZES, make_logits
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

# Sums of up to 3000 float32 terms in another order, followed by a logarithm. 3000 eps bounds the
# error for one order; its square root is what is seen.
SUM_TOLERANCE = 4e-6


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_logprobs", [0, 4])
def test_logprobs(compare, vocab_size, dtype, num_logprobs):
    num_tokens = 70  # more than the kernel works on at once
    logits = make_logits(num_tokens, vocab_size, dtype)
    generator = torch.Generator().manual_seed(5)
    sampled = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    compare(
        "sample.logprob._topk_log_softmax_kernel",
        lambda: compute_topk_scores(logits, num_logprobs, sampled),
        tolerance=SUM_TOLERANCE,
    )


def logits_with_ties(vocab_size, dtype=torch.float32):
    """Twenty rows in which token 1 has an equal, and the tokens to rank: that one and the best."""
    logits = make_logits(20, vocab_size, dtype)
    logits[:, 2] = logits[:, 1]
    best = logits.float().argmax(dim=-1)
    return logits, torch.where(torch.arange(20) % 2 == 0, 1, best)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_ranks(compare, vocab_size):
    logits, tokens = logits_with_ties(vocab_size)
    stock, _ = compare(
        "sample.logprob._ranks_kernel", lambda: compute_topk_scores(logits, 0, tokens)
    )
    assert stock.selected_token_ranks.unique().numel() > 1


def test_ranks_of_bfloat16():
    logits, tokens = logits_with_ties(1000, torch.bfloat16)
    expected = compute_topk_scores(logits.float(), 0, tokens).selected_token_ranks
    assert torch.equal(compute_topk_scores(logits, 0, tokens).selected_token_ranks, expected)


def test_rank_of_an_impossible_token():
    """The stock kernel also counts the padding of its last block here, which no vocabulary has."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert compute_topk_scores(logits, 0, torch.tensor([1])).selected_token_ranks.tolist() == [3]
