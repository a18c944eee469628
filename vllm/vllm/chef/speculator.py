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
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm.chef.graphs import TurnGraphs
from vllm.chef.ops import ops_for
from vllm.chef.state import Cycle, ProposalState, SlotStates, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.turns import Turns
from vllm.chef.verifier import StepScores, Verifier
from vllm.ensemble_decode.functions import Custom
from vllm.ensemble_decode.members import load_member
from vllm.ensemble_decode.model import MemberGroup

logger = init_logger(__name__)


class Reading(NamedTuple):
    """What a turn reads in its first pass, and what its member makes of it."""

    query_start: torch.Tensor  # [num_reqs + 1] query_start_loc
    start: torch.Tensor  # [num_reqs] position of the first token
    hidden_states: torch.Tensor  # [num_tokens, hidden_size]


class ChefSpeculator(StandaloneARSpeculator):
    """Loads and calls the members whose turns come after the first.

    A step is `begin`, then `replay` or, where there is no CUDA graph for it, `run`; `propose` is
    vLLM's, and ends the cycle.
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
        self.ops = ops_for(device)
        self.first: MemberGroup
        """The first turn's members, which vLLM has called when the cycle begins"""
        self.state: ProposalState
        self.verifier: Verifier
        self.stats: TurnStats
        self.graphs: list[TurnGraphs] = []
        """[num_turns - 1], or none"""
        speculative = vllm_config.speculative_config
        depths = range(turns.window + 1) if speculative.uses_dynamic_speculative_decoding() else []
        self.depths = {*depths, turns.window}
        """Tokens that a step may leave in a window, if it has room"""
        possible = {turns.gammas(depth) for depth in self.depths}
        self.gammas_on_device = {
            gammas: torch.tensor(gammas, dtype=torch.int64, device=device) for gammas in possible
        }
        self.calls_on_device = {
            gammas: torch.tensor(turns.num_calls(gammas), dtype=torch.int64, device=device)
            for gammas in possible
        }
        self.turn_gammas = torch.zeros(len(turns), dtype=torch.int64, device=device)
        self._set_gammas(turns.gammas(turns.window))

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        models = [
            MemberGroup(
                members=[load_member(self.vllm_config, self.member_configs, turn.members[0])]
            )
            for turn in self.turns.turns[1:]
        ]
        self.state = ProposalState(
            self.turns,
            self.max_num_reqs,
            self.max_model_len,
            self.vocab_size,
            self.vllm_config.model_config.head_dtype,
            self.device,
        )
        self.all_cycle = make_cycle(self.state, self.max_num_reqs)
        """What the rows of all steps' cycles are part of"""
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
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL or not self._can_capture():
            return
        for turn in range(1, len(self.turns)):
            graphs = TurnGraphs(
                self.vllm_config,
                self.device,
                {
                    1 + depth: min(self.turns.num_read(turn, 1 + depth), self.max_model_len)
                    for depth in self.depths
                },
                {self.turns.num_passes(gammas[turn]) for gammas in self.gammas_on_device},
                partial(self._captured_turn, turn),
                partial(self._captured_passes, turn),
            )
            self.graphs.append(graphs)

    def _can_capture(self) -> bool:
        """Whether all that turns do can be in graphs; if not, a line in the log says why."""
        step_len, further = 1 + self.turns.window, range(1, len(self.turns))
        query_len = max(self.turns.num_read(turn, step_len) for turn in further)
        thresholds = [
            group.get_metadata_builder().reorder_batch_threshold
            for groups in self.attn_groups
            for group in groups
        ]
        obstacle = None
        if isinstance(self.verifier.function, Custom):
            # It may look at values, or change from call to call.
            obstacle = "an ensemble_fn of your own"
        elif not self.supports_decode_metadata_update:
            obstacle = "attention metadata that cannot be refreshed in a graph"
        elif self.attn_cg_support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
            obstacle = f"{self.attn_cg_support.min_cg_attn_backend}"
        elif any(threshold is not None and threshold < query_len for threshold in thresholds):
            # Such a backend takes what a member reads for a prompt, and plans it on the host.
            obstacle = f"an attention backend that takes {query_len} tokens for a prompt"
        if obstacle is not None:
            logger.warning_once("Turns run without CUDA graphs: %s.", obstacle)
        return obstacle is None

    def capture(self) -> None:
        if not self.graphs:
            return
        num_rows = max(graphs.max_step_tokens() for graphs in self.graphs)
        self.step_hidden_states = torch.zeros(
            num_rows,
            sum(self.first.hidden_sizes),
            dtype=self.vllm_config.model_config.dtype,
            device=self.device,
        )
        """[num_rows, sum of the first turn's hidden sizes] of the engine step's rows of logits"""
        # What the first graph of a step makes of them is for those after it as well.
        self.step_logits = [
            logits.new_zeros(num_rows, logits.shape[-1])
            for logits in self.first.compute_member_logits(self.step_hidden_states[:1])
        ]
        everything = self.all_cycle
        self.ops.load(everything, everything.slots[:0], everything.slot_states)
        self.verifier.reserve_buffers()
        for graphs in self.graphs:
            graphs.capture(
                self.model_state,
                self.input_buffers,
                self.block_tables,
                self.attn_groups,
                self.kv_cache_config,
            )

    def begin(
        self,
        batch: InputBatch,
        prefill_len: torch.Tensor,  # [max_num_reqs]
        num_tokens: int,
    ) -> Cycle:
        """Start the step's cycle, which is to leave `num_tokens` in a window, at most."""
        self.batch, self.readings = batch, []
        # To where CUDA graphs find them: vLLM's own move about.
        sampling = self.verifier.sampler.sampling_states
        states = SlotStates(
            prefill_len,
            sampling.temperature.gpu,
            sampling.seeds.gpu,
            sampling.top_k.gpu,
            sampling.top_p.gpu,
            sampling.min_p.gpu,
        )
        self.cycle = self.ops.load(self.all_cycle, batch.idx_mapping[: batch.num_reqs], states)
        gammas = self.turns.gammas(num_tokens)
        if gammas != self.gammas:
            self._set_gammas(gammas)
        if self.graphs:
            for groups in self.attn_groups:
                for group in groups:
                    tables = self.block_tables.input_block_tables[group.kv_cache_group_id]
                    group.map_to_kernel_block_table(tables)
        return self.cycle

    def run(self, scores: StepScores, forbidden: torch.Tensor | None) -> LogprobsTensors | None:
        """The cycle, but for the last turn's passes of one token.

        Args:
            scores: of the first turn, with its batch.
            forbidden: `[num_reqs]`, as `begin_cycle` has it.
        """
        cycle, batch = self.cycle, scores.batch
        self.ops.begin_cycle(
            self.state,
            cycle,
            batch.query_start_loc[: cycle.num_reqs + 1],
            batch.cu_num_logits[: cycle.num_reqs + 1],
            batch.seq_lens[: cycle.num_reqs],
            batch.input_ids,
            forbidden,
        )
        logprobs = self._open(cycle, scores)
        for turn in range(1, len(self.turns)):
            reading = self._read(turn, cycle)
            self.readings.append(reading)
            logprobs = self._decide_and_propose(turn, cycle, scores, reading) or logprobs
            if turn < len(self.turns) - 1:
                self._propose_more(turn)
        return logprobs

    def replay(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, ...] of the engine step
        filters: bool,
    ) -> bool:
        """The same, for requests that ask for no more than temperature and, where `filters`, min-p,
        top-k and top-p; False where there are no CUDA graphs of such a step, and nothing is done.
        """
        step_len = self._uniform_step_len()
        if not self.graphs or step_len is None:
            return False
        replays = [graphs.find(self.cycle.num_reqs, step_len, filters) for graphs in self.graphs]
        if None in replays:
            return False
        rows = self.batch.logits_indices
        torch.index_select(hidden_states, 0, rows, out=self.step_hidden_states[: len(rows)])
        for turn, replay in enumerate(replays, start=1):
            replay()
            if turn < len(self.turns) - 1:
                self._propose_more(turn)
        return True

    def _uniform_step_len(self) -> int | None:
        """Tokens of every request in the engine step, where all are drafts but the first."""
        batch, num_reqs = self.batch, self.cycle.num_reqs
        query_start = batch.query_start_loc_np[: num_reqs + 1]
        length = int(query_start[1])
        if not (np.diff(query_start) == length).all():
            return None
        if not (batch.cu_num_logits_np[: num_reqs + 1] == query_start).all():
            return None
        return length

    def _captured_turn(
        self,
        turn: int,
        step_len: int,  # tokens of each request in the engine step, all with a row of logits
        filters: bool,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
    ) -> None:
        """A turn of `replay`, to be captured: nothing in it waits for the host."""
        cycle = self.all_cycle.rows(num_reqs)
        logits = [logits[: num_reqs * step_len] for logits in self.step_logits]
        scores = StepScores(logits, filters=filters)
        if turn == 1:
            hidden_states = self.step_hidden_states[: num_reqs * step_len]
            for made, kept in zip(
                self.first.compute_member_logits(hidden_states), logits, strict=True
            ):
                kept.copy_(made)
            engine_step = self.target_input_buffers
            starts = self.arange_gpu[: num_reqs + 1] * step_len
            self.ops.begin_cycle(
                self.state,
                cycle,
                starts,
                starts,
                engine_step.seq_lens[:num_reqs],
                engine_step.input_ids,
            )
            self._open(cycle, scores)
        query_start = self.input_buffers.query_start_loc[: num_reqs + 1]
        torch.mul(self.arange_gpu[: num_reqs + 1], num_tokens // num_reqs, out=query_start)
        start, is_again = self._prepare_tokens(cycle, query_start, num_tokens)
        if attn_metadata is not None:
            mappings = self._slot_mappings(cycle, num_tokens)
            mappings[:, :num_tokens].masked_fill_(is_again, PAD_SLOT_ID)
            self._update_draft_decode_metadata(attn_metadata, num_reqs)
        hidden_states = self._run_member(turn, num_tokens, attn_metadata, slot_mappings)
        reading = Reading(query_start, start, hidden_states)
        self._decide_and_propose(turn, cycle, scores, reading)

    def _captured_passes(
        self,
        turn: int,
        num_passes: int,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
    ) -> None:
        """The turn's passes of one token, to be captured as well."""
        cycle = self.all_cycle.rows(num_reqs)
        self._fill_query_start(self.arange_gpu[: num_reqs + 1], num_reqs)
        for _ in range(num_passes):
            position = self._prepare_token(cycle)
            if attn_metadata is not None:
                self._slot_mappings(cycle, num_tokens)
                self._update_draft_decode_metadata(attn_metadata, num_reqs)
            hidden_states = self._run_member(turn, num_tokens, attn_metadata, slot_mappings)
            self._propose_from(turn, cycle, hidden_states[:num_reqs], position)

    def _open(self, cycle: Cycle, scores: StepScores) -> LogprobsTensors | None:
        """The first turn: decide, and propose the token past the window, if all of it was read."""
        logprobs = self.verifier.decide(0, scores, cycle)
        if not self.turns.draws:
            rows, last = self.ops.last_scored(cycle)
            logits = scores.logits[0][rows]
            if scores.mask is not None:
                logits = logits + scores.mask[rows]
            tokens = self._draw(logits, cycle, last)
            self.ops.append(self.state, cycle, 0, self.turn_gammas, tokens)
        return logprobs

    def _read(self, turn: int, cycle: Cycle) -> Reading:
        """Run the turn's member over all that is new to it."""
        batch, rows = self.batch, slice(cycle.num_reqs + 1)
        query_start = self._reading_start(
            turn, batch.query_start_loc[rows], batch.cu_num_logits[rows]
        )
        query_start_np = self._reading_start(
            turn,
            torch.from_numpy(batch.query_start_loc_np[rows]),
            torch.from_numpy(batch.cu_num_logits_np[rows]),
        ).numpy()
        start, is_again = self._prepare_tokens(cycle, query_start, int(query_start_np[-1]))
        self._fill_query_start(query_start, cycle.num_reqs)
        extra = self.turns.num_new(turn)
        hidden_states = self._run(turn, cycle, query_start_np, extra, is_again)
        return Reading(query_start, start, hidden_states)

    def _decide_and_propose(
        self, turn: int, cycle: Cycle, scores: StepScores, reading: Reading
    ) -> LogprobsTensors | None:
        """What a turn does once its member has read: keep its scores, decide, and propose from
        them where no token has been settled since."""
        # The columns that the member has to score, at most, back from the one past the end.
        count = self.turns.num_unscored(turn)
        rows, kept, last = self.ops.place_scores(
            self.state, cycle, turn, count, reading.query_start, reading.start
        )
        logits = self._logits(turn, reading.hidden_states[rows.flatten()])
        self.state.kept_scores[turn - 1].index_copy_(0, kept.flatten(), logits)
        logprobs, decides = None, self.turns.is_scorer(turn)
        if decides:
            logprobs = self.verifier.decide(turn, scores, cycle)
        if not (decides and self.turns.draws):  # which settles a token in all requests
            tokens = self._draw(logits[count - 1 :: count], cycle, last)
            self.ops.append(self.state, cycle, turn, self.turn_gammas, tokens, decides)
        return logprobs

    def _propose_more(self, turn: int) -> None:
        """The turn's passes of one token."""
        cycle = self.cycle
        num_passes = self.turns.num_passes(self.gammas[turn])
        if not num_passes:
            return
        if self.graphs and self.graphs[turn - 1].replay_passes(num_passes, cycle.num_reqs):
            return
        self._fill_query_start(self.arange_gpu[: cycle.num_reqs + 1], cycle.num_reqs)
        for step in range(num_passes):
            position = self._prepare_token(cycle)
            extra = self.turns.num_new(turn) + 1 + step
            query_start_np = self.arange_np[: cycle.num_reqs + 1]
            hidden_states = self._run(turn, cycle, query_start_np, extra)
            self._propose_from(turn, cycle, hidden_states, position)

    def _prepare_tokens(
        self,
        cycle: Cycle,
        query_start: torch.Tensor,  # [num_reqs + 1]
        num_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a turn reads, as input of its first pass; returns what `prepare_tokens` does."""
        buffers = self.input_buffers
        return self.ops.prepare_tokens(
            self.state,
            cycle,
            self.all_token_ids,
            query_start,
            buffers.input_ids[:num_tokens],
            buffers.positions[:num_tokens],
            buffers.seq_lens[: cycle.num_reqs],
        )

    def _prepare_token(self, cycle: Cycle) -> torch.Tensor:  # [num_reqs]
        """The last token of each request, as input of a pass; returns where it is."""
        buffers, num_reqs = self.input_buffers, cycle.num_reqs
        return self.ops.prepare_token(
            self.state,
            cycle,
            self.all_token_ids,
            buffers.input_ids[:num_reqs],
            buffers.positions[:num_reqs],
            buffers.seq_lens[:num_reqs],
        )

    def _propose_from(
        self,
        turn: int,
        cycle: Cycle,
        hidden_states: torch.Tensor,  # [num_reqs, hidden_size] of the last tokens
        position: torch.Tensor,  # [num_reqs] where they are
    ) -> None:
        """Keep the member's scores of the token past the end, and propose one."""
        logits = self._logits(turn, hidden_states)
        kept = self.ops.place_score(self.state, cycle, turn, self.turn_gammas)
        self.state.kept_scores[turn - 1].index_copy_(0, kept, logits)
        tokens = self._draw(logits, cycle, position)
        self.ops.append(self.state, cycle, turn, self.turn_gammas, tokens)

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
        self._propose_more(len(self.turns) - 1)
        return self.ops.end_cycle(self.state, self.cycle, self.stats, self.turn_calls)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the step: tokens `[num_reqs, window + 1]`, and how many of them are decided and how
        many of the engine step's rejected, `[num_reqs]`."""
        return self.ops.outputs(self.cycle, self.turns.window + 1)

    def hidden_states(self) -> list[torch.Tensor]:  # num_turns - 1 x [num_tokens, hidden_size]
        """What the members have just computed in `run`, at the tokens of the engine step; anything
        where a request decodes."""
        batch, num_reqs = self.batch, self.cycle.num_reqs
        query_lens = batch.query_start_loc[: num_reqs + 1].long().diff()
        num_tokens = int(batch.query_start_loc_np[num_reqs])
        found = []
        for reading in self.readings:
            # The turn may have begun before the engine step's first token.
            shift = self.cycle.start - reading.start
            shift = shift + reading.query_start[:-1] - batch.query_start_loc[:num_reqs]
            shift = torch.repeat_interleave(shift, query_lens, output_size=num_tokens)
            at = torch.arange(num_tokens, device=self.device) + shift
            # What is read of a request that decodes may begin later and end before.
            found.append(reading.hidden_states[at.clamp(0, len(reading.hidden_states) - 1)])
        return found

    def logits_functions(self) -> list[tuple[tuple[int, ...], Any]]:
        """(members, their logits from the turn's hidden states) of the turns after the first."""
        return [
            (turn.members, lambda hidden, model=model: [model.compute_logits(hidden)])
            for turn, model in zip(self.turns.turns[1:], self.model, strict=True)
        ]

    def _set_gammas(self, gammas: tuple[int, ...]) -> None:
        self.gammas = gammas
        self.turn_gammas.copy_(self.gammas_on_device[gammas])
        self.turn_calls = self.calls_on_device[gammas]

    def _draw(
        self,
        logits: torch.Tensor,  # [num_reqs, vocab_size], raw
        cycle: Cycle,
        position: torch.Tensor,  # [num_reqs] of the token before
    ) -> torch.Tensor:  # [num_reqs]
        """Draws from a member's distribution.

        Of the sampling parameters only the temperature counts here: the others may cost
        acceptance, never exactness.
        """
        return gumbel_sample(
            logits,
            self.arange_gpu[: cycle.num_reqs],
            cycle.temperature,
            cycle.seeds,
            position,
            apply_temperature=True,
            # Noise of its own: a replacement must not know how its proposal was drawn.
            is_drafting=True,
            use_fp64=self.verifier.sampler.use_fp64_gumbel,
        )

    def _reading_start(
        self,
        turn: int,
        query_start: torch.Tensor,  # [num_reqs + 1] of the engine step
        row_start: torch.Tensor,  # [num_reqs + 1] of its rows of logits
    ) -> torch.Tensor:  # [num_reqs + 1] int32
        """query_start_loc of what a turn reads, where there is no graph of it."""
        step_lens, num_rows = query_start.diff(), row_start.diff()
        prompt = step_lens + self.turns.num_new(turn)
        decoding = prompt.clamp(max=self.turns.num_unscored(turn))
        query_lens = torch.where(step_lens == num_rows, decoding, prompt)
        ends = query_lens.clamp(max=self.max_model_len).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).int()

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
        num_reqs, num_tokens = cycle.num_reqs, int(query_start_np[-1])
        # vLLM's own buffer is too short for some batches with prompts.
        mappings = self._slot_mappings(cycle, num_tokens, out=self.slot_mappings)
        if is_again is not None:
            mappings[:, :num_tokens].masked_fill_(is_again, PAD_SLOT_ID)
        attn_metadata = self._build_attn_metadata(
            batch_desc=BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs),
            num_reqs=num_reqs,
            query_start_loc_np=query_start_np,
            seq_lens_cpu_upper_bound=self.batch.seq_lens_cpu_upper_bound,
            step=extra,
            slot_mappings=mappings,
        )
        by_layer = build_slot_mappings_by_layer(mappings, self.kv_cache_config)
        return self._run_member(turn, num_tokens, attn_metadata, by_layer)

    def _slot_mappings(
        self, cycle: Cycle, num_tokens: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:  # [num_kv_cache_groups, at least num_tokens]
        """Where the tokens in the input buffers are kept; by default in vLLM's own buffer."""
        return self.block_tables.compute_slot_mappings(
            cycle.slots,
            self.input_buffers.query_start_loc[: cycle.num_reqs + 1],
            self.input_buffers.positions[:num_tokens],
            num_tokens,
            out=out,
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
