"""Widens and deepens a Llama checkpoint: the same function, at the cost of a larger model.

    python benchmarks/inflate.py models/smollm2-135m models/smollm2-7b --size 7b
    python benchmarks/inflate.py models/smollm2-135m models/wide --hidden-size 960 --layers 34

A dimension that is not given comes from the size, or without `--size` from the source. The number
of heads follows the hidden size. With the result, a benchmark measures speed at the cost of a 7B
and with the real acceptance of smaller members. The module knows checkpoints in the layout of
transformers. It knows no engine.

Everything that is added is zero:
- hidden channels, which every layer then leaves at zero,
- MLP channels and heads, whose outputs are projected by zeros,
- layers, which add zero.

RMSNorm divides by the root of the mean square. If d channels are padded to D, the mean square is
multiplied by d/D. So eps is multiplied by d/D, and each norm's weight by sqrt(d/D). This is exact
except for the rounding of these weights to the dtype, up to 0.4 % in bfloat16. If D/d is a power of
4, there is no rounding.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Not copied to the target: files that are made anew, and files that describe only the source.
MADE_ANEW = ("config.json", "README.md", "SHA256SUMS")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

# Which axes a tensor has, by the second last part of its name; a bias has only the first axis.
AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("intermediate", "hidden"),
    "up_proj": ("intermediate", "hidden"),
    "down_proj": ("hidden", "intermediate"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
}
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class ShapeError(ValueError):
    """The source cannot be inflated, or not to this shape. The text is one line."""


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )

    @property
    def queries_per_key(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_parameters(self) -> int:
        """The number of parameters, without biases."""
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size


@dataclass(frozen=True)
class Size:
    """A public model's width, grouping of heads, least depth, and number of parameters.

    The vocabulary comes from the source. The depth comes from the source if the source is deeper.
    The width of the MLP is chosen to reach the number of parameters.
    """

    hidden_size: int
    queries_per_key: int
    num_hidden_layers: int
    num_parameters: float


SIZES = {
    "1b": Size(2048, 4, 16, 1.24e9),  # meta-llama/Llama-3.2-1B
    "3b": Size(3072, 3, 28, 3.21e9),  # meta-llama/Llama-3.2-3B
    "7b": Size(4096, 1, 32, 6.74e9),  # meta-llama/Llama-2-7b
}
MLP_MULTIPLE = 64


def shape_of_size(source: Shape, name: str) -> Shape:
    """The shape of a named size, with the head size and the vocabulary of the source.

    It has at least as many layers as the source.
    """
    size = SIZES[name]
    heads = size.hidden_size // source.head_dim
    shape = replace(
        source,
        hidden_size=size.hidden_size,
        num_hidden_layers=max(size.num_hidden_layers, source.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=heads // size.queries_per_key,
        intermediate_size=0,
    )
    missing = size.num_parameters - shape.num_parameters
    width = missing / (3 * shape.num_hidden_layers * shape.hidden_size)
    return replace(shape, intermediate_size=max(0, round(width / MLP_MULTIPLE)) * MLP_MULTIPLE)


def with_heads(shape: Shape, heads: int) -> Shape:
    """The shape with `heads` query heads.

    The number of query heads per key-value head stays if it divides `heads`. Otherwise each query
    head has a key-value head of its own.
    """
    ratio = shape.queries_per_key if heads % shape.queries_per_key == 0 else 1
    return replace(shape, num_attention_heads=heads, num_key_value_heads=heads // ratio)


def check(source: Shape, target: Shape) -> None:
    """Check that the target has room for the source.

    Raises:
        ShapeError: the target does not have room for the source.
    """
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        if getattr(target, key) < getattr(source, key):
            raise ShapeError(
                f"{key} {getattr(target, key)} is less than the source's {getattr(source, key)}"
            )
    heads, keys = target.num_attention_heads, target.num_key_value_heads
    if target.hidden_size % heads:
        raise ShapeError(
            f"hidden_size {target.hidden_size} is no multiple of {heads} heads, which transformers"
            " wants it to be"
        )
    if heads % keys:
        raise ShapeError(f"{heads} heads cannot share {keys} key-value heads evenly")
    needed = source.num_key_value_heads * _copies(source, target)
    if keys < needed:
        raise ShapeError(
            f"{heads} heads over {keys} key-value heads have no room for the source's"
            f" {source.num_attention_heads} over {source.num_key_value_heads}: at"
            f" {target.queries_per_key} to one, {needed} key-value heads are needed"
        )


def _copies(source: Shape, target: Shape) -> int:
    """How many key-value heads of the target stand for one of the source.

    The target may have fewer query heads per key-value head.
    """
    return math.ceil(source.queries_per_key / target.queries_per_key)


def head_origins(source: Shape, target: Shape) -> tuple[list[int], list[int]]:
    """For each head of the target, the index of the source's head, or -1 if it is padding.

    The first list is for query heads, the second for key-value heads.
    """
    copies, per_key = _copies(source, target), target.queries_per_key
    queries, keys = [-1] * target.num_attention_heads, [-1] * target.num_key_value_heads
    for head in range(source.num_attention_heads):
        key, place = divmod(head, source.queries_per_key)
        target_key = key * copies + place // per_key
        keys[target_key] = key
        queries[target_key * per_key + place % per_key] = head
    return queries, keys


def origins(source: Shape, target: Shape) -> dict[str, Tensor]:
    """By axis, `[target_size]`: for each index of the target the source's index; -1: padding."""

    def padded(num_source: int, num_target: int) -> Tensor:
        index = torch.full((num_target,), -1)
        index[:num_source] = torch.arange(num_source)
        return index

    def channels(heads: Sequence[int]) -> Tensor:
        first = torch.tensor(heads)[:, None] * source.head_dim
        return torch.where(first < 0, -1, first + torch.arange(source.head_dim)).flatten()

    queries, keys = head_origins(source, target)
    return {
        "hidden": padded(source.hidden_size, target.hidden_size),
        "intermediate": padded(source.intermediate_size, target.intermediate_size),
        "vocab": torch.arange(source.vocab_size),
        "query": channels(queries),
        "key": channels(keys),
    }


