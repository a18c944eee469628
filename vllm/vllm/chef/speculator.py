"""The members whose turns come after the first, as vLLM's speculator.

This module knows vLLM's life cycle of a speculator. The speculator's draft tokens carry the window
from step to step. `cycle.py` knows the order of a cycle.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm.chef.captured import GraphFunctions, ReadingBuffers, StepInputs
from vllm.chef.cycle import EngineStep, TurnRunner
from vllm.chef.gammas import StepGammas
from vllm.chef.grammar import forbidden_tokens
from vllm.chef.graphs import CycleGraphs, graphs_to_capture
from vllm.chef.ops import ops_for
from vllm.chef.passes import EagerPasses, MemberCaller
from vllm.chef.prompt_logprobs import LogitsFn
from vllm.chef.sampling import (
    DeviceParams,
    Processing,
    ProcessorStates,
    SamplerParams,
    StepParams,
    draw_proposals,
    reserve_buffers,
)
from vllm.chef.state import Cycle, ProposalState, SlotStates, kept_scores_bytes, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.step import (
    CycleStep,
    Decisions,
    EagerDecisions,
    EagerReadings,
    KeptReadings,
    LoadedReadings,
    Readings,
    ReplayedDecisions,
    ReplayedReadings,
    uniform_step_len,
)
from vllm.chef.turns import Turns
from vllm.chef.verifier import StepScores, Verifier
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.dtypes import widest
from vllm.ensemble_decode.members import load_member
from vllm.ensemble_decode.memory import out_of_memory
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.request_args import SlotCoefficients


class ChefSpeculator(StandaloneARSpeculator):
    """Loads and calls the members whose turns come after the first.

    Before the first step, these methods are called in this order: `load_model`, `set_sampler`,
    `set_attn`, `init_cudagraph_manager`, `capture`. All but `set_sampler` are vLLM's. In each step
    our runner calls `begin`, gets a `CycleStep` and runs it. Later vLLM calls `propose`, which
    finishes the step.
    """

    # From `load_model` on.
    first_members: MemberGroup
    state: ProposalState
    all_cycle: Cycle
    """The cycle of the largest batch. Each step's cycle is a view of its first rows."""
    # From `set_sampler` on.
    sampler: Sampler
    processor_states: ProcessorStates
    verifier: Verifier
    caller: MemberCaller
    turn_runner: TurnRunner
    # From the first `begin` on.
    step: CycleStep

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        ensemble: EnsembleConfig,
        members: list[ModelConfig],
        turns: Turns,
        req_states: RequestState,
    ) -> None:
        super().__init__(vllm_config, device)
        self.ensemble = ensemble
        self.member_configs = members
        self.turns = turns
        self.req_states = req_states
        self.ops = ops_for(device)
        self.stats = TurnStats(turns, device)
        self.num_extra_query_per_req = turns.num_new(len(turns) - 1)
        max_num_tokens = self.max_num_tokens + self.max_num_reqs * self.num_extra_query_per_req
        self.input_buffers = InputBuffers(self.max_num_reqs, max_num_tokens, device)
        is_dynamic = vllm_config.speculative_config.uses_dynamic_speculative_decoding()
        depths = range(turns.window + 1) if is_dynamic else [turns.window]
        self.gammas = StepGammas(turns, depths, device)
        self.graphs = CycleGraphs(vllm_config, device)
        self.captured: GraphFunctions | None = None

    # Before the first step

    def load_draft_model(
        self, target_model: MemberGroup, target_attn_layer_names: set[str]
    ) -> nn.Module:
        self.first_members = target_model
        self._make_state()
        return self._load_members()

    def _load_members(self) -> nn.ModuleList:  # [num_turns - 1]
        loaded = dict(zip(self.turns[0].members, self.first_members.members, strict=True))
        models = []
        for turn in self.turns.sequence[1:]:
            (member,) = turn.members
            loaded[member] = load_member(
                self.vllm_config, self.ensemble, self.member_configs, member, loaded
            )
            models.append(MemberGroup(members=[loaded[member]]))
        return nn.ModuleList(models)

    def _make_state(self) -> None:
        """Allocate the windows and scores of all requests.

        vLLM measures this memory as part of the models' memory.
        """
        with out_of_memory(
            f"what turns keep of {self.max_num_reqs} requests",
            "lower --max-num-seqs or chef.gamma",
        ):
            self.state = ProposalState(
                self.turns,
                self.max_num_reqs,
                self.max_model_len,
                self.vocab_size,
                self._scores_dtype,
                self.device,
            )
            self.all_cycle = make_cycle(self.state, self.max_num_reqs)

    @property
    def _scores_dtype(self) -> torch.dtype:
        return widest(config.head_dtype for config in self.member_configs)

    def kept_scores_bytes(self) -> dict[int, int]:
        """See `state.kept_scores_bytes`."""
        return kept_scores_bytes(self.turns, self.max_num_reqs, self.vocab_size, self._scores_dtype)

    def set_sampler(self, sampler: Sampler, coefficients: SlotCoefficients) -> None:
        """Build the objects that need vLLM's sampler. vLLM makes it after the members."""
        self.sampler = sampler
        self.processor_states = ProcessorStates(sampler)
        self.verifier = Verifier(self.ensemble, coefficients, self.turns, self.state, sampler)
        self.caller = MemberCaller(self, self.state, self.req_states.all_token_ids.gpu)
        draw = partial(draw_proposals, requests=self.arange_gpu, use_fp64=sampler.use_fp64_gumbel)
        self.turn_runner = TurnRunner(
            self.state,
            self.ops,
            self.gammas.on_device,
            self.verifier,
            self.caller.compute_logits,
            draw,
        )

    def logits_functions(self) -> list[tuple[tuple[int, ...], LogitsFn]]:
        """(members, their logits from the turn's hidden states) of the turns after the first."""
        return [
            (turn.members, lambda hidden, model=model: [model.compute_logits(hidden)])
            for turn, model in zip(self.turns.sequence[1:], self.model, strict=True)
        ]

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        # vLLM's own buffer is too short for what the last member may read.
        self.expanded_slot_mappings = torch.empty(
            self.block_tables.num_kv_cache_groups,
            self.input_buffers.max_num_tokens,
            dtype=torch.int64,
            device=self.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = graphs_to_capture(self, cudagraph_mode)

    def capture(self) -> None:
        graphs = self.graphs
        if not graphs.managers:
            return
        cycle = self.all_cycle
        # No row has a request, so what is run for a capture changes no request's state.
        self.ops.load(cycle, cycle.slots[:0], cycle.slot_states)
        reserve_buffers(self.vocab_size, self.device)
        self.captured = self._make_captured()
        graphs.capture(
            self.captured,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
        )

    def _make_captured(self) -> GraphFunctions:
        """Allocate the memory that graphs share with a step."""
        first = self.first_members
        dtype = widest(config.dtype for config in self.member_configs)
        hidden = torch.zeros(1, sum(first.hidden_sizes), dtype=dtype, device=self.device)
        max_num_reqs = self.graphs.max_decided()
        inputs = StepInputs(
            first.compute_member_logits(hidden),
            self.target_input_buffers,
            max_num_reqs,
            max_num_reqs * (1 + self.turns.window),
            self.ensemble.samples_members,
            self.processor_states,
        )
        readings = ReadingBuffers(
            [sum(model.hidden_sizes) for model in self.model],
            self.max_num_reqs,
            self.input_buffers.max_num_tokens,
            dtype,
            self.device,
        )
        return GraphFunctions(self.turn_runner, self.caller, self.all_cycle, inputs, readings)

    # In a step

    def begin(
        self,
        batch: InputBatch,
        engine_step: EngineStep,
        processing: Processing,
        depth: int,
        keeps_readings: bool,
    ) -> CycleStep:
        """Start the step's cycle. It leaves at most `depth` tokens in each window.

        Args:
            processing: what the requests ask for.
            keeps_readings: `CycleStep.readings` is a `KeptReadings`. Full graphs cannot keep them.
        """
        self.gammas.set_depth(depth)
        if self.graphs.managers:
            self._refresh_block_tables()
        cycle = self._load_cycle(batch)
        passes = EagerPasses(self.caller, batch, self.graphs.mixed_size)
        decisions = self._decisions(cycle, engine_step, processing)
        readings = self._replayed_readings(batch) if not keeps_readings else None
        if readings is None:
            readings = EagerReadings(passes, cycle)
            if isinstance(decisions, ReplayedDecisions):
                readings = LoadedReadings(readings, self.captured.readings)
            if keeps_readings:
                readings = KeptReadings(readings)
        self.step = CycleStep(
            cycle,
            engine_step,
            self.turn_runner,
            decisions,
            readings,
            passes,
            self.gammas,
            self.graphs,
        )
        return self.step

    def _decisions(
        self, cycle: Cycle, engine_step: EngineStep, processing: Processing
    ) -> Decisions:
        replays = self.graphs.find_decisions(len(self.turns), cycle.num_reqs, processing)
        if replays is None:
            return EagerDecisions(self.turn_runner, cycle, engine_step)
        self.captured.inputs.load(engine_step, processing)
        return ReplayedDecisions(replays)

    def _replayed_readings(self, batch: InputBatch) -> Readings | None:
        """None if no full graphs fit the batch."""
        step_len = uniform_step_len(batch)
        if step_len is None:
            return None
        replays = self.graphs.find_readings(len(self.turns), batch.num_reqs, step_len)
        if replays is None:
            return None
        return ReplayedReadings(replays, self.captured.readings, batch.num_reqs)

    def _load_cycle(self, batch: InputBatch) -> Cycle:
        # Copy to memory where CUDA graphs find them, because vLLM's own tensors move.
        sampling = self.sampler.sampling_states
        states = SlotStates(
            self.req_states.prefill_len.gpu,
            sampling.temperature.gpu,
            sampling.seeds.gpu,
            sampling.top_k.gpu,
            sampling.top_p.gpu,
            sampling.min_p.gpu,
        )
        return self.ops.load(self.all_cycle, batch.idx_mapping[: batch.num_reqs], states)

    def _refresh_block_tables(self) -> None:
        """Refresh the block tables of kernels whose block size differs from vLLM's.

        Graphs read these tables, but do not compute them.
        """
        for groups in self.attn_groups:
            for group in groups:
                tables = self.block_tables.input_block_tables[group.kv_cache_group_id]
                group.map_to_kernel_block_table(tables)

    def step_params(self, batch: InputBatch, processing: Processing) -> StepParams:
        """The sampling parameters of a step whose requests ask for `processing`."""
        if processing == Processing.CUSTOM:
            return SamplerParams(self.sampler, batch)
        if processing == Processing.BUILT_IN:
            self.processor_states.load()
        return DeviceParams(self.ensemble.samples_members, processing, self.processor_states)

    def forbidden_tokens(
        self,
        batch: InputBatch,
        bitmask: torch.Tensor,  # [num_rows, ceil(vocab_size / 32)]
    ) -> torch.Tensor:  # [num_reqs]
        """See `grammar.forbidden_tokens`."""
        return forbidden_tokens(batch, bitmask, self.req_states.draft_tokens, self.state.lengths)

    def logprobs(self, step: CycleStep, dims: tuple[int, int]) -> LogprobsTensors:
        """See `Verifier.logprobs`. The step has run."""
        return self.verifier.logprobs(step.engine_step.scores, step.cycle, *dims)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:  # [num_reqs, window]
        """End the step: make the last turn's proposals, and return the window for the next step."""
        return self._dummy_run(input_batch) if dummy_run else self.step.finish(self.stats)

    # For vLLM's memory profile

    def _dummy_run(self, input_batch: InputBatch) -> torch.Tensor:
        """Run every member once over as many tokens as it may get. This also compiles it."""
        num_tokens = input_batch.num_tokens + input_batch.num_reqs * self.num_extra_query_per_req
        num_tokens = min(num_tokens, self.max_num_tokens)
        for turn in range(1, len(self.turns)):
            hidden_states = self.caller.run(turn, num_tokens, None, None)
            self.model[turn - 1].compute_logits(hidden_states[: input_batch.num_reqs])
        return self.draft_tokens[: input_batch.num_reqs]

    def dummy_decision(self, batch: InputBatch, scores: StepScores) -> None:
        """The last decision of a cycle, which takes the most memory."""
        cycle = self._load_cycle(batch)
        self.verifier.decide(self.turns.last_scorer, scores, cycle)
