"""Trains the two members that are stored below weights/: an adapter, and a shallow model.

    python scripts/train_members.py                  # both, with the recipes below: for a GPU
    python scripts/train_members.py --members smollm2-amateur --device cpu --steps 500

The script writes weights and a model card. The card has measurements of the weights as they are
stored. The script knows torch and transformers. training_text.py collects the text, and
prepare_models.py makes models from the weights.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__" and not __package__:
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from repository import model_root, read_env
from scripts.member_cards import model_card
from scripts.prepare_models import (
    ADAPTER,
    AMATEUR,
    FULL,
    LAYERS,
    PYTHON,
    WEIGHTS,
    load_amateur,
    load_python,
    write_sums,
)
from scripts.training_text import Corpus, collect

# Rank 16 of all projections of SmolLM2-135M: 4.9 million values, 9.8 MB in bfloat16.
RANK, LORA_ALPHA = 16, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The parent's layers that the amateur starts from. After 61 thousand tokens of training, an amateur
# from these layers shared 0.217 of the probability with the parent. From layers 0, 1, 2, 29 it was
# 0.205, and from layers 0, 10, 20, 29 it was 0.202.
ORIGIN = (0, 1, 28, 29)


@dataclass(frozen=True)
class Recipe:
    """How a member is trained: AdamW, a linear warm-up, then a cosine down to a tenth.

    batch_size: blocks of `context` tokens per step; `micro_batch` blocks run at a time.
    """

    steps: int
    batch_size: int
    micro_batch: int
    context: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 0


RECIPES = {
    PYTHON: Recipe(steps=200, batch_size=64, micro_batch=16, context=1024, learning_rate=3e-4),
    AMATEUR: Recipe(steps=2000, batch_size=64, micro_batch=32, context=512, learning_rate=1e-3),
}

# Blocks compared at a time: their distributions take one or two gigabytes.
COMPARED_BLOCKS = 4

# The parts of a recipe that the command line can set.
OVERRIDES = {
    "steps": int,
    "batch_size": int,
    "micro_batch": int,
    "context": int,
    "learning_rate": float,
    "seed": int,
}


@dataclass
class Report:
    """What the model card says of a run."""

    recipe: Recipe
    num_tokens: int = 0
    seconds: float = 0.0
    final_loss: float = math.nan
    # By the name of the other model: what `compare` returns for that model and the stored member.
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


class LowRank(nn.Module):
    """W -> W + (alpha / rank) * B A, of LoRA (Hu et al., arXiv 2106.09685)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(RANK, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], RANK))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (LORA_ALPHA / RANK) * self.up @ self.down


def add_adapter(model: nn.Module) -> dict[str, LowRank]:
    """Put an update of low rank beside every projection; everything else is frozen."""
    model.requires_grad_(False)
    adapter = {}
    for name, module in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            adapter[name] = LowRank(module.weight)
            parametrize.register_parametrization(module, "weight", adapter[name])
    return adapter


