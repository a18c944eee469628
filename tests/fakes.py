"""Stand-ins for members, so that unit tests need neither weights nor an engine."""

import torch
from torch import nn


class TableMember(nn.Module):
    """A member whose logits are `table[token]`; its hidden state repeats the token id.

    With `pool`, its output lies in a buffer that all members share, like the outputs of piecewise
    CUDA graphs. The output is valid only until the next member runs.
    """

    def __init__(
        self,
        table: torch.Tensor,  # [vocab_size, vocab_size]
        width: int,
        pool: torch.Tensor | None = None,  # [>= num_tokens * width]
    ) -> None:
        super().__init__()
        self.table, self.width, self.pool = table, width, pool
        self.num_calls = 0

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids[:, None].float()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None,
        inputs_embeds: None,
    ) -> torch.Tensor:
        self.num_calls += 1
        hidden_states = input_ids[:, None].float().expand(-1, self.width)
        if self.pool is None:
            return hidden_states.clone()
        # Erases what other members had written there.
        self.pool.fill_(-1)
        return self.pool[: hidden_states.numel()].view(hidden_states.shape).copy_(hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.table[hidden_states[:, 0].long()]
