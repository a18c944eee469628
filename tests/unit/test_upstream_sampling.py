"""Facts of docs/upstream.md about vLLM's sampling and verification.

`fact` is the page's text about a test. No engine is started.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor
from vllm.v1.worker.gpu.sample import (
    bad_words,
    gumbel,
    logit_bias,
    min_p,
    penalties,
    thinking_budget,
)
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState

from vllm.chef import sampling
from vllm.chef.grammar import ALL_TOKENS
from vllm.ensemble_decode.model import MemberGroup
from vllm.ensemble_decode.sampler import (
    EnsembleRejectionSampler,
    EnsembleSampler,
    RowsPromptLogprobsWorker,
)

DEVICE = torch.device(current_platform.device_type)
VOCAB_SIZE, MAX_NUM_REQS = 40, 4


def tensor(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.fixture
def sampler(pageable_memory) -> Sampler:
    """The sampler of a stock runner. It has a budget for thinking."""
    reasoning = SimpleNamespace(
        reasoning_start_token_ids=[0],
        reasoning_end_token_ids=[1],
        natural_reasoning_end_token_ids=[1],
    )
    requests = RequestState(MAX_NUM_REQS, 32, 32, 2, VOCAB_SIZE, DEVICE)
    config = SimpleNamespace(reasoning_config=reasoning)
    return Sampler(config, MAX_NUM_REQS, VOCAB_SIZE, DEVICE, requests)


def test_a_sampler_is_its_dict(fact, sampler) -> None:
    taken_over = EnsembleSampler(sampler, MemberGroup(members=[]))
    used = re.findall(r"self\.(\w+)", inspect.getsource(Sampler))
    missing = [name for name in used if not hasattr(taken_over, name)]
    assert not missing, f"{fact} Missing: {missing}"
    bound = [name for name, value in vars(sampler).items() if owner_of(value) is sampler]
    assert not bound, f"{fact} Methods of the first sampler: {bound}"


def owner_of(value: Any) -> Any:
    return getattr(value, "__self__", None)


def test_verify_gets_the_requests_of_its_rows_by_place(fact, monkeypatch) -> None:
    found = []
    batch = SimpleNamespace(
        num_reqs=1,
        cu_num_logits_np=np.array([0, 3]),
        cu_num_logits=tensor(0, 3),
        idx_mapping=tensor(7),
        idx_mapping_np=np.array([7]),
        expanded_idx_mapping=tensor(7, 7, 7),
        expanded_local_pos=tensor(0, 1, 2),
        seq_lens_cpu_upper_bound=torch.tensor([9]),
    )
    verifier = object.__new__(EnsembleRejectionSampler)
    verifier.sampler = MagicMock(return_sampling_mask=False, logprobs_mode="raw_logprobs")
    verifier.sampler.reported = lambda logits, processed, slots: found.append(slots)
    monkeypatch.setattr(RejectionSampler, "_verify", lambda *_: (None, None, None))
    logits, tokens = torch.zeros(3, VOCAB_SIZE), tensor(1, 2, 3)
    verifier._verify_in_chunks(logits, batch, None, tokens, tokens, 99, -1)
    assert [slots.tolist() for slots in found] == [[7, 7, 7]], fact


class Rows(RowsPromptLogprobsWorker):
    """Keeps the numbers that it gets instead of hidden states."""

    seen: list[list[int]]

    def logits_of(self, rows: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seen.append(rows.tolist())
        return torch.zeros(len(rows), VOCAB_SIZE, device=DEVICE)


def test_prompt_logprobs_only_slice_the_hidden_states(fact) -> None:
    worker = Rows(MAX_NUM_REQS, DEVICE)
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        num_reqs=2,
        num_tokens=5,
        idx_mapping=tensor(0, 1),
        idx_mapping_np=np.array([0, 1]),
        query_start_loc=tensor(0, 2, 5),
        query_start_loc_np=np.array([0, 2, 5]),
        num_scheduled_tokens=np.array([2, 3]),
        num_computed_prefill_tokens_np=np.zeros(2, dtype=int),
        prefill_len_np=np.array([2, 3]),
    )
    for slot, name in enumerate(batch.req_ids):
        ids = np.zeros((slot + 1, 1), dtype=np.int64)
        params = SimpleNamespace(
            prompt_logprobs=1, prompt_logprob_token_ids=ids, prompt_logprob_start=0
        )
        worker.add_request(name, slot, params)
    hidden_states, prompt_lens = torch.zeros(8, 3, device=DEVICE), np.array([2, 3])
    tokens = torch.zeros(MAX_NUM_REQS, 32, dtype=torch.int32, device=DEVICE)
    worker.seen = []
    worker.compute_prompt_logprobs(
        None, hidden_states, batch, tokens, tokens[:, 0].contiguous(), prompt_lens
    )
    assert worker.seen == [[0, 1, 2, 3, 4]], fact
    worker.seen = []
    worker.compute_prompt_token_id_logprobs(None, hidden_states, batch, prompt_lens)
    assert worker.seen == [[0], [2, 3]], fact


def test_the_sampler_applies_its_processors_in_this_order(fact, sampler) -> None:
    found = [type(processor) for processor in sampler.logits_processors]
    expected = [logit_bias.LogitBiasState, penalties.PenaltiesState, bad_words.BadWordsState]
    assert found[:3] == expected, fact
    calls = MagicMock()
    for processor in sampler.logits_processors:
        processor.apply = getattr(calls, type(processor).__name__)
    sampler.thinking_budget_state, sampler.sampling_states = calls.thinking, calls.states
    sampler.needs_logits_processing[:] = True
    slots = np.array([0])
    sampler.apply_sampling_params(torch.zeros(1, 2), None, None, slots, None, None, None, slots)
    order = [name for name, *_ in calls.mock_calls if name.count(".") < 2]
    steps = ["thinking.apply"]
    steps += [f"states.apply_{step}" for step in ("temperature", "min_p", "top_k_top_p")]
    assert order == [cls.__name__ for cls in expected] + steps, fact


def test_a_grammar_has_a_row_of_the_bitmask_per_token(fact) -> None:
    config = MagicMock(num_speculative_tokens=2)
    config.scheduler_config.max_num_seqs = MAX_NUM_REQS
    config.model_config.is_diffusion = False
    manager = StructuredOutputManager(config)
    manager.backend = MagicMock()
    manager.backend.allocate_token_bitmask = lambda n: torch.zeros(n, 2, dtype=torch.int32)
    requests = {name: request_with_grammar(code) for name, code in (("a", 1), ("b", 2))}
    # The last draft of the first request is missing. Everything is allowed after it.
    bitmask = manager.grammar_bitmask(requests, ["b", "a"], {"a": [5, -1], "b": [6]})
    assert bitmask[:, 0].tolist() == [2, 2, 1, 1, ALL_TOKENS], fact


def request_with_grammar(code: int) -> MagicMock:
    """Its grammar writes `code` to its rows."""
    request = MagicMock()
    grammar = request.structured_output_request.grammar
    grammar.is_terminated.return_value = False
    grammar.fill_bitmask = lambda bitmask, row: bitmask[row].fill_(code)
    return request


def test_a_set_bit_allows_a_token(fact, stock_kernels) -> None:
    allowed, logits = [0, 31, 33], torch.zeros(1, VOCAB_SIZE, device=DEVICE)
    bits = np.zeros(64, dtype=bool)
    bits[allowed] = True
    words = np.packbits(bits, bitorder="little").view(np.int32)
    structured_outputs._apply_grammar_bitmask_kernel[(1, 1)](
        logits,
        logits.stride(0),
        tensor(0),
        tensor(0, 1),
        torch.from_numpy(words)[None].to(DEVICE),
        2,
        VOCAB_SIZE,
        MASK_STRIDE=1,
        BLOCK_SIZE=64,
    )
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == allowed, fact


def test_only_small_values_of_processors_move(fact, sampler) -> None:
    states = [*sampler.logits_processors, sampler.thinking_budget_state]
    small = set(addresses(states, UvaBackedTensor))
    assert set(sampling.ProcessorStates(sampler).kept) == {*small, "prompt_len"}, fact
    large = (states + [sampler.req_states], StagedWriteTensor, torch.Tensor)
    before, small_before = addresses(*large), addresses(states, UvaBackedTensor)
    params = SamplingParams(
        logit_bias={1: 2.0},
        allowed_token_ids=[1, 2],
        min_tokens=2,
        stop_token_ids=[3],
        frequency_penalty=0.5,
        thinking_token_budget=4,
    )
    sampler.req_states.add_request("0", 2, [1, 2], 0, 9)
    sampler.req_states.apply_staged_writes()
    sampler.add_request(sampler.req_states.req_id_to_index["0"], params)
    sampler.apply_staged_writes()
    assert addresses(*large) == before, fact
    small_now = addresses(states, UvaBackedTensor)
    assert all(small_now[name] != small_before[name] for name in small), fact


def addresses(owners: list[Any], *types: type) -> dict[str, int]:
    """By name, where the owners' values of these types lie on the device."""
    values = {name: value for owner in owners for name, value in vars(owner).items()}
    return {
        name: getattr(value, "gpu", value).data_ptr()
        for name, value in values.items()
        if isinstance(value, types)
    }


