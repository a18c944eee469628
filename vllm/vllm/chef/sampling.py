"""How the requests' sampling parameters change logits, in a proposal and in a decision.

A decision applies them in one of two ways:

- `FilterParams` runs on the device only, so CUDA graphs can hold it.
- `AllParams` uses vLLM's sampler, which asks the host what each request wants.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.min_p import apply_min_p
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm.chef.state import Candidates, Cycle

Process = Callable[
    [torch.Tensor],  # [count, num_reqs * num_columns, vocab_size], may be written
    torch.Tensor,  # of the same shape
]


class Layout(NamedTuple):
    """The layout of logits `[num_reqs * num_columns, vocab_size]`, as vLLM's kernels expect it."""

    requests: torch.Tensor  # [num_reqs] rows of the requests in the batch
    request: torch.Tensor  # [num_reqs * num_columns] request of each row
    column: torch.Tensor  # [num_reqs * num_columns] column of each row, int32
    cu_num_logits: torch.Tensor  # [num_reqs + 1] int32


class StepParams(Protocol):
    """The sampling parameters of a step's requests, as a decision applies them."""

    scales: bool
    """Whether the processor expects the members' logits divided by the temperature, in float32"""

    def logprobs_dims(self) -> tuple[int, int] | None:
        """The result of vLLM's `Sampler.get_logprobs_dims`. None if no request asks for any."""

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        """A function that applies the parameters to the logits of some of the step's requests.

        Args:
            part: those requests.
            cycle: the cycle of the whole step.
            candidates, layout: those of the part.
        """


class FilterParams:
    """Temperature and, if `filters`, min-p, top-k and top-p, with the cycle's values.

    Nothing waits for the host. If a request does not use a filter, that filter's kernel returns at
    once.

    Args:
        scales: see `StepParams`. If False, the temperature is applied here.
        filters: whether a request may use more than the temperature.
    """

    def __init__(self, scales: bool, filters: bool) -> None:
        self.scales, self.filters = scales, filters

    def logprobs_dims(self) -> None:
        return None

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        cycle, request = cycle.part(part), layout.request

        def apply(logits: torch.Tensor) -> torch.Tensor:
            rows = logits.flatten(0, 1)
            if not self.scales:
                apply_temperature(rows, request, cycle.temperature)
            if self.filters:
                of_rows = request.expand(len(logits), -1).flatten()
                apply_min_p(rows, of_rows, cycle.min_p)
                rows = apply_top_k_top_p(rows, cycle.top_k[of_rows], cycle.top_p[of_rows])
            return rows.view(logits.shape)

        return apply


class AllParams:
    """All sampling parameters, applied by vLLM's sampler, and log-probabilities."""

    scales = False

    def __init__(self, sampler: Sampler, batch: InputBatch) -> None:
        self.sampler, self.batch = sampler, batch

    def logprobs_dims(self) -> tuple[int, int] | None:
        return self.sampler.get_logprobs_dims(self.batch.idx_mapping_np)

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        batch, slots = self.batch, cycle.slots[part]
        num_columns = candidates.segment.shape[1]
        before = batch.input_ids[batch.logits_indices[cycle.first_step_row[part]]][:, None].long()
        inputs = torch.cat([before, cycle.tokens[part, : num_columns - 1]], dim=1)
        arguments = (
            slots.repeat_interleave(num_columns),
            slots,
            batch.idx_mapping_np[part],
            candidates.positions.flatten(),
            inputs.flatten().int(),  # vLLM's kernels expect int32
            layout.column,
            batch.seq_lens_cpu_upper_bound.numpy()[part] + num_columns,
        )

        def apply(logits: torch.Tensor) -> torch.Tensor:
            processed = [self.sampler.apply_sampling_params(rows, *arguments) for rows in logits]
            return processed[0][None] if len(processed) == 1 else torch.stack(processed)

        return apply


def asks_for_filters_only(sampler: Sampler, batch: InputBatch) -> bool:
    """Whether the step needs at most temperature, min-p, top-k and top-p.

    False if a request reports log-probabilities or uses another sampling parameter.
    """
    slots = batch.idx_mapping_np[: batch.num_reqs]
    if sampler.get_logprobs_dims(slots) is not None:
        return False
    if not sampler.needs_logits_processing[slots].any():
        return True
    thinking = sampler.thinking_budget_state
    bias, penalties, bad_words, *custom = sampler.logits_processors
    return not (
        custom
        or (thinking.enabled and thinking.use_thinking_budget[slots].any())
        or bias.use_logit_bias[slots].any()
        or penalties.use_penalty[slots].any()
        or bad_words.num_bad_words.np[slots].any()
    )


def asks_for_filters(sampler: Sampler, batch: InputBatch) -> bool:
    """Whether a request uses min-p, top-k or top-p."""
    slots, states = batch.idx_mapping_np[: batch.num_reqs], sampler.sampling_states
    return bool(
        (states.min_p.np[slots] != 0).any()
        or (states.top_k.np[slots] != states.vocab_size).any()
        or (states.top_p.np[slots] != 1).any()
    )


def reserve_buffers(vocab_size: int, device: torch.device) -> None:
    """Make vLLM's top-k allocate its largest buffers now.

    vLLM's top-k replaces its buffer when it needs a larger one. CUDA graphs would keep the old
    buffer. A batch of few rows has a buffer of its own.
    """
    num_rows = num_compute_units(device.index)
    logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
    top_p = logits[:, 0] + 1
    top_k = top_p.int() * vocab_size
    for rows in (slice(num_rows), slice(1)):
        apply_top_k_top_p(logits[rows], top_k[rows], top_p[rows])


def draw_proposals(
    logits: torch.Tensor,  # [num_reqs, vocab_size] raw logits of a member
    cycle: Cycle,
    position: torch.Tensor,  # [num_reqs] position of the token before the drawn one
    requests: torch.Tensor,  # [at least num_reqs] 0, 1, ...
    use_fp64: bool,
) -> torch.Tensor:  # [num_reqs]
    """Draw tokens from a member's distribution.

    Only the temperature is applied here. Ignoring the other sampling parameters may cost
    acceptance, but never exactness.
    """
    return gumbel_sample(
        logits,
        requests[: cycle.num_reqs],
        cycle.temperature,
        cycle.seeds,
        position,
        apply_temperature=True,
        # Proposals have separate noise: a replacement must be independent of how its proposal was
        # drawn.
        is_drafting=True,
        use_fp64=use_fp64,
    )
