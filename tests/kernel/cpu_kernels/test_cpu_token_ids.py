"""Token ids whose log-probabilities are requested, and bad words, against vLLM's kernels."""

from types import SimpleNamespace

import pytest
import torch
from step_state import MAX_NUM_REQS, SEEDS, VOCAB_SIZE, make_state
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.prompt_logprob import get_prompt_logprobs_token_ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_logprobs", [0, 2, 6])
def test_logprob_token_ids(compare_returned, seed, num_logprobs):
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

    compare_returned("sample.logprob._fill_logprob_token_ids_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompt_logprobs_token_ids(compare_returned, seed):
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

    compare_returned("sample.prompt_logprob._prompt_logprobs_token_ids_kernel", launch)


@pytest.mark.parametrize("seed", SEEDS)
def test_bad_words(compare_returned, seed):
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

    (logits,) = compare_returned("sample.bad_words._bad_words_kernel", launch)
    assert logits.isneginf().any() and logits.eq(0).any()
