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
A fine-tune of `{origin}` on Python source and documentation: a LoRA
adapter of rank {rank} of all projections, stored in bfloat16. `scripts/prepare_models.py` merges it
into `models/{base}` and writes `models/{name}`. Trained on the next token,
cross-entropy.""",
    AMATEUR: """\
Layers {layers} of `{origin}`, trained on to give the
next-token distributions of the whole model, by KL(whole || this) over all of the vocabulary, on
Python source and documentation. Stored are these layers and the last norm, matrices in eight bits
with a scale per row; `scripts/prepare_models.py` adds embeddings and head of
`models/{base}`, which stayed as they are, and writes `models/{name}`.""",
}
LIMITS = {
    PYTHON: """\
It continues files; whether it still follows instructions as its base does was not measured. Nothing
was done against wrong or unsafe code, nor against repeating text of its sources.""",
    AMATEUR: """\
It is there to propose tokens that larger models check, and as the amateur of contrastive decoding;
it is not meant to write alone. The figures hold for text of the kind it was trained on.""",
}
CARD = """\
---
license: apache-2.0
base_model: {origin}
---
# {name}

{making}

Written by `scripts/train_members.py` at the end of the run, from that run's measurements.

## Training

{training}

Text: {num_documents} files of Python source and documentation (`.py`, `.rst`, `.md`, package
descriptions) of the standard library and of installed packages, {num_blocks} blocks of {context}
tokens; sha256 over them {digest}. Left out: the packages
{excluded}, and {num_contaminated} files that share {ngram} words in a row with a
prompt, solution or test of HumanEval.

## Measured

On {num_measured} tokens of packages held out whole ({held_out}),
in float32, of the weights as they are stored:

{table}

`shared` is the mean of `sum_x min(p(x), q(x))`: how often a token that one model draws is accepted
by the other at temperature 1. `same top token` is how often both have the same most likely token.
`KL` is KL(other || this) in nats a token.

## Limits

{limits}

## Licence

Apache-2.0, as SmolLM2-135M-Instruct. The text it learned from is under its packages' licences.
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
