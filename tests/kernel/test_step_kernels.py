"""The kernels over requests that the CPU path replaces, against vLLM's own ones, interpreted.

Each launcher of vLLM runs twice, with the stock kernel and with ours, on the same random state;
every tensor that the kernel was given, and what the launcher returned, must then hold the same
bits. Where the interpreter cannot run a kernel, the comparison is with plain Python.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, tl, triton

if not (current_platform.is_cpu() and HAS_TRITON):
    pytest.skip("the kernels are replaced on the CPU only", allow_module_level=True)

from vllm.triton_utils import dispatcher
from vllm.v1.worker.gpu import buffer_utils, input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.gumbel import tl_rand32
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.prompt_logprob import get_prompt_logprobs_token_ids
from vllm.v1.worker.gpu.spec_decode import rejection_sampler, rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.ngram import speculator as ngram
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as standalone_ar

from vllm.ensemble_decode import cpu
from vllm.ensemble_decode.cpu import acceptance

GPU = "vllm.v1.worker.gpu"
CPU = torch.device("cpu")
NUM_REQS = 8
MAX_NUM_REQS = 11
MAX_MODEL_LEN = 48
MAX_NUM_TOKENS = 64
VOCAB_SIZE = 40
SEEDS = range(5)

cpu.register_cpu_kernels()


class Recorder:
    """Launches a kernel and keeps copies of the tensors that it was given, as it left them."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.tensors: list[torch.Tensor] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.kernel[grid](*args, **kwargs)
            self.tensors += [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]

        return launch


@pytest.fixture(autouse=True)
def defined_memory(monkeypatch):
    """Let `torch.empty` give NaN and the largest integer, so that what is left alone is equal."""
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no pinned memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compare(monkeypatch):
    """Run `launch` with the stock kernels of these names and with ours; return ours' result.

    `launch` makes its state anew and may return further tensors to be compared: those that a
    kernel knows by pointer.
    """

    def compare(names: str | list[str], launch: Callable[[], tuple[torch.Tensor, ...]]):
        names = [names] if isinstance(names, str) else names
        for name in names:
            assert isinstance(installed(name), dispatcher.KernelOverride)
        expected, stock = record({n: dispatcher._registry[n][0] for n in names}, launch)
        got, ours = record({n: installed(n) for n in names}, launch)
        assert len(expected) == len(got) > 0 and len(stock) == len(ours)
        for a, b in zip([*expected, *stock], [*got, *ours], strict=True):
            if "ptr" not in str(a.dtype) and a.dtype != torch.uint64:  # addresses
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
        return ours

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


