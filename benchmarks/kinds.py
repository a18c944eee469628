"""Kinds of requests that are measured side by side: vLLM's SamplingParams as plain data.

This module knows parameters by name. It makes no request of vLLM's.
"""

from argparse import Namespace
from itertools import product
from typing import Any

Kind = dict[str, Any]

# Tokens that every shape and every real member has.
SOME_TOKENS = list(range(100, 1000))
# It never ends by itself within a sample: a number takes two tokens at least.
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 500}

BASIC: list[Kind] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.0, "repetition_penalty": 1.05},
    {"temperature": 1.0, "repetition_penalty": 1.05},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0, "logprobs": 5},
]
FURTHER: list[Kind] = [
    {"temperature": 0.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {"100": 2.0, "200": -2.0}},
    # More than a request gets in the mean. The stop token is what is masked until then.
    {"temperature": 0.0, "min_tokens": None, "stop_token_ids": [2]},
    {"temperature": 0.0, "allowed_token_ids": SOME_TOKENS},
    {"temperature": 0.0, "bad_words": [" the", " return"]},
    {"temperature": 0.0, "structured_outputs": {"json": ENDLESS}},
]
KINDS = {"basic": BASIC, "all": BASIC + FURTHER}
# vLLM reads these with the tokenizer of the first member.
OF_THE_TOKENIZER = {"bad_words", "structured_outputs"}


def requests_of(args: Namespace) -> list[Kind]:
    """The kinds that a command line asks for; each has a temperature."""
    if args.requests is None:
        pairs = product(args.temperature, args.sampling)
        return [{"temperature": temperature, **sampling} for temperature, sampling in pairs]
    kinds = [dict(kind) for kind in KINDS[args.requests]]
    for kind in kinds:
        if "min_tokens" in kind:
            kind["min_tokens"] = args.num_tokens * 3 // 2
    return kinds


def needs_tokenizer(kind: Kind) -> bool:
    return not OF_THE_TOKENIZER.isdisjoint(kind)


def name_of(temperature: float, sampling: Kind) -> str:
    """A kind for readers. Long values are left out."""
    parts = [f"temperature {temperature:g}"]
    for name, value in sampling.items():
        is_short = isinstance(value, int | float) and name != "min_tokens"
        parts.append(f"{name} {value:g}" if is_short else name)
    return ", ".join(parts)
