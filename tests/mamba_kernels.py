"""A kernel of recurrent layers that vLLM's CPU build lacks, in plain torch.

On a CPU, vLLM's short convolution ignores how many drafts were accepted, so no speculation is exact
there. With this kernel the rest can be tested without a GPU.
"""

from typing import Any

import torch
from torch.nn.functional import conv1d, silu


def causal_conv1d_update(
    x: torch.Tensor,  # [num_tokens, dim]
    conv_state: torch.Tensor,  # [num_blocks, dim, at least width - 1], written
    weight: torch.Tensor,  # [dim, width]
    bias: torch.Tensor | None,  # [dim]
    activation: str | None,
    conv_state_indices: torch.Tensor,  # [num_reqs] or [num_reqs, num_blocks]
    num_accepted_tokens: torch.Tensor | None = None,  # [num_reqs]
    query_start_loc: torch.Tensor | None = None,  # [num_reqs + 1]
    null_block_id: int = 0,
    **_: Any,
) -> torch.Tensor:  # [num_tokens, dim]
    """vLLM's `causal_conv1d_update`: the state holds the inputs before the last accepted token."""
    blocks = conv_state_indices.flatten(1)[:, 0] if conv_state_indices.dim() > 1 else None
    blocks = (conv_state_indices if blocks is None else blocks).tolist()
    starts = range(len(x) + 1) if query_start_loc is None else query_start_loc.tolist()
    num_before = weight.shape[1] - 1
    out = torch.zeros_like(x)
    for row, block in enumerate(blocks):
        tokens = x[starts[row] : starts[row + 1]].T
        if block == null_block_id or not tokens.numel():
            continue
        skipped = 0 if num_accepted_tokens is None else int(num_accepted_tokens[row]) - 1
        before = conv_state[block, :, skipped : skipped + num_before]
        inputs = torch.cat([before, tokens], dim=-1)
        result = conv1d(inputs[None], weight[:, None], bias, groups=len(weight))[0].T
        out[starts[row] : starts[row + 1]] = silu(result) if activation else result
        kept = inputs[:, -num_before:] if num_accepted_tokens is None else inputs[:, 1:]
        conv_state[block, :, : kept.shape[1]] = kept.clone()
    return out


def selective_state_update(
    state: torch.Tensor,  # [num_blocks, num_heads, dim, state_size], written
    x: torch.Tensor,  # [num_tokens, num_heads, dim]
    dt: torch.Tensor,  # [num_tokens, num_heads, dim]
    A: torch.Tensor,  # [num_heads, dim, state_size]
    B: torch.Tensor,  # [num_tokens, num_groups, state_size]
    C: torch.Tensor,  # [num_tokens, num_groups, state_size]
    D: torch.Tensor,  # [num_heads, dim]
    dt_bias: torch.Tensor,  # [num_heads, dim]
    *,
    state_batch_indices: torch.Tensor,  # [num_reqs] or [num_reqs, num_states]
    dst_state_batch_indices: torch.Tensor | None,
    out: torch.Tensor,  # [num_tokens, num_heads, dim], written
    num_accepted_tokens: torch.Tensor | None,  # [num_reqs]
    cu_seqlens: torch.Tensor | None,  # [num_reqs + 1]
    null_block_id: int = 0,
    **_: Any,
) -> None:
    """Mamba 2's step, which keeps the state after each token of a request."""
    sources = state_batch_indices.reshape(len(state_batch_indices), -1).tolist()
    targets = sources
    if dst_state_batch_indices is not None:
        targets = dst_state_batch_indices.reshape(len(sources), -1).tolist()
    starts = range(len(x) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    num_shared = x.shape[1] // B.shape[1]
    dt = torch.nn.functional.softplus(dt + dt_bias)[..., None]
    B, C = (of_groups.repeat_interleave(num_shared, 1)[:, :, None] for of_groups in (B, C))
    for row, blocks in enumerate(sources):
        accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[row])
        h = state[blocks[accepted - 1]]
        for number, token in enumerate(range(starts[row], starts[row + 1])):
            h = h * (dt[token] * A).exp() + dt[token] * x[token][..., None] * B[token]
            out[token] = (h * C[token]).sum(-1) + D * x[token]
            if targets[row][number] != null_block_id:
                state[targets[row][number]] = h
