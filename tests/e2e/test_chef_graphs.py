"""What the CUDA graphs of turns replay, tested without a GPU: the same functions called once more.

A stand-in for vLLM's manager "captures" a function by keeping it. It "replays" the function by
calling it on fixed memory, at sizes that are rounded up. So it shows errors that a real graph would
hide:
- a value that came from the host,
- memory that has moved,
- padding rows that are taken for requests.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine, generate, greedy
from quick import quick
from tiny_models import VOCAB_SIZE, llama_config, save_model, save_noisy_copy
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.sample.ops.topk_topp_triton import _TRITON_BUFFER_CACHE
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

import vllm.chef.graphs
from vllm.chef.graphs import can_capture_passes
from vllm.chef.sampling import Processing, needed_processing
from vllm.chef.speculator import ChefSpeculator
from vllm.chef.verifier import Verifier
from vllm.ensemble_decode.functions import make_function

PROMPTS = [[1, 2, 3], list(range(20)), [7], [5, 6] * 8, [9, 8, 7]]
NUM_TOKENS = 24
# The parameters of each prompt.
FILTERS = [dict(top_p=0.8), dict(top_k=3), dict(), dict(min_p=0.1), dict(top_k=9, top_p=0.9)]
PROCESSORS = [
    dict(repetition_penalty=1.4, top_k=5),
    dict(allowed_token_ids=list(range(7, 40)), presence_penalty=0.5),
    dict(frequency_penalty=1.0, logit_bias={3: 1.0, 9: -5.0}),
    dict(min_tokens=20, stop_token_ids=list(range(30))),
    dict(bad_words=[[9], [5, 6], [4, 4, 4]], repetition_penalty=0.9),
]
# Of the first two members.
WEIGHTS = [[1, 0], None, [0, 1], [0.2, 0.8], [0.7, 0.6]]
REPORTS = [
    dict(logprobs=3),
    dict(logprobs=0, repetition_penalty=1.2),
    dict(),
    dict(logprob_token_ids=[1, 2, 63]),
    dict(logprobs=20, top_p=0.9),
]


def requests(asked: list[dict[str, Any]]) -> list[SamplingParams]:
    made = []
    for seed, (temperature, more) in enumerate(zip([1, 0.7, 0, 1.5, 0.9], asked, strict=True)):
        bad_words = more.get("bad_words", [])
        more = {key: value for key, value in more.items() if key != "bad_words"}
        settings = dict(temperature=temperature, seed=seed, max_tokens=NUM_TOKENS)
        made.append(SamplingParams(**settings, ignore_eos="stop_token_ids" not in more, **more))
        # vLLM makes these from words, with a tokenizer.
        made[-1]._bad_words_token_ids = bad_words
    return made


def with_weights(params: list[SamplingParams], num_members: int) -> list[SamplingParams]:
    """The requests, with `WEIGHTS`. A third member has weight 0.4."""
    made = [request.clone() for request in params]
    for request, weights in zip(made, WEIGHTS, strict=True):
        if weights is not None:
            request.extra_args = {"ensemble_weights": [*weights, 0.4][:num_members]}
    return made


def logprobs_of(output: Any) -> list[Any] | None:
    """By token: rank, and log-probability up to what rounding changes."""
    if output.logprobs is None:
        return None
    return [
        {
            token: (found.rank, pytest.approx(found.logprob, abs=1e-4))
            for token, found in row.items()
        }
        for row in output.logprobs
    ]


BATCHES = {
    Processing.TEMPERATURE: requests([{}] * 5),
    Processing.FILTERS: requests(FILTERS),
    Processing.BUILT_IN: requests(PROCESSORS),
}
REPORTED = requests(REPORTS)
CASES = {
    "two": (2, dict(gamma=[1, 4]), 4),
    "three": (3, dict(gamma=[1, 2, 3]), 5),
    "equal": (3, dict(gamma=[1, 1, 1]), 2),
    "sd": (2, dict(policy="sd", gamma=3), 3),
    "auto": (2, dict(gamma="auto", max_gamma=[1, 4]), 4),
    "auto of three": (3, dict(gamma="auto", max_gamma=[1, 1, 3]), 4),
}


class Manager:
    """Graphs of 1, 2, 4, 8, 16, ... tokens, rounded up to whole requests as vLLM's are.

    The number of padding requests depends on how many tokens each request has.
    """

    num_replays: Counter[tuple[Any, ...]] = Counter()
    """By key of the graph"""
    key: tuple[Any, ...]
    _candidates: dict[Any, Any] = {}

    def __init__(self, speculator: ChefSpeculator, length: int) -> None:
        self.speculator = speculator
        self.length = length
        # The largest graph, which the speculator makes room for.
        largest = self.descriptor(speculator.max_num_reqs, length)
        self._capture_descs = {CUDAGraphMode.FULL: [largest]}

    def descriptor(self, num_reqs: int, length: int) -> BatchExecutionDescriptor:
        sizes = [-(-size // length) for size in (1, 2, 4, *range(8, 8192, 8))]
        num_reqs = next(size for size in sizes if size >= num_reqs)
        num_reqs = min(num_reqs, self.speculator.max_num_reqs)
        return BatchExecutionDescriptor(
            CUDAGraphMode.FULL, num_reqs * length, num_reqs, uniform_token_count=length
        )

    def needs_capture(self) -> bool:
        return True

    def capture(self, function: Any, *_: Any, progress_bar_desc: str) -> None:
        self.function = function

    def dispatch(self, num_reqs: int, num_tokens: int, length: int, **_: Any) -> Any:
        assert num_tokens == num_reqs * length
        return self.descriptor(num_reqs, length)

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> None:
        Manager.num_replays[self.key] += 1
        speculator, num_tokens = self.speculator, desc.num_tokens
        mappings = speculator.block_tables.slot_mappings[:, :num_tokens]
        self.function(
            desc.num_reqs,
            num_tokens,
            speculator.rebuild_metadata(desc),
            build_slot_mappings_by_layer(mappings, speculator.kv_cache_config),
        )


def use_graphs(speculator: ChefSpeculator, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata: dict[str, Any] = {}

    def rebuild_metadata(desc: BatchExecutionDescriptor) -> dict[str, Any]:
        # A real graph's metadata keeps its memory, so a replay sees what the buffers hold then.
        query_start = np.arange(desc.num_reqs + 1, dtype=np.int32) * desc.uniform_token_count
        speculator.input_buffers.query_start_loc[: desc.num_reqs + 1] = torch.from_numpy(
            query_start
        )
        metadata.update(
            speculator._build_attn_metadata(
                num_reqs=desc.num_reqs,
                batch_desc=desc,
                query_start_loc_np=query_start,
                seq_lens_cpu_upper_bound=torch.full((desc.num_reqs,), speculator.max_model_len),
                step=0,
            )
        )
        speculator.desc = desc
        return metadata

    def make_manager(vllm_config: Any, device: Any, mode: Any, length: int) -> Manager:
        return Manager(speculator, length)

    monkeypatch.setattr(vllm.chef.graphs, "SpeculatorCudaGraphManager", make_manager)
    speculator.rebuild_metadata = rebuild_metadata
    monkeypatch.setattr(vllm.chef.graphs, "can_capture_passes", lambda _: True)
    speculator._update_draft_decode_metadata = lambda _, num_reqs: rebuild_metadata(speculator.desc)
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    for key, manager in speculator.graphs.managers.items():
        manager.key = key
    speculator.capture()


def counted_chunks(monkeypatch: pytest.MonkeyPatch, num_logits: int) -> list[int]:
    """Count, from now on, the parts of each verification, with at most `num_logits` rows a part."""
    chunks, counts = Verifier._chunks, []

    def counted(*args: Any) -> list[slice]:
        parts = list(chunks(*args))
        counts.append(len(parts))
        return parts

    monkeypatch.setattr(Verifier, "_chunks", counted)
    monkeypatch.setattr(vllm.chef.verifier, "get_max_chunk_logits", lambda _: num_logits)
    return counts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.01 * s) for s in (1, 2)]


@pytest.mark.parametrize("case", quick(CASES))
def test_replayed_passes_emit_what_eager_ones_emit(models, case, monkeypatch):
    num_members, chef, window = CASES[case]
    target = "raw-logits" if case == "sd" else "logits"
    settings = dict(extra_model=models[1:num_members], ensemble_target=target)
    greedy_params = with_weights([greedy(NUM_TOKENS)] * len(PROMPTS), num_members)
    with engine(models[0], settings) as llm:
        expected = generate(llm, PROMPTS, greedy_params)
        without = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    assert sum(a.token_ids != b.token_ids for a, b in zip(expected, without, strict=True)) > 1
    with engine(models[0], settings, chef, window) as llm:

        def run() -> tuple[list[Any], list[Any], dict[str, Any]]:
            llm.reset_prefix_cache()
            llm.collective_rpc("reset_turn_stats")
            outputs = generate(llm, PROMPTS, greedy_params)
            stats = llm.collective_rpc("turn_stats")[0]
            sampled = generate(llm, PROMPTS, with_weights(REPORTED, num_members))
            for processing, params in BATCHES.items():
                before = Manager.num_replays.copy()
                sampled += generate(llm, PROMPTS, params)
                sampled += generate(llm, PROMPTS, with_weights(params, num_members))
                used = Manager.num_replays - before
                # A batch may end with requests that ask for less.
                kinds = [key[2] for key in used if key[0] == "decide"]
                assert not before or max(kinds) == processing
            made = [(o.token_ids, o.finish_reason, logprobs_of(o)) for o in sampled]
            return [o.token_ids for o in outputs], made, stats

        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        Manager.num_replays.clear()
        _, eager_sampled, eager_stats = run()
        if case == "three":
            # As with a large vocabulary: a decision covers few requests at a time.
            chunks = counted_chunks(monkeypatch, num_logits=num_members * (window + 2) * 2)
        use_graphs(runner.speculator, monkeypatch)
        # Nobody needs a larger buffer, so it stays at the address that the graphs know.
        buffers = [b for key, b in _TRITON_BUFFER_CACHE.items() if key[2] == VOCAB_SIZE]
        assert [len(buffer) for buffer in buffers] == [num_compute_units()]
        tokens, sampled, stats = run()
        replays = Manager.num_replays
    assert case != "three" or max(chunks) > 2
    assert tokens == [out.token_ids for out in expected]
    # The proposals are the same as well. So the same tokens are accepted and, above temperature 0,
    # drawn. Depths of `auto` are random.
    assert "auto" in case or (stats, sampled) == (eager_stats, eager_sampled)
    num_steps = stats["num_cycles"] / len(PROMPTS)

    def num_replays(part: str) -> int:
        return sum(count for key, count in replays.items() if key[0] == part)

    num_turns = len(runner.turns)
    assert num_replays("decide") > num_turns * num_steps, "every step decides in graphs"
    assert num_replays("read") > (num_turns - 1) * num_steps, "most steps only decode"
    has_passes = case != "equal"
    assert (num_replays("propose_more") > num_steps) == has_passes


@pytest.mark.slow
def test_rows_of_a_step_before_are_not_read(models, monkeypatch):
    """A later turn's graph holds more rows than the graph in which the cycle begins."""
    settings = dict(extra_model=models[1:], ensemble_fn="mean", ensemble_target="logits")
    prompts = [[1 + i, 2, 3, *range(5, 22)] for i in range(5)]
    params = [greedy(1 if i == 4 else NUM_TOKENS) for i in range(5)]
    with engine(models[0], settings) as llm:
        expected = generate(llm, prompts, params)
    # The second turn reads 7 tokens of each request, and its graph holds 4 requests. The third turn
    # reads 3 tokens, and its graph holds 6 requests.
    with engine(models[0], settings, dict(gamma=[1, 1, 5]), 6) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        generate(llm, prompts[:1], greedy(2))
        use_graphs(runner.speculator, monkeypatch)
        found = generate(llm, prompts, params)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]


