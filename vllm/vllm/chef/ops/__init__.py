"""What a cycle does with its columns: `eager` in torch, the same functions `fused` in Triton."""

from types import ModuleType

import torch

from vllm.chef.ops import eager, fused


def ops_for(device: torch.device) -> ModuleType:
    return eager if device.type == "cpu" else fused
