"""Tiny random models of the architectures that vLLM serves for text, one per family.

The members in `e2e/test_families.py` are made from them. This module knows transformers and vLLM's
registry. It starts no engine.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from tiny_models import MAX_LEN, VOCAB_SIZE
from transformers.utils import is_torchvision_available

# For every family whose config has these names.
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=MAX_LEN,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
GPT2_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    n_embd=64,
    n_layer=2,
    n_head=2,
    n_positions=MAX_LEN,
    bos_token_id=None,
    eos_token_id=None,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED_EXPERTS = dict(
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    topk_group=1,
)
MAMBA_HEADS = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
INTERLEAVED = dict(sliding_window=16, num_hidden_layers=4)
# What sees images. No test runs it.
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
IMAGE_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_index",
    "boi_token_index",
    "eoi_token_index",
)
TORCHVISION_MODULES = ("transforms", "transforms.v2", "transforms.v2.functional")
MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is configured.

    Args:
        config_class: a class of transformers.
        options: values beside `sizes`.
        sizes: by default `SIZES`.
    """

    config_class: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)

    def config(self, **options: Any) -> transformers.PretrainedConfig:
        config_class = getattr(transformers, self.config_class)
        return config_class(**{**self.sizes, **self.options, **options})


def _family(config_class: str, **options: Any) -> Family:
    return Family(config_class, options)


def _multimodal(config_class: str, vision: Mapping[str, Any], **text: Any) -> Family:
    """A family that also reads images, with options of its text model."""
    options = {"text_config": {**SIZES, **text}, "vision_config": vision}
    # No prompt has a token of an image.
    for name in IMAGE_TOKENS:
        options[name] = VOCAB_SIZE
    return Family(config_class, options, sizes={})


