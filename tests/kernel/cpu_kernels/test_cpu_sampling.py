"""Temperature, min-p, top-k, top-p and the draw, against vLLM's kernels and plain torch.

The comparison is with plain torch if the interpreter cannot run a kernel, or runs it wrongly. The
interpreter truncates bfloat16 where a GPU rounds, and it compares bfloat16 as integers.
"""

import pytest
import torch
from logit_rows import MAX_NUM_REQS, SEEDS, VOCAB_SIZES, make_logits
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.min_p import apply_min_p

TEMPERATURES = torch.tensor([1.0, 0.0, 0.7, 1.3, 1e-5, 100.0])


def draw(vocab_size, dtype=torch.float32, num_tokens=8, first_pos=0, **options):
    """`gumbel_sample` with every temperature, a permuted mapping and a padding row."""
    mapping = torch.arange(num_tokens, dtype=torch.int32).flip(0) % MAX_NUM_REQS
    mapping[num_tokens // 2] = -1
    options = {"apply_temperature": True, "is_drafting": False} | options
    return gumbel_sample(
        make_logits(num_tokens, vocab_size, dtype, seed=first_pos),
        mapping,
        TEMPERATURES,
        SEEDS,
        first_pos + torch.arange(num_tokens),
        **options,
    )


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize(
    ("dtype", "is_drafting", "use_fp64", "apply_temperature"),
    [
        (torch.float32, False, False, False),
        (torch.float32, True, False, True),
        (torch.bfloat16, False, False, True),
        (torch.bfloat16, False, True, False),
        (torch.float32, True, True, True),
    ],
)
def test_draws(compare, vocab_size, dtype, is_drafting, use_fp64, apply_temperature):
    compare(
        "sample.gumbel._gumbel_sample_kernel",
        lambda: draw(
            vocab_size,
            dtype,
            is_drafting=is_drafting,
            use_fp64=use_fp64,
            apply_temperature=apply_temperature,
        ),
    )


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [-torch.inf] * 4, [torch.nan, 1.0, 3.0, 0.0]])
    zeros = torch.zeros(3)
    mapping = torch.arange(3, dtype=torch.int32)
    drawn = gumbel_sample(logits, mapping, zeros, zeros.long(), zeros.long(), False, False)
    assert drawn.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token_col", [False, True])
def test_draw_with_a_logits_cache(compare, dtype, per_token_col):
    """The interpreter cannot fill the cache, so the draws are compared without one."""
    vocab_size, num_tokens, num_cols = 1000, 8, 9
    cols = torch.arange(num_tokens) if per_token_col else torch.tensor(2)
    cache = torch.full((MAX_NUM_REQS, num_cols, vocab_size + 8), 7.0, dtype=dtype)
    drawn = draw(vocab_size, dtype, logits_cache=cache, logits_cache_col=cols, is_drafting=True)
    _, expected = compare(
        "sample.gumbel._gumbel_sample_kernel",
        lambda: draw(vocab_size, dtype, is_drafting=True),
    )
    assert torch.equal(drawn, expected)

    logits = make_logits(num_tokens, vocab_size, dtype)
    filled = torch.full_like(cache, 7.0)
    for token, req in enumerate([1, 0, 5, 4, -1, 2, 1, 0]):
        if req >= 0:
            filled[req, cols[token] if per_token_col else cols, :vocab_size] = logits[token]
    assert torch.equal(cache, filled)


def test_draw_with_another_source_for_the_cache():
    """The cache may hold other values than those of the draw."""
    source = make_logits(8, 64, seed=3)
    cache = torch.zeros(MAX_NUM_REQS, 1, 64)
    drawn = draw(
        64, logits_cache=cache, logits_cache_col=torch.tensor(0), logits_cache_source=source
    )
    assert torch.equal(drawn, draw(64))
    assert torch.equal(cache[4, 0], source[3])


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_temperature(compare, vocab_size):
    mapping = torch.tensor([3, 0, 1, 2, 2, 5, 4], dtype=torch.int32)
    compare(
        "sample.gumbel._temperature_kernel",
        lambda: apply_temperature(make_logits(7, vocab_size), mapping, TEMPERATURES),
    )


