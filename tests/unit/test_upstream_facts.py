"""Facts of docs/upstream.md about vLLM, except for sampling: what it does, beyond its names.

`fact` is the page's text about a test. No engine is started.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import textwrap
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from facts import FACTS
from prometheus_client import REGISTRY, Counter
from tiny_models import llama_config, save_model
from torch import nn
from vllm import SamplingParams
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics import loggers
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu import attn_utils, cudagraph_utils
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.spec_decode import speculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import cudagraph_utils as of_speculators

from repository import ROOT
from vllm.chef.graphs import for_the_same_batches, offer_every_length
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.runner import MemberRunner

DEVICE = torch.device(current_platform.device_type)
MAX_NUM_REQS = 4
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
# The folders that the page's file names are relative to.
BASES = (ROOT / "vllm/vllm", ROOT / "vllm", ROOT)


def test_every_fact_has_a_test_and_every_test_a_fact() -> None:
    tests = []
    for path in Path(__file__).parent.glob("test_upstream*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "fact" in {a.arg for a in node.args.args}:
                tests.append(node.name)
    named = [fact.test for fact in FACTS]
    unmatched = set(tests) ^ set(named)
    assert not unmatched, f"without a row in docs/upstream.md, or without a test: {unmatched}"
    assert len(named) == len(set(named)), "two rows name the same test"


def test_the_files_of_every_fact_exist() -> None:
    for fact in FACTS:
        for file in fact.files:
            assert any((base / file).is_file() for base in BASES), f"no file {file}: {fact.text}"


def tensor(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# Loading the members


def test_layers_are_grouped_by_the_name_of_their_backend(fact, monkeypatch) -> None:
    first = AttentionBackend
    second = subclass_attention_backend("Member1", first, None)
    twin = subclass_attention_backend("Member1", first, None)
    backends = {"0": first, "1": second, "2": twin, "3": first}
    layers = {name: SimpleNamespace(get_attn_backend=lambda b=b: b) for name, b in backends.items()}
    monkeypatch.setattr(attn_utils, "get_layers_from_vllm_config", lambda *_: layers)
    monkeypatch.setattr(attn_utils, "get_shared_kv_cache_layers", lambda _: {})
    monkeypatch.setattr(attn_utils, "prepare_kernel_block_sizes", lambda *_: [])
    monkeypatch.setattr(attn_utils, "get_attn_cg_support", lambda *_: None)
    monkeypatch.setattr(attn_utils, "AttentionGroup", group_of)
    config = MagicMock(cache_config=SimpleNamespace(kv_sharing_fast_prefill=False))
    (groups,), *_ = attn_utils.init_attn_backend(kv_cache(list(layers)), config, DEVICE)
    assert [group.layer_names for group in groups] == [["0", "3"], ["1", "2"]], fact


def group_of(backend: Any, layer_names: list[str], *_: Any) -> MagicMock:
    return MagicMock(layer_names=layer_names)


def kv_cache(layers: list[str]) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return KVCacheConfig(100, [], [KVCacheGroupSpec(layers, spec)])


# Speculation


def test_the_window_is_kept_as_draft_tokens(fact, monkeypatch) -> None:
    events = MagicMock()
    monkeypatch.setattr("vllm.v1.worker.gpu.model_runner.AsyncOutput", events.sends)
    runner = MagicMock(
        pcp_manager=None,
        pp_handler=None,
        adaptive_verification=None,
        num_speculative_steps=3,
        _draft_workspace_lane=0,
    )
    runner.execute_model_state.num_spec_tokens_to_schedule = 2
    runner.execute_model_state.input_batch.idx_mapping = torch.tensor([2, 0])
    runner.req_states.draft_tokens = torch.zeros(MAX_NUM_REQS, 3, dtype=torch.int64)
    runner.sample = events.sample
    events.sample.return_value = (MagicMock(), None, None)
    runner.speculator.propose = events.propose
    events.propose.return_value = torch.tensor([[1, 2, 3], [4, 5, 6]])
    MemberRunner.sample_tokens(runner, None)
    assert [name for name, *_ in events.mock_calls] == ["sample", "sends", "propose"], fact
    kept = runner.req_states.draft_tokens.tolist()
    assert kept == [[4, 5, -1], [0] * 3, [1, 2, -1], [0] * 3], fact
    readers = uses(MemberRunner.prepare_inputs, "self.req_states.draft_tokens")
    assert readers == ["combine_sampled_and_draft_tokens"], fact


def test_the_draft_model_comes_from_load_draft_model(fact, monkeypatch) -> None:
    monkeypatch.setattr(speculator, "get_layers_from_vllm_config", lambda *_: {})
    ours = MagicMock(use_acceptance_estimator=False)
    member = nn.Identity()
    ours.load_draft_model.return_value = member
    speculator.DraftModelSpeculator.load_model(ours, None)
    assert ours.load_draft_model.call_count == 1 and ours.model is member, fact


@pytest.fixture
def block_tables(pageable_memory) -> BlockTables:
    """One group. The KV cache of slot 1 is in block 5."""
    tables = BlockTables([16], MAX_NUM_REQS, 8, [2], DEVICE)
    tables.block_tables[0].gpu[1] = 5
    return tables


def test_a_row_without_a_request_gets_no_slots(fact, block_tables, stock_kernels) -> None:
    positions = tensor(3, 4, 3, 4, dtype=torch.int64)
    slots = block_tables.compute_slot_mappings(tensor(1, -1), tensor(0, 2, 4), positions, 6)
    assert slots.tolist() == [[83, 84, *[PAD_SLOT_ID] * 4]] and PAD_SLOT_ID == -1, fact


def test_slot_mappings_lie_in_the_buffer_that_graphs_read(fact, block_tables) -> None:
    arguments = tensor(1), tensor(0, 2), tensor(3, 4, dtype=torch.int64), 2
    ours = torch.zeros(1, 8, dtype=torch.int64, device=DEVICE)
    written = block_tables.compute_slot_mappings(*arguments, out=ours)
    assert written.data_ptr() == ours.data_ptr(), fact
    captured = block_tables.get_dummy_slot_mappings(2)
    written = block_tables.compute_slot_mappings(*arguments)
    assert written.data_ptr() == captured.data_ptr(), fact


# CUDA graphs


@pytest.fixture
def no_device(monkeypatch) -> None:
    """vLLM's managers of graphs work without a device until they capture."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    monkeypatch.setattr(cudagraph_utils, "graph_capture", lambda **_: nullcontext())
    monkeypatch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)


