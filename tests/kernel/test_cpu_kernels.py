"""The kernels that the CPU path replaces, against vLLM's own ones under Triton's interpreter.

Each launcher of vLLM runs twice, with the stock kernel and with ours, and every tensor that the
kernel was given must then hold the same bits, what it left untouched included. Where the
interpreter cannot run a kernel, or is wrong (it cuts bfloat16 off where a GPU rounds, and compares
bfloat16 as integers), the comparison is with plain torch.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

if not (current_platform.is_cpu() and HAS_TRITON):
    pytest.skip("the kernels are replaced on the CPU only", allow_module_level=True)

from vllm.triton_utils import dispatcher
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.min_p import apply_min_p
from vllm.v1.worker.gpu.sample.penalties import apply_penalties, bincount
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample
from vllm.v1.worker.gpu.structured_outputs import _apply_grammar_bitmask_kernel

from vllm.ensemble_decode import cpu

GPU = "vllm.v1.worker.gpu"
VOCAB_SIZES = (5, 64, 1000, 1025, 3000)
MAX_NUM_REQS = 6

cpu.register_cpu_kernels()


class Recorder:
    """Launches a kernel and keeps the tensors that it was given."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.tensors: list[torch.Tensor] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.kernel[grid](*args, **kwargs)
            self.tensors += [arg for arg in args if isinstance(arg, torch.Tensor)]

        return launch


