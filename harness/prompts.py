"""From the examples of a task to the engine's requests: tokens and seeds.

Knows tokenizers and chat templates; loads no weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.engine import Request
from harness.errors import ConfigError, one_line
from tasks import Example

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def load_tokenizer(model_config: "ModelConfig") -> Any:
    """The tokenizer that vLLM will use.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        return cached_tokenizer_from_config(model_config)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"method.model: '{model_config.tokenizer}' has no tokenizer: {one_line(error)}"
        ) from error


def make_requests(
    examples: Sequence[Example], tokenizer: Any, max_model_len: int, seed: int
) -> list[Request]:
    """One request per example; each has a seed of its own, so that a sample does not depend on
    what else runs or ran.

    Raises:
        ConfigError: a prompt leaves no room for a token, or the model has no chat template.
    """
    requests = []
    for example in examples:
        token_ids = _encode(tokenizer, example)
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
        requests.append(Request(example.index, token_ids, seed + example.index))
    return requests


def _encode(tokenizer: Any, example: Example) -> list[int]:
    if not example.messages:
        return tokenizer.encode(example.prompt)
    try:
        return tokenizer.apply_chat_template(
            list(example.messages), add_generation_prompt=True, return_dict=False
        )
    except ValueError as error:
        raise ConfigError(f"dataset.chat: {one_line(error)}; set it to false") from error
