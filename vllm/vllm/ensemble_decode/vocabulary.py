"""Which tokens the members have: one vocabulary for all, though a member may lack part of it.

Checkpoints that share a tokenizer may be padded to different numbers of rows. A fine-tune may have
added tokens. The ensemble's tokens are those that any member's tokenizer has. If a member lacks a
token, that member gives it no probability. A row without a token never gets any probability. This
module knows tokenizers and configs, and loads no weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm.ensemble_decode.errors import ConfigFieldError, reason

logger = init_logger(__name__)

FIELD = "--model/ensemble.extra_model"
# A text on which tokenizers differ that have equal vocabularies, but other merges or normalisation.
_PROBE = "def f(x):\n    return x + 1\n\nThe naïve café costs €1,234.50  — «ok»? 你好 🙂\t\r\n"


@dataclass(frozen=True)
class MemberVocabulary:
    """What a member has of the ensemble's `vocab_size` rows of logits.

    Args:
        vocab_size: rows of the ensemble. They are those of the first member.
        num_rows: rows that the member has.
        lacking: tokens below `vocab_size` that get no probability from this member, in order. They
            are the tokens that it lacks, and the rows that no member has a token for.
        read_as: the token that the member reads in place of a token that it lacks.
    """

    vocab_size: int
    num_rows: int
    lacking: tuple[int, ...]
    read_as: int

    @property
    def is_whole(self) -> bool:
        return not self.lacking and self.num_rows == self.vocab_size


def check_tokenizers(members: Sequence[ModelConfig], field: str = FIELD) -> None:
    """Refuse models whose tokenizers give one token different meanings.

    A token that only one model has must be an added or special token, such as a fine-tune brings.

    Raises:
        ConfigFieldError: one line that begins with `field`. It names the first token that differs,
            or the model whose tokenizer cannot be read.
    """
    first, *others = members
    if first.skip_tokenizer_init:
        return
    tokenizer = _tokenizer(first, field)
    for member in others:
        difference = _difference(tokenizer, _tokenizer(member, field))
        if difference is not None:
            raise ConfigFieldError(
                field,
                f"the tokenizers of '{first.model}' and '{member.model}' disagree: "
                f"{difference}; members must share one tokenizer",
            )


def member_vocabularies(
    members: Sequence[ModelConfig],
    union_needed: bool = True,
    read_as: Sequence[str | None] | None = None,
) -> list[MemberVocabulary]:
    """What each of `members` has of the first member's rows.

    Without tokenizers, rows that not all members have count as padding.

    Args:
        union_needed: whether a token that the first member lacks may be emitted at all.
        read_as: by member, the text of the token that stands for those that it lacks. None: its
            unknown token, or else its end token.

    Raises:
        ConfigFieldError: one line that names the field and the remedy, if `union_needed` and the
            first member has no row for a token, or if a member has no token with the text.
    """
    first = members[0]
    vocab_size = first.get_vocab_size()
    nums_rows = [member.get_vocab_size() for member in members]
    texts = read_as or [None] * len(members)
    if first.skip_tokenizer_init:
        if any(text is not None for text in texts):
            raise ConfigFieldError(
                "ensemble.read_as", "it names a token, so it needs tokenizers; leave it out"
            )
        has = [set(range(min(nums_rows)))] * len(members)
        reads = [0] * len(members)
    else:
        has = [
            {token for token in _ids(member) if token < num_rows}
            for member, num_rows in zip(members, nums_rows, strict=True)
        ]
        reads = [_read_as(*pair) for pair in zip(members, texts, strict=True)]
    for member, tokens in zip(members, has, strict=True):
        _check_beyond(first, member, tokens, union_needed)
    everything = range(vocab_size)
    return [
        MemberVocabulary(
            vocab_size,
            num_rows,
            tuple(token for token in everything if token not in tokens),
            read_as,
        )
        for num_rows, tokens, read_as in zip(nums_rows, has, reads, strict=True)
    ]


class FittedMember(nn.Module):
    """A member that reads and scores the ensemble's tokens, although it lacks some of them."""

    def __init__(
        self, model: nn.Module, vocabulary: MemberVocabulary, device: torch.device
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.ranges = _ranges(t for t in vocabulary.lacking if t < vocabulary.num_rows)
        """Columns of the member's own logits that are removed: (start, end) of each run"""
        tokens = torch.arange(vocabulary.vocab_size, dtype=torch.int32, device=device)
        for start, end in _ranges(vocabulary.lacking):
            tokens[start:end] = vocabulary.read_as
        self.register_buffer("reads", tokens, persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(self.reads[input_ids])

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        return self.model(
            input_ids=self.reads[input_ids],
            positions=positions,
            intermediate_tensors=None,
            inputs_embeds=None,
        )

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [num_rows, hidden_size]
    ) -> torch.Tensor:  # [num_rows, vocab_size], -inf where the member has no token
        logits = self.model.compute_logits(hidden_states)
        for start, end in self.ranges:
            logits[:, start:end] = float("-inf")
        missing = self.vocabulary.vocab_size - logits.shape[-1]
        if missing > 0:
            return nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocabulary.vocab_size]


