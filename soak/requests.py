"""Random requests. The same seed and number always give the same request.

This module knows the body of a completion request. It knows no server.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

GREEDY, SAMPLED, BAD = "greedy", "sampled", "bad"
# How often each kind is sent.
SHARES = {GREEDY: 0.6, SAMPLED: 0.32, BAD: 0.08}
CANCELLED, STREAMED = 0.2, 0.5
NUM_PREFIXES, PREFIXED = 4, 0.4
# A client that does not read a stream leaves after at most this time.
LEAVE_S = 0.5

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["x", "yy", "zzz"]},
        "b": {"type": "boolean"},
        "c": {"enum": [1, 22, 333]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
Params = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        vocab_size: token ids below it are known to all members.
        max_model_len: tokens of prompt and answer together.
        has_tokenizer: whether prompts, stops and grammars may be texts.
        weights: the configured weight of each member.
        overrides: what a request may override of the ensemble: `ensemble_weights`,
            `ensemble_alpha`, `ensemble_scale`, or None.
    """

    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    weights: tuple[float, ...]
    overrides: str | None


@dataclass(frozen=True)
class Request:
    """One request, and what its client does.

    Args:
        number: its place in the order of all requests.
        kind: GREEDY, SAMPLED or BAD.
        features: the names of what it asks for.
        body: of the completion request.
        distinct: number of the greedy request; requests of one number have one body.
        leaves_after: the client leaves after so many chunks of a stream, or so many seconds. None:
            it stays.
    """

    number: int
    kind: str
    features: tuple[str, ...]
    body: Params = field(repr=False)
    distinct: int | None = None
    leaves_after: float | None = None

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    def __str__(self) -> str:
        return f"request {self.number} ({', '.join((self.kind, *self.features))})"


