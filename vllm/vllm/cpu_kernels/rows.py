"""How the CPU kernels read and write rows of logits: as NumPy, in place where the dtype allows.

NumPy and not torch, although both have the operations: at one row of a vocabulary torch already
splits the work over its threads, and waiting for a core that is busy costs milliseconds.
"""

import inspect
from collections.abc import Callable

import numpy as np
import torch


def per_token(
    values: torch.Tensor,  # [max_num_reqs]
    idx_mapping: torch.Tensor,  # [num_tokens], -1 on padding rows
    padding: float,
) -> torch.Tensor:  # [num_tokens]
    """`values` of the request of each token, and `padding` where there is no request."""
    return torch.where(idx_mapping >= 0, values[idx_mapping.long()], padding)


def float_row(
    logits: torch.Tensor,  # [num_tokens, >= vocab_size], any float dtype
    row: int,
    vocab_size: int,
) -> np.ndarray:  # float32 [vocab_size]
    """One row to compute with; the memory of `logits` itself where that is float32."""
    scores = logits[row, :vocab_size]
    if scores.dtype == torch.bfloat16:  # the upper half of a float32, for which NumPy has no name
        words = scores.view(torch.int16).numpy().view(np.uint16)
        return (words.astype(np.uint32) << 16).view(np.float32)
    return scores.float().numpy()


def put_back(
    logits: torch.Tensor,  # [num_tokens, >= vocab_size]
    row: int,
    scores: np.ndarray,  # [vocab_size], from `float_row` and changed since
) -> None:
    """Round what was changed into `logits`; float32 logits have it already."""
    if logits.dtype != torch.float32:
        logits[row, : scores.size].copy_(torch.from_numpy(scores))


def copy_row(
    destination: torch.Tensor,  # [vocab_size]
    source: torch.Tensor,  # [vocab_size], of the same dtype
) -> None:
    destination.view(torch.uint8).numpy()[:] = source.view(torch.uint8).numpy()


def bits_of(
    packed: torch.Tensor,  # int32 [num_words]
    num_bits: int,
) -> np.ndarray:  # bool [num_bits]
    """Bit i of the row. The words are little-endian wherever vLLM runs, and so their bytes are."""
    octets = packed.contiguous().numpy().view(np.uint8)
    return np.unpackbits(octets, count=num_bits, bitorder="little").view(bool)


def takes_launch_options(kernel: Callable[..., None]) -> Callable[..., None]:
    """Hide `**options` from the dispatcher, which asks whether the names are the kernel's own."""
    signature = inspect.signature(kernel)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kernel.__signature__ = signature.replace(parameters=named)
    return kernel
