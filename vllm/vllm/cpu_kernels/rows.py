"""How the CPU kernels read and write rows of logits: as NumPy, in place where the dtype allows.

NumPy is faster than torch here, although both have the operations. Even for one row of a
vocabulary, torch splits the work over its threads. Waiting for a busy core then costs milliseconds.
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
    """For each token, the entry of `values` for its request. `padding` where there is no
    request.
    """
    return torch.where(idx_mapping >= 0, values[idx_mapping.long()], padding)


def float_row(
    logits: torch.Tensor,  # [num_tokens, >= vocab_size], any float dtype
    row: int,
    vocab_size: int,
) -> np.ndarray:  # float32 [vocab_size]
    """One row to compute with. If `logits` is float32, it shares the memory of `logits`."""
    scores = logits[row, :vocab_size]
    if scores.dtype == torch.bfloat16:  # NumPy has no bfloat16: it is the upper half of a float32
        words = scores.view(torch.int16).numpy().view(np.uint16)
        return (words.astype(np.uint32) << 16).view(np.float32)
    return scores.float().numpy()


def put_back(
    logits: torch.Tensor,  # [num_tokens, >= vocab_size]
    row: int,
    scores: np.ndarray,  # [vocab_size], from `float_row` and changed since
) -> None:
    """Round the changed row into `logits`. float32 logits share its memory and need no copy."""
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
    """Bit i of the row. The words are little-endian wherever vLLM runs, so their bytes are in
    order.
    """
    octets = packed.contiguous().numpy().view(np.uint8)
    return np.unpackbits(octets, count=num_bits, bitorder="little").view(bool)


def takes_launch_options(kernel: Callable[..., None]) -> Callable[..., None]:
    """Hide `**options` from the dispatcher, which checks that the names match the kernel's own."""
    signature = inspect.signature(kernel)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kernel.__signature__ = signature.replace(parameters=named)
    return kernel
