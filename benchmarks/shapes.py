"""Model folders with a config and no weights, for engines with `load_format="dummy"`.

The shapes are those of public checkpoints. The numbers are from the configs of these checkpoints.
"""

import json
import os
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = LLAMA | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
SHAPES = {
    "llama-7b": LLAMA  # meta-llama/Llama-2-7b
    | dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama-68m": LLAMA  # JackFram/llama-68m
    | dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
    ),
    "llama-8b": LLAMA_3  # meta-llama/Llama-3.1-8B
    | dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_scaling=LLAMA_3_ROPE | {"factor": 8.0},
    ),
    "llama-1b": LLAMA_3  # meta-llama/Llama-3.2-1B
    | dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_scaling=LLAMA_3_ROPE | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "qwen-1.5b": QWEN_2_5  # Qwen/Qwen2.5-1.5B, and its Coder and Math
    | dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "qwen-3b": QWEN_2_5  # Qwen/Qwen2.5-3B, and its Coder
    | dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    "llama-tiny": LLAMA  # to try without a GPU
    | dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=1024,
    ),
}


def make_shape(name: str, root: Path) -> str:
    """The folder of a shape below `root`; it is made if it is missing."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    # The rename is atomic: engines that start together make and read the same folder.
    part = folder / f"config.{os.getpid()}.part"
    part.write_text(json.dumps(SHAPES[name], indent=2))
    os.replace(part, folder / "config.json")
    return str(folder)
