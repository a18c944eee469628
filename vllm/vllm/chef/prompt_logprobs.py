"""Log-probabilities of the prompt under the ensemble, when members read it one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm.chef.cycle import Reading
from vllm.chef.state import Cycle
from vllm.ensemble_decode.ops import combine
from vllm.ensemble_decode.request_args import SlotCoefficients
from vllm.ensemble_decode.sampler import RowsPromptLogprobsWorker

LogitsFn = Callable[[torch.Tensor], list[torch.Tensor]]


class TurnPromptLogprobsWorker(RowsPromptLogprobsWorker):
    """Log-probabilities of the prompt, from the hidden states of all turns.

    vLLM gives it those of the first turn only. `take_up_first` and `take_up` keep those of all
    turns.

    Args:
        heads: num_turns x (members, function from the turn's hidden states to their logits).
    """

    def __init__(
        self,
        coefficients: SlotCoefficients,
        combines_probs: bool,
        heads: Sequence[tuple[tuple[int, ...], LogitsFn]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.coefficients = coefficients
        self.combines_probs = combines_probs
        self.heads = heads
        self.hidden_states: list[torch.Tensor] = []
        """num_turns x [num_tokens, hidden_size] of the step; empty if no request asks"""

    def take_up_first(
        self,
        hidden_states: torch.Tensor,  # [at least num_tokens, hidden_size] of the first turn
        batch: InputBatch,
    ) -> None:
        """Keep the first turn's hidden states, if a request asks for log-probabilities.

        They are copied before other members run, because other members' graphs overwrite them.
        """
        if self.is_asked:
            # Drop the rows that pad the batch for CUDA graphs.
            self.hidden_states = [hidden_states[: batch.num_tokens].clone()]

    def take_up(
        self,
        readings: Sequence[Reading],  # num_turns - 1, or empty if no request asks
        cycle: Cycle,
        batch: InputBatch,
    ) -> None:
        """Keep the hidden states of the other turns as well."""
        if self.is_asked:
            self.hidden_states += at_step_tokens(readings, cycle, batch)

    def logits_of(
        self, rows: torch.Tensor, hidden_states: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        logits: dict[int, torch.Tensor] = {}
        for hidden, (members, logits_fn) in zip(self.hidden_states, self.heads, strict=True):
            logits.update(zip(members, logits_fn(hidden[rows]), strict=True))
        stacked = torch.stack([logits[member] for member in sorted(logits)])
        of_rows = self.coefficients.of(slots[rows])
        return combine(self.coefficients.function, stacked, self.combines_probs, of_rows)


def at_step_tokens(
    readings: Sequence[Reading], cycle: Cycle, batch: InputBatch
) -> list[torch.Tensor]:  # num_turns - 1 x [num_tokens, hidden_size]
    """Hidden states that members have computed at the tokens of the engine step.

    For a request that decodes, the values may be anything.
    """
    num_reqs = cycle.num_reqs
    query_start_loc = batch.query_start_loc[: num_reqs + 1]
    query_lens = query_start_loc.long().diff()
    num_tokens = int(batch.query_start_loc_np[num_reqs])
    found = []
    for reading in readings:
        # The turn's reading may start before the engine step's first token.
        shift = cycle.step_start - reading.read_start
        shift = shift + reading.query_start_loc[:-1] - query_start_loc[:-1]
        shift = torch.repeat_interleave(shift, query_lens, output_size=num_tokens)
        at = torch.arange(num_tokens, device=shift.device) + shift
        # The reading of a decoding request may start later and end earlier.
        found.append(reading.hidden_states[at.clamp(0, len(reading.hidden_states) - 1)])
    return found
