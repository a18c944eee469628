"""CUDA graphs of a cycle's parts.

- **Decisions**: `TurnRunner.open`, and `TurnRunner.judge` of each later turn. They depend on the
  number of requests only, so any step can replay them, also one that reads prompts. There is one
  graph for each kind of sampling parameters (`Processing`).
- **Readings**: a member's pass over the tokens that are new to it, if all requests decode.
- **Passes of one token**, as many as a turn makes in a row.
- **Mixed readings**: a member's pass over tokens of any layout, in vLLM's piecewise graphs.

Readings and passes of one token need an attention backend that can refresh its metadata inside a
graph. The module builds on vLLM's graph manager for speculators.
"""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    has_compiled_submodule,
)
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm.chef.captured import GraphFunctions
from vllm.chef.sampling import IN_GRAPHS, Processing
from vllm.ensemble_decode.functions import Custom
from vllm.ensemble_decode.trial import obstacle_to_capture

if TYPE_CHECKING:
    from vllm.chef.speculator import ChefSpeculator

logger = init_logger(__name__)

Replay = Callable[[], None]


def obstacle_to_graphs(speculator: DraftModelSpeculator, query_len: int) -> str | None:
    """Why no graph can hold a pass over `query_len` tokens of each request. None if one can.

    The answer depends on the backends of the speculator's attention.
    """
    if not speculator.supports_decode_metadata_update:
        return "attention metadata that cannot be refreshed in a graph"
    support = speculator.attn_cg_support
    if support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
        return f"{support.min_cg_attn_backend}"
    for group in (group for groups in speculator.attn_groups for group in groups):
        threshold = group.get_metadata_builder().reorder_batch_threshold
        if threshold is not None and threshold < query_len:
            # Such a backend treats the tokens that a member reads as a prompt, and plans them on
            # the host.
            return f"an attention backend that takes {query_len} tokens for a prompt"
    return None


def for_the_same_batches(vllm_config: VllmConfig, step_len: int, length: int) -> VllmConfig:
    """A copy whose capture sizes cover the same request counts, at `length` tokens each.

    vLLM's own sizes are in tokens. vLLM rounds them up to whole requests of `step_len` tokens.
    """
    config = copy(vllm_config)
    # With dynamic speculation, vLLM would also make graphs of other lengths.
    config.speculative_config = None
    config.compilation_config = compilation = copy(vllm_config.compilation_config)
    largest = compilation.max_cudagraph_capture_size or 0
    # A size that is rounded up past the largest batch becomes the largest batch.
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    nums_reqs = {
        min(ceil(size / step_len), max_num_reqs)
        for size in compilation.cudagraph_capture_sizes or []
    }
    sizes = {n * length for n in nums_reqs if n * step_len <= largest}
    # No step is larger. vLLM's slot mappings have no room for more tokens either.
    max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    compilation.cudagraph_capture_sizes = sorted(size for size in sizes if size <= max_num_tokens)
    compilation.max_cudagraph_capture_size = max(compilation.cudagraph_capture_sizes, default=0)
    return config


def offer_every_length(manager: CudaGraphManager) -> None:
    """Let `manager.dispatch` find a graph where requests may have several lengths (`gamma: auto`).

    vLLM offers a batch only the graphs of the next larger number of tokens. Sizes are rounded up to
    a multiple of each length. Often none of the offered graphs then has the batch's length, and the
    batch would run without a graph.
    """
    graphs = manager._capture_descs.get(CUDAGraphMode.FULL, [])
    graphs = sorted(graphs, key=lambda desc: desc.num_tokens)
    for (num_tokens, num_loras), offered in manager._candidates.items():
        smallest: dict[Any, BatchExecutionDescriptor] = {}
        for desc in graphs:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_loras:
                smallest.setdefault((desc.uniform_token_count, desc.num_ubatches), desc)
        others = [desc for desc in offered if desc.cg_mode != CUDAGraphMode.FULL]
        manager._candidates[num_tokens, num_loras] = [*smallest.values(), *others]