def test_temperature_of_bfloat16():
    """Computed in float32 and rounded once; the interpreter truncates the bits instead."""
    logits = make_logits(1, 1000, torch.bfloat16)
    expected = (logits.float() / 0.7).bfloat16()
    apply_temperature(logits, torch.tensor([2]), TEMPERATURES)
    assert torch.equal(logits, expected)


def test_padding_rows_keep_their_logits():
    logits = make_logits(2, 64)
    apply_temperature(logits, torch.tensor([-1, -1]), torch.full((MAX_NUM_REQS,), 0.5))
    apply_min_p(logits, torch.tensor([-1, -1]), torch.full((MAX_NUM_REQS,), 0.5))
    assert torch.equal(logits, make_logits(2, 64))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_min_p(compare, vocab_size, dtype):
    mapping = torch.tensor([3, 0, 1, 2, 2], dtype=torch.int32)
    min_p = torch.tensor([0.0, 0.1, 1.0, 1e-4])
    compare(
        "sample.min_p._min_p_kernel",
        lambda: apply_min_p(make_logits(5, vocab_size, dtype), mapping, min_p),
    )


def kept_by(logits: torch.Tensor, k, p) -> torch.Tensor:
    """Which tokens survive, by the function that the sampler imports by name."""
    masked = vllm_sampler.apply_top_k_top_p(logits.clone(), k, p)
    assert torch.equal(masked[masked > -torch.inf], logits[masked > -torch.inf])
    return masked > -torch.inf


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("with_k", [False, True])
@pytest.mark.parametrize("with_p", [False, True])
def test_top_k_top_p(vocab_size, with_k, with_p):
    num_tokens = 40
    generator = torch.Generator().manual_seed(vocab_size)
    logits = make_logits(num_tokens, vocab_size)
    k = torch.randint(1, vocab_size + 1, (num_tokens,), generator=generator, dtype=torch.int32)
    k[::3], k[1::9] = vocab_size, 1
    p = torch.rand(num_tokens, generator=generator)
    p[::4], p[1::10] = 1.0, 1e-6
    k, p = k if with_k else None, p if with_p else None
    kept = kept_by(logits, k, p)
    reference = apply_top_k_top_p_pytorch(logits.clone(), k, p) > -torch.inf
    for row in torch.nonzero((kept != reference).any(dim=1)).flatten():
        # The reference adds float32 from the smallest up. It may differ by the token at the border.
        assert abs(int(kept[row].sum()) - int(reference[row].sum())) == 1
        in_top_k = logits[row].topk(int(k[row]) if with_k else vocab_size).values.double()
        mass = in_top_k.softmax(-1).cumsum(-1)
        assert (mass - p[row]).abs().min() < 1e-5


@pytest.mark.parametrize(
    ("logits", "k", "p", "kept"),
    [
        ([1.0, 2.0, 2.0, 2.0, 0.0], 2, 1.0, [1, 2]),  # k of equals: the first ones
        ([1.0, 2.0, 2.0, 2.0, 0.0], 4, 1.0, [0, 1, 2, 3]),
        ([0.0, 0.0, 0.0, 0.0], 4, 0.5, [0, 1]),  # p of equals: no more than needed
        ([0.0, 0.0, 0.0, 0.0], 4, 0.51, [0, 1, 2]),
        ([3.0, 0.0, 0.0, 0.0], 4, 0.9, [0, 1]),  # 0.870, then 0.043 each
        ([3.0, 3.0, 0.0, 3.0], 2, 0.5, [0]),  # p counts in what k has left
        ([3.0, 3.0, 0.0, 3.0], 2, 0.6, [0, 1]),
        ([-torch.inf, 1.0, -torch.inf, 0.0], 3, 0.99, [1, 3]),
        ([-torch.inf, 1.0, -torch.inf, 0.0], 3, 0.5, [1]),
    ],
)
def test_ties_keep_as_many_as_asked(logits, k, p, kept):
    k, p = torch.tensor([k], dtype=torch.int32), torch.tensor([p])
    assert kept_by(torch.tensor([logits]), k, p)[0].nonzero().flatten().tolist() == kept


def test_top_k_top_p_writes_its_mask_value():
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    logits = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf] * 3])
    k, p = torch.tensor([2, 2]), torch.tensor([1.0, 0.5])
    assert apply_top_k_top_p_triton(logits, k, p, mask_value=-5.0)[0].tolist() == [-5.0, 3.0, 2.0]
