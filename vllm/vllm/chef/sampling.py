"""How the requests' sampling parameters change logits, in a proposal and in a decision.

A decision applies them in one of two ways:

- `DeviceParams` runs on the device only, so CUDA graphs can hold it.
- `SamplerParams` uses vLLM's sampler, which asks the host what each request wants.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from vllm import envs
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.min_p import apply_min_p
from vllm.v1.worker.gpu.sample.penalties import apply_penalties
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.thinking_budget import apply_thinking_budget

from vllm.chef.state import Candidates, Cycle

Process = Callable[
    [torch.Tensor],  # [count, num_reqs * num_columns, vocab_size], may be written
    torch.Tensor,  # of the same shape
]


class Processing(IntEnum):
    """What the logits of a step pass through. Each value includes those before it."""

    TEMPERATURE = 0
    FILTERS = 1  # min-p, top-k and top-p
    BUILT_IN = 2  # penalties, biases, bad words, thinking budgets, grammars
    CUSTOM = 3  # logits processors of the user's own, which no graph holds


IN_GRAPHS = (Processing.TEMPERATURE, Processing.FILTERS, Processing.BUILT_IN)


class Layout(NamedTuple):
    """The layout of logits `[num_reqs * num_columns, vocab_size]`, as vLLM's kernels expect it."""

    requests: torch.Tensor  # [num_reqs] rows of the requests in the batch
    request: torch.Tensor  # [num_reqs * num_columns] request of each row
    column: torch.Tensor  # [num_reqs * num_columns] column of each row, int32
    cu_num_logits: torch.Tensor  # [num_reqs + 1] int32


class StepParams(Protocol):
    """The sampling parameters of a step's requests, as a decision applies them."""

    scales: bool
    """Whether the processor expects the members' logits divided by the temperature"""
    needs_float32: bool
    """Whether the processor expects the members' logits in float32"""
    needs_all_columns: bool
    """Whether the processor needs all columns of a request, from the first one on

    Penalties count the tokens in the columns before.
    """

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        """A function that applies the parameters to the logits of some of the step's requests.

        Args:
            part: those requests.
            cycle: the cycle of the whole step.
            candidates, layout: those of the part.
        """


