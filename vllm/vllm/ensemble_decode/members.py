"""The members of an ensemble as vLLM models: checked from their configs, then loaded.

The first member is the engine's own model. The others are loaded beside it, each under its own
prefix. Their attention layers therefore get their own KV caches from vLLM, like the first member's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig, replace
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform

from vllm.ensemble_decode.config import EnsembleConfig, MemberSource
from vllm.ensemble_decode.errors import ConfigFieldError, reason
from vllm.ensemble_decode.member_config import (
    attention_window,
    entry_size,
    loading_config,
    use_own_metadata,
)
from vllm.ensemble_decode.memory import check_cache, out_of_memory
from vllm.ensemble_decode.ops import combine
from vllm.ensemble_decode.recurrent import check_recurrent
from vllm.ensemble_decode.shared_weights import has_same_weights, keep_once
from vllm.ensemble_decode.vocabulary import (
    check_tokenizers,
    fitted,
    member_vocabularies,
)

# Speculative methods of Model Runner V2 that need only the target's logits.
LOGITS_ONLY_SPECULATION = ("draft_model", "ngram")


def check_ensemble(vllm_config: VllmConfig) -> tuple[EnsembleConfig, list[ModelConfig]]:
    """The ensemble of an engine's configuration, checked before any weight is loaded.

    Returns the ensemble and the model configs of all members, in the user's order.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    ensemble = EnsembleConfig.from_additional_config(vllm_config.additional_config)
    _check_engine(vllm_config)
    _check_reads_text(vllm_config.model_config)
    members = member_configs(vllm_config, ensemble)
    for member in members:
        _check_supported(member)
    check_tokenizers(members)
    # A contrast can never emit a token that the first member lacks, whatever the others say.
    member_vocabularies(
        members, not ensemble.make_function().subtracts, ensemble.read_as_of_members
    )
    _check_max_model_len(members)
    check_draft_model(vllm_config)
    check_attention(vllm_config, members)
    check_recurrent(vllm_config, members)
    check_cache(vllm_config, members)
    _check_experts(vllm_config, members)
    _check_function(ensemble, members[0].get_vocab_size())
    return ensemble, members


def member_configs(vllm_config: VllmConfig, ensemble: EnsembleConfig) -> list[ModelConfig]:
    """The model configs of all members, in the user's order. They are not checked."""
    others = [_member_model_config(vllm_config, source) for source in ensemble.extra_model]
    return [vllm_config.model_config, *others]


def load_members(
    vllm_config: VllmConfig, ensemble: EnsembleConfig, members: list[ModelConfig]
) -> list[nn.Module]:
    """Load every member, in the order of `members` (from `check_ensemble`)."""
    loaded: dict[int, nn.Module] = {}
    for index in range(len(members)):
        loaded[index] = load_member(vllm_config, ensemble, members, index, loaded)
    return list(loaded.values())


def load_member(
    vllm_config: VllmConfig,
    ensemble: EnsembleConfig,
    members: list[ModelConfig],
    index: int,
    loaded: Mapping[int, nn.Module],
) -> nn.Module:
    """Load one member of `members` (from `check_ensemble`), with the ensemble's vocabulary.

    Args:
        loaded: by index, the members that are loaded. Weights that one of them has are kept once.
    """
    formats = [vllm_config.load_config.load_format]
    formats += [source.load_format or formats[0] for source in ensemble.extra_model]
    with out_of_memory(
        f"member {index} (counted from 0), '{members[index].model}',",
        "take a smaller or a quantized one, raise --gpu-memory-utilization, or spread all members "
        "over more GPUs with --tensor-parallel-size",
    ):
        if index == 0:
            model = get_model(vllm_config=vllm_config)
        else:
            model = load_beside(
                vllm_config,
                members[index],
                f"member_{index}",
                {"member": index},
                members[:index],
                formats[index],
            )
    # Dummy weights are all equal, and stand for models that are not.
    for other, same in loaded.items() if formats[index] != "dummy" else ():
        if formats[other] == formats[index] and has_same_weights(members[other], members[index]):
            keep_once(same, model)
            break
    vocabularies = member_vocabularies(members, False, ensemble.read_as_of_members)
    vocabulary = vocabularies[index]
    return fitted(model, vocabulary, vllm_config.device_config.device)


