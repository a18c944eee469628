"""The plain ensemble as one vLLM model: all members run on every token.

vLLM sees one module, whose hidden states are the members' side by side. vLLM's batching, KV cache,
prefix caching, preemption and CUDA graphs therefore cover all members at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncsByType
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm.ensemble_decode.dtypes import widest
from vllm.ensemble_decode.functions import EnsembleFunction
from vllm.ensemble_decode.ops import combine
from vllm.ensemble_decode.recurrent import recurrent_layers
from vllm.ensemble_decode.request_args import SlotCoefficients
from vllm.ensemble_decode.vocabulary import FittedMember

MAX_NUM_DIMS = 4  # of a position in an image, in any of vLLM's models


class MemberGroup(nn.Module):
    """Members that run together on the same input. Each is a vLLM text-generation model.

    Their hidden states stand side by side, in the widest dtype of any member. Their logits do too.
    """

    def __init__(
        self,
        *,
        vllm_config: object = None,  # vLLM requires these two names; the members hold the config
        prefix: str = "",
        members: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        # [num_members], set by the first forward pass. Some architectures project their last hidden
        # state, so the config does not tell its width.
        self.hidden_sizes: list[int] = []
        self.hidden_dtypes: list[torch.dtype] = []

    @property
    def num_members(self) -> int:
        return len(self.members)

    # vLLM asks the engine's model for positions in an image, if the first member knows such.
    supports_mrope = True

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: object
    ) -> tuple[torch.Tensor, int]:  # [num_dims, num_tokens], offset of what follows
        """Those of a text: all dimensions count the tokens."""
        return torch.arange(len(input_tokens)).expand(MAX_NUM_DIMS, -1), 0

    def get_model_state_cls(self) -> type[ModelState]:
        """vLLM looks at the engine's configuration. That is one member's."""
        return MambaHybridModelState if recurrent_layers(self) else DefaultModelState

    def get_mamba_state_copy_funcs(
        self, mamba_types: set[MambaAttentionBackendEnum]
    ) -> MambaStateCopyFuncsByType:
        """How vLLM copies the states of recurrent layers, by their kind."""
        found = {}
        for member in self.members:
            model = member.model if isinstance(member, FittedMember) else member
            own = {layer.mamba_type for layer in recurrent_layers(member)}
            if needed := own & mamba_types:
                found |= model.get_mamba_state_copy_funcs(needed)
        return found

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The first member's embeddings. vLLM asks every generating model for them."""
        return self.members[0].embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens], or of a text [num_dims, num_tokens]
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:  # [num_tokens, sum(hidden_sizes)]
        if positions.dim() > 1:
            positions = positions[0]
        if not self.hidden_sizes:
            return self._first_forward(input_ids, positions)
        if self.num_members == 1:
            return run_member(self.members[0], input_ids, positions)
        hidden_states = None
        start = 0
        for member, size in zip(self.members, self.hidden_sizes, strict=True):
            output = run_member(member, input_ids, positions)
            if hidden_states is None:
                hidden_states = output.new_empty(
                    output.shape[0], sum(self.hidden_sizes), dtype=widest(self.hidden_dtypes)
                )
            # Copy before the next member runs. In piecewise CUDA graphs the members share one
            # memory pool, and the next member's graphs overwrite this member's output.
            hidden_states[:, start : start + size] = output
            start += size
        return hidden_states

    def _first_forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # This is vLLM's memory profiling, or the first step if there is none. It is never a CUDA
        # graph.
        outputs = [run_member(member, input_ids, positions) for member in self.members]
        self.hidden_sizes = [output.shape[-1] for output in outputs]
        self.hidden_dtypes = [output.dtype for output in outputs]
        return torch.cat(outputs, dim=-1)

    def compute_member_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> list[torch.Tensor]:  # num_members x [num_rows, vocab_size]
        split = hidden_states.split(self.hidden_sizes, dim=-1)
        return [
            member.compute_logits(hidden.to(dtype).contiguous())
            for member, hidden, dtype in zip(self.members, split, self.hidden_dtypes, strict=True)
        ]

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> torch.Tensor:  # [num_rows, num_members * vocab_size]
        logits = self.compute_member_logits(hidden_states)
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)


class EnsembleModel(MemberGroup):
    """All members of an ensemble. They share the vocabulary.

    `compute_logits` returns the logits that `EnsembleConfig.ensemble_target` asks for:

    - `raw-logits`: the ensemble's logits
    - `logits`, `probs`: the logits of all members. `EnsembleSampler` combines them after it has
      applied the sampling parameters to each member.

    Args:
        model_state_cls: vLLM's `ModelState` for this model. It provides that sampler.
        coefficients: those of the requests. None: all requests have those of `function`.
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
        model_state_cls: type[ModelState],
        coefficients: SlotCoefficients | None = None,
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, members=members)
        self.function = function
        self.samples_members = samples_members
        self.combines_probs = combines_probs
        self.model_state_cls = model_state_cls
        self.coefficients = coefficients
        self._slots: torch.Tensor | None = None

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
    ) -> torch.Tensor:  # [num_rows, vocab_size] or [num_rows, num_members * vocab_size]
        if self.samples_members:
            return super().compute_logits(hidden_states)
        return self.token_logits(hidden_states, self._slots)

    @contextmanager
    def slots_of_rows(self, slots: torch.Tensor) -> Iterator[None]:  # [num_rows]
        """Tell `compute_logits` which requests its rows belong to. vLLM does not."""
        self._slots = slots
        try:
            yield
        finally:
            self._slots = None

    def token_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum(hidden_sizes)]
        slots: torch.Tensor | None,  # [num_rows]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        """The ensemble's logits before any sampling parameter."""
        return self.combine(torch.stack(self.compute_member_logits(hidden_states)), slots)

    def ensemble_logits(
        self,
        logits: torch.Tensor,  # [num_rows, num_members * vocab_size], from `compute_logits`
        slots: torch.Tensor | None = None,  # [num_rows]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        """The ensemble's distribution before any sampling parameter. Only for `samples_members`."""
        return self.combine(split_members(logits, self.num_members), slots)

    def combine(
        self,
        logits: torch.Tensor,  # [num_members, num_rows, vocab_size]
        slots: torch.Tensor | None,  # [num_rows]. None: the coefficients of `function`
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        rows = None
        if self.coefficients is not None and slots is not None:
            rows = self.coefficients.of(slots)
        return combine(self.function, logits, self.combines_probs, rows)

    def get_model_state_cls(self) -> type[ModelState]:
        return self.model_state_cls


def run_member(
    member: nn.Module,
    input_ids: torch.Tensor,  # [num_tokens]
    positions: torch.Tensor,  # [num_tokens]
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """Call a member with all arguments that vLLM passes to a model. Some models have no
    defaults.
    """
    return member(
        input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
    )


def split_members(
    logits: torch.Tensor,  # [num_rows, num_members * vocab_size]
    num_members: int,
) -> torch.Tensor:  # [num_members, num_rows, vocab_size], a view
    return logits.unflatten(-1, (num_members, -1)).transpose(0, 1)
