"""What each member takes of a device's memory, told before weights load."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.member_config import attention_window, cache_dtype, entry_size

GIB = 1 << 30
NUM_TOKENS = 1000


@dataclass(frozen=True)
class MemberMemory:
    """Bytes on each device.

    Args:
        weights: None if the checkpoint is not on disk yet, or is not in safetensors files.
        cache: of the KV cache, for 1,000 tokens. Layers with a window need less for long texts.
        kept_scores: of the logits that turns keep.
    """

    model: str
    weights: int | None
    cache: int
    kept_scores: int = 0


def member_memory(
    vllm_config: VllmConfig, member: ModelConfig, kept_scores: int = 0
) -> MemberMemory:
    weights = weight_bytes(member)
    return MemberMemory(
        member.model,
        None if weights is None else weights // vllm_config.parallel_config.tensor_parallel_size,
        NUM_TOKENS * bytes_per_token(vllm_config, member),
        kept_scores,
    )


def bytes_per_token(vllm_config: VllmConfig, member: ModelConfig) -> int:
    """Bytes of a member's KV cache on each device."""
    dtype = cache_dtype(vllm_config, member)
    value_size = (member.dtype if dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[dtype]).itemsize
    num_layers = member.get_num_layers_by_block_type(vllm_config.parallel_config, "attention")
    # The last layers of some models read what earlier layers keep.
    num_layers -= getattr(member.hf_text_config, "num_kv_shared_layers", None) or 0
    return num_layers * entry_size(vllm_config, member) * value_size


def check_cache(vllm_config: VllmConfig, members: Sequence[ModelConfig]) -> None:
    """Refuse a KV cache that is too small for one request, if the user gives its size.

    Where layers have windows, the cache may hold more than is told here, and vLLM itself refuses
    what is too small. It does so after it has loaded the weights.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    given = vllm_config.cache_config.kv_cache_memory_bytes
    if given is None or any(attention_window(member) is not None for member in members):
        return
    of_token = sum(bytes_per_token(vllm_config, member) for member in members)
    max_model_len = vllm_config.model_config.max_model_len
    if given < of_token * max_model_len:
        raise ConfigFieldError(
            "--kv-cache-memory-bytes",
            f"{given} bytes hold {given // of_token} tokens of all members, and a request may "
            f"have {max_model_len}; raise it to {of_token * max_model_len} or more, or lower "
            "--max-model-len",
        )


def weight_bytes(member: ModelConfig) -> int | None:
    """Bytes of a model's weights as they are loaded. None if that cannot be told from files.

    Unquantized values get the model's dtype.
    """
    files = sorted(Path(member.model).glob("*.safetensors"))
    if not files:
        return None
    if member.quantization is not None:
        return sum(file.stat().st_size for file in files)
    num_values = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            num_values += sum(prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())
    return num_values * member.dtype.itemsize


def memory_table(members: Sequence[MemberMemory], available: int | None) -> str:
    """A line per member, and what is left of `available` bytes for the KV cache. None: unknown."""
    lines = ["Memory on each device:"]
    for index, member in enumerate(members):
        weights = "unknown" if member.weights is None else _shown(member.weights)
        line = (
            f"  member {index}: weights {weights}, KV cache {_shown(member.cache)} per 1,000 tokens"
        )
        if member.kept_scores:
            line += f", kept scores {_shown(member.kept_scores)}"
        lines.append(f"{line} ('{member.model}')")
    if available is not None and all(member.weights is not None for member in members):
        left = available - sum(member.weights + member.kept_scores for member in members)
        tokens = max(0, left) * NUM_TOKENS // max(1, sum(member.cache for member in members))
        lines.append(
            f"  left of {_shown(available)}: about {_shown(left)}, "
            f"or {tokens:,} tokens of all members"
        )
    return "\n".join(lines)


def available_bytes(vllm_config: VllmConfig) -> int | None:
    """Bytes of the device that vLLM may use. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    _, total = torch.cuda.mem_get_info()
    return int(total * vllm_config.cache_config.gpu_memory_utilization)


@contextmanager
def out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Say what does not fit, and what to do, if the device has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"out of memory: {what} does not fit; {remedy}") from error


def _shown(num_bytes: int) -> str:
    gib = num_bytes / GIB
    return f"{gib:.2f} GiB" if abs(gib) >= 1 else f"{gib * 1024:.1f} MiB"
