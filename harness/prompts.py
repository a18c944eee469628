"""From the examples of a task to the engine's requests: tokens, choices and seeds.

This module knows tokenizers and chat templates. It loads no weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.engine import Request
from harness.errors import ConfigError, one_line
from tasks import Example, Task

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def load_tokenizer(model_config: "ModelConfig") -> Any:
    """The tokenizer that vLLM will use.

    Raises:
        ConfigError: there is no tokenizer, or it cannot be read.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        return cached_tokenizer_from_config(model_config)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"method.model: '{model_config.tokenizer}' has no tokenizer: {one_line(error)}"
        ) from error


def make_requests(
    task: Task, examples: Sequence[Example], tokenizer: Any, max_model_len: int, seed: int
) -> list[Request]:
    """One request per example.

    Each request has its own seed, so a sample does not depend on what else runs or ran.

    Raises:
        ConfigError:
            - a prompt leaves no room for a token,
            - the model has no chat template, or
            - the choices of an example do not differ in exactly one token.
    """
    requests = []
    for example in examples:
        token_ids, choices = _encode(tokenizer, example), {}
        if texts := task.choices(example):
            token_ids, choices = _encode_choices(tokenizer, example, token_ids, texts)
        if not token_ids:
            raise ConfigError(
                f"method.model: its tokenizer makes no tokens of example {example.index}; mend the "
                "files of the tokenizer"
            )
        if len(token_ids) >= max_model_len:
            raise ConfigError(
                f"method.llm.max_model_len: example {example.index} has {len(token_ids)} prompt "
                f"tokens and the members read {max_model_len}; raise it, or choose other members"
            )
        requests.append(Request(example.index, token_ids, seed + example.index, choices))
    return requests


def _encode_choices(
    tokenizer: Any, example: Example, prompt: list[int], texts: Sequence[str]
) -> tuple[list[int], dict[int, str]]:
    """The tokens that prompt and choices share, and each choice by its last token."""
    if example.messages:
        encoded = [prompt + tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        encoded = [tokenizer.encode(example.prompt + text) for text in texts]
    choices = {ids[-1]: text for ids, text in zip(encoded, texts, strict=True)}
    if len(choices) < len(texts) or any(ids[:-1] != encoded[0][:-1] for ids in encoded):
        raise ConfigError(
            f"method.model: its tokenizer makes more than one token of {' or '.join(texts)} after "
            f"the prompt of example {example.index}; let the answer be generated, or choose others"
        )
    return encoded[0][:-1], choices


def _encode(tokenizer: Any, example: Example) -> list[int]:
    if not example.messages:
        return tokenizer.encode(example.prompt)
    try:
        return tokenizer.apply_chat_template(
            list(example.messages), add_generation_prompt=True, return_dict=False
        )
    except ValueError as error:
        raise ConfigError(f"dataset.chat: {one_line(error)}; set it to false") from error