def load_beside(
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    name: str,
    additional: dict[str, Any],
    others: Sequence[ModelConfig],
    load_format: str | None = None,
) -> nn.Module:
    """Load a model beside the engine's own.

    Args:
        name: keeps the model's compiled graphs apart, and is the prefix of its attention layers.
        additional: see `loading_config`.
        others: the models of the same engine that come before it.
        load_format: as vLLM has it. None: the engine's.
    """
    config = loading_config(vllm_config, model_config, additional)
    load_config = vllm_config.load_config
    if load_format is not None:
        load_config = replace(load_config, load_format=load_format)
    layers = vllm_config.compilation_config.static_forward_context
    known = set(layers)
    with set_model_tag(name):
        model = get_model(
            vllm_config=config, model_config=model_config, prefix=name, load_config=load_config
        )
    own = [layer for layer_name, layer in layers.items() if layer_name not in known]
    use_own_metadata(own, model_config, others)
    return model


def _member_model_config(vllm_config: VllmConfig, source: MemberSource) -> ModelConfig:
    first = vllm_config.model_config
    options = {
        "trust_remote_code": first.trust_remote_code,
        "dtype": first.dtype,
        **_asked_for(first),
        **source.options,
    }
    # It belongs to the loader.
    options.pop("load_format", None)
    try:
        return ModelConfig(
            model=source.model,
            tokenizer=source.model,
            seed=first.seed,
            enforce_eager=first.enforce_eager,
            skip_tokenizer_init=first.skip_tokenizer_init,
            language_model_only=True,
            **options,
        )
    except (ValueError, OSError) as error:  # OSError: files of a model that are missing
        raise ConfigFieldError(
            "ensemble.extra_model", f"'{source.model}': {reason(error)}"
        ) from error


def _asked_for(first: ModelConfig) -> dict[str, Any]:
    """Two of the user's settings. vLLM may have changed them to fit the first member's checkpoint.

    A checkpoint with a sliding window of 0 turns sliding windows off, and some architectures have a
    tokenizer mode of their own. Neither is meant for the other members.
    """
    defaults = {"tokenizer_mode": "auto", "disable_sliding_window": False}
    found = {name: getattr(first, name) for name in defaults}
    if found == defaults:
        return found
    by_itself = ModelConfig(
        model=first.model,
        tokenizer=first.tokenizer,
        trust_remote_code=first.trust_remote_code,
        dtype=first.dtype,
        skip_tokenizer_init=first.skip_tokenizer_init,
    )
    return {
        name: defaults[name] if getattr(by_itself, name) == value else value
        for name, value in found.items()
    }