def graph_config(sizes: list[int]) -> SimpleNamespace:
    """The configuration of an engine whose requests may have 1, 2 or 4 tokens in a step."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=99),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        speculative_config=SimpleNamespace(
            uses_dynamic_speculative_decoding=lambda: True,
            num_speculative_tokens_per_batch_size=[[1, 2, 3], [3, 4, 1], [5, 8, 0]],
        ),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        num_speculative_tokens=3,
    )


def manager_of(config: SimpleNamespace, mode: CUDAGraphMode, length: int) -> Any:
    return of_speculators.SpeculatorCudaGraphManager(config, DEVICE, mode, length)


@pytest.mark.parametrize("length", [1, 2])
def test_a_captured_function_gets_six_arguments_by_place(
    fact, length, no_device, monkeypatch
) -> None:
    inputs = ("metadata", "slots")
    monkeypatch.setattr(of_speculators, "prepare_inputs_to_capture", lambda *_, **__: inputs)
    manager, found = manager_of(graph_config([8]), PIECEWISE, length), []
    manager.capture(lambda *args, **_: found.append(args), *[None] * 5)
    modes = [CUDAGraphMode.NONE, PIECEWISE]
    assert found == [(8, 8, *inputs, None, mode) for mode in modes], fact


@support_torch_compile
class Member(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_compiled_members_are_known(fact, mode) -> None:
    config = VllmConfig(compilation_config={"mode": mode})
    with set_current_vllm_config(config):
        member = nn.Sequential(Member(vllm_config=config))
    found = cudagraph_utils.has_compiled_submodule(MemberGroup(members=[member]))
    assert found == (mode != CompilationMode.NONE), fact


def test_a_manager_takes_its_sizes_from_its_configuration(fact, no_device) -> None:
    config = graph_config([4, 8, 16])
    manager = manager_of(config, CUDAGraphMode.FULL_DECODE_ONLY, 4)
    lengths = {desc.uniform_token_count for desc in manager._capture_descs[FULL]}
    assert lengths == {1, 2, 4}, fact
    config = for_the_same_batches(config, 4, 3)
    manager = manager_of(config, CUDAGraphMode.FULL_DECODE_ONLY, 3)
    found = [
        (desc.num_reqs, desc.num_tokens, desc.uniform_token_count)
        for desc in manager._capture_descs[FULL]
    ]
    assert found == [(4, 12, 3), (2, 6, 3), (1, 3, 3)], fact


def test_dispatch_takes_the_first_candidate_that_fits(fact, no_device) -> None:
    manager = manager_of(graph_config([4, 8, 16]), CUDAGraphMode.FULL_DECODE_ONLY, 4)
    manager._graphs_captured = True

    def found() -> tuple[int, int | None]:
        desc = manager.dispatch(3, 6, 2, num_active_loras=0)
        return desc.num_tokens, desc.uniform_token_count

    manager._candidates[6, 0] = [d for d in manager._candidates[6, 0] if d.uniform_token_count == 4]
    assert found() == (6, None), fact
    offer_every_length(manager)
    assert found() == (8, 2), fact
    longest_first = [d for d in manager._capture_descs[FULL] if d.uniform_token_count == 2]
    manager._candidates[6, 0] = longest_first
    assert found() == (16, 2), fact


# Scheduler


@pytest.fixture
def scheduler(tmp_path) -> Scheduler:
    """The scheduler of a stock engine with one request that decodes and a prompt that waits."""
    model = save_model(tmp_path / "0", llama_config(), seed=0)
    config = EngineArgs(model, skip_tokenizer_init=True, max_num_seqs=4).create_engine_config()
    config.cache_config.num_gpu_blocks = 100
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=kv_cache(["0"]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
    )
    scheduler.add_request(Request("decodes", [1, 2], SamplingParams(max_tokens=9), None))
    run(scheduler, scheduler.schedule())
    scheduler.add_request(Request("waits", [1, 2], SamplingParams(max_tokens=9), None))
    return scheduler


def run(scheduler: Scheduler, step: SchedulerOutput) -> dict[int, EngineCoreOutputs]:
    """The engine emits a token for each request of the step."""
    places = {name: place for place, name in enumerate(step.num_scheduled_tokens)}
    output = ModelRunnerOutput(list(places), places, sampled_token_ids=[[3]] * len(places))
    return scheduler.update_from_output(step, output)


def test_throttled_prompts_wait(fact, scheduler) -> None:
    step = scheduler.schedule(True)
    assert set(step.num_scheduled_tokens) == {"decodes"}, fact
    run(scheduler, step)
    assert set(scheduler.schedule(False).num_scheduled_tokens) == {"decodes", "waits"}, fact


def test_the_depth_is_looked_up_by_the_number_of_requests(fact, scheduler) -> None:
    scheduler.dynamic_sd_lookup = MagicMock()
    lookup = scheduler.dynamic_sd_lookup.__getitem__
    lookup.return_value = 7
    step = scheduler.schedule()
    assert lookup.call_args_list == [call(2)] and step.num_spec_tokens_to_schedule == 7, fact


# Metrics


def test_all_columns_of_the_sampled_tokens_reach_the_host(fact) -> None:
    assert "async_copy_to_np(sampler_output.sampled_token_ids)" in inspect.getsource(AsyncOutput), (
        fact
    )
    output = MagicMock(spec=AsyncOutput, _has_fault=None, logprobs_tensors=None, num_nans=None)
    output.copy_event, output.prompt_logprobs_dict = MagicMock(), {}
    output.prompt_token_id_logprobs_dict, output.pending_aux_output = {}, None
    output.sampling_mask_tensors = None
    output.sampled_token_ids = np.array([[5, 6, 7, 8], [9, 1, 2, 3]])
    output.num_sampled_tokens_np = np.array([2, 1])
    output.model_runner_output = ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1})
    assert AsyncOutput.get_output(output).sampled_token_ids == [[5, 6], [9]], fact
    assert output.sampled_token_ids.tolist() == [[5, 6, 7, 8], [9, 1, 2, 3]], fact


def test_counts_of_drafts_may_be_replaced(fact, scheduler) -> None:
    step = scheduler.schedule(True)
    step.scheduled_spec_decode_tokens = {"decodes": [-1, -1, -1]}
    scheduler.make_spec_decoding_stats = MagicMock(return_value=None)
    scheduler.make_stats = MagicMock(return_value=None)
    request = scheduler.requests["decodes"]
    request.spec_decode_metrics = MagicMock()
    request.max_tokens = request.num_output_tokens + 1
    before = request.num_computed_tokens
    (output,) = run(scheduler, step)[0].outputs
    assert scheduler.make_spec_decoding_stats.call_count == 1, fact
    assert request.spec_decode_metrics.observe.call_count == 1, fact
    assert len(request.spec_decode_metrics.mock_calls) == 1, fact
    assert scheduler.make_stats.call_args.args[0] is None, fact
    assert request.num_computed_tokens == before - 3, fact
    assert output.finished and output.spec_decode_metrics is request.spec_decode_metrics, fact


def test_numbers_by_name_reach_the_front_end(fact) -> None:
    stats = SchedulerStats(running_lora_adapters={"a 0": 3})
    stats.field_of_ours = 5
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert received.running_lora_adapters == {"a 0": 3}, fact
    assert not hasattr(received, "field_of_ours"), fact
    source = inspect.getsource(loggers)
    _, of_lora = source.split("if self.gauge_lora_info is not None:", 1)
    of_lora, _ = of_lora.split("if mm_cache_stats is not None:", 1)
    assert source.count("stats.running_lora_adapters") == 1, fact
    assert "stats.running_lora_adapters" in of_lora, fact


def test_metrics_of_plugins_are_made_last(fact, monkeypatch) -> None:
    order = []

    class Ours(loggers.AggregateStatLoggerBase):
        def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
            order.append("ours")

        def record(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_engine_initialized(self) -> None:
            order.append("initialized")

    class Prometheus(Ours):
        def __init__(self, *args: Any) -> None:
            order.append("vLLM's")

    assert "unregister_vllm_metrics()" in inspect.getsource(loggers.PrometheusStatLogger.__init__)
    monkeypatch.setattr(loggers, "PrometheusStatLogger", Prometheus)
    manager = loggers.StatLoggerManager(MagicMock(), [0], [Ours], enable_default_loggers=False)
    assert order == ["ours", "vLLM's"], fact
    manager.log_engine_initialized()
    assert order[2:] == ["initialized"] * 2, fact
    Counter("vllm:ours", "A metric of ours.")
    unregister_vllm_metrics()
    assert REGISTRY.get_sample_value("vllm:ours_total") is None, fact


# Driving an engine


def test_a_request_is_checked_before_the_engine_gets_it(fact, monkeypatch) -> None:
    processor = object.__new__(InputProcessor)
    for name in ("model_config", "speculative_config", "structured_outputs_config"):
        setattr(processor, name, MagicMock())
    processor.renderer = MagicMock()
    monkeypatch.setattr(SamplingParams, "verify", lambda *_: None)
    seen = []

    def refuse(params: SamplingParams) -> None:
        seen.append(params)
        raise VLLMValidationError("refused")

    processor.validate_logits_processors_params = refuse
    params = SamplingParams()
    # What follows the check would not find what it needs.
    with suppress(AttributeError), pytest.raises(VLLMValidationError, match="refused"):
        processor.process_inputs("0", "text", params, ("generate",))
    assert seen == [params], fact


def test_the_input_processor_is_made_before_the_engine(fact) -> None:
    for front_end, starts in ((LLMEngine, "make_client"), (AsyncLLM, "make_async_mp_client")):
        source = inspect.getsource(front_end.__init__)
        engine = source.index(f"EngineCoreClient.{starts}(")
        assert source.index("InputProcessor(") < engine, (front_end, fact)


def test_vllms_programs_are_its_command_and_its_entry_points(fact) -> None:
    # vLLM's CPU build is a distribution of another name.
    commands = importlib.metadata.entry_points(group="console_scripts")
    assert {c.name for c in commands if c.module.startswith("vllm.")} == {"vllm"}, fact
    assert importlib.util.find_spec("vllm.entrypoints.openai.api_server"), fact


def test_only_three_refusals_need_the_speculative_config(fact) -> None:
    assert uses(InputProcessor, "self.speculative_config") == ["params.verify"], fact
    refusals = ["self._validate_trace_replay", "self._validate_spec_decode"]
    assert uses(SamplingParams.verify, "speculative_config") == refusals, fact
    refuses = inspect.getsource(SamplingParams._validate_spec_decode)
    assert set(re.findall(r"self\.(\w+)", refuses)) == {"min_p", "logit_bias"}, fact


def uses(source: Any, name: str) -> list[str]:
    """What is called with `name` as an argument, and any other use as written."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(arg): ast.unparse(call.func) for call in calls for arg in call.args}
    read = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Load)]
    return [called.get(id(node), name) for node in read if ast.unparse(node) == name]


# Plugins, Triton, machines without a GPU


@pytest.mark.filterwarnings("ignore::FutureWarning")  # it looks at every object
def test_a_kernel_is_replaced_in_every_module(fact, monkeypatch) -> None:
    monkeypatch.setattr(dispatcher, "_registry", {})

    def kernel(x: int) -> None: ...

    modules = [ModuleType(name) for name in ("its_own", "another")]
    for module in modules:
        module.kernel = kernel
        monkeypatch.setitem(sys.modules, module.__name__, module)
    dispatcher.register_kernels({"its_own.kernel": lambda x: x + 1})
    assert all(module.kernel is not kernel for module in modules), fact
    assert [module.kernel[1](2) for module in modules] == [3, 3], fact
