"""Which batches have a CUDA graph in the turns: vLLM's own managers, without any capture."""

from itertools import product
from math import ceil
from types import SimpleNamespace

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm.chef.config import depth_schedule
from vllm.chef.graphs import CycleGraphs, offer_every_length
from vllm.chef.runner import ChefRunner
from vllm.chef.sampling import Processing
from vllm.chef.turns import chef_turns, sd_turns
from vllm.ensemble_decode.runner import MemberRunner

FULL = CUDAGraphMode.FULL
# The sizes that vLLM chooses, and few.
SIZES = {
    "default": [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)],
    "few": [1, 8, 48, 192, 448],
    "none": [],
}


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    init = cudagraph_utils.CudaGraphManager._init_candidates

    def init_as_captured(manager):
        init(manager)
        manager._graphs_captured = True

    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "_init_candidates", init_as_captured)


def config(sizes: list[int], max_num_seqs: int, window: int, schedule: list | None):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes, default=0)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        speculative_config=SimpleNamespace(
            uses_dynamic_speculative_decoding=lambda: schedule is not None,
            num_speculative_tokens_per_batch_size=schedule,
        ),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        num_speculative_tokens=window,
    )


def cycle_graphs(vllm_config, turns, depths) -> CycleGraphs:
    graphs = CycleGraphs(vllm_config, None)
    graphs.add_decisions(len(turns), 1 + turns.window)
    for turn in range(1, len(turns)):
        lengths = {1 + depth: turns.num_read(turn, 1 + depth) for depth in depths}
        graphs.add_readings(turn, lengths)
        graphs.add_passes(turn, {0, 3})
    return graphs


def check_replays(replays, managers, num_reqs, lengths) -> None:
    for replay, manager, length in zip(replays, managers, lengths, strict=True):
        assert replay.func == manager.run_fullgraph
        (desc,) = replay.args
        assert desc.num_reqs >= num_reqs and desc.uniform_token_count == length


def is_held_by(sizes: list[int], max_num_seqs: int, num_reqs: int, length: int) -> bool:
    """Whether one of the sizes, rounded up to whole requests, holds this many requests.

    vLLM makes no graph with more tokens than its largest size, or with more requests than there
    are.
    """
    rounded = [ceil(size / length) for size in sizes]
    return any(num_reqs <= held <= max_num_seqs and held * length <= max(sizes) for held in rounded)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("max_num_seqs", [64, 256])
@pytest.mark.parametrize("gammas", [(1, 1), (1, 5), (1, 1, 5)])
def test_what_has_a_graph_in_the_engine_step_has_one_in_the_turns(
    sizes, max_num_seqs, gammas, auto
):
    turns = chef_turns(gammas, range(len(gammas), 0, -1), (True,) * len(gammas))
    schedule = depth_schedule(turns) if auto else None
    vllm_config = config(SIZES[sizes], max_num_seqs, turns.window, schedule)
    mode, step_len = CUDAGraphMode.FULL_DECODE_ONLY, 1 + turns.window
    step = SpeculatorCudaGraphManager(vllm_config, None, mode, step_len)
    offer_every_length(step)
    depths, found = range(turns.window + 1) if auto else [turns.window], 0
    graphs = cycle_graphs(vllm_config, turns, depths)
    managers, num_turns, further = graphs.managers, len(turns), range(1, len(turns))
    for num_reqs, depth in product(range(1, max_num_seqs + 1), depths):
        length = 1 + depth
        desc = step.dispatch(num_reqs, num_reqs * length, length, num_active_loras=0)
        expected = is_held_by(SIZES[sizes], max_num_seqs, num_reqs, length)
        assert (desc.cg_mode == FULL) == expected, (num_reqs, length)
        decisions = graphs.find_decisions(num_turns, num_reqs, Processing.BUILT_IN)
        readings = graphs.find_readings(num_turns, num_reqs, length)
        if desc.cg_mode == FULL:
            found += 1
            assert desc.uniform_token_count == length and desc.num_reqs >= num_reqs
            assert readings is not None, (num_reqs, length)
            assert decisions is not None or depth < turns.window, (num_reqs, length)
        if readings is not None:
            of_turns = [managers["read", turn, length] for turn in further]
            lengths = [turns.num_read(turn, length) for turn in further]
            check_replays(readings, of_turns, num_reqs, lengths)
        if decisions is not None:
            of_turns = [managers["decide", turn, Processing.BUILT_IN] for turn in range(num_turns)]
            check_replays(decisions, of_turns, num_reqs, [1] * num_turns)
            assert num_reqs <= graphs.max_decided()
    for manager in managers.values():
        assert len(manager._capture_descs.get(FULL, [])) <= len(SIZES[sizes])
    assert graphs.find_readings(num_turns, 1, turns.window + 2) is None
    assert graphs.find_passes(1, 2, 1) is None
    assert (graphs.find_passes(1, 3, 1) is not None) == bool(SIZES[sizes])
    assert (found > 0) == bool(SIZES[sizes])
    assert vllm_config.compilation_config.cudagraph_capture_sizes is SIZES[sizes]