# vLLM takes such a draft model for layers of the target.
NO_DRAFT = ("glm4_moe",)
RECURRENT = ("granitemoehybrid", "falcon_h1", "nemotron_h")
FAMILIES = {
    "llama": _family("LlamaConfig"),
    "llama_wide": _family(
        "LlamaConfig", hidden_size=128, num_attention_heads=4, num_key_value_heads=2
    ),
    "apertus": _family("ApertusConfig"),
    "arcee": _family("ArceeConfig"),
    "bloom": Family("BloomConfig", dict(hidden_size=64), GPT2_SIZES),
    "cohere": _family("CohereConfig", logit_scale=0.5, tie_word_embeddings=True),
    "ernie4_5": _family("Ernie4_5Config", head_dim=32),
    "exaone4": _family("Exaone4Config", sliding_window_pattern=4, **INTERLEAVED),
    "falcon": _family(
        "FalconConfig", multi_query=True, new_decoder_architecture=False, parallel_attn=True
    ),
    "falcon_h1": _family(
        "FalconH1Config",
        head_dim=32,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "gemma": _family("GemmaConfig", head_dim=32, tie_word_embeddings=True),
    "gemma2": _family(
        "Gemma2Config",
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "gemma3": _family(
        "Gemma3TextConfig",
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
        **INTERLEAVED,
    ),
    "gemma3_multimodal": _multimodal(
        "Gemma3Config",
        dict(VISION, model_type="siglip_vision_model"),
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
        **INTERLEAVED,
    ),
    "glm4": _family("Glm4Config", head_dim=32),
    "glm4_moe": _family("Glm4MoeConfig", head_dim=32, n_group=1, **ROUTED_EXPERTS),
    "gpt2": Family("GPT2Config", {}, GPT2_SIZES),
    "gpt_oss": _family("GptOssConfig", head_dim=32, sliding_window=16, **LOCAL_EXPERTS),
    "gptj": Family("GPTJConfig", dict(rotary_dim=16), GPT2_SIZES),
    "granite": _family(
        "GraniteConfig",
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
    ),
    "granitemoe": _family("GraniteMoeConfig", **LOCAL_EXPERTS),
    "granitemoehybrid": _family(
        "GraniteMoeHybridConfig",
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
        position_embedding_type="rope",
        mamba_chunk_size=32,
        **MAMBA_HEADS,
        **LOCAL_EXPERTS,
    ),
    "hunyuan": _family("HunYuanDenseV1Config", head_dim=32),
    # A chunk must be a multiple of a block, and blocks have 128 tokens on a CPU.
    "llama4": _family(
        "Llama4TextConfig",
        head_dim=32,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        attention_chunk_size=128,
    ),
    "llava": _multimodal(
        "LlavaConfig",
        dict(VISION, model_type="clip_vision_model", projection_dim=32),
        model_type="llama",
    ),
    "mistral": _family("MistralConfig", head_dim=32, sliding_window=None),
    "mistral_16": _family("MistralConfig", head_dim=32, sliding_window=16),
    "mistral_32": _family("MistralConfig", num_key_value_heads=2, sliding_window=32),
    "mistral3": _multimodal(
        "Mistral3Config",
        dict(VISION, model_type="pixtral", head_dim=16),
        model_type="mistral",
        head_dim=32,
        sliding_window=None,
    ),
    "mixtral": _family("MixtralConfig", **LOCAL_EXPERTS),
    "nemotron": _family("NemotronConfig", head_dim=32),
    "nemotron_h": _family(
        "NemotronHConfig",
        head_dim=32,
        num_hidden_layers=3,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
    ),
    "olmo": _family("OlmoConfig"),
    "olmo2": _family("Olmo2Config"),
    "olmo3": _family("Olmo3Config", **INTERLEAVED),
    "olmoe": _family("OlmoeConfig", **EXPERTS),
    "opt": _family("OPTConfig", word_embed_proj_dim=32, ffn_dim=64, do_layer_norm_before=False),
    "phi": _family("PhiConfig", num_key_value_heads=2),
    "phi3": _family("Phi3Config", original_max_position_embeddings=MAX_LEN),
    "qwen2": _family("Qwen2Config"),
    "qwen2_5_vl": _multimodal(
        "Qwen2_5_VLConfig",
        dict(QWEN_VISION, fullatt_block_indexes=[0]),
        rope_parameters=MROPE,
    ),
    "qwen2_moe": _family(
        "Qwen2MoeConfig", moe_intermediate_size=32, shared_expert_intermediate_size=32, **EXPERTS
    ),
    "qwen3": _family("Qwen3Config", head_dim=32),
    "qwen3_vl": _multimodal(
        "Qwen3VLConfig",
        dict(QWEN_VISION, deepstack_visual_indexes=[0], num_position_embeddings=16),
        head_dim=32,
        rope_parameters={**MROPE, "mrope_interleaved": True},
    ),
    "qwen3_moe": _family("Qwen3MoeConfig", head_dim=32, moe_intermediate_size=32, **EXPERTS),
    "seed_oss": _family("SeedOssConfig", head_dim=32),
    "smollm3": _family("SmolLM3Config"),
    "stablelm": _family("StableLmConfig"),
    "starcoder2": _family("Starcoder2Config", sliding_window=None),
}


def save_family(root: Path, name: str, **options: Any) -> str:
    """A random float32 model of a family below `root`; its seed is its place in the table.

    Its class is inspected in this process. vLLM would start another process for that, whose imports
    take 20 seconds.
    """
    torch.manual_seed(list(FAMILIES).index(name))
    config = FAMILIES[name].config(**options)
    model = reference_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.18)
    path = root / name
    model.save_pretrained(path)
    inspect_here(json.loads((path / "config.json").read_text())["architectures"][0])
    return str(path)


def reference_class(config: transformers.PretrainedConfig) -> type:
    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


@torch.inference_mode()
def logits_of(
    path: str,
    texts: Sequence[Sequence[int]],
) -> list[torch.Tensor]:  # num_texts x [length, vocab_size]
    """What transformers computes for whole texts.

    Call it before the first engine starts. vLLM runs some families on transformers' own code, and
    for them it changes the classes of this process.
    """
    # "eager", because the faster ways leave out Gemma 2's soft caps and gpt-oss's sinks.
    config = transformers.AutoConfig.from_pretrained(path)
    model = reference_class(config).from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return [model.eval()(input_ids=torch.tensor([list(text)])).logits[0] for text in texts]


@cache
def inspect_here(architecture: str) -> None:
    """Tell vLLM what an architecture's class can do, without another process."""
    from vllm import ModelRegistry

    registered = ModelRegistry.models.get(architecture)
    if registered is not None:
        stand_in_for_torchvision()
        ModelRegistry.register_model(architecture, registered.load_model_cls())


def stand_in_for_torchvision() -> None:
    """Put something into `sys.modules` that can be imported as torchvision, if it is missing.

    vLLM's modules of multimodal models import it, and a text needs nothing of it. Not every index
    has a torchvision without CUDA.
    """
    if is_torchvision_available() or "torchvision" in sys.modules:
        return
    for name in ("torchvision", *(f"torchvision.{name}" for name in TORCHVISION_MODULES)):
        sys.modules[name] = MagicMock(__path__=[], __spec__=ModuleSpec(name, None))