def _check_engine(vllm_config: VllmConfig) -> None:
    refuse = {
        ("--enable-lora", "LoRA adapters"): vllm_config.lora_config is not None,
        ("--pipeline-parallel-size", "pipeline parallelism"): (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        ("--enable-prompt-embeds", "prompt embeddings"): (
            vllm_config.model_config.enable_prompt_embeds
        ),
        ("--return-sampling-mask", "sampling masks"): (
            vllm_config.model_config.return_sampling_mask
        ),
        ("--watermark-config", "watermarks"): vllm_config.watermark_config is not None,
        ("--enable-trace-replay", "replay of traces under speculation"): (
            vllm_config.speculative_config is not None
            and vllm_config.model_config.enable_trace_replay
        ),
        ("--speculative-config.enable_adaptive_verification", "adaptive verification"): (
            vllm_config.speculative_config is not None
            and vllm_config.speculative_config.enable_adaptive_verification
        ),
    }
    for (option, what), present in refuse.items():
        if present:
            raise ConfigFieldError(
                option, f"{what} cannot be combined with an ensemble; leave the option out"
            )
    speculative = vllm_config.speculative_config
    check_drafts_alone(vllm_config)
    if speculative is not None and speculative.method not in LOGITS_ONLY_SPECULATION:
        raise ConfigFieldError(
            "--speculative-config.method",
            f"'{speculative.method}' reads hidden states "
            f"that an ensemble does not have; use one of {', '.join(LOGITS_ONLY_SPECULATION)}",
        )
    if not vllm_config.use_v2_model_runner:
        raise ConfigFieldError(
            "VLLM_USE_V2_MODEL_RUNNER",
            "ensembles run on Model Runner V2, which this "
            "configuration turns off; unset the variable, and see vLLM's warning above for what "
            "V2 does not support",
        )


def _check_supported(member: ModelConfig) -> None:
    kinds = {
        "encoder-decoder": member.is_encoder_decoder,
        "pooling": member.runner_type != "generate",
        "without attention": member.is_attention_free,
    }
    for kind, present in kinds.items():
        if present:
            raise ConfigFieldError(
                "--model/ensemble.extra_model",
                f"'{member.model}' cannot be a member ({kind}); "
                "members must be decoder-only models with attention that generate text",
            )


def _check_reads_text(first: ModelConfig) -> None:
    """Refuse an engine whose requests may bring images or sound. The other members get none."""
    multimodal = first.multimodal_config
    if multimodal is not None and not multimodal.language_model_only:
        raise ConfigFieldError(
            "--language-model-only",
            f"'{first.model}' is multimodal, and an ensemble reads text alone; set it",
        )


def _check_max_model_len(members: list[ModelConfig]) -> None:
    smallest = min(members[1:], key=lambda member: member.max_model_len)
    max_model_len = members[0].max_model_len
    if smallest.max_model_len < max_model_len:
        raise ConfigFieldError(
            "--max-model-len",
            f"{max_model_len} is beyond '{smallest.model}', whose "
            f"longest context is {smallest.max_model_len}; set it to that or less",
        )
    for member in members[1:]:
        member.max_model_len = max_model_len


def drafts_alone(model: ModelConfig) -> bool:
    """Whether vLLM can take the model for a draft model.

    For some architectures vLLM takes every draft for layers of the target that predict several
    tokens (MTP). It then changes the draft's config, and the method.
    """
    config = deepcopy(model.hf_config)
    return SpeculativeConfig.hf_config_override(config).model_type == model.hf_config.model_type


def check_drafts_alone(vllm_config: VllmConfig) -> None:
    """Refuse a draft model that vLLM takes for layers of the target (`drafts_alone`).

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "mtp":
        return
    if speculative.draft_model_config.model == vllm_config.model_config.model:
        return
    raise ConfigFieldError(
        "--speculative-config.model",
        f"vLLM takes '{speculative.draft_model_config.model}' for layers of another model that "
        "predict several tokens, because of its architecture; choose a draft model of another one",
    )


def check_draft_model(vllm_config: VllmConfig) -> None:
    """Refuse a draft model that vLLM would run wrongly, or in vain.

    With another tokenizer, the proposed ids would mean other text and never be accepted. With a
    context that is shorter than the engine's, vLLM would read past its end. More proposals than a
    context holds could never all be used.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return
    model, draft = vllm_config.model_config, speculative.draft_model_config
    check_gamma_fits(
        speculative.num_speculative_tokens,
        model.max_model_len,
        "--speculative-config.num_speculative_tokens",
    )
    check_tokenizers([model, draft], "--speculative-config.model")
    if draft.max_model_len < model.max_model_len:
        raise ConfigFieldError(
            "--max-model-len",
            f"{model.max_model_len} is beyond the draft model '{draft.model}', "
            f"whose longest context is {draft.max_model_len}; set it to that or less",
        )


def check_gamma_fits(num_tokens: int, max_model_len: object, field: str) -> None:
    """Refuse more proposed tokens than a context holds.

    Args:
        max_model_len: as the user may give it. A text such as `4k` is not judged here, but by the
            engine, once vLLM has read it.

    Raises:
        ConfigFieldError: one line that names `field` and the remedy.
    """
    if isinstance(max_model_len, int) and 0 < max_model_len <= num_tokens:
        raise ConfigFieldError(
            field,
            f"{num_tokens} tokens do not fit into the context of {max_model_len} tokens; "
            "choose fewer",
        )


def check_attention(vllm_config: VllmConfig, members: Sequence[ModelConfig]) -> None:
    """Refuse members whose attention vLLM's KV cache cannot hold in one engine.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    windows = {window for member in members if (window := attention_window(member)) is not None}
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and len(windows) > 1:
        raise ConfigFieldError(
            "--disable-hybrid-kv-cache-manager",
            "without that manager all layers need one "
            f"attention window, and the members have {sorted(windows)}; leave it out",
        )
    _check_latent(members)
    block_size = vllm_config.cache_config.block_size
    largest = max(entry_size(vllm_config, member) for member in members)
    for member in members:
        chunk_size, size = member.attention_chunk_size, entry_size(vllm_config, member)
        # vLLM gives layers with smaller entries larger blocks, so that all blocks have the same
        # size in bytes.
        ratio = largest // size if largest % size == 0 else 1
        if chunk_size is not None and chunk_size % (block_size * ratio) != 0:
            raise ConfigFieldError(
                "--block-size",
                f"'{member.model}' attends in chunks of {chunk_size} "
                f"tokens, which blocks of {block_size * ratio} tokens do not divide; set it to a "
                f"divisor of {chunk_size // ratio}",
            )


def _check_latent(members: Sequence[ModelConfig]) -> None:
    """Refuse latent attention beside other attention, where their kernels share no block size."""
    latent = [member.model for member in members if member.use_mla]
    if latent and len(latent) < len(members) and current_platform.is_cpu():
        raise ConfigFieldError(
            "--model/ensemble.extra_model",
            f"'{latent[0]}' has latent attention (MLA), whose kernel on a CPU takes other blocks "
            "than the attention of other members; use a GPU, or set VLLM_MLA_DISABLE=1",
        )


def _check_experts(vllm_config: VllmConfig, members: Sequence[ModelConfig]) -> None:
    """Refuse experts under data parallelism if the first member has none.

    Where ranks share experts, vLLM looks for experts in the first member only.
    """
    experts = [member.model for member in members[1:] if member.is_moe]
    if experts and not members[0].is_moe and vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigFieldError(
            "--data-parallel-size",
            f"'{experts[0]}' has experts and the first member has "
            "none, so that vLLM would not keep its ranks in step; set it to 1",
        )


def _check_function(ensemble: EnsembleConfig, vocab_size: int) -> None:
    """Try the function once, on uniform distributions. The user's own function may not fit."""
    size = (ensemble.num_members, 2, vocab_size)
    function = ensemble.make_function()
    try:
        with _one_thread():
            scores = torch.full(size, 1.0 / vocab_size)
            shape = function(scores, are_probs=ensemble.combines_probs).shape
            combine(function, scores, ensemble.combines_probs)
    except Exception as error:  # the user's function may raise anything
        raise ConfigFieldError(
            "ensemble.ensemble_fn",
            f"'{ensemble.ensemble_fn}' fails on scores of shape {list(size)} "
            f"({type(error).__name__}: {error}); mend it, or its ensemble_args",
        ) from error
    if shape != size[1:]:
        raise ConfigFieldError(
            "ensemble.ensemble_fn",
            f"'{ensemble.ensemble_fn}' turns scores of shape "
            f"{list(size)} into {list(shape)}; it must give {list(size[1:])}",
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run operations on the CPU without starting torch's threads.

    vLLM may fork this process to run the engine. OpenMP threads that were started before do not
    exist in the fork, and its first operation on several threads would wait for them forever.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
