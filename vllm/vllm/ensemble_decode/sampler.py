"""vLLM's samplers over the logits of all members: `ensemble_target` `logits` and `probs`.

vLLM's own code applies every sampling parameter, once per member. Then the members are combined,
and vLLM draws from the result. A row of logits holds the members side by side, `[num_rows,
num_members * vocab_size]`. It therefore passes through vLLM's batching, chunking and slicing like
the logits of one model.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from vllm.ensemble_decode.model import EnsembleModel, split_members


class EnsembleModelState(DefaultModelState):
    """Gives vLLM the samplers that fit the ensemble's target."""

    model: EnsembleModel

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, RejectionSampler | None] | None:
        if not self.model.samples_members:
            return None
        ensemble_sampler = EnsembleSampler(sampler, self.model)
        speculative_config = self.vllm_config.speculative_config
        if speculative_config is None:
            return ensemble_sampler, None
        return ensemble_sampler, EnsembleRejectionSampler(
            ensemble_sampler, speculative_config, self.device
        )


class RecurrentModelState(EnsembleModelState, MambaHybridModelState):
    """The same, with the states of recurrent layers."""


class EnsembleSampler(Sampler):
    """A `Sampler` over the logits of all members (see the module's docstring)."""

    def __init__(self, sampler: Sampler, model: EnsembleModel) -> None:
        # Take over the request states of the sampler that the model runner built.
        vars(self).update(vars(sampler))
        self.model = model
        # vLLM reports log-probabilities from the logits it was given, or from those that `sample`
        # returns. The given logits are all members' here. So vLLM must always take the returned
        # ones.
        self.reports_processed = self.logprobs_mode in PROCESSED_LOGPROBS_MODES
        self.logprobs_mode = self.logprobs_mode.replace("raw_", "processed_")

    def apply_sampling_params(
        self,
        logits: torch.Tensor,  # [num_rows, num_members * vocab_size]
        expanded_idx_mapping: torch.Tensor,  # [num_rows]
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        """Logits of the ensemble's distribution, after the sampling parameters."""
        members = split_members(logits, self.model.num_members)
        processed = [
            super(EnsembleSampler, self).apply_sampling_params(
                m, expanded_idx_mapping, *args, **kwargs
            )
            for m in members
        ]
        return self.model.combine(torch.stack(processed), expanded_idx_mapping)

    def sample(
        self,
        logits: torch.Tensor,  # [num_rows, num_members * vocab_size]
        expanded_idx_mapping: torch.Tensor,  # [num_rows]
        idx_mapping: torch.Tensor,  # [num_reqs]
        idx_mapping_np: np.ndarray,  # [num_reqs]
        pos: torch.Tensor,  # [num_rows]
        input_ids: torch.Tensor,  # [num_rows]
        expanded_local_pos: torch.Tensor,  # [num_rows]
        seq_lens_upper_bound_np: np.ndarray,  # [num_reqs]
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows], [num_rows, vocab_size]
        """Sampled tokens, and the logits from which log-probabilities are reported."""
        processed = self.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            input_ids,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        # top_k and top_p are None, because they are already applied to each member.
        sampled, _ = self._sample_random(
            processed,
            expanded_idx_mapping,
            idx_mapping_np,
            pos,
            None,
            None,
            use_fused_sampler=False,
        )
        if return_logprobs:
            processed = self.reported(logits, processed, expanded_idx_mapping)
        return sampled, processed

    def reported(
        self,
        logits: torch.Tensor,  # [num_rows, num_members * vocab_size]
        processed: torch.Tensor,  # [num_rows, vocab_size]
        slots: torch.Tensor,  # [num_rows]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        return processed if self.reports_processed else self.model.ensemble_logits(logits, slots)


class EnsembleRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler. Its target is the ensemble, and the proposer is outside of it."""

    sampler: EnsembleSampler

    def _verify(self, logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        # vLLM uses the first of the three results only for log-probabilities.
        processed, sampled, num_sampled = super()._verify(logits, *args)
        expanded_idx_mapping = args[6]
        reported = self.sampler.reported(logits, processed, expanded_idx_mapping)
        return reported, sampled, num_sampled


class RowsPromptLogprobsWorker(PromptLogprobsWorker):
    """vLLM's worker for prompt log-probabilities, which depend on the request of each token.

    vLLM only slices the hidden states that it is given, and passes the slices on. It gets the
    numbers of the tokens instead. Subclasses compute the logits of tokens.
    """

    @property
    def is_asked(self) -> bool:
        return bool(self.in_progress_prompt_logprobs or self.token_id_scores)

    def logits_of(
        self,
        rows: torch.Tensor,  # [num_rows] tokens of the step
        hidden_states: torch.Tensor,  # [at least num_tokens, hidden_size], which vLLM has
        slots: torch.Tensor,  # [num_tokens]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        raise NotImplementedError

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: torch.Tensor, input_batch: InputBatch, *args: Any
    ) -> Any:
        given = self._by_row(logits_fn, hidden_states, input_batch)
        return super().compute_prompt_logprobs(*given, input_batch, *args)

    def compute_prompt_token_id_logprobs(
        self, logits_fn: Any, hidden_states: torch.Tensor, input_batch: InputBatch, *args: Any
    ) -> Any:
        given = self._by_row(logits_fn, hidden_states, input_batch)
        return super().compute_prompt_token_id_logprobs(*given, input_batch, *args)

    def _by_row(
        self, logits_fn: Any, hidden_states: torch.Tensor, batch: InputBatch
    ) -> tuple[Any, torch.Tensor]:
        if not self.is_asked:
            return logits_fn, hidden_states
        num_reqs, num_tokens = batch.num_reqs, batch.num_tokens
        query_lens = batch.query_start_loc[: num_reqs + 1].diff()
        slots = torch.repeat_interleave(
            batch.idx_mapping[:num_reqs], query_lens, output_size=num_tokens
        )
        rows = torch.arange(num_tokens, device=slots.device)
        return partial(self.logits_of, hidden_states=hidden_states, slots=slots), rows


class EnsemblePromptLogprobsWorker(RowsPromptLogprobsWorker):
    """Log-probabilities of the prompt under the ensemble."""

    def __init__(self, model: EnsembleModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = model

    def logits_of(
        self, rows: torch.Tensor, hidden_states: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        return self.model.token_logits(hidden_states[rows], slots[rows])


class EnsembleStructuredOutputsWorker(StructuredOutputsWorker):
    """Grammar masks. They are sampling parameters too, so they are applied to every member."""

    def __init__(self, model: EnsembleModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = model

    def apply_grammar_bitmask(self, logits: torch.Tensor, *args: Any) -> None:
        for member in split_members(logits, self.model.num_members):
            super().apply_grammar_bitmask(member, *args)
