"""One checkpoint that is a member twice: its weights are kept in memory once."""

import torch
from torch import nn
from vllm.config import ModelConfig

from vllm.ensemble_decode.vocabulary import FittedMember

# What decides which values a model's weights have.
_OF_WEIGHTS = ("model", "revision", "dtype", "quantization", "hf_overrides")


def has_same_weights(one: ModelConfig, other: ModelConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _OF_WEIGHTS)


def keep_once(loaded: nn.Module, model: nn.Module) -> None:
    """Let `model` use the weights of `loaded` wherever both have the same values.

    Both have been read completely, so nothing depends on how a quantization prepares its weights.
    The members keep their own attention layers, and with them their own KV caches.
    """
    source = loaded.model if isinstance(loaded, FittedMember) else loaded
    kept = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        same = kept.get(name)
        if same is not None and same.dtype == parameter.dtype and torch.equal(same, parameter):
            parameter.data = same.data
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