def save_adapter(adapter: dict[str, LowRank], folder: Path) -> None:
    """Save in the layout and under the names of the library peft."""
    tensors = {}
    for name, update in adapter.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = update.down.detach().bfloat16().cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = update.up.detach().bfloat16().cpu().contiguous()
    save_file(tensors, folder / ADAPTER)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": FULL,
        "r": RANK,
        "lora_alpha": LORA_ALPHA,
        "target_modules": list(PROJECTIONS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def cut_layers(parent: nn.Module, origin: Sequence[int]) -> nn.Module:
    """The parent with only the layers `origin`; these layers and the last norm are trained."""
    layers = parent.model.layers
    parent.model.layers = nn.ModuleList([layers[index] for index in origin])
    for index, layer in enumerate(parent.model.layers):
        layer.self_attn.layer_idx = index  # its place in the cache
    parent.config.num_hidden_layers = len(origin)
    parent.requires_grad_(False)
    parent.model.layers.requires_grad_(True)
    parent.model.norm.requires_grad_(True)
    return parent


def save_layers(amateur: nn.Module, folder: Path) -> None:
    """Save matrices in eight bits with a scale per row, and vectors in bfloat16."""
    tensors = {}
    for name, parameter in amateur.named_parameters():
        if parameter.requires_grad:
            weight = parameter.detach().cpu()
            if weight.dim() == 1:
                tensors[name] = weight.bfloat16()
            else:
                tensors[name], tensors[f"{name}_scale"] = quantize_rows(weight)
    save_file(tensors, folder / LAYERS)


def quantize_rows(
    weight: Tensor,  # [num_rows, num_columns]
) -> tuple[Tensor, Tensor]:
    """int8 `[num_rows, num_columns]` and float32 scales `[num_rows, 1]`.

    Their product is close to `weight`.
    """
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def to_tokens(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """All texts one after another, each closed by the end token: int32 `[num_tokens]`."""
    end = [tokenizer.eos_token_id]
    rows = []
    for start in range(0, len(texts), 1000):
        encoded = tokenizer(
            list(texts[start : start + 1000]), add_special_tokens=False, verbose=False
        )
        rows += [np.array(ids + end, dtype=np.int32) for ids in encoded["input_ids"]]
    return torch.from_numpy(np.concatenate(rows))


def to_blocks(tokens: Tensor, context: int) -> Tensor:
    """`[num_blocks, context]` from `[num_tokens]`; tokens after the last whole block are dropped.

    Raises:
        ValueError: there is not even one block.
    """
    num_blocks = len(tokens) // context
    if num_blocks == 0:
        raise ValueError(f"{len(tokens)} tokens are less than one block of {context} (--context)")
    return tokens[: num_blocks * context].view(num_blocks, context)


def batches(blocks: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """`recipe.steps` batches `[batch_size, context]`. The seed gives each epoch its own order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        picked, order = order[: recipe.batch_size], order[recipe.batch_size :]
        yield blocks[picked].long()


def log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Log-probabilities of each next token: float32 `[batch_size, context, vocab_size]`."""
    return model(tokens, use_cache=False).logits.float().log_softmax(-1)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.nll_loss(log_probs(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def distillation_loss(student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """The divergence KL(teacher || student) per token, over the whole vocabulary."""
    with torch.no_grad():
        target = log_probs(teacher, tokens).flatten(0, 1)
    scores = log_probs(student, tokens).flatten(0, 1)
    return F.kl_div(scores, target, log_target=True, reduction="batchmean")


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],  # takes tokens [micro_batch, context]
    blocks: Tensor,
    recipe: Recipe,
    progress: Callable[[], None],
) -> Report:
    """Minimise `loss`, and call `progress` ten times. The returned time is without these calls."""
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    report = Report(recipe)
    every = max(1, recipe.steps // 10)
    start, losses = time.perf_counter(), []
    for step, batch in enumerate(batches(blocks, recipe), 1):
        micro_batches = batch.to(device).split(recipe.micro_batch)
        total = 0.0
        for tokens in micro_batches:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(tokens) * (len(tokens) / len(batch))
            value.backward()
            total = total + value.detach()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(total)
        report.num_tokens += batch.numel()
        if step % every == 0:
            report.final_loss = torch.stack(losses[-every:]).mean().item()
            report.seconds += time.perf_counter() - start
            print(
                f"[train] step {step}/{recipe.steps} loss {report.final_loss:.4f}"
                f" {report.num_tokens / report.seconds:.0f} tokens/s",
                flush=True,
            )
            progress()
            start = time.perf_counter()
    report.seconds += time.perf_counter() - start
    return report


def rate(step: int, recipe: Recipe) -> float:
    """The factor of the learning rate at a step."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def compare(
    model: nn.Module,
    other: nn.Module,
    blocks: Tensor,  # [num_blocks, context]
) -> dict[str, float]:
    """Compare both models on the same text, in their own dtype.

    perplexity, other_perplexity: of the text.
    kl: KL(other || model) per token, in nats.
    shared: sum_x min(p(x), q(x)), the mean over tokens. It is the chance that a token drawn from
        one model is accepted by the other at temperature 1 (Leviathan et al., arXiv 2211.17192).
    same_top: the share of tokens where both models have the same most likely token. It is the
        chance of acceptance at temperature 0.
    """
    device = next(model.parameters()).device
    sums = dict.fromkeys(("loss", "other_loss", "kl", "shared", "same_top"), 0.0)
    for tokens in blocks.long().to(device).split(COMPARED_BLOCKS):
        scores, other_scores = (
            log_probs(each, tokens)[:, :-1].flatten(0, 1) for each in (model, other)
        )
        text = tokens[:, 1:].flatten()
        sums["loss"] += F.nll_loss(scores, text, reduction="sum").item()
        sums["other_loss"] += F.nll_loss(other_scores, text, reduction="sum").item()
        kl = F.kl_div(scores, other_scores, log_target=True, reduction="sum")
        sums["kl"] += kl.item()
        sums["shared"] += torch.minimum(scores, other_scores).exp().sum().item()
        sums["same_top"] += (scores.argmax(-1) == other_scores.argmax(-1)).sum().item()
    means = {key: value / blocks[:, 1:].numel() for key, value in sums.items()}
    perplexities = {
        "perplexity": math.exp(means.pop("loss")),
        "other_perplexity": math.exp(means.pop("other_loss")),
    }
    return {**perplexities, **means}


@dataclass
class Data:
    """The path of the base, and blocks of text `[num_blocks, context]`."""

    base: Path
    device: str
    train: Tensor
    held_out: Tensor

    def load_base(self, dtype: torch.dtype | str = "auto") -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype)
        return model.eval().to(self.device)

    def measure(self, model: nn.Module, other: nn.Module) -> dict[str, float]:
        """Compare in float32, where rounding is negligible."""
        models = (each.float().eval().to(self.device) for each in (model, other))
        return compare(*models, self.held_out)


def train_python(data: Data, recipe: Recipe, folder: Path) -> Report:
    """Train a low-rank adapter of the base on the next token."""
    base, model = data.load_base(), data.load_base(torch.float32)
    adapter = add_adapter(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    report = train(
        parameters,
        lambda tokens: next_token_loss(model, tokens),
        data.train,
        recipe,
        lambda: print_comparison(FULL, compare(model, base, data.held_out)),
    )
    save_adapter(adapter, folder)
    return report


def train_amateur(data: Data, recipe: Recipe, folder: Path, origin: Sequence[int]) -> Report:
    """Train a few layers of the base to match the base's distributions."""
    base = data.load_base()
    student = cut_layers(data.load_base(torch.float32), origin)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    report = train(
        parameters,
        lambda tokens: distillation_loss(student, base, tokens),
        data.train,
        recipe,
        lambda: print_comparison(FULL, compare(student, base, data.held_out)),
    )
    save_layers(student, folder)
    return report


def print_comparison(other: str, measured: dict[str, float]) -> None:
    figures = " ".join(f"{key} {value:.4g}" for key, value in measured.items())
    print(f"[train] on held-out text, against {other}: {figures}", flush=True)


def make_member(
    name: str,
    args: argparse.Namespace,
    corpus: Corpus,
    tokens: dict[str, Tensor],  # tokens of the corpus: "train" and "held_out"
) -> None:
    """Train, store and measure a member; its folder is replaced only at the end."""
    recipe = make_recipe(name, args)
    torch.manual_seed(recipe.seed)
    held_out = to_blocks(tokens["held_out"], recipe.context)
    picked = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    data = Data(
        base=args.base,
        device=args.device,
        train=to_blocks(tokens["train"], recipe.context),
        held_out=held_out[picked[: args.held_out_blocks]],
    )
    print(f"[train] {name}: {data.train.numel()} tokens, {recipe}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=f".{name}.") as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        if name == PYTHON:
            report = train_python(data, recipe, folder)
            member = load_python(folder, args.base)
        else:
            report = train_amateur(data, recipe, folder, args.layers)
            member = load_amateur(folder, args.base)
            if (args.out / PYTHON).exists():
                other = load_python(args.out / PYTHON, args.base)
                report.measured[PYTHON] = data.measure(member, other)
        report.measured[FULL] = data.measure(member, data.load_base())
        for other, measured in report.measured.items():
            print_comparison(other, measured)
        write_sums(folder)
        (folder / "README.md").write_text(card(name, args, corpus, data, report))
        shutil.rmtree(args.out / name, ignore_errors=True)
        folder.rename(args.out / name)
    print(f"[train] wrote {args.out / name}", flush=True)


def card(name: str, args: argparse.Namespace, corpus: Corpus, data: Data, report: Report) -> str:
    recipe = report.recipe
    return model_card(
        name,
        training={
            "date": date.today().isoformat(),
            "hardware": device_name(args.device),
            "time": f"{report.seconds / 60:.1f} minutes, without measuring",
            "tokens": report.num_tokens,
            "steps": f"{recipe.steps} of {recipe.batch_size} x {recipe.context} tokens",
            "learning rate": f"{recipe.learning_rate:g}, warm-up {recipe.warmup:g} of the steps,"
            " cosine to a tenth",
            "optimiser": f"AdamW, weight decay {recipe.weight_decay:g}, gradient norm at most 1",
            "precision": "bfloat16 products, float32 weights",
            "seed": recipe.seed,
            "last loss": f"{report.final_loss:.4f}",
            "versions": versions(),
        },
        measured=report.measured,
        rank=RANK,
        layers=", ".join(map(str, args.layers)),
        context=recipe.context,
        num_documents=len(corpus.train),
        num_blocks=len(data.train),
        num_contaminated=corpus.num_contaminated,
        digest=corpus.digest[:16],
        num_measured=data.held_out.numel(),
        held_out=", ".join(corpus.held_out_packages),
    )


def device_name(device: str) -> str:
    if device == "cpu":
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name(device)


def versions() -> str:
    libraries = (f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return ", ".join([f"Python {platform.python_version()}", *libraries])


def make_recipe(name: str, args: argparse.Namespace) -> Recipe:
    given = {key: getattr(args, key) for key in OVERRIDES if getattr(args, key) is not None}
    recipe = replace(RECIPES[name], **given)
    return replace(recipe, micro_batch=min(recipe.micro_batch, recipe.batch_size))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    read_env()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--members", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--base", type=Path, default=model_root() / FULL, help="folder of the full model"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=ORIGIN,
        help="layers of the full model that the amateur starts from",
    )
    parser.add_argument("--max-documents", type=int, help="the most files to read")
    parser.add_argument(
        "--held-out-blocks", type=int, default=64, help="number of blocks to measure on"
    )
    for key, kind in OVERRIDES.items():
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=kind, help="replaces the recipe's value"
        )
    args = parser.parse_args(argv)
    if not (args.base / "config.json").exists():
        parser.error(f"--base: no model in {args.base}; run scripts/prepare_models.py first")
    for key in ("max_documents", "held_out_blocks", *OVERRIDES):
        if (value := getattr(args, key)) is not None and value <= 0 and key != "seed":
            parser.error(f"--{key.replace('_', '-')}: {value} must be greater than 0")
    num_layers = json.loads((args.base / "config.json").read_text())["num_hidden_layers"]
    if not all(0 <= layer < num_layers for layer in args.layers):
        parser.error(f"--layers: the parent has layers 0 to {num_layers - 1}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    try:
        corpus = collect(max_documents=args.max_documents)
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        tokens = {key: to_tokens(getattr(corpus, key), tokenizer) for key in ("train", "held_out")}
        for name in args.members:
            make_member(name, args, corpus, tokens)
    except ValueError as error:
        raise SystemExit(f"[train] {error}") from error


if __name__ == "__main__":
    main()