def pick(tensor: Tensor, axis: int, origin: Tensor) -> Tensor:
    """`tensor` with the indices of `origin` along `axis`, and zeros where an index is -1."""
    picked = tensor.index_select(axis, origin.clamp(min=0))
    return picked.index_fill_(axis, (origin < 0).nonzero()[:, 0], 0)


class Source:
    """A checkpoint's tensors by name, read one at a time."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self._file_of = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), file)
        if not self._file_of:
            raise ShapeError(f"{folder} holds no safetensors")
        if config.get("tie_word_embeddings"):
            self._file_of.pop("lm_head.weight", None)
        for name in list(self._file_of):
            if name.endswith("rotary_emb.inv_freq"):  # every reader computes it anew
                del self._file_of[name]

    def names(self, num_layers: int) -> Iterator[tuple[str, bool]]:
        """Each tensor name of a model with `num_layers` layers, and whether the source has it."""
        ours = "model.layers.0."
        parts = [name.removeprefix(ours) for name in self._file_of if name.startswith(ours)]
        yield from ((name, True) for name in self._file_of if ".layers." not in name)
        for layer in range(num_layers):
            for part in parts:
                name = f"model.layers.{layer}.{part}"
                yield name, name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], "pt") as tensors:
            return tensors.get_tensor(name)


class Inflation:
    """Makes the target's tensors from the source's."""

    def __init__(self, source: Shape, target: Shape, tensors: Source, dtype: torch.dtype):
        self._tensors, self._dtype = tensors, dtype
        self._origins = origins(source, target)
        self._norm_scale = math.sqrt(source.hidden_size / target.hidden_size)
        self.names = dict(tensors.names(target.num_hidden_layers))
        for name in self.names:
            if name.split(".")[-2] not in AXES:
                raise ShapeError(f"tensor {name} is none of a Llama's")

    def shape(self, name: str) -> list[int]:
        return [len(self._origins[axis]) for axis in self._axes(name)]

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self._dtype.itemsize

    def make(self, name: str) -> Tensor:
        if not self.names[name]:
            return torch.zeros(self.shape(name), dtype=self._dtype)
        tensor = self._tensors[name]
        if name.split(".")[-2] in NORMS:
            tensor = tensor.float() * self._norm_scale
        tensor = tensor.to(self._dtype)
        for axis, kind in enumerate(self._axes(name)):
            tensor = pick(tensor, axis, self._origins[kind])
        return tensor

    @staticmethod
    def _axes(name: str) -> tuple[str, ...]:
        *_, module, kind = name.split(".")
        return AXES[module][:1] if kind == "bias" else AXES[module]


def write_shards(inflation: Inflation, folder: Path, shard_bytes: int) -> int:
    """Write all tensors, one file at a time, and the index; returns the bytes of the tensors.

    Memory holds the tensors of one file at most.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in inflation.names:
        if filled and filled + inflation.num_bytes(name) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += inflation.num_bytes(name)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(inflation, names, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(map(inflation.num_bytes, inflation.names))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_shard(inflation: Inflation, names: Sequence[str], file: Path) -> None:
    # A separate function, so that its tensors are freed before the next file's are made.
    tensors = {name: inflation.make(name) for name in names}
    save_file(tensors, file, metadata={"format": "pt"})


def inflated_config(
    config: dict[str, Any], source: Shape, target: Shape, dtype: str
) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    eps = config["rms_norm_eps"] * source.hidden_size / target.hidden_size
    return {**config, **vars(target), "rms_norm_eps": eps, "dtype": dtype}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint.

    Raises:
        ShapeError: it is not a plain Llama checkpoint.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ShapeError(f"{folder} has no config.json")
    config = json.loads(file.read_text())
    if config.get("model_type") != "llama":
        raise ShapeError(f"{folder} is of type '{config.get('model_type')}', not 'llama'")
    if config.get("quantization_config"):
        raise ShapeError(f"{folder} is quantised; inflate the checkpoint that it was made from")
    return {"rms_norm_eps": 1e-6, **config}  # transformers' default


def inflate(
    folder: Path, into: Path, target: Shape, dtype: str | None = None, shard_gib: float = 2.0
) -> int:
    """Write the checkpoint `folder` in the shape `target` to `into`; returns the bytes written.

    Raises:
        ShapeError: `target` does not have room for the checkpoint, or `into` exists.
    """
    config = read_config(folder)
    source = Shape.of(config)
    check(source, target)
    if into.exists():
        raise ShapeError(f"{into} is there; remove it or name another folder")
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    inflation = Inflation(source, target, Source(folder, config), DTYPES[dtype])
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.") as temporary:
        made = Path(temporary) / into.name
        made.mkdir()
        num_bytes = write_shards(inflation, made, int(shard_gib * 2**30))
        inflated = inflated_config(config, source, target, dtype)
        (made / "config.json").write_text(json.dumps(inflated, indent=2) + "\n")
        for file in folder.iterdir():  # tokenizer, chat template, generation defaults
            if file.name not in MADE_ANEW and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copy(file, made)
        made.rename(into)
    return num_bytes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", choices=SIZES, help="near a public Llama's shape")
    for flag in ("hidden-size", "intermediate-size", "layers", "heads", "kv-heads"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's")
    parser.add_argument("--shard-gib", type=float, default=2.0)
    return parser.parse_args(argv)


def wanted_shape(args: argparse.Namespace) -> Shape:
    source = Shape.of(read_config(args.source))
    shape = shape_of_size(source, args.size) if args.size else source
    given = {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
    }
    for key, value in given.items():
        if value is not None and value < 1:
            raise ShapeError(f"{key} {value} must be 1 or more")
    if args.hidden_size is not None:
        shape = with_heads(shape, max(1, args.hidden_size // source.head_dim))
    return replace(shape, **{key: value for key, value in given.items() if value is not None})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        shape = wanted_shape(args)
        num_bytes = inflate(args.source, args.target, shape, args.dtype, args.shard_gib)
    except ShapeError as error:
        raise SystemExit(f"inflate: {error}") from error
    print(
        f"{args.target}: {shape.num_parameters / 1e9:.3f} billion parameters,"
        f" {num_bytes / 2**30:.2f} GiB; hidden {shape.hidden_size},"
        f" intermediate {shape.intermediate_size}, {shape.num_hidden_layers} layers,"
        f" {shape.num_attention_heads} heads over {shape.num_key_value_heads} of {shape.head_dim}"
    )


if __name__ == "__main__":
    main()
