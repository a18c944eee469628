"""The statistics and draws of rejection sampling, against vLLM's kernels, interpreted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from logit_rows import MAX_NUM_REQS, SEEDS, VOCAB_SIZES, make_logits
from quick import quick
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

REJECTION_KERNELS = [
    f"spec_decode.rejection_sampler_utils.{kernel}"
    for kernel in (
        "_compute_local_logits_stats_kernel",
        "_compute_local_residual_mass_kernel",
        "_resample_kernel",
    )
]
NUM_STEPS = 3


@pytest.fixture
def log1p(monkeypatch):
    """The interpreter lacks libdevice, and the resampling kernel uses one function of it."""
    from triton.language import core as tl
    from triton.runtime.interpreter import TensorHandle

    def interpreted_log1p(x):
        return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    namespace = SimpleNamespace(log1p=interpreted_log1p)
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", namespace)


def reject(
    vocab_size, dtype=torch.float32, seed=0, with_draft_logits=True, num_possible=None, **options
):
    """Six requests with 3, 2, 0, 3, 3 and 1 drafts.

    They are sampled and greedy, close to the target and far from it. The last draft of one request
    is a placeholder.
    """
    generator = torch.Generator().manual_seed(seed)
    num_drafts = torch.tensor([3, 2, 0, 3, 3, 1])
    cu_num_logits = torch.cat([torch.zeros(1), (num_drafts + 1).cumsum(0)]).int()
    num_logits = int(cu_num_logits[-1])
    idx_mapping = torch.tensor([3, 0, 5, 1, 4, 2], dtype=torch.int32)
    temperature = torch.tensor([0.7, 0.0, 1.0, 1.0, 1.3, 0.0])  # by request state
    expanded = idx_mapping.repeat_interleave(num_drafts + 1)
    local_pos = torch.cat([torch.arange(n + 1) for n in num_drafts.tolist()]).int()

    target = make_logits(num_logits, vocab_size, dtype, seed)
    num_possible = num_possible or vocab_size
    closeness = torch.tensor([0.1, 0.1, 2.0, 0.3, 2.0, 1.0])
    draft_logits = torch.randn(MAX_NUM_REQS, NUM_STEPS, vocab_size, generator=generator)
    draft_logits = (draft_logits * closeness[:, None, None]).to(dtype)
    draft_sampled = torch.randint(0, num_possible, (num_logits,), generator=generator).int()
    for row, (req, step) in enumerate(zip(expanded.tolist(), local_pos.tolist(), strict=True)):
        if step < NUM_STEPS:
            draft_logits[req, step] += torch.where(target[row].isfinite(), target[row], -9.0)
            likely = (target[row], draft_logits[req, step])[(row + seed) % 2]
            if row + 1 < num_logits and torch.rand((), generator=generator) < 0.7:
                draft_sampled[row + 1] = likely[:num_possible].float().argmax()
    target[:, num_possible:] = draft_logits[:, :, num_possible:] = -torch.inf
    draft_sampled[int(cu_num_logits[1]) - 1] = -1
    return rejection_sample(
        target,
        draft_logits if with_draft_logits else None,
        draft_sampled,
        cu_num_logits,
        100 + torch.arange(num_logits),
        idx_mapping,
        expanded,
        local_pos,
        temperature,
        SEEDS + seed,
        NUM_STEPS,
        **options,
    )


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rejection_kernels(compare, log1p, vocab_size, dtype):
    options = {"use_fp64": dtype == torch.bfloat16, "use_block_verification": True}
    compare(REJECTION_KERNELS, lambda: reject(vocab_size, dtype, **options))


@pytest.mark.parametrize("use_block_verification", quick([False, True], False))
@pytest.mark.parametrize("with_draft_logits", quick([False, True], True))
def test_rejection_sampling(compare, log1p, use_block_verification, with_draft_logits):
    """The same tokens in the end, over many seeds and for every number of accepted drafts."""
    options = {
        "use_block_verification": use_block_verification,
        "with_draft_logits": with_draft_logits,
    }
    kernels = [name for name in REJECTION_KERNELS if "residual_mass" not in name]
    if use_block_verification and with_draft_logits:
        kernels = REJECTION_KERNELS

    def outcomes():
        return [reject(50, seed=seed, **options) for seed in range(8)]

    counts = set()
    for (stock, stock_num), (ours, our_num) in zip(*compare(kernels, outcomes), strict=True):
        emitted = torch.arange(NUM_STEPS + 1) < stock_num[:, None]
        assert torch.equal(our_num, stock_num)
        assert torch.equal(ours[emitted], stock[emitted])
        counts |= set(stock_num.tolist())
    assert counts == {1, 2, 3, 4}


def test_rejection_with_a_block_of_impossible_tokens(compare, log1p):
    """A padded vocabulary ends with such a block; statistics cover blocks of 8192 tokens."""
    options = {"num_possible": 8000, "use_block_verification": True}
    _, (sampled, num_sampled) = compare(REJECTION_KERNELS, lambda: reject(8300, **options))
    assert (sampled[torch.arange(NUM_STEPS + 1) < num_sampled[:, None]] < 8000).all()


def test_watermarked_resampling(compare):
    """The stock kernel handles this, and it must get every argument in its place."""
    options = {
        "contexts": torch.arange(18 * 4, dtype=torch.int32).reshape(18, 4) % 50,
        "watermarking": torch.tensor([True, True, False, False, True, True]),
        "watermarking_skip_mask": torch.arange(18) % 5 == 0,
        "watermark_key": 12345678901234,
    }
    compare(REJECTION_KERNELS[2], lambda: reject(50, with_draft_logits=False, **options))
