"""Inputs, block tables, staged writes and bookkeeping of a step, against vLLM's kernels."""

from types import SimpleNamespace

import pytest
import torch
from step_state import (
    MAX_MODEL_LEN,
    MAX_NUM_REQS,
    MAX_NUM_TOKENS,
    NUM_REQS,
    SEEDS,
    VOCAB_SIZE,
    make_state,
)
from vllm.v1.worker.gpu import input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_lookahead", [1, 3])
def test_prepare_prefill_inputs(compare_returned, seed, num_lookahead):
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

    compare_returned("input_batch._prepare_prefill_inputs_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(compare_returned, seed):
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

    (seq_lens,) = compare_returned("input_batch._prepare_pos_seq_lens_kernel", launch)
    assert seq_lens[NUM_REQS:].eq(0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_new_sampled_tokens", [1, 0])
def test_combine_sampled_and_draft_tokens(compare_returned, seed, num_new_sampled_tokens):
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

    compare_returned("input_batch._combine_sampled_and_draft_tokens_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(compare_returned, seed):
    def launch():
        state = make_state(seed)
        mapping = state.idx_mapping.clone()
        mapping[2] = -1
        return input_batch.expand_idx_mapping(mapping, state.num_logits, state.cu_num_logits, 4)

    compare_returned("input_batch._expand_idx_mapping_kernel", launch)


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
def test_gather_block_tables(compare_returned, seed, block_sizes, num_padding):
    """The rows of the requests and of the padding; no request has the other rows in this step."""

    def launch():
        state = make_state(seed)
        tables = make_block_tables(state, block_sizes)
        for group, table in enumerate(tables.block_tables):
            counts = state.integers(table.gpu.shape[1] + 1, MAX_NUM_REQS)
            counts[state.idx_mapping[0]] = 0
            tables.num_blocks.np[group] = counts.numpy()
        tables.num_blocks.copy_to_uva()
        return tables.gather_block_tables(state.idx_mapping, state.num_reqs + num_padding)

    gathered = compare_returned("block_table._gather_block_tables_kernel", launch)
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
def test_slot_mappings(compare_returned, int1_masks, seed, options):
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

    (slots,) = compare_returned("block_table._compute_slot_mappings_kernel", launch)
    assert (slots >= 0).any() and (slots == -1).any()


def stage_writes(tensors: list[StagedWriteTensor], state: SimpleNamespace) -> None:
    """Ten writes that overlap; some write only one element."""
    for number in range(10):
        tensor = tensors[number % len(tensors)]
        row, start = state.integers(MAX_NUM_REQS, 1).item(), state.integers(4, 1).item()
        length = state.integers(tensor.gpu[0].numel() - 4, 1, low=1).item()
        tensor.stage_write(row % 4, start, state.integers(99, length).tolist())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_staged_writes(compare_returned, seed, dtype):
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

    rows, numbers = compare_returned("buffer_utils._apply_write_kernel", launch)
    assert rows.any() and numbers.count_nonzero() == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_staged_writes_to_several_groups(compare_returned, seed):
    def launch():
        state = make_state(seed)
        tables = make_block_tables(state, [1, 2, 3])
        stage_writes(tables.block_tables[:: 1 + seed % 2], state)
        tables.apply_staged_writes()
        return tuple(table.gpu for table in tables.block_tables)

    compare_returned("buffer_utils._apply_write_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_num_sampled_and_rejected(compare_returned, seed):
    def launch():
        state = make_state(seed)
        return input_batch.get_num_sampled_and_rejected(
            state.num_sampled,
            state.seq_lens,
            state.cu_num_logits,
            state.idx_mapping,
            state.prefill_len,
        )

    num_sampled, num_rejected = compare_returned(
        "input_batch._get_num_sampled_and_rejected_kernel", launch
    )
    assert (num_sampled == 0).sum() == 2 and (num_rejected >= 0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
def test_post_update(compare_returned, seed, with_queries, with_counts):
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

    compare_returned("input_batch._post_update_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_post_update_num_computed_tokens(compare_returned, seed):
    def launch():
        state = make_state(seed)
        input_batch.post_update_num_computed_tokens(
            state.idx_mapping, state.num_computed_tokens, state.query_start_loc
        )
        return (state.num_computed_tokens,)

    compare_returned("input_batch._post_update_num_computed_tokens_kernel", launch)