class CycleGraphs:
    """The graphs of a cycle. A `CycleGraphs` that nothing was added to holds none.

    Each graph has a key: the name of a method of `GraphFunctions`, and its first arguments.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.managers: dict[tuple[Any, ...], SpeculatorCudaGraphManager] = {}
        self.lengths: dict[tuple[int, int], int] = {}
        """By turn and tokens per request in the engine step, tokens per request of a reading"""

    # Before the first step

    def add_decisions(self, num_turns: int, step_len: int) -> None:
        """Graphs of all decisions.

        `step_len` is the most tokens that a request has in the engine step. The request counts are
        those of the engine's own graphs for such steps.
        """
        config = for_the_same_batches(self.vllm_config, step_len, 1)
        for turn in range(num_turns):
            for processing in IN_GRAPHS:
                self._add(("decide", turn, processing), config, 1)

    def add_readings(self, turn: int, lengths: Mapping[int, int]) -> None:
        """Graphs of a turn's readings.

        `lengths` has the tokens per request that the member reads, by tokens per request in the
        engine step. All requests decode.
        """
        for step_len, length in lengths.items():
            config = for_the_same_batches(self.vllm_config, step_len, length)
            self._add(("read", turn, step_len), config, length)
            self.lengths[turn, step_len] = length

    def add_passes(self, turn: int, numbers: Collection[int]) -> None:
        """Graphs of a turn's passes of one token.

        `numbers` has each number of passes that the turn may make in a row.
        """
        for number in numbers:
            if number:
                self._add(("propose_more", turn, number), self.vllm_config, 1)

    def add_mixed_readings(self, turn: int) -> None:
        """Piecewise graphs of a turn's readings, for batches of any layout."""
        key, mode = ("member", turn), CUDAGraphMode.PIECEWISE
        self.managers[key] = SpeculatorCudaGraphManager(self.vllm_config, self.device, mode, 1)

    def _add(self, key: tuple[Any, ...], vllm_config: VllmConfig, length: int) -> None:
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.managers[key] = SpeculatorCudaGraphManager(vllm_config, self.device, mode, length)

    def max_decided(self) -> int:
        """Requests in the largest graph of a decision. 0 if there is none."""
        counts = [
            desc.num_reqs
            for (part, *_), manager in self.managers.items()
            if part == "decide"
            for desc in manager._capture_descs.get(CUDAGraphMode.FULL, [])
        ]
        return max(counts, default=0)

    def capture(self, parts: GraphFunctions, *args: Any) -> None:
        """Capture the functions in `parts`.

        `args` are the further arguments of `SpeculatorCudaGraphManager.capture`.
        """
        for (part, *selects), manager in self.managers.items():
            if manager.needs_capture():
                function = partial(getattr(parts, part), *selects)

                def captured(*arguments: Any, function=function, **_: Any) -> None:
                    function(*arguments)

                description = f"Capturing turns, {part} {' '.join(map(str, selects))}"
                manager.capture(captured, *args, progress_bar_desc=description)

    # In a step

    def find_decisions(
        self, num_turns: int, num_reqs: int, processing: Processing
    ) -> list[Replay] | None:
        """Calls that replay the decisions of each turn. None if there is no graph.

        The first is `TurnRunner.open`.
        """
        keys = [("decide", turn, processing) for turn in range(num_turns)]
        return self._find(keys, num_reqs, [1] * num_turns)

    def find_readings(self, num_turns: int, num_reqs: int, step_len: int) -> list[Replay] | None:
        """Calls that replay the readings of the turns after the first.

        Each request has `step_len` tokens in the engine step. None if a turn has no graph.
        """
        turns = range(1, num_turns)
        lengths = [self.lengths.get((turn, step_len), 0) for turn in turns]
        return self._find([("read", turn, step_len) for turn in turns], num_reqs, lengths)

    def find_passes(self, turn: int, number: int, num_reqs: int) -> Replay | None:
        """A call that replays `number` passes of one token. None if there is no such graph."""
        found = self._find([("propose_more", turn, number)], num_reqs, [1])
        return found[0] if found else None

    def mixed_size(self, turn: int, num_tokens: int) -> int | None:
        """Tokens in the piecewise graphs that hold `num_tokens` tokens. None if none hold them."""
        manager = self.managers.get(("member", turn))
        if manager is None:
            return None
        desc = manager.dispatch(1, num_tokens, None, num_active_loras=0)
        return desc.num_tokens if desc.cg_mode == CUDAGraphMode.PIECEWISE else None

    def _find(
        self, keys: list[tuple[Any, ...]], num_reqs: int, lengths: list[int]
    ) -> list[Replay] | None:
        replays = []
        for key, length in zip(keys, lengths, strict=True):
            manager = self.managers.get(key)
            if manager is None:
                return None
            desc = manager.dispatch(num_reqs, num_reqs * length, length, num_active_loras=0)
            if desc.cg_mode != CUDAGraphMode.FULL:
                return None
            replays.append(partial(manager.run_fullgraph, desc))
        return replays


def graphs_to_capture(speculator: "ChefSpeculator", mode: CUDAGraphMode) -> CycleGraphs:
    """The graphs that the speculator's turns can have. They are not captured yet."""
    graphs = CycleGraphs(speculator.vllm_config, speculator.device)
    turns, gammas = speculator.turns, speculator.gammas
    further, step_len = range(1, len(turns)), 1 + turns.window
    if mode.decode_mode() == CUDAGraphMode.FULL:
        if can_capture_decisions(speculator):
            graphs.add_decisions(len(turns), step_len)
        if can_capture_passes(speculator):
            for turn in further:
                lengths = {1 + n: turns.num_read(turn, 1 + n) for n in gammas.depths}
                longest = speculator.max_model_len
                graphs.add_readings(turn, {n: min(lengths[n], longest) for n in lengths})
                graphs.add_passes(turn, gammas.possible_passes(turn))
    if mode.mixed_mode() == CUDAGraphMode.PIECEWISE:
        for turn in further:
            # Piecewise graphs are made by compilation.
            if has_compiled_submodule(speculator.model[turn - 1]):
                graphs.add_mixed_readings(turn)
    return graphs


def can_capture_decisions(speculator: "ChefSpeculator") -> bool:
    """Whether graphs can hold the decisions. If not, the log says why."""
    function, ensemble = speculator.verifier.function, speculator.ensemble
    if not isinstance(function, Custom):
        return True
    obstacle = obstacle_to_capture(
        function, speculator.vocab_size, ensemble.combines_probs, speculator.device
    )
    if obstacle is not None:
        logger.warning_once(
            "Decisions run without CUDA graphs, because of the ensemble_fn '%s': %s.",
            ensemble.ensemble_fn,
            obstacle,
        )
    return obstacle is None


def can_capture_passes(speculator: "ChefSpeculator") -> bool:
    """Whether graphs can hold the members' passes. If not, the log says why."""
    turns = speculator.turns
    query_len = max(turns.num_read(turn, 1 + turns.window) for turn in range(1, len(turns)))
    obstacle = obstacle_to_graphs(speculator, query_len)
    if obstacle is not None:
        logger.warning_once("Members run without full CUDA graphs: %s.", obstacle)
    return obstacle is None
