"""Penalties, biases, grammar masks and counts of NaN, against vLLM's kernels or their meaning."""

import pytest
import torch
from logit_rows import MAX_NUM_REQS, VOCAB_SIZES, make_logits
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.penalties import apply_penalties, bincount
from vllm.v1.worker.gpu.structured_outputs import _apply_grammar_bitmask_kernel


def make_token_counts(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt bits and output counts, by the interpreted kernel or ours, whichever is installed."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (MAX_NUM_REQS, 1100), generator=generator).int()
    prompt_bits = torch.full((MAX_NUM_REQS, -(-vocab_size // 32)), -1, dtype=torch.int32)
    counts = torch.full((MAX_NUM_REQS, vocab_size), 3, dtype=torch.int32)
    prompt_len = torch.tensor([10, 1030, 1, 5, 40, 7], dtype=torch.int32)
    prefill_len = torch.tensor([10, 1090, 40, 1050, 44, 7], dtype=torch.int32)
    bincount(
        torch.tensor([4, 1, 0, 3], dtype=torch.int32),
        tokens,
        prompt_len,
        prefill_len,
        prompt_bits,
        counts,
        max_prefill_len=1090,
    )
    return prompt_bits, counts


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_bincount(compare, vocab_size):
    compare("sample.penalties._bincount_kernel", lambda: make_token_counts(vocab_size))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_penalties(compare, vocab_size):
    prompt_bits, counts = make_token_counts(vocab_size)
    # Two requests with drafts (three and two rows), then single rows. One of these asks for
    # nothing. Tokens repeat, so that drafts count twice.
    mapping = torch.tensor([3, 3, 3, 0, 0, 1, 4, 2], dtype=torch.int32)
    local_pos = torch.tensor([0, 1, 2, 0, 1, 0, 0, 0], dtype=torch.int32)
    token_ids = torch.tensor([4, 2, 2, 1, 3, 0, 1, 4], dtype=torch.int32)
    repetition = torch.tensor([1.3, 1.0, 1.0, 0.8, 2.0, 1.0])
    frequency = torch.tensor([0.5, -0.7, 0.0, 0.1, 0.0, 0.0])
    presence = torch.tensor([0.25, 0.0, 0.0, 0.3, 0.0, 0.0])

    def launch():
        logits = make_logits(8, vocab_size)
        apply_penalties(
            logits,
            mapping,
            token_ids,
            local_pos,
            repetition,
            frequency,
            presence,
            prompt_bits,
            counts,
        )
        return logits

    stock, _ = compare("sample.penalties._penalties_kernel", launch)
    changed = (stock != make_logits(8, vocab_size)).any(dim=1)
    assert changed.tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("check_all_masked", [False, True])
def test_logit_bias(compare, vocab_size, check_all_masked):
    """Request 0 has biases, 1 allowed tokens, 2 stop tokens, 3 all, 4 none, 5 only stop tokens."""
    allowed = torch.tensor([[0, 0, 0], [3, 1, 4], [0, 0, 0], [2, 0, 0], [0, 0, 0], [3, 2, 0]])
    biased = torch.tensor([[0, 4, 1], [0, 0, 0], [0, 0, 0], [2, 3, 0], [0, 0, 0], [0, 0, 0]])
    stop = torch.tensor([[0, 0], [0, 0], [1, 2], [2, 4], [0, 0], [2, 3]])
    bias = torch.tensor([1.5, -100.0, 0.25]).repeat(MAX_NUM_REQS, 1)

    def launch():
        return apply_logit_bias(
            make_logits(8, vocab_size),
            torch.tensor([3, 0, 1, 2, 4, 2, 3, 5], dtype=torch.int32),
            torch.tensor([5, 5, 18, 5, 5, 19, 50, 5]),  # 20 tokens are due where stops wait
            torch.tensor([0, 3, 0, 1, 0, 2], dtype=torch.int32),
            allowed.int(),
            torch.tensor([3, 0, 0, 2, 0, 0], dtype=torch.int32),
            biased.int(),
            bias,
            torch.tensor([0, 0, 20, 20, 0, 20], dtype=torch.int32),
            torch.tensor([0, 0, 2, 2, 0, 2], dtype=torch.int32),
            torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32),
            stop.int(),
            check_all_masked_rows=check_all_masked,
        )

    compare("sample.logit_bias._bias_kernel", launch)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_grammar_bitmask(vocab_size):
    """The interpreter cannot run this kernel: one of its masks is not boolean, as it must be."""
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(5, vocab_size, generator=generator) < 0.5
    allowed[0] = True
    shifts = torch.arange(-(-vocab_size // 32) * 32) % 32
    bits = torch.nn.functional.pad(allowed.long(), (0, shifts.numel() - vocab_size)) << shifts
    bitmask = bits.reshape(5, -1, 32).sum(dim=-1).to(torch.int32)
    cu_num_logits = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    # With a stride of 4: request 2 at three positions, request 0 at position 1, and request 1 at a
    # position that was trimmed away.
    indices = torch.tensor([9, 8, 10, 1, 6], dtype=torch.int32)
    logits = make_logits(7, vocab_size)
    expected = logits.clone()
    for mask, row in enumerate([5, 4, 6, 1]):
        expected[row, ~allowed[mask]] = -torch.inf
    _apply_grammar_bitmask_kernel[(5, 1)](
        logits,
        logits.stride(0),
        indices,
        cu_num_logits,
        bitmask,
        bitmask.stride(0),
        vocab_size,
        MASK_STRIDE=4,
        BLOCK_SIZE=8192,
    )
    assert torch.equal(logits, expected)


def test_num_nans():
    """The interpreter has no `isnan`, so the expected counts are written out."""
    logits = make_logits(3, 1025)
    logits[0, ::100] = torch.nan
    logits[2, 4] = torch.nan
    assert get_num_nans(logits).tolist() == [11, 0, 1]