def fitted(model: nn.Module, vocabulary: MemberVocabulary, device: torch.device) -> nn.Module:
    """The model itself if it has all of the ensemble's tokens. Otherwise a `FittedMember`."""
    return model if vocabulary.is_whole else FittedMember(model, vocabulary, device)


def _tokenizer(member: ModelConfig, field: str) -> Any:
    try:
        return cached_tokenizer_from_config(member)
    except (ValueError, OSError) as error:
        raise ConfigFieldError(
            field, f"the tokenizer of '{member.model}' cannot be read: {reason(error)}"
        ) from error


def _ids(member: ModelConfig) -> set[int]:
    return set(cached_tokenizer_from_config(member).get_vocab().values())


def log_what_is_read(members: Sequence[ModelConfig], read_as: Sequence[str | None] | None) -> None:
    """Say once which members read other tokens than the text has. Padding is in no text.

    Args:
        members, read_as: as `member_vocabularies` has them.
    """
    vocabularies = member_vocabularies(members, False, read_as)
    emitted = set().union(*({*range(v.vocab_size)} - {*v.lacking} for v in vocabularies))
    for member, vocabulary in zip(members, vocabularies, strict=True):
        lacks = [token for token in vocabulary.lacking if token in emitted]
        if lacks:
            logger.info_once(
                "'%s' lacks %d tokens of the ensemble, such as %d. It reads token %d in place of "
                "each (ensemble.read_as).",
                member.model,
                len(lacks),
                lacks[0],
                vocabulary.read_as,
            )


def _read_as(member: ModelConfig, text: str | None) -> int:
    """The token with this text. None: the unknown token, or else the end token."""
    tokenizer = cached_tokenizer_from_config(member)
    if text is not None:
        token = tokenizer.get_vocab().get(text)
        if token is None:
            raise ConfigFieldError(
                "ensemble.read_as", f"'{member.model}' has no token {text!r}; name one that it has"
            )
        return token
    known = [getattr(tokenizer, name, None) for name in ("unk_token_id", "eos_token_id")]
    return next((token for token in known if token is not None), 0)


def _check_beyond(
    first: ModelConfig, member: ModelConfig, tokens: set[int], union_needed: bool
) -> None:
    vocab_size = first.get_vocab_size()
    beyond = max(tokens, default=-1)
    if beyond < vocab_size:
        return
    if union_needed:
        raise ConfigFieldError(
            FIELD,
            f"'{member.model}' has token {beyond}, beyond the {vocab_size} rows of "
            f"'{first.model}', which are the ensemble's; begin with the member of most rows",
        )
    logger.warning_once(
        "Tokens from %d on of '%s' are never emitted: '%s', which every token needs, lacks them.",
        vocab_size,
        member.model,
        first.model,
    )


def _difference(first: object, other: object) -> str | None:
    """The first token on which two tokenizers differ, in words. None if they agree."""
    vocabs = [tokenizer.get_vocab() for tokenizer in (first, other)]
    tokens = [{token_id: token for token, token_id in vocab.items()} for vocab in vocabs]
    added = {*first.get_added_vocab(), *other.get_added_vocab()}
    for token_id in sorted({*tokens[0], *tokens[1]}):
        one, two = (of_one.get(token_id) for of_one in tokens)
        if one is not None and two is not None:
            if one != two:
                return f"{token_id} is {one!r} in one and {two!r} in the other"
            continue
        token, lacking = (one, vocabs[1]) if two is None else (two, vocabs[0])
        if token in lacking:
            return f"{token!r} is {token_id} in one and {lacking[token]} in the other"
        if token not in added:
            return f"{token!r} ({token_id}) is in one only"
    one, two = (tokenizer.encode(_PROBE, add_special_tokens=False) for tokenizer in (first, other))
    if one == two:
        return None
    pairs = list(zip_longest(one, two))
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    shown = [of_one.get(token_id) for of_one, token_id in zip(tokens, pairs[at], strict=True)]
    return f"where one reads {shown[0]!r} in a text the other reads {shown[1]!r}"


def _ranges(tokens: Iterable[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of consecutive numbers."""
    ordered = list(tokens)
    if not ordered:
        return []
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a + 1 for a, b in pairwise(ordered) if b != a + 1), ordered[-1] + 1]
    return list(zip(starts, ends, strict=True))
