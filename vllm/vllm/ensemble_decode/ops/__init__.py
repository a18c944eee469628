"""From the members' logits to the ensemble's.

`eager` is in torch, for any function. `fused` is in Triton on a GPU, for sums.
"""

import torch

from vllm.ensemble_decode.functions import EnsembleFunction
from vllm.ensemble_decode.ops import eager, fused
from vllm.ensemble_decode.request_args import RowCoefficients


def combine(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
    combines_probs: bool,
    rows: RowCoefficients | None = None,
) -> torch.Tensor:  # [num_rows, vocab_size], float32
    """See `eager.combine`."""
    ops = fused if logits.is_cuda and fused.can_combine(function, logits) else eager
    return ops.combine(function, logits, combines_probs, rows)
