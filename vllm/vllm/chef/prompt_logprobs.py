"""Log-probabilities of the prompt under the ensemble, whose members read it one after another."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.ops import combine

LogitsFn = Callable[[torch.Tensor], list[torch.Tensor]]


class TurnPromptLogprobsWorker(PromptLogprobsWorker):
    """vLLM's worker, which is given the hidden states of the first turn, with those of all."""

    def __init__(self, ensemble: EnsembleConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ensemble = ensemble
        self.function = ensemble.make_function()
        self.hidden_states: list[torch.Tensor] = []
        """num_turns x [num_tokens, hidden_size] of the step, empty where nobody asks"""
        self.members: list[tuple[tuple[int, ...], LogitsFn]] = []
        """num_turns x (members, their logits from the turn's hidden states)"""

    @property
    def is_asked(self) -> bool:
        return bool(self.in_progress_prompt_logprobs or self.token_id_scores)

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: torch.Tensor, *args: Any
    ) -> dict[str, Any]:
        return super().compute_prompt_logprobs(self._logits, self._all(hidden_states), *args)

    def compute_prompt_token_id_logprobs(
        self, logits_fn: Any, hidden_states: torch.Tensor, *args: Any
    ) -> dict[str, Any]:
        hidden_states = self._all(hidden_states)
        return super().compute_prompt_token_id_logprobs(self._logits, hidden_states, *args)

    def _all(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_tokens, sum of the turns' hidden sizes]"""
        return torch.cat(self.hidden_states, dim=-1) if self.is_asked else hidden_states

    def _logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, sum of the turns' hidden sizes]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        split = hidden_states.split([h.shape[-1] for h in self.hidden_states], dim=-1)
        logits: dict[int, torch.Tensor] = {}
        for hidden, (members, logits_fn) in zip(split, self.members, strict=True):
            logits.update(zip(members, logits_fn(hidden.contiguous()), strict=True))
        stacked = torch.stack([logits[member] for member in sorted(logits)])
        return combine(self.function, stacked, self.ensemble.combines_probs)
