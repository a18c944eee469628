"""How CPU kernels read and write rows of logits: the same numbers as torch, in place or rounded."""

import inspect

import numpy as np
import pytest
import torch

from vllm.cpu_kernels import rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB_SIZE = 37


def padded_logits(dtype: torch.dtype) -> torch.Tensor:  # [3, VOCAB_SIZE + 5]
    """Random rows with entries past the vocabulary, and the values that are no numbers."""
    logits = torch.randn(3, VOCAB_SIZE + 5, generator=torch.Generator().manual_seed(0)) * 30
    logits[1, :3] = torch.tensor([float("-inf"), float("inf"), -0.0])
    return logits.to(dtype)


def test_padding_rows_get_the_padding():
    values = torch.tensor([0.5, 2.0, 7.0])
    idx_mapping = torch.tensor([2, -1, 0, 0, -1], dtype=torch.int32)
    found = rows.per_token(values, idx_mapping, 1.0)
    assert found.tolist() == [7.0, 1.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_read_to_the_bit(dtype):
    logits = padded_logits(dtype)
    for row in range(len(logits)):
        found = rows.float_row(logits, row, VOCAB_SIZE)
        expected = logits[row, :VOCAB_SIZE].float().numpy()
        assert found.dtype == np.float32 and found.shape == (VOCAB_SIZE,)
        assert (found.view(np.int32) == expected.view(np.int32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_row_is_put_back(dtype):
    logits = padded_logits(dtype)
    expected = logits.clone()
    expected[1, :VOCAB_SIZE] = (expected[1, :VOCAB_SIZE].float() + 0.3).to(dtype)
    scores = rows.float_row(logits, 1, VOCAB_SIZE)
    scores += np.float32(0.3)
    rows.put_back(logits, 1, scores)
    assert torch.equal(logits, expected)


def test_only_float32_shares_its_memory():
    for dtype in DTYPES:
        logits = padded_logits(dtype)
        before = logits.clone()
        rows.float_row(logits, 0, VOCAB_SIZE)[:] = 0
        assert torch.equal(logits, before) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_a_row_is_copied_with_all_its_bits(dtype):
    source = (torch.arange(VOCAB_SIZE) * 1.1 - 9).to(dtype)
    if dtype.is_floating_point:
        source[2] = float("nan")
    destination = torch.zeros_like(source)
    rows.copy_row(destination, source)
    assert torch.equal(destination.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("num_bits", [1, 31, 32, 33, 70])
def test_bits_count_from_the_lowest_of_the_first_word(num_bits):
    words = [-(2**31) + 5, 2**31 - 7, -1]
    packed = torch.tensor(words, dtype=torch.int32)
    expected = [bool(words[bit // 32] >> (bit % 32) & 1) for bit in range(num_bits)]
    assert rows.bits_of(packed, num_bits).tolist() == expected
    strided = torch.stack([packed, torch.zeros_like(packed)], dim=1)[:, 0]
    assert rows.bits_of(strided, num_bits).tolist() == expected


def test_launch_options_are_hidden_from_the_dispatcher():
    @rows.takes_launch_options
    def kernel(logits, num_rows, **options):
        return options

    assert list(inspect.signature(kernel).parameters) == ["logits", "num_rows"]
    assert kernel(None, 1, num_warps=4) == {"num_warps": 4}
