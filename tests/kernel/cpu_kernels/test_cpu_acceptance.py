"""Which drafts are accepted, against vLLM's kernels under Triton's interpreter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quick import quick
from step_state import MAX_NUM_REQS, SEEDS, VOCAB_SIZE, cumulate, make_state, strided
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

from vllm.cpu_kernels import acceptance

NUM_STEPS = 4
NUM_BLOCKS = 13  # the kernels add up 16 of them
# Standard verification, given rates, and verification by block.
MODES = ["standard", "synthetic", "block"]


@triton.jit
def _uniform_kernel(seeds, positions, out, N: tl.constexpr):
    index = tl.arange(0, N)
    uniforms = tl_rand32(tl.load(seeds + index), tl.load(positions + index), includes_zero=False)
    tl.store(out + index, uniforms)


def test_uniforms():
    generator = torch.Generator().manual_seed(1)
    num = 4096
    seeds = torch.randint(-(2**63), 2**63 - 1, (num,), generator=generator)
    positions = torch.randint(0, 2**40, (num,), generator=generator)
    positions[: num // 2] %= 2**20
    expected = torch.empty(num)
    _uniform_kernel[(1,)](seeds, positions, expected, num)
    uniforms = acceptance.philox_uniform(seeds.numpy(), positions.numpy())
    assert np.array_equal(uniforms, expected.numpy())
    assert uniforms.min() > 0 and uniforms.max() < 1 and np.unique(uniforms).size > num * 0.99


def make_verification(
    seed: int, dtype: torch.dtype, with_draft_logits: bool, mode: str
) -> SimpleNamespace:
    """Nine requests with 4, 3, 0, 4, 2, 4, 1, 4 and 4 drafts.

    Some drafts are placeholders, and three requests are greedy. The statistics by block are random,
    as for a large vocabulary.
    """
    state = make_state(seed, NUM_STEPS)
    generator = torch.Generator().manual_seed(100 + seed)
    num_drafts = torch.tensor([4, 3, 0, 4, 2, 4, 1, 4, 4])
    cu_num_logits = cumulate(num_drafts + 1)
    num_logits, num_reqs = int(cu_num_logits[-1]), num_drafts.numel()
    idx_mapping = torch.randperm(MAX_NUM_REQS, generator=generator)[:num_reqs]
    greedy = torch.zeros(MAX_NUM_REQS, dtype=torch.bool)
    greedy[idx_mapping[[1, 2, 5]]] = True

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    draft_sampled = state.integers(VOCAB_SIZE, num_logits)
    draft_sampled[torch.rand(num_logits, generator=generator) < 0.1] = -1
    target_local_argmax = state.integers(VOCAB_SIZE, num_logits, NUM_BLOCKS, dtype=torch.int64)
    # Tokens on which drafts and the target agree are likely to be accepted.
    agreed = torch.rand(num_logits, generator=generator) < 0.7
    agreed = (agreed & (draft_sampled >= 0))[1:]
    target_local_argmax[:-1][agreed] = draft_sampled[1:][agreed, None].long()
    # A one-hot draft is not compared with its own probability, so the target's must be large.
    target_local_max = normal(num_logits, NUM_BLOCKS) - (0.0 if with_draft_logits else 3.0)
    target_local_max[3, 2] = torch.nan
    return SimpleNamespace(
        integers=state.integers,
        num_reqs=num_reqs,
        num_logits=num_logits,
        sampled=state.integers(99, num_reqs, NUM_STEPS + 1, dtype=torch.int64),
        num_sampled=state.integers(99, num_reqs),
        log_sums=(normal(num_reqs), normal(num_reqs)),
        target_logits=(normal(num_logits, VOCAB_SIZE + 3) + 1).to(dtype)[:, :VOCAB_SIZE],
        target_local_argmax=target_local_argmax,
        target_local_max=target_local_max,
        target_local_sumexp=normal(num_logits, NUM_BLOCKS).exp(),
        draft_sampled=draft_sampled,
        draft_logits=normal(MAX_NUM_REQS, NUM_STEPS, VOCAB_SIZE + 8).to(dtype)
        if with_draft_logits
        else None,
        draft_local_max=normal(num_logits, NUM_BLOCKS),
        draft_local_sumexp=normal(num_logits, NUM_BLOCKS).exp(),
        cu_num_logits=cu_num_logits,
        idx_mapping=idx_mapping,
        expanded_idx_mapping=idx_mapping.repeat_interleave(num_drafts + 1),
        temperature=torch.where(greedy, 0.0, normal(MAX_NUM_REQS).abs() + 0.3),
        seeds=torch.randint(-(2**63), 2**63 - 1, (MAX_NUM_REQS,), generator=generator),
        pos=state.integers(2000, num_logits, dtype=torch.int64),
        rates=torch.tensor([0.9, 0.8, 0.7, 0.6]) if mode == "synthetic" else None,
        cumulative_log_p=-normal(num_logits).abs() if mode == "block" else None,
        local_residual_mass=normal(num_logits, NUM_BLOCKS).abs() * normal(num_logits, 1).exp() / 9
        if mode == "block" and with_draft_logits
        else None,
    )


def draft_arguments(state: SimpleNamespace) -> list:
    strides = state.draft_logits.stride()[:2] if state.draft_logits is not None else (0, 0)
    return [
        state.draft_sampled,
        state.draft_logits,
        *strides,
        *strided(state.draft_local_max, state.draft_local_sumexp),
        state.cu_num_logits,
        state.idx_mapping,
        state.temperature,
    ]


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("with_draft_logits", quick([False, True], True))
@pytest.mark.parametrize("mode", quick(MODES, "standard"))
def test_acceptance(compare_returned, dtype, with_draft_logits, mode):
    outcomes = []
    for seed in range(8):

        def launch(seed=seed):
            state = make_verification(seed, dtype, with_draft_logits, mode)
            mass = state.local_residual_mass
            rejection_sampler_utils._rejection_kernel[(state.num_reqs,)](
                *strided(state.sampled),
                state.num_sampled,
                *state.log_sums,
                *strided(state.target_logits, state.target_local_argmax),
                *strided(state.target_local_max, state.target_local_sumexp),
                *draft_arguments(state),
                state.seeds,
                state.pos,
                state.rates,
                state.cumulative_log_p,
                mass,
                mass.stride(0) if mass is not None else 0,
                NUM_BLOCKS,
                PADDED_VOCAB_NUM_BLOCKS=16,
                HAS_DRAFT_LOGITS=with_draft_logits,
                SYNTHETIC_MODE=mode == "synthetic",
                USE_BLOCK_VERIFICATION=mode == "block",
                num_warps=1,
            )
            return state.num_sampled, state.sampled

        name = "spec_decode.rejection_sampler_utils._rejection_kernel"
        outcomes += compare_returned(name, launch)[0].tolist()
    assert set(outcomes) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_draft_logits", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_cumulative_log_p(compare_returned, dtype, with_draft_logits, seed):
    def launch():
        state = make_verification(seed, dtype, with_draft_logits, "block")
        rejection_sampler_utils._compute_cumulative_log_p_kernel[(state.num_reqs,)](
            state.cumulative_log_p,
            *strided(state.target_logits, state.target_local_max, state.target_local_sumexp),
            *draft_arguments(state),
            NUM_BLOCKS,
            PADDED_VOCAB_NUM_BLOCKS=16,
            HAS_DRAFT_LOGITS=with_draft_logits,
            num_warps=1,
        )
        return (state.cumulative_log_p,)

    compare_returned("spec_decode.rejection_sampler_utils._compute_cumulative_log_p_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_insert_resampled(compare_returned, seed, dtype):
    def launch():
        state = make_verification(seed, torch.float32, False, "standard")
        num_drafts = state.cu_num_logits.diff() - 1
        num_accepted = state.integers(NUM_STEPS + 1, state.num_reqs) % (num_drafts + 1)
        num_accepted[3], num_accepted[5] = num_drafts[3], num_drafts[5]  # the latter is greedy
        maxima = state.target_local_max[: state.num_reqs].to(dtype).contiguous()
        maxima[4] = torch.nan
        rejection_sampler_utils._insert_resampled_kernel[(state.num_reqs,)](
            *strided(state.sampled),
            num_accepted.int(),
            *strided(state.target_local_argmax, maxima),
            NUM_BLOCKS,
            state.cu_num_logits,
            state.expanded_idx_mapping,
            state.temperature,
            PADDED_RESAMPLE_NUM_BLOCKS=16,
        )
        return (state.sampled,)

    compare_returned("spec_decode.rejection_sampler_utils._insert_resampled_kernel", launch)
