"""The model cards of the trained members: their text, with a run's figures filled in.

This module knows words and tables only. Every figure comes from train_members.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.prepare_models import AMATEUR, FULL, PYTHON
from scripts.training_text import EXCLUDED_PACKAGES, NGRAM

ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAKING = {
    PYTHON: """\
This model is `{origin}`, fine-tuned on Python source and documentation.
This folder stores a LoRA adapter of rank {rank} on all projections, in bfloat16. The loss was the
cross-entropy of the next token. `scripts/prepare_models.py` merges the adapter into `models/{base}`
and writes `models/{name}`.""",
    AMATEUR: """\
This model has layers {layers} of `{origin}`. They were trained further to
reproduce the next-token distributions of the whole model on Python source and documentation. The
loss was KL(whole || this) over the whole vocabulary. This folder stores the layers and the last
norm, with matrices in eight bits and a scale per row. The embeddings and the head were not trained.
`scripts/prepare_models.py` takes them from `models/{base}` and writes
`models/{name}`.""",
}
LIMITS = {
    PYTHON: """\
The model continues files. Nobody measured whether it still follows instructions as its base does.
It may write wrong or unsafe code, and it may repeat text from its sources. Nothing prevents
this.""",
    AMATEUR: """\
The model has two uses: it proposes tokens that larger models check, and it is the amateur of
contrastive decoding. It is not meant to write alone. The figures hold for text like its training
text.""",
}
CARD = """\
---
license: apache-2.0
base_model: {origin}
---
# {name}

{making}

`scripts/train_members.py` wrote this card at the end of the run, from that run's measurements.

## Training

{training}

The text is Python source and documentation of the standard library and of installed packages:
`.py`, `.rst` and `.md` files, and package descriptions. Its {num_documents} files make
{num_blocks} blocks of {context} tokens. The sha256 over the files begins with {digest}.

These files were left out:
- all files of {excluded},
- {num_contaminated} files that share {ngram} words in a row with a prompt, solution or test of
  HumanEval.

## Measured

The models ran in float32, this one with its stored weights. They read {num_measured} tokens of
packages that were left out of the training: {held_out}.

{table}

- `shared` is the mean of `sum_x min(p(x), q(x))`. It is how often one model accepts a token that
  the other draws, at temperature 1.
- `same top token` is how often both models have the same most likely token.
- `KL` is KL(other || this) in nats per token.

## Limits

{limits}

## Licence

Apache-2.0, as for SmolLM2-135M-Instruct. The training text is under the licences of its packages.
"""


def model_card(
    name: str,
    training: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, float]],
    **fields: Any,
) -> str:
    """The card of `name`; `measured` has, by model, what train_members.compare returns."""
    fields |= {"name": name, "base": FULL, "origin": ORIGIN}
    head = ("against", "perplexity", "of the other", "KL", "shared", "same top token")
    rows = [
        (other, *(f"{value:.3f}" for value in figures.values()))
        for other, figures in measured.items()
    ]
    return CARD.format(
        **fields,
        making=MAKING[name].format(**fields),
        limits=LIMITS[name],
        training=_table(("", ""), list(training.items())),
        table=_table(head, rows),
        excluded=" and ".join(EXCLUDED_PACKAGES),
        ngram=NGRAM,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