@pytest.fixture
def int1_masks(monkeypatch):
    """The interpreter takes only NumPy's bool for a mask, and makes an integer of `int1 & int1`."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def with_bool_mask(stock, position):
        def call(self, *args):
            mask = args[position]
            handle = TensorHandle((mask.data.astype(np.int64) & 1).astype(bool), mask.dtype)
            return stock(self, *args[:position], handle, *args[position + 1 :])

        return call

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        stock = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, with_bool_mask(stock, position))


def installed(name: str) -> object:
    module, attr = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attr)


# ------------------------------------------------------------------------- the state of a step


def strided(*tensors: torch.Tensor) -> list[torch.Tensor | int]:
    return [argument for tensor in tensors for argument in (tensor, tensor.stride(0))]


def cumulate(lengths: torch.Tensor) -> torch.Tensor:  # int32 [num + 1]
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


def make_state(seed: int, num_speculative_steps: int = 3) -> SimpleNamespace:
    """Eight requests, in any order: two in the middle of their prompt (one without a token this
    step), one at its end, two whose window reaches back into the prompt (one wholly), and three
    that decode: with all their drafts, with one behind the very prompt, and without any."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, dtype=torch.int32, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    num_reqs = NUM_REQS
    idx_mapping = torch.randperm(MAX_NUM_REQS, generator=generator)[:num_reqs]
    window = num_speculative_steps + 1
    prefill = torch.tensor([20, 20, 12, 10, 10, 5, 7, 5])
    computed = torch.tensor([3, 4, 7, 9, 8, 11, 7, 6])
    num_drafts = torch.tensor([0, 0, 0, 2, 1, window - 1, 1, 0])
    query_lens = torch.tensor([int(integers(9, 1, low=1)), 0, 5, 3, 2, window, 2, 1])
    if seed > 0:
        order = torch.randperm(num_reqs, generator=generator)
        prefill, computed, num_drafts, query_lens = (
            x[order] for x in (prefill, computed, num_drafts, query_lens)
        )

    def by_place(values: torch.Tensor) -> torch.Tensor:  # [MAX_NUM_REQS]
        out = integers(MAX_MODEL_LEN, MAX_NUM_REQS)
        out[idx_mapping] = values.int()
        return out

    cu_num_logits = cumulate(num_drafts + 1)
    sampled = (torch.rand(num_reqs, generator=generator) * (num_drafts + 1)).int() + 1
    return SimpleNamespace(
        num_reqs=num_reqs,
        idx_mapping=idx_mapping,
        query_start_loc=cumulate(query_lens),
        query_lens=query_lens,
        prefill_len=by_place(prefill),
        num_computed_tokens=by_place(computed),
        total_len=by_place(computed + 1),
        seq_lens=integers(9, MAX_NUM_REQS).index_copy(
            0, torch.arange(num_reqs), (computed + query_lens).int()
        ),
        cu_num_logits=cu_num_logits,
        num_logits=int(cu_num_logits[-1]),
        num_sampled=sampled.int(),
        num_rejected=(num_drafts + 1 - sampled).int(),
        input_ids=integers(VOCAB_SIZE, MAX_NUM_TOKENS),
        positions=integers(MAX_MODEL_LEN, MAX_NUM_TOKENS, dtype=torch.int64),
        all_token_ids=integers(VOCAB_SIZE, MAX_NUM_REQS, MAX_MODEL_LEN),
        last_sampled_tokens=integers(VOCAB_SIZE, MAX_NUM_REQS, 1, dtype=torch.int64),
        draft_tokens=integers(VOCAB_SIZE, MAX_NUM_REQS, num_speculative_steps, dtype=torch.int64),
        sampled_tokens=integers(VOCAB_SIZE, num_reqs, num_speculative_steps + 1, dtype=torch.int64),
        integers=integers,
    )