@pytest.fixture(autouse=True)
def defined_memory():
    """Let `torch.empty` give NaN, so that what a kernel leaves alone compares equal too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compare(monkeypatch):
    """Run `launch` with the stock kernels of these names and with ours; return what it returned."""

    def compare(names: str | list[str], launch: Callable, tolerance: float = 0.0):
        names = [names] if isinstance(names, str) else names
        expected, stock_result = record({n: dispatcher._registry[n][0] for n in names}, launch)
        got, our_result = record({n: installed(n) for n in names}, launch)
        assert len(expected) == len(got) > 0
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
        return stock_result, our_result

    def record(kernels: dict[str, object], launch: Callable):
        recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                module, attr = name.rsplit(".", 1)
                patch.setattr(importlib.import_module(module), attr, recorder)
            result = launch()
        assert all(recorder.tensors for recorder in recorders.values())
        return [tensor for r in recorders.values() for tensor in r.tensors], result

    return compare


def installed(name: str) -> dispatcher.KernelOverride:
    module, attr = name.rsplit(".", 1)
    kernel = getattr(importlib.import_module(module), attr)
    assert isinstance(kernel, dispatcher.KernelOverride)
    return kernel


def make_logits(
    num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:  # [num_tokens, vocab_size], rows apart as behind a padded head
    generator = torch.Generator().manual_seed(seed)
    padded = torch.randn(num_tokens, vocab_size + 3, generator=generator) * 3
    logits = padded.to(dtype)[:, :vocab_size]
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    logits[:, 1] = 0.5  # so that no row is empty
    return logits


# ------------------------------------------------------------------------------- the draw

SEEDS = torch.tensor([0, -1, 2**40 + 3, -(2**62), 12345, 7])
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
        f"{GPU}.sample.gumbel._gumbel_sample_kernel",
        lambda: draw(
            vocab_size,
            dtype,
            is_drafting=is_drafting,
            use_fp64=use_fp64,
            apply_temperature=apply_temperature,
        ),
    )


@pytest.mark.parametrize("vocab_size", [5, 1025])
def test_draws_over_seeds_and_positions(compare, vocab_size):
    """All noise and no logits: the draw is then the noise, and 150 of them must be the same."""
    generator = torch.Generator().manual_seed(1)
    num_tokens = 150
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_tokens,), generator=generator)
    pos = torch.randint(0, 2**20, (num_tokens,), generator=generator)

    def launch():
        logits = torch.zeros(num_tokens, vocab_size)
        mapping = torch.arange(num_tokens, dtype=torch.int32)
        return gumbel_sample(logits, mapping, torch.ones(num_tokens), seeds, pos, False, False)

    stock, ours = compare(f"{GPU}.sample.gumbel._gumbel_sample_kernel", launch)
    assert torch.equal(stock, ours)
    assert stock.unique().numel() > min(vocab_size, 110) * 0.9  # they are draws, not a constant


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [-torch.inf] * 4, [torch.nan, 1.0, 3.0, 0.0]])
    zeros = torch.zeros(3)
    mapping = torch.arange(3, dtype=torch.int32)
    drawn = gumbel_sample(logits, mapping, zeros, zeros.long(), zeros.long(), False, False)
    assert drawn.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token_col", [False, True])
def test_draw_with_a_logits_cache(compare, dtype, per_token_col):
    """The interpreter cannot fill the cache: the draws are compared without one."""
    vocab_size, num_tokens, num_cols = 1000, 8, 9
    cols = torch.arange(num_tokens) if per_token_col else torch.tensor(2)
    cache = torch.full((MAX_NUM_REQS, num_cols, vocab_size + 8), 7.0, dtype=dtype)
    drawn = draw(vocab_size, dtype, logits_cache=cache, logits_cache_col=cols, is_drafting=True)
    _, expected = compare(
        f"{GPU}.sample.gumbel._gumbel_sample_kernel",
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
    """What goes into the cache need not be what the draw is from."""
    source = make_logits(8, 64, seed=3)
    cache = torch.zeros(MAX_NUM_REQS, 1, 64)
    drawn = draw(
        64, logits_cache=cache, logits_cache_col=torch.tensor(0), logits_cache_source=source
    )
    assert torch.equal(drawn, draw(64))
    assert torch.equal(cache[4, 0], source[3])


# -------------------------------------------------------------------- temperature and min-p


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_temperature(compare, vocab_size):
    mapping = torch.tensor([3, 0, 1, 2, 2, 5, 4], dtype=torch.int32)
    compare(
        f"{GPU}.sample.gumbel._temperature_kernel",
        lambda: apply_temperature(make_logits(7, vocab_size), mapping, TEMPERATURES),
    )


def test_temperature_of_bfloat16():
    """Computed in float32 and rounded once; the interpreter cuts the bits off instead."""
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
        f"{GPU}.sample.min_p._min_p_kernel",
        lambda: apply_min_p(make_logits(5, vocab_size, dtype), mapping, min_p),
    )


# ------------------------------------------------------------------------ top-k and top-p


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
        # The reference adds float32 from the smallest up; it may differ by the token at the border.
        assert abs(int(kept[row].sum()) - int(reference[row].sum())) == 1
        in_top_k = logits[row].topk(int(k[row]) if with_k else vocab_size).values.double()
        mass = in_top_k.softmax(-1).cumsum(-1)
        assert (mass - p[row]).abs().min() < 1e-5


@pytest.mark.parametrize(
    ("logits", "k", "p", "kept"),
    [
        ([1.0, 2.0, 2.0, 2.0, 0.0], 2, 1.0, [1, 2]),  # k of equals: the first ones
        ([1.0, 2.0, 2.0, 2.0, 0.0], 4, 1.0, [0, 1, 2, 3]),
        ([0.0, 0.0, 0.0, 0.0], 4, 0.5, [0, 1]),  # p of equals: no more than it takes
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


# ------------------------------------------------------------------- penalties and biases


def make_token_counts(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt bits and output counts, by the interpreted or our kernel, as is installed."""
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
    compare(f"{GPU}.sample.penalties._bincount_kernel", lambda: make_token_counts(vocab_size))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_penalties(compare, vocab_size):
    prompt_bits, counts = make_token_counts(vocab_size)
    # Two requests with drafts (three and two rows), then single rows, among them one that asks
    # for nothing; tokens repeat, so that drafts count twice.
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

    stock, _ = compare(f"{GPU}.sample.penalties._penalties_kernel", launch)
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

    compare(f"{GPU}.sample.logit_bias._bias_kernel", launch)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_grammar_bitmask(vocab_size):
    """The interpreter cannot run this one: its masks must be boolean, and here one is not."""
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(5, vocab_size, generator=generator) < 0.5
    allowed[0] = True
    shifts = torch.arange(-(-vocab_size // 32) * 32) % 32
    bits = torch.nn.functional.pad(allowed.long(), (0, shifts.numel() - vocab_size)) << shifts
    bitmask = bits.reshape(5, -1, 32).sum(dim=-1).to(torch.int32)
    cu_num_logits = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    # With a stride of 4: request 2 at three positions, 0 at position 1, and 1 at a position that
    # was trimmed away.
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
    """The interpreter has no `isnan`; the count speaks for itself."""
    logits = make_logits(3, 1025)
    logits[0, ::100] = torch.nan
    logits[2, 4] = torch.nan
    assert get_num_nans(logits).tolist() == [11, 0, 1]


# ------------------------------------------------------------------------------- logprobs

# Sums of up to 3000 float32 terms in another order, of which the log is taken: 3000 eps is the
# bound for one order, its square root what is seen.
SUM_TOLERANCE = 4e-6


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_logprobs", [0, 4])
def test_logprobs(compare, vocab_size, dtype, num_logprobs):
    num_tokens = 70  # more than are worked on at once
    logits = make_logits(num_tokens, vocab_size, dtype)
    generator = torch.Generator().manual_seed(5)
    sampled = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    compare(
        f"{GPU}.sample.logprob._topk_log_softmax_kernel",
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
        f"{GPU}.sample.logprob._ranks_kernel", lambda: compute_topk_scores(logits, 0, tokens)
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


# --------------------------------------------------------------------- rejection sampling

REJECTION_KERNELS = [
    f"{GPU}.spec_decode.rejection_sampler_utils.{kernel}"
    for kernel in (
        "_compute_local_logits_stats_kernel",
        "_compute_local_residual_mass_kernel",
        "_resample_kernel",
    )
]
NUM_STEPS = 3


@pytest.fixture
def log1p(monkeypatch):
    """The interpreter lacks libdevice, from which the resampling kernel takes one function."""
    from triton.language import core as tl
    from triton.runtime.interpreter import TensorHandle

    def interpreted_log1p(x):
        return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    namespace = SimpleNamespace(log1p=interpreted_log1p)
    monkeypatch.setattr(rejection_sampler_utils, "tldevice", namespace)


def reject(
    vocab_size, dtype=torch.float32, seed=0, with_draft_logits=True, num_possible=None, **options
):
    """Six requests with 3, 2, 0, 3, 3 and 1 drafts: sampled and greedy ones, close to the target
    and far from it, and one whose last draft is a placeholder."""
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


@pytest.mark.parametrize("use_block_verification", [False, True])
@pytest.mark.parametrize("with_draft_logits", [False, True])
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
    """As a padded vocabulary has at its end; the statistics come in blocks of 8192 tokens."""
    options = {"num_possible": 8000, "use_block_verification": True}
    _, (sampled, num_sampled) = compare(REJECTION_KERNELS, lambda: reject(8300, **options))
    assert (sampled[torch.arange(NUM_STEPS + 1) < num_sampled[:, None]] < 8000).all()


def test_watermarked_resampling(compare):
    """Left to the stock kernel, which must get every argument in its place."""
    options = {
        "contexts": torch.arange(18 * 4, dtype=torch.int32).reshape(18, 4) % 50,
        "watermarking": torch.tensor([True, True, False, False, True, True]),
        "watermarking_skip_mask": torch.arange(18) % 5 == 0,
        "watermark_key": 12345678901234,
    }
    compare(REJECTION_KERNELS[2], lambda: reject(50, with_draft_logits=False, **options))


# ---------------------------------------------------------------------------- registration


def test_registering_again_changes_nothing(caplog):
    before = dict(dispatcher._registry)
    cpu.register_cpu_kernels()
    assert dispatcher._registry == before
    assert not caplog.records
    assert set(cpu.cpu_kernels()) <= set(before)


def test_every_kernel_has_our_parameters():
    """Launches are positional: a parameter more or less in another vLLM must not pass unseen."""
    import inspect

    for name, ours in cpu.cpu_kernels().items():
        stock = dispatcher._registry[name][0].arg_names
        parameters = [p.lstrip("_") for p in inspect.signature(ours).parameters]
        assert len(parameters) == len(stock), name
        for constexpr in filter(str.isupper, stock):
            assert parameters.index(constexpr) == stock.index(constexpr), (name, constexpr)


def test_nothing_is_replaced_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "_registered", False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(dispatcher, "register_kernels", lambda overrides: pytest.fail("replaced"))
    cpu.register_cpu_kernels()
