"""Operations of a cycle on its columns: in torch (`eager`), and the same in Triton (`fused`)."""

from types import ModuleType

import torch

from vllm.chef.ops import eager, fused


def ops_for(device: torch.device) -> ModuleType:
    return eager if device.type == "cpu" else fused
