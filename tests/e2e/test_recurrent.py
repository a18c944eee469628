"""Members with recurrent layers: mamba 2 beside attention, in either place of an ensemble.

Every case is held against what transformers computes for each member alone, with all tokens forced
(`test_families.py`).
"""

from collections.abc import Iterator
from typing import Any

import mamba_kernels
import pytest
import torch
from engines import engine, generate, greedy
from families import FAMILIES, logits_of, save_family
from test_families import FORCED, NUM_TOKENS, PROMPTS, assert_mean_of, run
from tiny_models import VOCAB_SIZE
from vllm import LLM
from vllm.model_executor.layers.mamba import mamba_mixer2
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import CPUSSUBackend
from vllm.platforms import current_platform

from vllm.ensemble_decode import ConfigFieldError, recurrent

PAIRS = [
    ("granitemoehybrid", "llama"),
    ("falcon_h1", "granitemoehybrid"),
    ("nemotron_h", "llama_wide"),
]
BY_TURNS = dict(gamma=[1, 2], turn_order=[0, 1])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    names = {name for pair in PAIRS for name in pair}
    return {name: save_family(root, name) for name in FAMILIES if name in names}


@pytest.fixture(scope="module")
def tables(models: dict[str, str]) -> dict[str, list[torch.Tensor]]:
    texts = [prompt + [FORCED] * NUM_TOKENS for prompt in PROMPTS]
    return {name: logits_of(path, texts) for name, path in models.items()}


@pytest.fixture(scope="module")
def long_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recurrent member and a llama that read 512 tokens."""
    root = tmp_path_factory.mktemp("long")
    names = ["granitemoehybrid", "llama"]
    return [save_family(root, name, max_position_embeddings=512) for name in names]


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's CPU kernels ignore how many proposals were accepted. Its CUDA kernels do not."""
    if recurrent.loses_states():
        update, step = mamba_kernels.causal_conv1d_update, mamba_kernels.selective_state_update
        monkeypatch.setattr(mamba_mixer2, "causal_conv1d_update", update)
        monkeypatch.setattr(CPUSSUBackend, "__call__", lambda _, *args, **kw: step(*args, **kw))
        monkeypatch.setattr(recurrent, "loses_states", lambda: False)
    yield


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_plain_ensembles(pair, swapped, models, tables):
    names = list(reversed(pair)) if swapped else list(pair)
    assert_mean_of(tables, names, run(models, names))


@pytest.mark.parametrize("swapped", [False, True])
def test_prompts_in_chunks(swapped, models, tables):
    names = list(reversed(PAIRS[0])) if swapped else list(PAIRS[0])
    assert_mean_of(tables, names, run(models, names, max_num_batched_tokens=16, max_num_seqs=4))


@pytest.mark.gpu
# A recurrent member must open the cycle, so it cannot come second by turns.
@pytest.mark.parametrize(("swapped", "by_turns"), [(False, False), (False, True), (True, False)])
def test_cached_prefixes(swapped, by_turns, long_models):
    """Blocks of a prompt are in the cache, with the recurrent state behind them."""
    first, other = reversed(long_models) if swapped else long_models
    ensemble = dict(extra_model=[other], ensemble_fn="mean")
    prefix = [(7 * i + 3) % VOCAB_SIZE for i in range(280)]
    prompts, params = [[*prefix, 5, n] for n in range(4)], greedy(24)
    with engine(first, ensemble, max_model_len=400) as llm:
        expected = [generate(llm, [prompt], params)[0].token_ids for prompt in prompts]
    chef = (dict(gamma=[1, 2], turn_order=[0, 1]), 2) if by_turns else ()
    with engine(first, ensemble, *chef, max_model_len=400, enable_prefix_caching=True) as llm:
        found = [generate(llm, [prompt], params)[0].token_ids for prompt in prompts]
        assert metric(llm, "vllm:prefix_cache_hits") > 0
    assert found == expected


