"""The ensemble's arithmetic over the vocabulary: Triton kernels against their torch namesake."""

import numpy as np
import pytest
import torch
from compile_for_cuda import compile_launches, recorded
from quick import quick
from vllm.triton_utils import HAS_TRITON

from vllm.ensemble_decode.functions import make_function
from vllm.ensemble_decode.ops import eager, fused
from vllm.ensemble_decode.request_args import RowCoefficients

if not HAS_TRITON:
    pytest.skip("no Triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 on a GPU only: the interpreter truncates it where a GPU rounds.
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
NUM_ROWS = 5
VOCAB_SIZES = [7, fused.BLOCK, 2 * fused.BLOCK + 100]
FUNCTIONS = {
    "weighted": ("weighted", 2, {}),
    "weights": ("weighted", 3, {"weights": [0.7, 0.0, 0.3]}),
    "mean": ("mean", 4, {}),
    "product": ("product", 3, {"weights": [1.0, 0.5, 0.0]}),
    "contrastive": ("contrastive", 2, {"alpha": 0.3}),
    "contrastive-3": ("contrastive", 3, {"alpha": 1.0}),
    "target alone": ("contrastive", 2, {"alpha": 0.0}),
    "proxy": ("proxy_tuning", 3, {"scale": 1.5}),
}
# By slot: what requests ask for.
ASKED = {
    "weighted": [{}, {"weights": [0.0, 0.1, 0.9]}, {"weights": [2.0, 0.0, 0.0]}],
    "product": [{"weights": [1.0, 0.5, 0.25]}, {}, {"weights": [0.0, 1.0, 0.0]}],
    "contrastive": [{"alpha": 0.0}, {"alpha": 1.0}, {}],
    "proxy_tuning": [{"scale": 0.0}, {"scale": 0.5}, {"scale": 2.0}],
}
SLOTS = [2, 0, 1, 2, 1]  # of the rows


@pytest.fixture(autouse=True)
def silent_arithmetic():
    """As on a GPU, log(0) and 0 * -inf are values; NumPy, which the interpreter uses, warns."""
    with np.errstate(divide="ignore", invalid="ignore"):
        yield


def logits(num_members: int, vocab_size: int, removed: bool, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size + num_members)
    made = 4 * torch.randn(num_members, NUM_ROWS, vocab_size, generator=generator)
    made[:, 3] = made[0, 3]  # a contrast of strength 1 leaves nothing of this one
    if removed:
        # As top-k leaves them. In the second row the members share no token.
        is_removed = torch.rand(made.shape, generator=generator) < 0.6
        is_removed[..., 2] = False  # each leaves a token
        made[is_removed] = float("-inf")
        made[:, 1] = float("-inf")
        for member in range(num_members):
            made[member, 1, member] = float(member)
    return made.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("vocab_size", quick(VOCAB_SIZES, VOCAB_SIZES[-1]))
@pytest.mark.parametrize("case", quick(FUNCTIONS, "weights", "proxy"))
def test_kernels_combine_as_torch_does(case, vocab_size, removed, probs, dtype):
    name, num_members, args = FUNCTIONS[case]
    function = make_function(name, num_members, args)
    scores = logits(num_members, vocab_size, removed, dtype)
    check(fused.combine(function, scores, probs), eager.combine(function, scores, probs), probs)


def check(found: torch.Tensor, expected: torch.Tensor, probs: bool) -> None:
    assert found.dtype == torch.float32
    if probs:
        # Logarithms of differences that are close to nothing say little.
        found, expected = found.exp(), expected.exp()
    else:
        assert found.isneginf().equal(expected.isneginf())
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-7 if probs else 2e-5)


def rows_of(name: str, slots: list[int], rows_per_slot: int) -> RowCoefficients:
    functions = [make_function(name, 3, args) for args in ASKED[name]]
    table = torch.tensor([function.coefficients for function in functions], device=DEVICE)
    return RowCoefficients(table, torch.tensor(slots, device=DEVICE).int(), rows_per_slot)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("vocab_size", quick([7, fused.BLOCK + 100], fused.BLOCK + 100))
@pytest.mark.parametrize("name", quick(ASKED, "contrastive"))
def test_each_row_has_coefficients_of_its_own(name, vocab_size, removed, probs, dtype):
    scores = logits(3, vocab_size, removed, dtype)
    rows = rows_of(name, SLOTS, 1)
    # The configuration subtracts nothing, which says nothing about the requests.
    function = make_function(name, 3, {"alpha": 0.0} if name == "contrastive" else {})
    found, expected = (ops.combine(function, scores, probs, rows) for ops in (fused, eager))
    check(found, expected, probs)
    for row, slot in enumerate(SLOTS):
        own = make_function(name, 3, ASKED[name][slot])
        check(found[row : row + 1], eager.combine(own, scores[:, row : row + 1], probs), probs)


@pytest.mark.parametrize("ops", [eager, fused], ids=["torch", "Triton"])
def test_a_request_may_have_several_rows(ops):
    function = make_function("weighted", 3, {})
    scores = logits(3, 50, False, torch.float32)[:, :4]
    found = ops.combine(function, scores, True, rows_of("weighted", [1, 2], 2))
    assert found.equal(ops.combine(function, scores, True, rows_of("weighted", [1, 1, 2, 2], 1)))
    # Rows without a request fill up the batch of a CUDA graph.
    padded = ops.combine(function, scores, True, rows_of("weighted", [1, -1], 2))
    assert padded[:2].equal(found[:2])


def test_rows_may_lie_apart():
    """Members lie side by side in a row, as vLLM's sampler passes them on."""
    function = make_function("weighted", 2, {})
    scores = logits(2, 50, False, torch.float32)
    side_by_side = scores.transpose(0, 1).flatten(1).unflatten(-1, (2, -1)).transpose(0, 1)
    assert not side_by_side.is_contiguous()
    assert fused.can_combine(function, side_by_side)
    assert fused.combine(function, side_by_side, True).equal(fused.combine(function, scores, True))


def test_what_is_no_sum_is_left_to_torch():
    plausible = make_function("contrastive_plausible", 2, {})
    assert not fused.can_combine(plausible, torch.zeros(2, 1, 5))
    mean = make_function("mean", 2, {})
    assert not fused.can_combine(mean, torch.zeros(2, 5, 3).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="compiled by the tests above")
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    launches = recorded(fused, monkeypatch)
    for num_members, dtype in ((2, torch.bfloat16), (3, torch.float32)):
        for name, probs in (("weighted", True), ("product", True), ("contrastive", False)):
            function = make_function(name, num_members, {})
            fused.combine(function, logits(num_members, 50, False, dtype), probs)
    for name, probs in (("weighted", True), ("contrastive", False), ("proxy_tuning", True)):
        function = make_function(name, 3, {})
        scores = logits(3, 50, False, torch.float32)[:, :4]
        fused.combine(function, scores, probs, rows_of(name, [0, 1], 2))
    compile_launches(launches, fused, tmp_path)