MORE_THAN_FILTERS = [
    dict(repetition_penalty=1.1),
    dict(presence_penalty=0.5),
    dict(frequency_penalty=0.5),
    dict(logit_bias={3: 1.0}),
    dict(allowed_token_ids=[1, 2]),
    dict(min_tokens=2, stop_token_ids=[5]),
]


@pytest.mark.slow
def test_a_step_passes_through_what_its_requests_ask_for(models):
    settings = dict(extra_model=models[1:2], ensemble_fn="mean", ensemble_target="logits")
    with engine(models[0], settings, dict(gamma=[1, 4]), 4) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner

        def needed(*requests: SamplingParams) -> Processing:
            for slot, params in enumerate(requests):
                runner.sampler.add_request(slot, params)
            slots = np.arange(len(requests))
            batch = SimpleNamespace(num_reqs=len(slots), idx_mapping_np=slots)
            return needed_processing(runner.sampler, batch)

        plain = [SamplingParams(temperature=t, logprobs=n) for t in (0, 1, 0.7) for n in (None, 1)]
        assert needed(*plain) == Processing.TEMPERATURE
        for more in FILTERS:
            expected = Processing.FILTERS if more else Processing.TEMPERATURE
            assert needed(*plain, SamplingParams(temperature=0.7, **more)) == expected
        for more in MORE_THAN_FILTERS:
            assert needed(*plain, SamplingParams(temperature=0, **more)) == Processing.BUILT_IN, (
                more
            )
        bad_words = SamplingParams(temperature=0.7)
        bad_words._bad_words_token_ids = [[1, 2]]
        assert needed(bad_words) == Processing.BUILT_IN
        assert needed(*plain) == Processing.TEMPERATURE, "slots are free again"
        runner.sampler.logits_processors.append(SimpleNamespace(add_request=lambda *_: True))
        assert needed(*plain) == Processing.CUSTOM, "a processor of the user's own may ask the host"