# ---------------------------------------------------------------------------- before the forward


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_lookahead", [1, 3])
def test_prepare_prefill_inputs(compare, seed, num_lookahead):
    def launch():
        state = make_state(seed)
        next_prefill_tokens = state.integers(VOCAB_SIZE, num_lookahead, MAX_NUM_REQS)
        input_batch.prepare_prefill_inputs(
            state.input_ids,
            next_prefill_tokens,
            state.idx_mapping,
            state.query_start_loc,
            state.all_token_ids,
            state.prefill_len,
            state.num_computed_tokens,
        )
        return (next_prefill_tokens,)

    compare(f"{GPU}.input_batch._prepare_prefill_inputs_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(compare, seed):
    def launch():
        state = make_state(seed)
        input_batch.prepare_pos_seq_lens(
            state.idx_mapping,
            state.query_start_loc,
            state.num_computed_tokens,
            state.positions,
            state.seq_lens,
        )
        return (state.seq_lens,)

    (seq_lens,) = compare(f"{GPU}.input_batch._prepare_pos_seq_lens_kernel", launch)
    assert seq_lens[NUM_REQS:].eq(0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_new_sampled_tokens", [1, 0])
def test_combine_sampled_and_draft_tokens(compare, seed, num_new_sampled_tokens):
    def launch():
        state = make_state(seed)
        cu_num_logits = state.cu_num_logits
        if not num_new_sampled_tokens:
            cu_num_logits = cu_num_logits - torch.arange(state.num_reqs + 1, dtype=torch.int32)
        logits_indices = input_batch.combine_sampled_and_draft_tokens(
            state.input_ids,
            state.idx_mapping,
            state.last_sampled_tokens,
            state.query_start_loc,
            state.seq_lens,
            state.prefill_len,
            state.draft_tokens,
            cu_num_logits,
            int(cu_num_logits[-1]),
            num_new_sampled_tokens,
        )
        return state.input_ids, logits_indices

    compare(f"{GPU}.input_batch._combine_sampled_and_draft_tokens_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(compare, seed):
    def launch():
        state = make_state(seed)
        mapping = state.idx_mapping.clone()
        mapping[2] = -1
        return input_batch.expand_idx_mapping(mapping, state.num_logits, state.cu_num_logits, 4)

    compare(f"{GPU}.input_batch._expand_idx_mapping_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_gather_draft_sampled(compare, seed):
    def launch():
        state = make_state(seed)
        num_logits = state.cu_num_logits.diff()
        offset = torch.cat([torch.arange(n) for n in num_logits.tolist()])
        indices = (state.query_start_loc[1:] - num_logits).repeat_interleave(num_logits) + offset
        query = [torch.arange(n) for n in state.query_lens.tolist()]
        first = state.num_computed_tokens[state.idx_mapping]
        positions = torch.cat([q + n for q, n in zip(query, first.tolist(), strict=True)])
        state.positions[: positions.numel()] = positions
        return rejection_sampler.gather_draft_sampled(
            state.input_ids,
            state.positions,
            indices.long().clamp(min=0),
            state.idx_mapping.repeat_interleave(num_logits),
            offset.int(),
            state.prefill_len,
        )

    drafts, _ = compare(f"{GPU}.spec_decode.rejection_sampler._gather_draft_sampled_kernel", launch)
    assert (drafts == -1).sum() == 3 and (drafts >= 0).sum() == NUM_REQS + 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_model_len", [MAX_MODEL_LEN, 13])
def test_prepare_inputs_of_a_draft_model(compare, seed, max_model_len):
    def launch():
        state = make_state(seed)
        # Never without a token: a request that has none is not in the batch.
        query_lens = state.query_lens.clamp(min=1)
        query_start_loc = cumulate(query_lens)
        buffers = SimpleNamespace(
            query_start_loc=state.integers(99, MAX_NUM_REQS + 1),
            seq_lens=state.integers(99, MAX_NUM_REQS),
        )
        batch = SimpleNamespace(
            num_reqs=state.num_reqs,
            num_tokens=int(query_start_loc[-1]),
            query_start_loc=query_start_loc,
            query_start_loc_np=query_start_loc.numpy(),
            input_ids=state.input_ids,
            positions=state.positions,
            idx_mapping=state.idx_mapping,
            seq_lens=state.seq_lens,
        )
        out = [state.integers(99, MAX_NUM_TOKENS + MAX_NUM_REQS) for _ in range(2)]
        out[1] = out[1].long()
        last_token_indices = state.integers(99, MAX_NUM_REQS, dtype=torch.int64)
        standalone_ar.prepare_prefill_inputs(
            buffers,
            batch,
            state.last_sampled_tokens,
            torch.minimum(state.num_rejected, query_lens.int() - 1),
            *out,
            last_token_indices,
            MAX_NUM_REQS,
            max_model_len,
        )
        return *out, last_token_indices, buffers.query_start_loc, buffers.seq_lens

    name = f"{GPU}.spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel"
    compare(name, launch)


# -------------------------------------------------------------------------------- block tables

BLOCK_SIZES = [[4], [4, 16, 8]]


def make_block_tables(state: SimpleNamespace, block_sizes: list[int], **options) -> BlockTables:
    tables = BlockTables(
        block_sizes,
        MAX_NUM_REQS,
        MAX_NUM_TOKENS,
        [-(-MAX_MODEL_LEN // size) + 1 for size in block_sizes],
        CPU,
        **options,
    )
    for table, size in zip(tables.block_tables, block_sizes, strict=True):
        table.gpu.copy_(state.integers(1000, *table.gpu.shape))
        table.size = size
    for table in tables.input_block_tables:
        table.copy_(state.integers(1000, *table.shape))
    tables.slot_mappings.copy_(state.integers(1000, *tables.slot_mappings.shape))
    return tables


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block_sizes", BLOCK_SIZES)
@pytest.mark.parametrize("num_padding", [0, 2])
def test_gather_block_tables(compare, seed, block_sizes, num_padding):
    """The rows of the requests and of the padding; further ones are nobody's in this step."""

    def launch():
        state = make_state(seed)
        tables = make_block_tables(state, block_sizes)
        for group, table in enumerate(tables.block_tables):
            counts = state.integers(table.gpu.shape[1] + 1, MAX_NUM_REQS)
            counts[state.idx_mapping[0]] = 0
            tables.num_blocks.np[group] = counts.numpy()
        tables.num_blocks.copy_to_uva()
        return tables.gather_block_tables(state.idx_mapping, state.num_reqs + num_padding)

    gathered = compare(f"{GPU}.block_table._gather_block_tables_kernel", launch)
    assert all(table[NUM_REQS:].eq(0).all() for table in gathered)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "options",
    [
        {"block_sizes": [4]},
        {"block_sizes": [4, 16, 8], "slot_mapping_enabled": [True, False, True]},
        {"block_sizes": [4, 16], "cp_size": 2, "cp_rank": 1},
        {
            "block_sizes": [4, 16, 8],
            "cp_size": 2,
            "cp_rank": 0,
            "cp_interleave": 2,
            "dcp_sharded": [True, False, True],
        },
    ],
)
def test_slot_mappings(compare, int1_masks, seed, options):
    def launch():
        state = make_state(seed)
        tables = make_block_tables(state, **options)
        mapping = state.idx_mapping.clone()
        mapping[3] = -1
        return (
            tables.compute_slot_mappings(
                mapping, state.query_start_loc, state.positions % MAX_MODEL_LEN, 40
            ),
        )

    (slots,) = compare(f"{GPU}.block_table._compute_slot_mappings_kernel", launch)
    assert (slots >= 0).any() and (slots == -1).any()


def stage_writes(tensors: list[StagedWriteTensor], state: SimpleNamespace) -> None:
    """Ten writes over one another, some of nothing but one element."""
    for number in range(10):
        tensor = tensors[number % len(tensors)]
        row, start = state.integers(MAX_NUM_REQS, 1).item(), state.integers(4, 1).item()
        length = state.integers(tensor.gpu[0].numel() - 4, 1, low=1).item()
        tensor.stage_write(row % 4, start, state.integers(99, length).tolist())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_staged_writes(compare, seed, dtype):
    def launch():
        state = make_state(seed)
        rows = StagedWriteTensor((MAX_NUM_REQS, 20), dtype, CPU)
        numbers = StagedWriteTensor(MAX_NUM_REQS, dtype, CPU)
        stage_writes([rows], state)
        for row in (3, 5, 3):
            numbers.stage_write_elem(row, state.integers(99, 1).item())
        rows.apply_write()
        numbers.apply_write()
        return rows.gpu, numbers.gpu

    rows, numbers = compare(f"{GPU}.buffer_utils._apply_write_kernel", launch)
    assert rows.any() and numbers.count_nonzero() == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_staged_writes_to_several_groups(compare, seed):
    def launch():
        state = make_state(seed)
        tables = make_block_tables(state, [1, 2, 3])
        stage_writes(tables.block_tables[:: 1 + seed % 2], state)
        tables.apply_staged_writes()
        return tuple(table.gpu for table in tables.block_tables)

    compare(f"{GPU}.buffer_utils._apply_write_kernel", launch)


# ----------------------------------------------------------------------------- after the forward


@pytest.mark.parametrize("seed", SEEDS)
def test_num_sampled_and_rejected(compare, seed):
    def launch():
        state = make_state(seed)
        return input_batch.get_num_sampled_and_rejected(
            state.num_sampled,
            state.seq_lens,
            state.cu_num_logits,
            state.idx_mapping,
            state.prefill_len,
        )

    num_sampled, num_rejected = compare(
        f"{GPU}.input_batch._get_num_sampled_and_rejected_kernel", launch
    )
    assert (num_sampled == 0).sum() == 2 and (num_rejected >= 0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
def test_post_update(compare, seed, with_queries, with_counts):
    def launch():
        state = make_state(seed)
        mapping = state.idx_mapping.clone()
        mapping[4] = -1
        num_sampled = state.num_sampled.clone()
        num_sampled[1] = 0
        state.sampled_tokens[3:] %= 2  # so that a token comes twice
        counts = state.integers(5, MAX_NUM_REQS, VOCAB_SIZE)
        input_batch.post_update(
            mapping,
            state.num_computed_tokens,
            state.last_sampled_tokens,
            counts if with_counts else None,
            state.sampled_tokens,
            num_sampled,
            state.num_rejected,
            state.query_start_loc if with_queries else None,
            state.all_token_ids,
            state.total_len,
        )
        return ()

    compare(f"{GPU}.input_batch._post_update_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_post_update_num_computed_tokens(compare, seed):
    def launch():
        state = make_state(seed)
        input_batch.post_update_num_computed_tokens(
            state.idx_mapping, state.num_computed_tokens, state.query_start_loc
        )
        return (state.num_computed_tokens,)

    compare(f"{GPU}.input_batch._post_update_num_computed_tokens_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_flatten_sampled(compare, seed):
    def launch():
        state = make_state(seed)
        flat = torch.full((state.num_logits,), -7)
        num_sampled = state.num_sampled.clone()
        num_sampled[2] = 0
        rejection_sampler._flatten_sampled_kernel[(state.num_reqs,)](
            flat,
            state.sampled_tokens,
            state.sampled_tokens.stride(0),
            num_sampled,
            state.cu_num_logits,
            num_warps=1,
        )
        return (flat,)

    compare(f"{GPU}.spec_decode.rejection_sampler._flatten_sampled_kernel", launch)


# -------------------------------------------------------------------------------------- n-grams


def make_ngram_state(seed: int, max_model_len: int) -> SimpleNamespace:
    """Tokens of an alphabet of three, so that suffixes occur again, at every length of text."""
    state = make_state(seed)
    state.all_token_ids = state.integers(3, MAX_NUM_REQS, max_model_len)
    state.total_len = state.integers(max_model_len + 1, MAX_NUM_REQS, low=1)
    state.total_len[state.idx_mapping[:3]] = torch.tensor([1, 2, max_model_len]).int()
    state.all_token_ids[state.idx_mapping[3]] = torch.arange(max_model_len).int()  # no match
    state.num_sampled[4] = 0
    return state


def propose_ngrams(state: SimpleNamespace, min_n: int, max_n: int, num_drafts: int):
    max_model_len = state.all_token_ids.shape[1]
    block_l = 16
    num_blocks = -(-max_model_len // block_l)
    speculator = SimpleNamespace(
        req_states=SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=state.all_token_ids),
            total_len=SimpleNamespace(gpu=state.total_len),
        ),
        n_blocks=num_blocks,
        block_l=block_l,
        min_n=min_n,
        max_n=max_n,
        max_model_len=max_model_len,
        num_speculative_steps=num_drafts,
        scratch=state.integers(9, MAX_NUM_REQS, num_blocks, dtype=torch.int64),
        drafts=state.integers(9, MAX_NUM_REQS, num_drafts, dtype=torch.int64),
    )
    batch = SimpleNamespace(num_reqs=state.num_reqs, idx_mapping=state.idx_mapping)
    return ngram.NgramGPUSpeculator.propose(
        speculator,
        batch,
        None,
        None,
        None,
        None,
        state.num_sampled,
        state.num_rejected,
        state.last_sampled_tokens,
        None,
        None,
        None,
    )


NGRAM_KERNELS = [
    f"{GPU}.spec_decode.ngram.speculator.{kernel}"
    for kernel in ("_ngram_scan_kernel", "_ngram_finalize_kernel")
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 3), (2, 4, 5)])
@pytest.mark.parametrize("max_model_len", [16, 47])
def test_ngrams(compare, int1_masks, seed, sizes, max_model_len):
    def launch():
        return (propose_ngrams(make_ngram_state(seed, max_model_len), *sizes),)

    compare(NGRAM_KERNELS, launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_ngram_drafts(compare, int1_masks, seed):
    """From any scores: the scan gives none to a request that has sampled nothing."""

    def launch():
        state, num_blocks = make_ngram_state(seed, 47), 3
        scores = state.integers(2 * 48 + 1, MAX_NUM_REQS, num_blocks, dtype=torch.int64)
        drafts = state.integers(9, MAX_NUM_REQS, 3, dtype=torch.int64)
        ngram._ngram_finalize_kernel[(state.num_reqs,)](
            *strided(state.all_token_ids),
            state.idx_mapping,
            state.total_len,
            state.num_sampled,
            state.last_sampled_tokens.view(-1),
            *strided(scores),
            drafts,
            47,
            num_blocks,
            3,
            4,
            4,
            num_warps=2,
            num_stages=1,
        )
        return (drafts,)

    compare(NGRAM_KERNELS[1], launch)


def draft_by_ngram(tokens: list[int], sizes: tuple[int, int, int]) -> list[int]:
    """What followed on the last earlier place of the longest suffix; [] without one."""
    min_n, max_n, num_drafts = sizes
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                return tokens[start + n : start + n + num_drafts]
    return []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 3), (2, 4, 5)])
def test_ngrams_in_plain_python(seed, sizes):
    state = make_ngram_state(seed, 47)
    drafts = propose_ngrams(state, *sizes)
    for row, req in enumerate(state.idx_mapping.tolist()):
        found = draft_by_ngram(state.all_token_ids[req, : state.total_len[req]].tolist(), sizes)
        found = found if state.num_sampled[row] else []
        fill = [int(state.last_sampled_tokens[req])] * (sizes[2] - len(found))
        assert drafts[row].tolist() == found + fill


# ----------------------------------------------------------------------------------- acceptance


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


NUM_STEPS = 4
NUM_BLOCKS = 13  # of which the kernels add up 16
# Standard verification, rates that are given, and verification by block.
MODES = ["standard", "synthetic", "block"]


def make_verification(
    seed: int, dtype: torch.dtype, with_draft_logits: bool, mode: str
) -> SimpleNamespace:
    """Nine requests with 4, 3, 0, 4, 2, 4, 1, 4 and 4 drafts, some of them placeholders, three of
    them greedy; the statistics by block are random, as though of a large vocabulary."""
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
    # What drafts and the target agree on is likely to be accepted.
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_draft_logits", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_acceptance(compare, dtype, with_draft_logits, mode):
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

        name = f"{GPU}.spec_decode.rejection_sampler_utils._rejection_kernel"
        outcomes += compare(name, launch)[0].tolist()
    assert set(outcomes) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_draft_logits", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_cumulative_log_p(compare, dtype, with_draft_logits, seed):
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

    compare(f"{GPU}.spec_decode.rejection_sampler_utils._compute_cumulative_log_p_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_insert_resampled(compare, seed, dtype):
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

    compare(f"{GPU}.spec_decode.rejection_sampler_utils._insert_resampled_kernel", launch)


# ------------------------------------------------------------------------------------ token ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_logprobs", [0, 2, 6])
def test_logprob_token_ids(compare, seed, num_logprobs):
    def launch():
        state = make_state(seed)
        num_tokens = state.num_logits
        own = SimpleNamespace(gpu=state.integers(VOCAB_SIZE, MAX_NUM_REQS, 16))
        num_own = SimpleNamespace(gpu=state.integers(5, MAX_NUM_REQS))
        num_own.gpu[state.idx_mapping[0]] = 0
        scores = compute_topk_scores(
            torch.randn(num_tokens, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)),
            num_logprobs,
            state.integers(VOCAB_SIZE, num_tokens, dtype=torch.int64),
            logprob_token_ids_state=SimpleNamespace(token_ids=own, num_token_ids=num_own),
            expanded_idx_mapping=state.idx_mapping.repeat_interleave(state.cu_num_logits.diff()),
            max_per_req_token_ids=4,
        )
        return (scores.logprob_token_ids,)

    compare(f"{GPU}.sample.logprob._fill_logprob_token_ids_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompt_logprobs_token_ids(compare, seed):
    def launch():
        state = make_state(seed)
        token_ids = get_prompt_logprobs_token_ids(
            int(state.query_start_loc[-1]) + 3,
            state.query_start_loc,
            state.idx_mapping,
            state.num_computed_tokens,
            state.all_token_ids,
        )
        return (token_ids,)

    compare(f"{GPU}.sample.prompt_logprob._prompt_logprobs_token_ids_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_bad_words(compare, seed):
    """Words of one to four tokens of an alphabet of two, some longer than the output."""

    def launch():
        state = make_state(seed)
        num_words = state.integers(7, MAX_NUM_REQS)
        lengths = state.integers(5, MAX_NUM_REQS, 6, low=1)
        offsets = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()
        total_len = state.total_len + 4
        total_len[state.idx_mapping[0]] = state.prefill_len[state.idx_mapping[0]]  # no output yet
        num_logits = state.cu_num_logits.diff()
        logits = torch.zeros(state.num_logits, 8)[:, :5]
        apply_bad_words(
            logits,
            state.idx_mapping.repeat_interleave(num_logits),
            state.integers(2, MAX_NUM_REQS, 24),
            offsets,
            num_words,
            state.all_token_ids % 2,
            torch.minimum(state.prefill_len, total_len - 1),
            total_len,
            state.input_ids[: state.num_logits] % 2,
            torch.cat([torch.arange(n) for n in num_logits.tolist()]).int(),
            6,
        )
        return (logits,)

    (logits,) = compare(f"{GPU}.sample.bad_words._bad_words_kernel", launch)
    assert logits.isneginf().any() and logits.eq(0).any()
