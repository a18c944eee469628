"""The random state of a step with requests of all kinds, for the tests of CPU kernels."""

from types import SimpleNamespace

import torch
from quick import quick

NUM_REQS = 8
MAX_NUM_REQS = 11
MAX_MODEL_LEN = 48
MAX_NUM_TOKENS = 64
VOCAB_SIZE = 40
# Of `make_state`, in the tests that take one.
SEEDS = quick(range(5), 0)


def strided(*tensors: torch.Tensor) -> list[torch.Tensor | int]:
    return [argument for tensor in tensors for argument in (tensor, tensor.stride(0))]


def cumulate(lengths: torch.Tensor) -> torch.Tensor:  # int32 [num + 1]
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


def make_state(seed: int, num_speculative_steps: int = 3) -> SimpleNamespace:
    """Eight requests, in any order.

    - Two are in the middle of their prompt; one of them has no token in this step.
    - One is at the end of its prompt.
    - Two have a window that reaches back into the prompt; one of these lies wholly in it.
    - Three decode: with all their drafts, with one draft right after the prompt, and without any.
    """
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
