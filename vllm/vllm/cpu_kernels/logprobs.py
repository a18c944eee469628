"""Log-probabilities of chosen tokens, and ranks, as vLLM's kernels compute them.

Each function takes a kernel's launch arguments in the kernel's order and writes to the same
tensors. `_` stands before an argument that only a GPU needs.
"""

import numpy as np
import torch

from vllm.cpu_kernels.rows import float_row


def topk_log_softmax_kernel(
    output: torch.Tensor,  # float32 [num_tokens, topk]
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    topk_ids: torch.Tensor,  # int64 [num_tokens, topk]
    _topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    for row, ids in enumerate(topk_ids[:, :topk].numpy()):
        scores = float_row(logits, row, vocab_size)
        shifted = scores - scores.max()
        chosen = shifted[ids]
        output[row].numpy()[:] = chosen - np.log(np.exp(shifted, out=shifted).sum())


def ranks_kernel(
    output: torch.Tensor,  # int64 [num_tokens]
    logits: torch.Tensor,  # [num_tokens, vocab_size]
    _logits_stride: int,
    token_ids: torch.Tensor,  # [num_tokens]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """How many tokens are at least as likely as the given one. 1 for the best."""
    for row, token in enumerate(token_ids.tolist()):
        scores = float_row(logits, row, vocab_size)
        output[row] = np.count_nonzero(scores >= scores[token])