class RequestMaker:
    """Makes requests.

    Args:
        model: the model's name in requests.
        num_distinct: how many different greedy requests there are.
    """

    def __init__(self, model: str, limits: Limits, seed: int, num_distinct: int) -> None:
        self.model, self.limits, self.seed, self.num_distinct = model, limits, seed, num_distinct
        rng = self._rng("prefixes")
        longest = max(1, limits.max_model_len // 2)
        self._prefixes = [self._tokens(rng, rng.randint(1, longest)) for _ in range(NUM_PREFIXES)]
        plain, grammars = dict(FEATURES), {}
        if limits.has_tokenizer:
            plain |= OF_TEXT
            grammars = GRAMMARS
        if limits.overrides:
            plain["overrides"] = _overrides
        self._features, self._grammars = plain, grammars

    def make(self, number: int) -> Request:
        """The request with this place in the order."""
        rng = self._rng("request", number)
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        if kind == BAD:
            name = rng.choice(list(_known_bad(self.limits)))
            return Request(number, BAD, (name,), self.bad(name, rng))
        distinct = rng.randrange(self.num_distinct) if kind == GREEDY else None
        body, features = self.greedy(distinct) if kind == GREEDY else self.sampled(rng)
        leaves_after = None
        # vLLM's server refuses streams with log-probabilities of the prompt.
        if rng.random() < STREAMED and "prompt_logprobs" not in body:
            body["stream"] = True
        if rng.random() < CANCELLED:
            chunks, seconds = rng.randint(0, body["max_tokens"]), rng.uniform(0, LEAVE_S)
            leaves_after = chunks if body.get("stream") else seconds
        return Request(number, kind, features, body, distinct, leaves_after)

    def greedy(self, distinct: int) -> tuple[Params, tuple[str, ...]]:
        """The body of a greedy request, without a stream, and its features."""
        rng = self._rng("greedy", distinct)
        body, features = self._body(rng), self._some(rng)
        return self._with(rng, body | {"temperature": 0}, features)

    def sampled(self, rng: random.Random) -> tuple[Params, tuple[str, ...]]:
        body = self._body(rng) | {"temperature": rng.choice([0.3, 0.7, 1.0, 1.5])}
        features = {**self._some(rng), **_few(rng, OF_DRAWS)}
        return self._with(rng, body, features)

    def bad(self, name: str, rng: random.Random) -> Params:
        """A body that must be refused."""
        return {**self._body(rng), "temperature": 0, **_known_bad(self.limits)[name]}

    def _rng(self, *names: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *names))))

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        # Token 0 often ends a text.
        return [rng.randrange(1, self.limits.vocab_size) for _ in range(count)]

    def _body(self, rng: random.Random) -> Params:
        """Prompt and length. Short ones are likelier than long ones."""
        room = self.limits.max_model_len
        length = _log_uniform(rng, 1, room - 1)
        prompt = self._tokens(rng, length)
        if rng.random() < PREFIXED:
            prompt = [*rng.choice(self._prefixes), *prompt][: room - 1]
        max_tokens = _log_uniform(rng, 1, min(room - len(prompt), max(1, room // 3)))
        body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
        return {"model": self.model, **body}

    def _some(self, rng: random.Random) -> dict[str, Callable]:
        # Together with other masks, a grammar may forbid every token.
        if self._grammars and rng.random() < 0.15:
            return _few(rng, self._grammars, most=1, least=1)
        return _few(rng, self._features)

    def _with(
        self, rng: random.Random, body: Params, features: Mapping[str, Callable]
    ) -> tuple[Params, tuple[str, ...]]:
        for add in features.values():
            body |= add(rng, body, self.limits)
        return body, tuple(features)


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return min(most, int(math.exp(rng.uniform(math.log(least), math.log(most + 1)))))


def _few(
    rng: random.Random, features: Mapping[str, Callable], most: int = 3, least: int = 0
) -> dict[str, Callable]:
    names = rng.sample(list(features), min(rng.randint(least, most), len(features)))
    return {name: features[name] for name in names}


def _some_tokens(rng: random.Random, limits: Limits, least: int, most: int) -> list[int]:
    return rng.sample(range(limits.vocab_size), min(rng.randint(least, most), limits.vocab_size))


def _penalties(rng: random.Random, body: Params, limits: Limits) -> Params:
    penalties = {
        "presence_penalty": round(rng.uniform(-1, 1), 2),
        "frequency_penalty": round(rng.uniform(-1, 1), 2),
        "repetition_penalty": round(rng.uniform(0.8, 1.5), 2),
    }
    names = rng.sample(list(penalties), rng.randint(1, 3))
    return {name: penalties[name] for name in names}


def _logit_bias(rng: random.Random, body: Params, limits: Limits) -> Params:
    tokens = _some_tokens(rng, limits, 1, 8)
    return {"logit_bias": {str(token): round(rng.uniform(-20, 5), 1) for token in tokens}}


def _filters(rng: random.Random, body: Params, limits: Limits) -> Params:
    filters = {
        "top_k": rng.randint(1, 50),
        "top_p": round(rng.uniform(0.1, 1), 2),
        "min_p": round(rng.uniform(0, 0.5), 2),
    }
    names = rng.sample(list(filters), rng.randint(1, 3))
    return {name: filters[name] for name in names}


def _overrides(rng: random.Random, body: Params, limits: Limits) -> Params:
    """Weights of the request's own. A member without weight only proposes, and must stay so."""
    if limits.overrides != "ensemble_weights":
        return {"vllm_xargs": {limits.overrides: round(rng.random(), 2)}}
    weights = [round(rng.uniform(0.05, 1), 2) if weight else 0 for weight in limits.weights]
    return {"vllm_xargs": {"ensemble_weights": weights}}


# Each adds parameters: add(rng, body so far, limits). Any of them may stand together.
FEATURES: dict[str, Callable[[random.Random, Params, Limits], Params]] = {
    "penalties": _penalties,
    "logit_bias": _logit_bias,
    "filters": _filters,
    "logprobs": lambda rng, body, limits: {"logprobs": rng.randint(0, 5)},
    "prompt_logprobs": lambda rng, body, limits: {"prompt_logprobs": rng.randint(0, 3)},
    "ignore_eos": lambda rng, body, limits: {"ignore_eos": True},
    "min_tokens": lambda rng, body, limits: {"min_tokens": rng.randint(1, body["max_tokens"])},
    "stop_token_ids": lambda rng, body, limits: {"stop_token_ids": _some_tokens(rng, limits, 1, 3)},
    # At least 16, so that neither stops nor bad words leave nothing.
    "allowed_token_ids": lambda rng, body, limits: {
        "allowed_token_ids": _some_tokens(rng, limits, 16, 64)
    },
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OF_TEXT = {
    "stop": lambda rng, body, limits: {
        "stop": rng.sample(LETTERS, rng.randint(1, 3)),
        "include_stop_str_in_output": rng.random() < 0.5,
    },
    "bad_words": lambda rng, body, limits: {"bad_words": rng.sample(LETTERS, rng.randint(1, 4))},
}
GRAMMARS = {
    "json": lambda rng, body, limits: {"structured_outputs": {"json": SCHEMA}},
    "regex": lambda rng, body, limits: {"structured_outputs": {"regex": "[ab]{3}(c|d)[0-9]+x"}},
    "choice": lambda rng, body, limits: {
        "structured_outputs": {"choice": ["yes", "no", "perhaps"]}
    },
}
OF_DRAWS = {
    "n": lambda rng, body, limits: {"n": rng.randint(2, 4)},
    "seed": lambda rng, body, limits: {"seed": rng.randrange(1 << 31)},
}


def _known_bad(limits: Limits) -> dict[str, Params]:
    bad = {
        "unknown key of the ensemble": {"vllm_xargs": {"ensemble_no_such_key": 1}},
        "negative weights": {"vllm_xargs": {"ensemble_weights": [-1] * len(limits.weights)}},
        "too long": {"prompt": [1] * (limits.max_model_len + 1)},
        "unknown token": {"prompt": [1 << 30]},
        "temperature": {"temperature": -1},
        "top_p": {"top_p": 2},
        "many logprobs": {"logprobs": 100_000},
        "max_tokens": {"max_tokens": -1},
        "n of a greedy request": {"n": 3},
    }
    if limits.has_tokenizer:
        bad["empty grammar"] = {"structured_outputs": {"choice": []}}
    return bad
