"""Tiny checkpoints that are quantized on disk, in the formats that people publish.

Scales and packed values of 4 bits are random: a stock engine tells what such a checkpoint computes.
This module knows transformers. It knows no vLLM.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, save_model

GROUP_SIZE = 32
# Kernels of 4 bits want widths that are multiples of 64, and inputs that are multiples of 128.
SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
)


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale per layer; activations are quantized as they come."""
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {
        f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": scale.reshape(1),
    }


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale per output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {
        f"{name}.weight": (weight / scale).round().to(torch.int8),
        f"{name}.weight_scale": scale,
    }


def _random_int32(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def _four_bits(num_inputs: int, num_outputs: int) -> dict[str, torch.Tensor]:
    groups = num_inputs // GROUP_SIZE
    return {
        "scales": torch.rand(groups, num_outputs).add(0.5).mul(0.03).half(),
        "qzeros": _random_int32(groups, num_outputs // 8),
    }


def _gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    num_outputs, num_inputs = weight.shape
    tensors = {
        **_four_bits(num_inputs, num_outputs),
        "qweight": _random_int32(num_inputs // 8, num_outputs),
        "g_idx": (torch.arange(num_inputs) // GROUP_SIZE).to(torch.int32),
    }
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _awq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    num_outputs, num_inputs = weight.shape
    tensors = {
        **_four_bits(num_inputs, num_outputs),
        "qweight": _random_int32(num_inputs, num_outputs // 8),
    }
    return {f"{name}.{key}": value for key, value in tensors.items()}


_COMPRESSED_WEIGHTS = dict(num_bits=8, type="int", symmetric=True, strategy="channel")
_COMPRESSED_INPUTS = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
# How the layers of a format are stored, and what its config says.
FORMATS: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], dict]] = {
    "fp8": (_fp8, dict(quant_method="fp8", activation_scheme="dynamic")),
    "int8": (
        _int8,
        dict(
            quant_method="compressed-tensors",
            format="int-quantized",
            ignore=["lm_head"],
            config_groups={
                "all": dict(
                    targets=["Linear"],
                    weights=_COMPRESSED_WEIGHTS,
                    input_activations=_COMPRESSED_INPUTS,
                )
            },
        ),
    ),
    "gptq": (
        _gptq,
        dict(quant_method="gptq", bits=4, group_size=GROUP_SIZE, desc_act=False, sym=True),
    ),
    "awq": (
        _awq,
        dict(quant_method="awq", bits=4, group_size=GROUP_SIZE, zero_point=True, version="gemm"),
    ),
}


def save_quantized(path: Path, name: str, seed: int) -> str:
    """A random llama whose layers are quantized in a format of `FORMATS`."""
    save_model(path, llama_config(**SIZES), seed)
    weights, (quantize, config) = load_file(path / "model.safetensors"), FORMATS[name]
    for key in [key for key in weights if key.endswith("_proj.weight")]:
        weights |= quantize(key.removesuffix(".weight"), weights.pop(key).contiguous())
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] = config
    (path / "config.json").write_text(json.dumps(content))
    return str(path)