# What `chef/sampling.py` launches in CUDA graphs.
LAUNCHERS = [
    logit_bias.apply_logit_bias,
    penalties.apply_penalties,
    bad_words.apply_bad_words,
    thinking_budget.apply_thinking_budget,
    gumbel.apply_temperature,
    min_p.apply_min_p,
]


class NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_processors_read_nothing_on_the_host(fact, launcher, monkeypatch) -> None:
    for name in kernels_of(launcher):
        monkeypatch.setitem(launcher.__globals__, name, NoKernel())
    # Tensors without values: whoever reads one gets an error.
    values = dict.fromkeys(inspect.signature(launcher).parameters, torch.zeros(3, 8, device="meta"))
    numbers = {"max_num_bad_words": 2, "check_all_masked_rows": True}
    try:
        launcher(**{name: numbers.get(name, value) for name, value in values.items()})
    except (NotImplementedError, RuntimeError, TypeError) as error:
        pytest.fail(f"{fact} {launcher.__name__}: {error}")


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_kernels_of_processors_return_early(fact, launcher) -> None:
    functions = functions_of(sys.modules[launcher.__module__])
    for name in kernels_of(launcher):
        assert any(is_costly(node) for node in functions[name].body), f"{name} reads something else"
        unguarded = [node.lineno for node in before_any_guard(functions[name]) if is_costly(node)]
        assert not unguarded, f"{fact} {name} reads at once, in line {unguarded}"