def test_no_graph_is_larger_than_a_step_may_be():
    turns = chef_turns((1, 5), (2, 1), (True, True))
    vllm_config = config(SIZES["default"], 128, turns.window, None)
    for max_num_tokens, num_reqs in ((8192, 83), (64, 32)):
        vllm_config.scheduler_config.max_num_batched_tokens = max_num_tokens
        graphs = cycle_graphs(vllm_config, turns, [turns.window])
        assert graphs.find_readings(2, num_reqs, 6)
        assert num_reqs <= graphs.max_decided() <= max_num_tokens


@pytest.mark.parametrize("auto", [False, True])
def test_the_largest_batch_has_graphs_of_its_own(auto):
    """vLLM rounds its sizes 16 and 24 up to 6 and 8 requests, which are more than there are."""
    turns = chef_turns((1, 2), (2, 1), (True, True))
    schedule = depth_schedule(turns) if auto else None
    graphs = cycle_graphs(config([1, 2, 4, 8, 16, 24], 5, 2, schedule), turns, [turns.window])
    assert graphs.max_decided() == 5
    for num_reqs in range(1, 6):
        assert graphs.find_decisions(2, num_reqs, Processing.BUILT_IN), num_reqs
        assert graphs.find_readings(2, num_reqs, 1 + turns.window), num_reqs


@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_of_any_layout_get_the_next_larger_piecewise_graph(sizes):
    turns = chef_turns((1, 5), (2, 1), (True, True))
    # Prompts have many tokens of few requests.
    vllm_config = config(SIZES[sizes], 2, turns.window, depth_schedule(turns))
    graphs = cycle_graphs(vllm_config, turns, [turns.window])
    assert graphs.mixed_size(1, 1) is None, "it has full graphs only"
    graphs.add_mixed_readings(1)
    for num_tokens in range(1, max(SIZES[sizes], default=0) + 2):
        held = [size for size in SIZES[sizes] if size >= num_tokens]
        assert graphs.mixed_size(1, num_tokens) == min(held, default=None), num_tokens
    captured = set(graphs.managers["member", 1]._capture_descs)
    assert captured <= {CUDAGraphMode.PIECEWISE}
    assert graphs.mixed_size(2, 1) is None, "this turn has no piecewise graphs"
    assert CycleGraphs(vllm_config, None).mixed_size(1, 1) is None


def test_piecewise_graphs_hold_nothing_before_they_are_captured():
    graphs = CycleGraphs(config(SIZES["default"], 2, 5, None), None)
    graphs.add_mixed_readings(1)
    assert graphs.mixed_size(1, 3) == 4
    graphs.managers["member", 1]._graphs_captured = False
    assert graphs.mixed_size(1, 3) is None


def test_a_member_reads_what_it_has_not_scored():
    for gammas, lengths in {
        (1, 1): [[1, 2], [2, 2]],
        (1, 5): [[1, 2], [2, 2], [6, 2]],
        (1, 1, 1): [[1, 2, 3], [2, 3, 3], [3, 3, 3]],
        (1, 1, 5): [[1, 2, 3], [2, 3, 3], [7, 7, 3]],
    }.items():
        turns = chef_turns(gammas, range(len(gammas), 0, -1), (True,) * len(gammas))
        for step_len, *read in lengths:
            found = [turns.num_read(turn, step_len) for turn in range(1, len(turns))]
            assert found == read, (gammas, step_len)
    assert [sd_turns(3, 5).num_read(1, step_len) for step_len in (1, 6)] == [1, 1]


def test_the_engine_step_finds_graphs_of_every_length(monkeypatch):
    turns = chef_turns((1, 5), (2, 1), (True, True))
    vllm_config = config(SIZES["default"], 64, turns.window, depth_schedule(turns))
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    runner = object.__new__(ChefRunner)
    runner.cudagraph_manager = SpeculatorCudaGraphManager(vllm_config, None, mode, 6)

    def is_found(num_reqs: int, length: int) -> bool:
        desc = runner.cudagraph_manager.dispatch(num_reqs, num_reqs * length, length, 0)
        return desc.cg_mode == FULL

    assert not is_found(3, 4), "vLLM mends this itself"
    monkeypatch.setattr(MemberRunner, "capture_model", lambda self: 7, raising=False)
    assert runner.capture_model() == 7
    assert is_found(3, 4)
