"""From the members' logits to the ensemble's, for each `ensemble_target`.

This module knows where a target sits relative to the sampling parameters. It knows neither vLLM's
batches nor its sampler (`sampler.py` does).
"""

import torch

from vllm.ensemble_decode.functions import NEG_INF, EnsembleFunction, sum_by_row
from vllm.ensemble_decode.request_args import RowCoefficients


def combine(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
    combines_probs: bool,
    rows: RowCoefficients | None = None,
) -> torch.Tensor:  # [num_rows, vocab_size], float32
    """Logits whose softmax is the ensemble's distribution.

    Args:
        function: gets float32 logits, or their softmax if `combines_probs`.
        logits: raw, or processed by the sampling parameters (-inf where a token is removed).
        combines_probs: combine probabilities (`ensemble_target: probs`) instead of logits.
        rows: each row's coefficients. None: those of `function`.
    """
    logits = logits.float()
    if not combines_probs:
        return _combine_logits(function, logits, rows)
    if function.log_space:
        return _combine_logits(function, logits.log_softmax(dim=-1), rows)
    return _combine_probs(function, logits, rows)


def _combine_logits(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
    rows: RowCoefficients | None,
) -> torch.Tensor:  # [num_rows, vocab_size]
    if rows is None:
        combined = function(logits, are_probs=False)
    else:
        combined = sum_by_row(logits, rows.by_row(), function.subtracts)
    # -inf minus -inf is NaN: a token that no member offers.
    combined = combined.masked_fill(combined.isnan(), NEG_INF)
    # If the members' top-k or top-p share no token, nothing is left to sample from. The first
    # member then decides alone.
    return _or_first(combined, combined > NEG_INF, logits[0])


def _combine_probs(
    function: EnsembleFunction,
    logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
    rows: RowCoefficients | None,
) -> torch.Tensor:  # [num_rows, vocab_size]
    probs = logits.softmax(dim=-1)
    if rows is None:
        combined = function(probs, are_probs=True)
    else:
        combined = sum_by_row(probs, rows.by_row(), floors=False)
    # A difference of probabilities can be negative. Such a token gets no probability.
    combined = combined.nan_to_num(nan=0.0).clamp_(min=0.0)
    combined = _or_first(combined, combined > 0, probs[0])
    return (combined / combined.sum(dim=-1, keepdim=True)).log_()


def _or_first(
    combined: torch.Tensor,  # [num_rows, vocab_size]
    offered: torch.Tensor,  # [num_rows, vocab_size], bool: the token can be sampled
    first: torch.Tensor,  # [num_rows, vocab_size]
) -> torch.Tensor:  # [num_rows, vocab_size]
    return torch.where(offered.any(dim=-1, keepdim=True), combined, first)
