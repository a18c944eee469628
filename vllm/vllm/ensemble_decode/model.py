"""The plain ensemble as one vLLM model: all members run on every token.

vLLM sees one module whose hidden states are the members' side by side, so that its batching,
KV cache, prefix caching, preemption and CUDA graphs cover all members at once.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vllm.ensemble_decode.functions import EnsembleFunction
from vllm.ensemble_decode.ops import combine


class MemberGroup(nn.Module):
    """Members, each a vLLM text-generation model, that run together on the same input.

    Their hidden states are put side by side, and so are their logits.
    """

    def __init__(
        self,
        *,
        vllm_config: object = None,  # vLLM looks for these two names; members carry the config
        prefix: str = "",
        members: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        # [num_members], set by the first forward pass: some architectures project their last
        # hidden state, so that no config tells its width.
        self.hidden_sizes: list[int] = []

    @property
    def num_members(self) -> int:
        return len(self.members)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The first member's embeddings; vLLM asks for them of any model that generates."""
        return self.members[0].embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:  # [num_tokens, sum(hidden_sizes)]
        if not self.hidden_sizes:
            return self._first_forward(input_ids, positions)
        if self.num_members == 1:
            return run_member(self.members[0], input_ids, positions)
        hidden_states = None
        start = 0
        for member, size in zip(self.members, self.hidden_sizes, strict=True):
            output = run_member(member, input_ids, positions)
            if hidden_states is None:
                hidden_states = output.new_empty(output.shape[0], sum(self.hidden_sizes))
            # Copied before the next member runs: in piecewise CUDA graphs the members share one
            # memory pool, and the next member's graphs overwrite this member's output.
            hidden_states[:, start : start + size] = output
            start += size
        return hidden_states

    def _first_forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # vLLM's memory profiling, or the first step where there is none: never a CUDA graph.
        outputs = [run_member(member, input_ids, positions) for member in self.members]
        self.hidden_sizes = [output.shape[-1] for output in outputs]
        return torch.cat(outputs, dim=-1)

    def compute_member_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> list[torch.Tensor]:  # num_members x [num_rows, vocab_size]
        split = hidden_states.split(self.hidden_sizes, dim=-1)
        return [
            member.compute_logits(hidden.contiguous())
            for member, hidden in zip(self.members, split, strict=True)
        ]

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> torch.Tensor:  # [num_rows, num_members * vocab_size]
        logits = self.compute_member_logits(hidden_states)
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)


class EnsembleModel(MemberGroup):
    """All members of an ensemble, which share the vocabulary.

    `compute_logits` gives what `EnsembleConfig.ensemble_target` has the sampler work on:
    the ensemble's logits (`raw-logits`), or all members' (`logits`, `probs`), which
    `EnsembleSampler` combines once it has applied the sampling parameters to each.

    Args:
        model_state_cls: vLLM's `ModelState` for this model, which hands out that sampler.
    """

    def __init__(
        self,
        *,
        vllm_config: object = None,
        prefix: str = "",
        members: Sequence[nn.Module],
        function: EnsembleFunction,
        samples_members: bool,
        combines_probs: bool,
        model_state_cls: type,
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, members=members)
        self.function = function
        self.samples_members = samples_members
        self.combines_probs = combines_probs
        self.model_state_cls = model_state_cls

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> torch.Tensor:  # [num_rows, vocab_size] or [num_rows, num_members * vocab_size]
        if self.samples_members:
            return super().compute_logits(hidden_states)
        logits = self.compute_member_logits(hidden_states)
        return combine(self.function, torch.stack(logits), combines_probs=False)

    def ensemble_logits(
        self,
        logits: torch.Tensor,  # [num_rows, num_members * vocab_size], of `compute_logits`
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        """The ensemble's distribution before any sampling parameter (only `samples_members`)."""
        members = split_members(logits, self.num_members)
        return combine(self.function, members, self.combines_probs)

    def get_model_state_cls(self) -> type:
        return self.model_state_cls


def run_member(
    member: nn.Module,
    input_ids: torch.Tensor,  # [num_tokens]
    positions: torch.Tensor,  # [num_tokens]
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """Call a member with all that vLLM passes to a model; some models have no defaults."""
    return member(
        input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
    )


def split_members(
    logits: torch.Tensor,  # [num_rows, num_members * vocab_size]
    num_members: int,
) -> torch.Tensor:  # [num_members, num_rows, vocab_size], a view
    return logits.unflatten(-1, (num_members, -1)).transpose(0, 1)
