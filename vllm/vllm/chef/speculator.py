"""The turns of an engine step after the first: members read what is new to them, and propose.

Runs models; knows distributions only through the verifier.  vLLM calls it as the speculator of a
draft model, whose draft tokens carry the window from step to step.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm.chef.graphs import MemberGraphs
from vllm.chef.state import Cycle, Pending, ProposalState, end_cycle, make_pending
from vllm.chef.stats import TurnStats
from vllm.chef.turns import Turns
from vllm.chef.verifier import Verifier
from vllm.ensemble_decode.members import load_member


class Reading(NamedTuple):
    """What a turn reads in its first pass."""

    query_start: torch.Tensor  # [num_reqs + 1] query_start_loc
    start: torch.Tensor  # [num_reqs] position of the first token
    is_again: torch.Tensor  # [num_tokens] bool: comes before the tokens of the engine step


class ChefSpeculator(StandaloneARSpeculator):
    """Loads and calls the members whose turns come after the first.

    `begin` starts the step's cycle; `read` and `propose_more` are the two halves of a turn;
    `propose` is vLLM's, and ends the cycle.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        members: list[ModelConfig],
        turns: Turns,
        all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len]
    ) -> None:
        super().__init__(vllm_config, device)
        self.member_configs = members
        self.turns = turns
        self.all_token_ids = all_token_ids
        self.num_extra_query_per_req = turns.num_new(len(turns) - 1)
        max_num_tokens = self.max_num_tokens + self.max_num_reqs * self.num_extra_query_per_req
        self.input_buffers = InputBuffers(self.max_num_reqs, max_num_tokens, device)
        self.state: ProposalState
        self.verifier: Verifier
        self.stats: TurnStats
        self.graphs: list[MemberGraphs] = []
        """[num_turns - 1], or none"""
        self.cycle: Cycle | None = None
        speculative = vllm_config.speculative_config
        depths = range(turns.window + 1) if speculative.uses_dynamic_speculative_decoding() else []
        self.possible_gammas = {turns.gammas(depth) for depth in [*depths, turns.window]}

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        models = [
            load_member(self.vllm_config, self.member_configs, turn.members[0])
            for turn in self.turns.turns[1:]
        ]
        self.state = ProposalState(
            self.turns,
            self.max_num_reqs,
            self.vocab_size,
            self.vllm_config.model_config.head_dtype,
            self.device,
        )
        self.pending = make_pending(self.state, self.max_num_reqs)
        return nn.ModuleList(models)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        self.slot_mappings = torch.empty(
            self.block_tables.num_kv_cache_groups,
            self.input_buffers.max_num_tokens,
            dtype=torch.int64,
            device=self.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = []
        for turn in range(1, len(self.turns)):
            graphs = MemberGraphs(
                self.vllm_config,
                self.device,
                cudagraph_mode,
                1 + self.turns.window + self.turns.num_new(turn),
                {self.turns.num_passes(gammas[turn]) for gammas in self.possible_gammas},
                partial(self._run_member, turn),
                partial(self._passes, turn) if self.supports_decode_metadata_update else None,
            )
            self.graphs.append(graphs)

    def capture(self) -> None:
        for graphs in self.graphs:
            graphs.capture(
                self.model_state,
                self.input_buffers,
                self.block_tables,
                self.attn_groups,
                self.kv_cache_config,
            )

    def begin(self, cycle: Cycle, num_tokens: int) -> None:
        """Start the step's cycle, which is to leave `num_tokens` in a window, at most."""
        self.cycle = cycle
        self.gammas = self.turns.gammas(num_tokens)
        # Where CUDA graphs find them: vLLM's own move about.
        states = self.verifier.sampler.sampling_states
        self.temperature.copy_(states.temperature.gpu)
        self.seeds.copy_(states.seeds.gpu)

    def has_room(self, pending: Pending) -> torch.Tensor:  # [num_reqs] bool
        """Whether the context of a request can take one more token."""
        return pending.last_position + 1 < self.max_model_len

    def draw(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size], raw
        pending: Pending,
    ) -> torch.Tensor:  # [num_reqs]
        """Draws from a member's distribution of the token past the end of each request.

        Of the sampling parameters only the temperature counts here: the others may cost
        acceptance, never exactness.
        """
        return gumbel_sample(
            logits,
            pending.slots,
            self.temperature,
            self.seeds,
            pending.last_position,
            apply_temperature=True,
            # Noise of its own: a replacement must not know how its proposal was drawn.
            is_drafting=True,
            use_fp64=self.verifier.sampler.use_fp64_gumbel,
        )

    def read(self, turn: int) -> torch.Tensor:  # [num_reqs, vocab_size]
        """Run the turn's member over all that is new to it, and keep its scores there.

        Returns its logits of the token past the end of each request.
        """
        cycle = self.cycle
        extra = self.turns.num_new(turn)
        query_start_np = self._query_start_np(cycle, extra)
        reading = self._prepare_tokens(cycle, extra, int(query_start_np[-1]))
        hidden_states = self._run(turn, cycle, query_start_np, extra, reading.is_again)
        self.last_read = hidden_states, reading

        # The columns that the member has to score, at most, back from the one past the end.
        count = self.turns.num_unscored(turn)
        columns = cycle.end[:, None] - torch.arange(count - 1, -1, -1, device=self.device)
        positions = cycle.first[:, None] + columns
        first_row = reading.query_start[:-1, None]
        rows = torch.maximum(first_row + positions - 1 - reading.start[:, None], first_row)
        logits = self._logits(turn, hidden_states[rows.flatten()]).unflatten(0, (-1, count))
        is_new = positions >= self.state.scored[cycle.slots, turn, None]
        keep = is_new & (columns >= 0) & cycle.active[:, None]
        self._keep(turn, cycle.slots, positions, logits, keep)
        return logits[:, -1]

    def step_hidden_states(self) -> torch.Tensor:  # [num_tokens, hidden_size]
        """What `read` has just computed, at the tokens of the engine step."""
        hidden_states, reading = self.last_read
        batch, num_reqs = self.cycle.batch, self.cycle.num_reqs
        query_lens = batch.query_start_loc[: num_reqs + 1].long().diff()
        num_tokens = int(batch.query_start_loc_np[num_reqs])
        # The turn may have begun before the engine step's first token.
        shift = self.cycle.start - reading.start
        shift = shift + reading.query_start[:-1] - batch.query_start_loc[:num_reqs]
        shift = torch.repeat_interleave(shift, query_lens, output_size=num_tokens)
        return hidden_states[torch.arange(num_tokens, device=self.device) + shift]

    def logits_functions(self) -> list[tuple[tuple[int, ...], Any]]:
        """(members, their logits from the turn's hidden states) of the turns after the first."""
        return [
            (turn.members, lambda hidden, model=model: [model.compute_logits(hidden)])
            for turn, model in zip(self.turns.turns[1:], self.model, strict=True)
        ]

    def propose_first(self, turn: int, logits: torch.Tensor, settled_before: torch.Tensor) -> None:
        """Propose from what `read` returned, where no token has been settled since."""
        cycle = self.cycle
        if self.gammas[turn] == 0:
            return
        fresh = cycle.active & (cycle.settled == settled_before) & self.has_room(cycle)
        cycle.append(self.draw(logits, cycle), fresh, cycle.new_lengths[:, turn])

    def propose_more(self, turn: int) -> None:
        """The turn's passes of one token."""
        cycle, gamma = self.cycle, self.gammas[turn]
        num_passes = self.turns.num_passes(gamma)
        if self.graphs[turn - 1].run_passes(num_passes, cycle.num_reqs, self._load_pending):
            done = self.pending.rows(cycle.num_reqs)
            for name in ("tokens", "end", "new_lengths"):
                getattr(cycle, name).copy_(getattr(done, name))
            return
        for step in range(num_passes):
            self._prepare_token(cycle)
            extra = self.turns.num_new(turn) + 1 + step
            query_start_np = self.arange_np[: cycle.num_reqs + 1]
            hidden_states = self._run(turn, cycle, query_start_np, extra)
            self._propose_from(turn, gamma, cycle, hidden_states)

    def _load_pending(self) -> None:
        """Put everything where the graph of `_passes` finds it."""
        self.pending.load(self.cycle)
        for groups in self.attn_groups:
            for group in groups:
                tables = self.block_tables.input_block_tables[group.kv_cache_group_id]
                group.map_to_kernel_block_table(tables)

    def _passes(
        self,
        turn: int,
        num_passes: int,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
    ) -> None:
        """The turn's passes of one token, to be captured: nothing in it waits for the host."""
        pending, buffers = self.pending.rows(num_reqs), self.input_buffers
        gamma = num_passes + (not self.turns.draws)
        for _ in range(num_passes):
            self._prepare_token(pending)
            if attn_metadata is not None:
                self.block_tables.compute_slot_mappings(
                    pending.slots,
                    buffers.query_start_loc[: num_reqs + 1],
                    buffers.positions[:num_reqs],
                    num_tokens,
                )
                self._update_draft_decode_metadata(attn_metadata, num_reqs)
            hidden_states = self._run_member(turn, num_tokens, attn_metadata, slot_mappings)
            self._propose_from(turn, gamma, pending, hidden_states[:num_reqs])

    def _prepare_token(self, pending: Pending) -> None:
        """The last token of each request, as input of a pass."""
        buffers, num_reqs = self.input_buffers, pending.num_reqs
        buffers.input_ids[:num_reqs] = pending.last_token(self.all_token_ids)
        position = pending.last_position.clamp(0, self.max_model_len - 1)
        buffers.positions[:num_reqs] = position
        buffers.seq_lens[:num_reqs] = position + 1
        self._fill_query_start(self.arange_gpu[: num_reqs + 1], num_reqs)

    def _propose_from(
        self,
        turn: int,
        gamma: int,
        pending: Pending,
        hidden_states: torch.Tensor,  # [num_reqs, hidden_size] of the last tokens
    ) -> None:
        """Keep the member's scores of the token past the end, and propose one of `gamma`."""
        wanted = pending.active & (pending.new_lengths[:, turn] < gamma)
        wanted &= self.has_room(pending)
        logits = self._logits(turn, hidden_states)
        position = pending.last_position + 1
        self._keep(turn, pending.slots, position[:, None], logits[:, None], wanted[:, None])
        pending.append(self.draw(logits, pending), wanted, pending.new_lengths[:, turn])

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:  # [num_reqs, window]
        """End the step: the last turn's proposals, and the window for the next step."""
        if dummy_run:
            return self._dummy_run(input_batch)
        self.propose_more(len(self.turns) - 1)
        cycle, self.cycle = self.cycle, None
        self.stats.add(cycle, self.gammas)
        return end_cycle(self.state, cycle)

    def _prepare_tokens(self, cycle: Cycle, extra: int, num_tokens: int) -> Reading:
        """The tokens of the engine step with `extra` more each: what has been decided and proposed
        since. Behind the end of a request come tokens that are overwritten later.
        """
        buffers, num_reqs = self.input_buffers, cycle.num_reqs
        query_lens = cycle.batch.query_start_loc[: num_reqs + 1].long().diff() + extra
        query_lens = query_lens.clamp(max=self.max_model_len)
        # Where the context would end, before the engine step's first token.
        start = torch.minimum(cycle.start, self.max_model_len - query_lens)
        query_start = torch.cat([query_lens.new_zeros(1), query_lens.cumsum(0)])
        request = torch.repeat_interleave(
            self.arange_gpu[:num_reqs], query_lens, output_size=num_tokens
        ).long()
        offset = torch.arange(num_tokens, device=self.device) - query_start[request]
        positions = start[request] + offset
        column = positions - cycle.first[request]
        known = self.all_token_ids[cycle.slots[request], positions].long()
        pending = cycle.tokens[request, column.clamp(0, cycle.tokens.shape[1] - 1)]
        pending = pending.masked_fill(column >= cycle.end[request], 0)
        buffers.input_ids[:num_tokens] = torch.where(column < 0, known, pending)
        buffers.positions[:num_tokens] = positions
        self._fill_query_start(query_start, num_reqs)
        buffers.seq_lens[:num_reqs] = start + query_lens
        buffers.seq_lens[num_reqs:] = 0
        return Reading(query_start, start, positions < cycle.start[request])

    def _query_start_np(self, cycle: Cycle, extra: int) -> np.ndarray:  # [num_reqs + 1]
        query_lens = np.diff(cycle.batch.query_start_loc_np[: cycle.num_reqs + 1]) + extra
        query_start = np.zeros(cycle.num_reqs + 1, dtype=np.int32)
        np.cumsum(np.minimum(query_lens, self.max_model_len), out=query_start[1:])
        return query_start

    def _run(
        self,
        turn: int,
        cycle: Cycle,
        query_start_np: np.ndarray,  # [num_reqs + 1]
        extra: int,
        is_again: torch.Tensor | None = None,  # [num_tokens] bool
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        """One pass of the turn's member over what is in the input buffers.

        Tokens that `is_again` fill a request's share of the batch up from the front.  They must not
        be kept: a sliding window may have let go of what they look back to.
        """
        num_tokens = int(query_start_np[-1])
        context: dict[str, Any] = {}

        def prepare(desc: BatchExecutionDescriptor) -> None:
            mappings = self._slot_mappings(cycle, num_tokens, desc)
            if is_again is not None:
                mappings[:, :num_tokens].masked_fill_(is_again, PAD_SLOT_ID)
            context["attn_metadata"] = self._build_attn_metadata(
                batch_desc=desc,
                num_reqs=cycle.num_reqs,
                query_start_loc_np=query_start_np,
                seq_lens_cpu_upper_bound=cycle.batch.seq_lens_cpu_upper_bound,
                step=extra,
                slot_mappings=mappings,
            )
            context["slot_mappings"] = build_slot_mappings_by_layer(mappings, self.kv_cache_config)

        hidden_states = self.graphs[turn - 1].run(query_start_np, prepare)
        if hidden_states is None:
            return self._run_member(turn, num_tokens, **context)
        return hidden_states

    def _slot_mappings(
        self, cycle: Cycle, num_tokens: int, desc: BatchExecutionDescriptor
    ) -> torch.Tensor:  # [num_kv_cache_groups, at least num_tokens]
        in_graph = desc.cg_mode == CUDAGraphMode.FULL
        return self.block_tables.compute_slot_mappings(
            cycle.slots,
            self.input_buffers.query_start_loc[: cycle.num_reqs + 1],
            self.input_buffers.positions[:num_tokens],
            desc.num_tokens,
            # A graph reads vLLM's own buffer, which is too short for some batches with prompts.
            out=None if in_graph else self.slot_mappings,
        )

    def _run_member(
        self, turn: int, num_tokens: int, attn_metadata: Any, slot_mappings: Any
    ) -> torch.Tensor:
        members, self.model = self.model, self.model[turn - 1]
        try:
            return self._run_model(
                self.input_buffers.input_ids[:num_tokens],
                self.input_buffers.positions[:num_tokens],
                attn_metadata,
                slot_mappings,
                None,
            )
        finally:
            self.model = members

    def _logits(
        self,
        turn: int,
        hidden_states: torch.Tensor,  # [num_rows, hidden_size]
    ) -> torch.Tensor:  # [num_rows, vocab_size]
        # What is proposed from must be what is kept to judge the proposal by.
        return self.model[turn - 1].compute_logits(hidden_states).to(self.state.scores.dtype)

    def _keep(
        self,
        turn: int,
        slots: torch.Tensor,  # [num_reqs]
        positions: torch.Tensor,  # [num_reqs, num_rows]
        logits: torch.Tensor,  # [num_reqs, num_rows, vocab_size]
        keep: torch.Tensor,  # [num_reqs, num_rows] bool
    ) -> None:
        self.state.scores[turn - 1][slots[:, None], self.state.ring(positions, keep)] = logits
        scored = torch.where(keep, positions + 1, 0).amax(dim=1)
        self.state.scored[slots, turn] = torch.maximum(self.state.scored[slots, turn], scored)

    def _fill_query_start(self, query_start: torch.Tensor, num_reqs: int) -> None:
        buffer = self.input_buffers.query_start_loc
        buffer[: num_reqs + 1] = query_start
        buffer[num_reqs + 1 :] = query_start[-1]

    def _dummy_run(self, input_batch: InputBatch) -> torch.Tensor:
        """Every member once over as many tokens, for vLLM's memory profile and compilation."""
        num_tokens = input_batch.num_tokens + input_batch.num_reqs * self.num_extra_query_per_req
        num_tokens = min(num_tokens, self.max_num_tokens)
        for turn in range(1, len(self.turns)):
            hidden_states = self._run_member(turn, num_tokens, None, None)
            self.model[turn - 1].compute_logits(hidden_states[: input_batch.num_reqs])
        return self.draft_tokens[: input_batch.num_reqs]