class ProcessorStates:
    """What vLLM's logits processors know about the requests, in memory that does not move.

    vLLM's own small values move from step to step. CUDA graphs would read the old values.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.bias, self.penalties, self.bad_words = sampler.logits_processors[:3]
        self.thinking = sampler.thinking_budget_state
        self._moving = {
            "num_allowed_token_ids": self.bias.num_allowed_token_ids,
            "num_logit_bias": self.bias.num_logit_bias,
            "min_lens": self.bias.min_lens,
            "num_stop_token_ids": self.bias.num_stop_token_ids,
            "restore_when_all_masked": self.bias.restore_when_all_masked,
            "repetition_penalty": self.penalties.repetition_penalty,
            "frequency_penalty": self.penalties.frequency_penalty,
            "presence_penalty": self.penalties.presence_penalty,
            "num_bad_words": self.bad_words.num_bad_words,
            "prompt_len": sampler.req_states.prompt_len,
        }
        if self.thinking.enabled:
            self._moving["thinking_token_budget"] = self.thinking.thinking_token_budget
        device = sampler.req_states.device
        self.kept = {
            name: torch.empty_like(state.gpu, device=device) for name, state in self._moving.items()
        }
        """By name, `[max_num_reqs]`"""
        self.load()

    def load(self) -> None:
        """Copy the values of the current step."""
        for name, state in self._moving.items():
            self.kept[name].copy_(state.gpu, non_blocking=True)

    def apply(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size] float32, written
        slots: torch.Tensor,  # [num_rows]
        slots_of_requests: torch.Tensor,  # [num_reqs]
        positions: torch.Tensor,  # [num_rows] of the token before each row
        inputs: torch.Tensor,  # [num_rows] that token, int32
        column: torch.Tensor,  # [num_rows] int32
    ) -> None:
        """Apply vLLM's processors, in vLLM's order. No kernel asks the host anything."""
        kept, bias, penalties, words = self.kept, self.bias, self.penalties, self.bad_words
        requests = self.sampler.req_states
        apply_logit_bias(
            logits,
            slots,
            positions,
            kept["num_allowed_token_ids"],
            bias.allowed_token_ids.gpu,
            kept["num_logit_bias"],
            bias.logit_bias_token_ids.gpu,
            bias.logit_bias.gpu,
            kept["min_lens"],
            kept["num_stop_token_ids"],
            kept["restore_when_all_masked"],
            bias.stop_token_ids.gpu,
            check_all_masked_rows=True,
        )
        apply_penalties(
            logits,
            slots,
            inputs,
            column,
            kept["repetition_penalty"],
            kept["frequency_penalty"],
            kept["presence_penalty"],
            penalties.prompt_bin_mask,
            penalties.output_bin_counts,
        )
        apply_bad_words(
            logits,
            slots,
            words.bad_word_token_ids.gpu,
            words.bad_word_offsets.gpu,
            kept["num_bad_words"],
            requests.all_token_ids.gpu,
            kept["prompt_len"],
            requests.total_len.gpu,
            inputs,
            column,
            envs.VLLM_MAX_NUM_BAD_WORDS,
        )
        thinking = self.thinking
        if thinking.enabled:
            apply_thinking_budget(
                logits,
                slots_of_requests,
                slots,
                kept["thinking_token_budget"],
                requests.all_token_ids.gpu,
                requests.total_len.gpu,
                inputs,
                column,
                thinking.cached_last_start,
                thinking.cached_last_end,
                thinking.cached_scan_pos,
                thinking.reasoning_start_token_ids,
                thinking.natural_reasoning_end_token_ids,
                thinking.reasoning_end_token_ids,
            )


class DeviceParams:
    """The sampling parameters up to `processing`, with values that lie on the device.

    Nothing waits for the host. If a request does not use a parameter, the parameter's kernel
    returns at once.

    Args:
        samples_members: see `EnsembleConfig.samples_members`.
        states: used if `processing` is `BUILT_IN`.
    """

    def __init__(
        self, samples_members: bool, processing: Processing, states: ProcessorStates
    ) -> None:
        self.processing, self.states = processing, states
        # Penalties and biases come before the temperature.
        self.scales = samples_members and processing < Processing.BUILT_IN
        self.needs_float32 = samples_members
        self.needs_all_columns = processing == Processing.BUILT_IN

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        cycle = cycle.part(part)

        def apply(logits: torch.Tensor) -> torch.Tensor:
            rows, count = logits.flatten(0, 1), len(logits)
            if self.processing == Processing.BUILT_IN:
                self._apply_processors(rows, count, cycle, candidates, layout)
            if not self.scales:
                apply_temperature(rows, layout.request.repeat(count), cycle.temperature)
            if self.processing >= Processing.FILTERS:
                request = layout.request.repeat(count)
                apply_min_p(rows, request, cycle.min_p)
                rows = apply_top_k_top_p(rows, cycle.top_k[request], cycle.top_p[request])
            return rows.view(logits.shape)

        return apply

    def _apply_processors(
        self,
        rows: torch.Tensor,  # [count * num_reqs * num_columns, vocab_size]
        count: int,
        cycle: Cycle,  # of the part
        candidates: Candidates,
        layout: Layout,
    ) -> None:
        # A row without a request has some request's slot. Its result is never read.
        slots = cycle.slots.clamp(min=0)
        tokens = self.states.sampler.req_states.all_token_ids.gpu
        inputs = input_tokens(cycle, tokens, candidates.segment.shape[1])
        self.states.apply(
            rows,
            slots[layout.request].repeat(count),
            slots,
            candidates.positions.flatten().repeat(count),
            inputs.flatten().repeat(count),
            layout.column.repeat(count),
        )


class SamplerParams:
    """All sampling parameters, applied by vLLM's sampler.

    Only this class runs logits processors of the user's own.
    """

    scales = needs_float32 = False
    needs_all_columns = True

    def __init__(self, sampler: Sampler, batch: InputBatch) -> None:
        self.sampler, self.batch = sampler, batch

    def processor(
        self, part: slice, cycle: Cycle, candidates: Candidates, layout: Layout
    ) -> Process:
        batch, num_columns = self.batch, candidates.segment.shape[1]
        cycle = cycle.part(part)
        tokens = self.sampler.req_states.all_token_ids.gpu
        arguments = (
            cycle.slots.repeat_interleave(num_columns),
            cycle.slots,
            batch.idx_mapping_np[part],
            candidates.positions.flatten(),
            input_tokens(cycle, tokens, num_columns).flatten(),
            layout.column,
            batch.seq_lens_cpu_upper_bound.numpy()[part] + num_columns,
        )

        def apply(logits: torch.Tensor) -> torch.Tensor:
            processed = [self.sampler.apply_sampling_params(rows, *arguments) for rows in logits]
            return processed[0][None] if len(processed) == 1 else torch.stack(processed)

        return apply


def input_tokens(
    cycle: Cycle,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len], vLLM's tokens of all requests
    num_columns: int,
) -> torch.Tensor:  # [num_reqs, num_columns] int32, which vLLM's kernels expect
    """The token before each column."""
    slots, before = cycle.slots.clamp(min=0), (cycle.first_position - 1).clamp(min=0)
    first = all_token_ids[slots, before][:, None]
    return torch.cat([first, cycle.tokens[:, : num_columns - 1].int()], dim=1)


def needed_processing(sampler: Sampler, batch: InputBatch) -> Processing:
    """What the step's requests ask for.

    Grammars and log-probabilities are not considered.
    """
    slots = batch.idx_mapping_np[: batch.num_reqs]
    if not sampler.needs_logits_processing[slots].any():
        return Processing.TEMPERATURE
    thinking = sampler.thinking_budget_state
    bias, penalties, bad_words, *custom = sampler.logits_processors
    if custom:
        return Processing.CUSTOM
    if (
        (thinking.enabled and thinking.use_thinking_budget[slots].any())
        or bias.use_logit_bias[slots].any()
        or penalties.use_penalty[slots].any()
        or bad_words.num_bad_words.np[slots].any()
    ):
        return Processing.BUILT_IN
    return Processing.FILTERS if asks_for_filters(sampler, batch) else Processing.TEMPERATURE


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
