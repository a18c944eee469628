"""Drafts on their way through a step, and n-grams that propose drafts, against vLLM's kernels."""

from types import SimpleNamespace

import pytest
import torch
from step_state import (
    MAX_MODEL_LEN,
    MAX_NUM_REQS,
    MAX_NUM_TOKENS,
    NUM_REQS,
    SEEDS,
    cumulate,
    make_state,
    strided,
)
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.ngram import speculator as ngram
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator as standalone_ar


@pytest.mark.parametrize("seed", SEEDS)
def test_gather_draft_sampled(compare_returned, seed):
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

    drafts, _ = compare_returned(
        "spec_decode.rejection_sampler._gather_draft_sampled_kernel", launch
    )
    assert (drafts == -1).sum() == 3 and (drafts >= 0).sum() == NUM_REQS + 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_model_len", [MAX_MODEL_LEN, 13])
def test_prepare_inputs_of_a_draft_model(compare_returned, seed, max_model_len):
    def launch():
        state = make_state(seed)
        # Every request has a token: a request without one is not in the batch.
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

    name = "spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel"
    compare_returned(name, launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_flatten_sampled(compare_returned, seed):
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

    compare_returned("spec_decode.rejection_sampler._flatten_sampled_kernel", launch)


def make_ngram_state(seed: int, max_model_len: int) -> SimpleNamespace:
    """Tokens of an alphabet of three, so that suffixes repeat, at every length of text."""
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
    f"spec_decode.ngram.speculator.{kernel}"
    for kernel in ("_ngram_scan_kernel", "_ngram_finalize_kernel")
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 3), (2, 4, 5)])
@pytest.mark.parametrize("max_model_len", [16, 47])
def test_ngrams(compare_returned, int1_masks, seed, sizes, max_model_len):
    def launch():
        return (propose_ngrams(make_ngram_state(seed, max_model_len), *sizes),)

    compare_returned(NGRAM_KERNELS, launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_ngram_drafts(compare_returned, int1_masks, seed):
    """From any scores: the scan gives no drafts to a request that has sampled nothing."""

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

    compare_returned(NGRAM_KERNELS[1], launch)


def draft_by_ngram(tokens: list[int], sizes: tuple[int, int, int]) -> list[int]:
    """The tokens after the last earlier place of the longest suffix; [] without one."""
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
