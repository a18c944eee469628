"""Members with recurrent layers (mamba, short convolutions, gated delta nets) beside attention.

Such a layer keeps a state per request instead of keys and values per token. vLLM prepares for these
layers if the engine's own model has some. This module makes the same preparations if any member
has.
"""

from collections.abc import Iterable, Sequence
from copy import copy

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.config import HybridAttentionMambaModelConfig
from vllm.platforms import current_platform

from vllm.ensemble_decode.errors import ConfigFieldError


def check_recurrent(vllm_config: VllmConfig, members: Sequence[ModelConfig]) -> None:
    """Prepare the cache's configuration for members with recurrent layers.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    check_speculation(vllm_config, members, "--model/ensemble.extra_model")
    recurrent = [member.model for member in members if member.is_hybrid]
    if not recurrent:
        return
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ConfigFieldError(
            "--disable-hybrid-kv-cache-manager",
            f"'{recurrent[0]}' has recurrent layers, which need that manager; leave it out",
        )
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching and loses_states():
        raise ConfigFieldError(
            "--enable-prefix-caching",
            f"'{recurrent[0]}' has recurrent layers, whose states vLLM's CPU kernels do not keep "
            "for a cache; set --no-enable-prefix-caching",
        )
    if members[0].is_hybrid:
        return  # vLLM has prepared the configuration
    if cache.enable_prefix_caching and cache.mamba_cache_mode != "align":
        raise ConfigFieldError(
            "--mamba-cache-mode",
            f"with prefix caching, '{recurrent[0]}' needs align, because it has recurrent layers; "
            "set that, or set --no-enable-prefix-caching",
        )
    HybridAttentionMambaModelConfig.verify_and_update_config(vllm_config)


def check_speculation(vllm_config: VllmConfig, models: Sequence[ModelConfig], field: str) -> None:
    """Refuse speculation that would continue from wrong states without a word.

    Args:
        models: those that verify.
        field: where the user named them.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    recurrent = next((model.model for model in models if model.is_hybrid), None)
    if recurrent is not None and loses_states():
        raise ConfigFieldError(
            field,
            f"'{recurrent}' has recurrent layers, and vLLM's CPU kernels for them ignore which "
            "proposals were accepted; on a CPU, run it without turns and without speculation",
        )
    draft = speculative.draft_model_config if speculative.method == "draft_model" else None
    if draft is not None and draft.is_hybrid and draft.model not in {m.model for m in models}:
        raise ConfigFieldError(
            "--speculative-config.model",
            f"'{draft.model}' has recurrent layers, and vLLM's speculation keeps no states of a "
            "draft model; choose one that has attention in every layer",
        )


def loses_states() -> bool:
    """Whether the platform's kernels keep the last state of a pass only.

    vLLM's CPU kernels do (`vllm.model_executor.layers.mamba.ops.cpu`). They ignore how many
    proposals were accepted, and return no state at the end of a block.
    """
    return current_platform.is_cpu()


def align_blocks(vllm_config: VllmConfig, members: Iterable[ModelConfig]) -> None:
    """Make blocks of the KV cache large enough for the recurrent state of every member.

    A block of tokens takes as many bytes as a state, or more. vLLM sees to that for the engine's
    own model, once the layers exist. The states get no padding here: vLLM pads all layers to one
    size when it groups them.
    """
    cache, sizes = vllm_config.cache_config, []
    for member in members:
        if member.is_hybrid:
            of_member = copy(vllm_config)
            of_member.model_config, of_member.cache_config = member, copy(cache)
            current_platform.update_block_size_for_backend(of_member)
            sizes.append(of_member.cache_config.block_size)
    if sizes:
        cache.block_size = max(cache.block_size, *sizes)
        cache.mamba_page_size_padded = None
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = cache.block_size


def recurrent_layers(model: nn.Module) -> list[MambaBase]:
    return [module for module in model.modules() if isinstance(module, MambaBase)]
