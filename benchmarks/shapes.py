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
SHAPES = {
    "llama-7b": dict(  # meta-llama/Llama-2-7b
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama-68m": dict(  # JackFram/llama-68m
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
    ),
    "llama-tiny": dict(  # to try without a GPU
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
    part.write_text(json.dumps({**LLAMA, **SHAPES[name]}, indent=2))
    os.replace(part, folder / "config.json")
    return str(folder)