def test_turns_are_captured_where_nothing_is_planned_on_the_host(models, monkeypatch):
    settings = dict(extra_model=models[1:2], ensemble_fn="mean", ensemble_target="logits")
    with engine(models[0], settings, dict(gamma=[1, 4]), 4) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        speculator = runner.speculator
        monkeypatch.setattr(speculator, "supports_decode_metadata_update", True)
        support = SimpleNamespace(min_cg_attn_backend="ATTENTION")
        monkeypatch.setattr(speculator, "attn_cg_support", support)
        for of_backend in AttentionCGSupport:
            support.min_cg_support = of_backend
            can = of_backend in (AttentionCGSupport.ALWAYS, AttentionCGSupport.UNIFORM_BATCH)
            assert can_capture_passes(speculator) == can
        support.min_cg_support = AttentionCGSupport.ALWAYS
        (group,) = [group for groups in speculator.attn_groups for group in groups]
        # A member reads its own last proposal, and the first turn's.
        for threshold, can in ((None, True), (6, True), (2, True), (1, False)):
            monkeypatch.setattr(group.get_metadata_builder(), "reorder_batch_threshold", threshold)
            assert can_capture_passes(speculator) == can
        monkeypatch.setattr(group.get_metadata_builder(), "reorder_batch_threshold", None)

        def parts(mode: CUDAGraphMode) -> set[str]:
            speculator.init_cudagraph_manager(mode)
            return {key[0] for key in speculator.graphs.managers}

        monkeypatch.setattr(vllm.chef.graphs, "SpeculatorCudaGraphManager", lambda *args: args)
        # A request has no more to read than its context.
        for max_model_len, length in ((96, 2), (1, 1)):
            with monkeypatch.context() as patch:
                patch.setattr(speculator, "max_model_len", max_model_len)
                found = parts(CUDAGraphMode.FULL_DECODE_ONLY)
            assert found == {"decide", "read", "propose_more"}
            assert speculator.graphs.lengths == {(1, 5): length}
        with monkeypatch.context() as patch:
            patch.setattr(vllm.chef.graphs, "has_compiled_submodule", lambda _: True)
            assert "member" in parts(CUDAGraphMode.FULL_AND_PIECEWISE)
            assert parts(CUDAGraphMode.PIECEWISE) == {"member"}
        assert "member" not in parts(CUDAGraphMode.FULL_AND_PIECEWISE), "nothing is compiled"
        with monkeypatch.context() as patch:
            own = make_function("operator:itemgetter", 2, {})
            patch.setattr(speculator.verifier, "function", own)
            assert parts(CUDAGraphMode.FULL_DECODE_ONLY) == {"read", "propose_more"}
        monkeypatch.setattr(speculator, "supports_decode_metadata_update", False)
        assert parts(CUDAGraphMode.FULL_DECODE_ONLY) == {"decide"}
        # Nothing is captured if vLLM captures nothing.
        assert parts(CUDAGraphMode.NONE) == set()
