"""The engine's configuration as one member must see it.

vLLM keeps one configuration per engine, and fills parts of it from the engine's own model:

- the sliding window of `cache_config`
- the dtype of the KV cache
- the model that attention backends ask for heads and head sizes

Here every member gets these values from its own checkpoint. This module knows vLLM's configuration
and loads nothing.
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

from torch import nn
from vllm.config import CacheConfig, ModelConfig, VllmConfig, replace
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend

# Keys of a model's config that no attention backend reads. Models that differ only in these keys
# can share attention metadata. It is then built once per step for all of them.
_NOT_OF_ATTENTION = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "intermediate_size",
    "name_or_path",
    "num_hidden_layers",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


def loading_config(
    vllm_config: VllmConfig, member: ModelConfig, additional: dict[str, Any]
) -> VllmConfig:
    """The configuration for loading a member that is not the engine's own model.

    Args:
        additional: entries for `additional_config`. They differ by member, so that vLLM's compile
            cache keeps the members apart. Compiled code holds the names of the attention layers.
    """
    return replace(
        vllm_config,
        model_config=member,
        quant_config=None,
        # vLLM adjusts these to the configuration's model, so each member has copies.
        cache_config=_cache_config(vllm_config, member),
        parallel_config=copy(vllm_config.parallel_config),
        attention_config=copy(vllm_config.attention_config),
        additional_config={**vllm_config.additional_config, **additional},
    )


def sliding_window(member: ModelConfig) -> int | None:
    """The window of a model in which all layers have one. vLLM keeps this value in `cache_config`.

    In models that mix windows, each layer gets its own.
    """
    layer_types = getattr(member.hf_text_config, "layer_types", None)
    if layer_types is None or all(kind == "sliding_attention" for kind in layer_types):
        return member.get_sliding_window()
    return None


def attention_window(member: ModelConfig) -> int | None:
    """The window of the layers that do not attend to all earlier tokens. None if there is none."""
    if member.attention_chunk_size is not None:
        return member.attention_chunk_size
    return None if member.disable_sliding_window else member.get_sliding_window()


def cache_dtype(vllm_config: VllmConfig, member: ModelConfig) -> str:
    """The dtype of a member's KV cache: the user's, or else the one that its own checkpoint
    names.
    """
    given = vllm_config.cache_config.cache_dtype
    # vLLM overwrites the user's "auto" with the dtype that the first member's checkpoint names.
    of_the_first = resolve_kv_cache_dtype_string("auto", vllm_config.model_config)
    return resolve_kv_cache_dtype_string("auto" if given == of_the_first else given, member)


def entry_size(vllm_config: VllmConfig, member: ModelConfig) -> int:
    """The number of values that a layer's KV cache holds per token."""
    keys_and_values = 1 if member.use_mla else 2
    num_kv_heads = member.get_num_kv_heads(vllm_config.parallel_config)
    return keys_and_values * num_kv_heads * member.get_head_size()


def use_own_metadata(
    layers: Sequence[nn.Module],
    member: ModelConfig,
    others: Sequence[ModelConfig],
) -> None:
    """Let attention metadata of a member's `layers` be built from that member's configuration.

    vLLM builds metadata per group of layers with one backend, from the engine's configuration. A
    member therefore gets its own backends. It shares them if its attention has the settings of one
    of `others`, the members before it.
    """
    settings = [attention_settings(other) for other in [*others, member]]
    place = settings.index(settings[-1])
    if place == 0:
        return
    for layer in layers:
        if isinstance(layer, MambaBase):
            backend = _backend_of(layer.get_attn_backend(), member, place)
            # Such a layer keeps no backend. It looks one up at each call.
            layer.get_attn_backend = partial(_as_is, backend)
        elif getattr(layer, "attn_backend", None) is not None:
            layer.attn_backend = _backend_of(layer.attn_backend, member, place)


def attention_settings(member: ModelConfig) -> dict[str, Any]:
    """The entries of a model's config that attention metadata may depend on."""
    config = member.hf_text_config.to_dict()
    settings = {key: value for key, value in config.items() if key not in _NOT_OF_ATTENTION}
    return {**settings, "dtype": member.dtype, "quantization": member.quantization}


def _as_is(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    return backend


def _cache_config(vllm_config: VllmConfig, member: ModelConfig) -> CacheConfig:
    config = copy(vllm_config.cache_config)
    config.sliding_window = sliding_window(member)
    config.is_attention_free = member.is_attention_free
    config.cache_dtype = cache_dtype(vllm_config, member)
    return config


def _backend_of(
    backend: type[AttentionBackend], member: ModelConfig, place: int
) -> type[AttentionBackend]:
    """`backend` with a builder that reads `member`.

    Each place has its own backend name, because vLLM groups layers by name.
    """
    builder = backend.get_builder_cls()

    def as_member(vllm_config: VllmConfig) -> VllmConfig:
        config = copy(vllm_config)
        config.model_config = member
        config.cache_config = _cache_config(vllm_config, member)
        return config

    class MemberBuilder(builder):
        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: Any,
            vllm_config: VllmConfig,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, as_member(vllm_config), *args, **kwargs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> Any:
            return super().get_cudagraph_support(as_member(vllm_config), kv_cache_spec)

        @classmethod
        def get_varlen_cudagraph_max_query_len(
            cls, vllm_config: VllmConfig, kv_cache_spec: Any
        ) -> int | None:
            return super().get_varlen_cudagraph_max_query_len(as_member(vllm_config), kv_cache_spec)

    return subclass_attention_backend(f"Member{place}", backend, MemberBuilder)