@pytest.mark.parametrize("swapped", [False, True])
def test_requests_that_are_preempted_resume(swapped, long_models):
    first, other = reversed(long_models) if swapped else long_models
    ensemble = dict(extra_model=[other], ensemble_fn="mean")
    # Requests grow past the end of a block. It has 128 tokens on a CPU, and 16 on a GPU.
    num_blocks = 14 if current_platform.is_cpu() else 60
    prompts, params = [[n + 1] * 110 for n in range(6)], greedy(40)
    with engine(first, ensemble, max_model_len=400) as llm:
        expected = [o.token_ids for o in generate(llm, prompts, params)]
    with engine(first, ensemble, max_model_len=400, num_gpu_blocks_override=num_blocks) as llm:
        assert [o.token_ids for o in generate(llm, prompts, params)] == expected
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize("chef", [BY_TURNS, dict(gamma=2, policy="sd")], ids=["chef", "sd"])
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2]], ids="+".join)
def test_a_recurrent_member_opens_the_cycle(pair, chef, models, tables, exact_kernels):
    assert_mean_of(tables, pair, run(models, pair, chef, 2))


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_turns_emit_what_the_plain_ensemble_emits(async_scheduling, models, exact_kernels):
    """Proposals are accepted and rejected, in chunks and from a cache that is too small."""
    ensemble = dict(extra_model=[models["llama"]], ensemble_fn="weighted", weights=[0.3, 0.7])
    prompts, params = [[n + 1] * (3 + 9 * n) for n in range(6)], greedy(40)
    with engine(models["granitemoehybrid"], ensemble) as llm:
        expected = [o.token_ids for o in generate(llm, prompts, params)]
    settings: dict[str, Any] = dict(
        max_num_batched_tokens=32,
        max_num_scheduled_tokens=16,
        max_num_seqs=4,
        async_scheduling=async_scheduling,
    )
    with engine(models["granitemoehybrid"], ensemble, dict(gamma=[1, 3]), 3, **settings) as llm:
        assert [o.token_ids for o in generate(llm, prompts, params)] == expected
        accepted = metric(llm, "vllm:spec_decode_num_accepted_tokens")
        assert 0 < accepted < metric(llm, "vllm:spec_decode_num_draft_tokens")


def test_a_draft_model_outside_proposes_to_a_recurrent_member(models, tables, exact_kernels):
    names = ["granitemoehybrid", "llama"]
    speculative = {"method": "draft_model", "model": models["llama"], "num_speculative_tokens": 2}
    assert_mean_of(tables, names, run(models, names, speculative_config=speculative))


@pytest.mark.parametrize(
    ("first", "other", "settings", "line"),
    [
        (
            "llama",
            "granitemoehybrid",
            dict(chef=dict(gamma=[1, 2], turn_order=[0, 1]), window=2),
            "turn_order: member 1 .* has recurrent layers, whose states cannot be taken back; let",
        ),
        (
            "llama",
            "llama_wide",
            dict(draft="granitemoehybrid"),
            "speculative_config.model: '.*' has recurrent layers, .* keeps no states",
        ),
        (
            "llama",
            "granitemoehybrid",
            dict(disable_hybrid_kv_cache_manager=True),
            "disable_hybrid_kv_cache_manager: '.*granitemoehybrid' has recurrent layers",
        ),
        (
            "llama",
            "granitemoehybrid",
            dict(enable_prefix_caching=True, mamba_cache_mode="none"),
            "mamba_cache_mode: with prefix caching, '.*granitemoehybrid' needs align",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(first, other, settings, line, models, exact_kernels):
    if "draft" in settings:
        speculative = {"method": "draft_model", "num_speculative_tokens": 2}
        draft = models[settings["draft"]]
        settings = dict(speculative_config={**speculative, "model": draft})
    with (
        pytest.raises(ConfigFieldError, match=f"^{line}"),
        engine(models[first], dict(extra_model=[models[other]]), **settings),
    ):
        pass


@pytest.mark.skipif(not recurrent.loses_states(), reason="these kernels keep the states")
@pytest.mark.parametrize("chef", [BY_TURNS, None])
def test_speculation_on_a_cpu_is_refused(chef, models):
    draft = {"method": "draft_model", "model": models["llama"], "num_speculative_tokens": 2}
    settings = {} if chef else dict(speculative_config=draft)
    line = "model/extra_model: '.*granitemoehybrid' has recurrent layers, and vLLM's CPU kernels"
    with (
        pytest.raises(ConfigFieldError, match=f"^{line}"),
        engine(
            models["granitemoehybrid"], dict(extra_model=[models["llama"]]), chef, 2, **settings
        ),
    ):
        pass


@pytest.mark.skipif(not recurrent.loses_states(), reason="these kernels keep the states")
@pytest.mark.parametrize("names", [("granitemoehybrid", "llama"), ("llama", "granitemoehybrid")])
def test_cached_prefixes_on_a_cpu_are_refused(names, models):
    line = "enable_prefix_caching: '.*granitemoehybrid' has recurrent layers, whose states vLLM's"
    ensemble = dict(extra_model=[models[names[1]]])
    with (
        pytest.raises(ConfigFieldError, match=f"^{line}"),
        engine(models[names[0]], ensemble, enable_prefix_caching=True),
    ):
        pass