def kernels_of(launcher: Callable[..., None]) -> list[str]:
    names = [name for name in launcher.__code__.co_names if name.endswith("_kernel")]
    assert names, f"{launcher.__name__} launches no kernel"
    return names


def functions_of(module: ModuleType) -> dict[str, ast.FunctionDef]:
    nodes = ast.parse(inspect.getsource(module)).body
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def before_any_guard(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """What may run for a request that asks for nothing.

    These are the statements outside of any `if`, and those after an `else`, up to the first
    `if ...: return`.
    """
    for node in function.body:
        if not isinstance(node, ast.If):
            yield node
        elif any(isinstance(inner, ast.Return) for inner in node.body):
            return
        else:
            yield from node.orelse


def is_costly(statement: ast.stmt) -> bool:
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return bool(names & {"logits_ptr", "all_token_ids_ptr"})


def test_top_k_keeps_its_buffer(fact, monkeypatch) -> None:
    found = []
    kernels = ["_topk_topp", "_topp_split_stats", "_topp_split_step", "_topp_split_mask"]
    for name in kernels:
        monkeypatch.setattr(topk_topp_triton, name, lambda *args: found.append(args))
    for name in ("_TRITON_BUFFER_CACHE", "_TRITON_SPLIT_CACHE"):
        monkeypatch.setattr(topk_topp_triton, name, {})
    for module in (topk_topp_triton, sampling):
        monkeypatch.setattr(module, "num_compute_units", lambda _: 16)

    def buffers(num_rows: int) -> list[int]:
        """Addresses of the buffers that the kernels get."""
        found.clear()
        logits = torch.zeros(num_rows, VOCAB_SIZE, device=DEVICE)
        top_p = logits[:, 0] + 1
        sampling.apply_top_k_top_p(logits, top_p.int(), top_p)
        given = [arg for args in found for arg in args if isinstance(arg, torch.Tensor)]
        addresses = {arg.data_ptr() for arg in given if arg.dim() > 1} - {logits.data_ptr()}
        assert addresses, f"{fact} No kernel gets a buffer."
        return sorted(addresses)

    small = buffers(1)
    assert buffers(1) == small, fact
    assert buffers(3) != small, fact
    sampling.reserve_buffers(VOCAB_SIZE, DEVICE)
    few = buffers(1)
    reserved = {*few, *buffers(16)}
    assert buffers(1) == few, fact
    assert all(set(buffers(num_rows)) <= reserved for num_rows in (3, 8, 70)), fact


@pytest.mark.parametrize("by_block", [False, True])
def test_no_draft_logits_are_read_at_temperature_0(fact, by_block, stock_kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, VOCAB_SIZE, generator=generator).to(DEVICE)
    best = target.argmax(-1)
    # Two requests with two proposals each. Only the second one of the first request is rejected.
    drafts = best.roll(1)
    drafts[2] = (best[1] + 1) % VOCAB_SIZE

    def outcome(draft_logits: float) -> list[list[int]]:
        tokens, counts = rejection_sampler_utils.rejection_sample(
            target,
            torch.full((MAX_NUM_REQS, 2, VOCAB_SIZE), draft_logits, device=DEVICE),
            drafts,
            tensor(0, 3, 6),
            tensor(4, 5, 6, 7, 8, 9, dtype=torch.int64),
            tensor(1, 3),
            tensor(1, 1, 1, 3, 3, 3),
            tensor(0, 1, 2, 0, 1, 2),
            torch.zeros(MAX_NUM_REQS, device=DEVICE),
            torch.zeros(MAX_NUM_REQS, dtype=torch.int64, device=DEVICE),
            2,
            None,
            use_fp64=False,
            use_block_verification=by_block,
        )
        return [row[:count].tolist() for row, count in zip(tokens, counts.tolist(), strict=True)]

    expected = [best[:2].tolist(), best[3:].tolist()]
    for value in (0.0, torch.nan, torch.inf):
        assert outcome(value) == expected, fact
