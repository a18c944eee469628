"""What a member takes over from the engine's configuration, and which members are refused.

The tests use configs alone: no model here has weights.
"""

from pathlib import Path

import pytest
from families import FAMILIES, inspect_here
from tiny_models import llama_config
from transformers import DeepseekV2Config, PretrainedConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.member_config import attention_settings, loading_config
from vllm.ensemble_decode.members import check_ensemble, member_configs
from vllm.ensemble_decode.worker import with_experts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def save(root: Path, name: str, config: PretrainedConfig | None = None) -> str:
    config = config or FAMILIES[name].config()
    config.architectures = config.architectures or [
        type(config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
    ]
    config.save_pretrained(root / name)
    inspect_here(config.architectures[0])
    return str(root / name)


def engine_config(first: str, *others: str, **arguments) -> VllmConfig:
    return EngineArgs(
        first,
        skip_tokenizer_init=True,
        additional_config={"ensemble": {"extra_model": list(others)}},
        **arguments,
    ).create_engine_config()


@pytest.mark.parametrize(
    ("first", "second"),
    [("mistral_16", "mistral"), ("mistral", "mistral_16"), ("mistral_16", "mistral_32")],
)
def test_each_member_has_its_own_sliding_window(root, first, second):
    config = engine_config(save(root, first), save(root, second))
    _, members = check_ensemble(config)
    of_second = loading_config(config, members[1], {})
    windows = {"mistral": None, "mistral_16": 16, "mistral_32": 32}
    assert config.cache_config.sliding_window == windows[first]
    assert of_second.cache_config.sliding_window == windows[second]
    # Layers of both models are found in one place.
    context = config.compilation_config.static_forward_context
    assert of_second.compilation_config.static_forward_context is context


def test_a_member_changes_nothing_of_the_engine(root):
    """vLLM adjusts a configuration to its model when it is made, for experts among other things."""
    config = engine_config(save(root, "llama"), save(root, "mixtral"))
    _, members = check_ensemble(config)
    of_second = loading_config(config, members[1], {})
    assert of_second.parallel_config.is_moe_model
    assert not config.parallel_config.is_moe_model
    for name in ("cache_config", "parallel_config", "attention_config"):
        assert getattr(of_second, name) is not getattr(config, name)


def test_sliding_windows_are_off_for_all_members_only_if_the_user_asks(root):
    """vLLM turns them off for a checkpoint whose window is 0, as Qwen2-MoE's is by default."""
    windowed = save(root, "mistral_16")
    config = engine_config(save(root, "qwen2_moe"), windowed)
    assert config.model_config.disable_sliding_window
    _, members = check_ensemble(config)
    assert members[1].get_sliding_window() == 16
    off = engine_config(save(root, "llama"), windowed, disable_sliding_window=True, max_model_len=8)
    _, members = check_ensemble(off)
    assert members[1].disable_sliding_window


def test_the_first_members_quantization_is_no_other_members(root):
    config = engine_config(save(root, "llama"), save(root, "mistral"))
    # What `--quantization fp8` leaves there. A CPU cannot load such weights.
    config.model_config.quantization = "fp8"
    first, second = member_configs(config, EnsembleConfig(save(root, "mistral")))
    assert (first.quantization, second.quantization) == ("fp8", None)


def test_experts_are_looked_for_in_every_member(root):
    dense, experts = save(root, "llama"), save(root, "mixtral")
    config = engine_config(dense, experts)
    _, members = check_ensemble(config)
    assert not config.model_config.is_moe
    assert with_experts(config, members).model_config.is_moe
    draft = {"method": "draft_model", "model": experts, "num_speculative_tokens": 1}
    config = engine_config(dense, dense, speculative_config=draft)
    _, members = check_ensemble(config)
    assert with_experts(config, members).model_config.is_moe
    assert not with_experts(engine_config(dense, dense), members).model_config.is_moe


def test_models_share_attention_metadata_where_their_attention_is_the_same(root):
    paths = [
        save(root, "llama"),
        save(root, "deeper", llama_config(layers=3, intermediate_size=128)),
        save(root, "heads", llama_config(num_attention_heads=1)),
        save(root, "mistral_16"),
    ]
    _, members = check_ensemble(engine_config(*paths))
    first, deeper, heads, mistral = map(attention_settings, members)
    assert first == deeper
    assert first != heads and first != mistral and heads != mistral


REFUSED = [
    (
        ["mistral_16", "mistral_32"],
        dict(disable_hybrid_kv_cache_manager=True),
        r"^--disable-hybrid-kv-cache-manager: .* have \[16, 32\]; leave it out$",
    ),
    (
        # Layers with half as many heads get blocks of twice as many tokens.
        ["llama_wide", "llama4"],
        {},
        r"^--block-size: .* chunks of 128 tokens, which blocks of 256 tokens do not "
        r"divide; set it to a divisor of 64$",
    ),
    (
        ["llama", "mixtral"],
        dict(data_parallel_size=2),
        r"^--data-parallel-size: '.*mixtral' has experts and the first member has none",
    ),
]


@pytest.mark.parametrize(("names", "arguments", "message"), REFUSED)
def test_what_one_engine_cannot_hold_is_refused(root, names, arguments, message):
    config = engine_config(*[save(root, name) for name in names], **arguments)
    with pytest.raises(ValueError, match=message) as caught:
        check_ensemble(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("swapped", [False, True])
def test_latent_attention_beside_other_attention_is_refused_on_a_cpu(root, swapped, monkeypatch):
    config = DeepseekV2Config(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=4, kv_lora_rank=512, qk_rope_head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    names = [save(root, "latent", config), save(root, "llama")]
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    message = r"^--model/ensemble\.extra_model: '.*latent' has latent attention \(MLA\), whose"
    with pytest.raises(ConfigFieldError, match=message):
        check_ensemble(engine_config(*(reversed(names) if swapped else names)))
    check_ensemble(engine_config(names[0], names[0]))
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    check_ensemble(engine_config(*names))


def test_blocks_that_divide_a_chunk_are_taken(root):
    paths = [save(root, "llama_wide"), save(root, "llama4")]
    check_ensemble(engine_config(*paths, block_size=32))


def test_a_draft_model_of_a_shorter_context_is_refused(root):
    model = save(root, "llama")
    short = save(root, "short", llama_config(max_position_embeddings=64))
    draft = {"method": "draft_model", "model": short, "num_speculative_tokens": 1}
    config = engine_config(model, model, speculative_config=draft)
    message = r"^--max-model-len: 128 is beyond the draft model '.*', .* is 64; set it"
    with pytest.raises(ValueError, match=message):
        check_ensemble(config)
    check_ensemble(engine_config(model, model, speculative_config=draft, max_model_len=64))
