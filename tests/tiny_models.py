"""Tiny random language models on disk, and the distributions that transformers gives them.

The e2e tests compare the engine with these. This module knows transformers. It knows no vLLM.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB_SIZE = 64
MAX_LEN = 128
TIE = 1e-3


def llama_config(vocab_size: int = VOCAB_SIZE, layers: int = 2, **kwargs) -> LlamaConfig:
    defaults = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaConfig(**{**defaults, **kwargs})


def qwen2_config(vocab_size: int = VOCAB_SIZE) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=MAX_LEN,
        bos_token_id=None,
        eos_token_id=None,
    )


def gpt2_config(vocab_size: int = VOCAB_SIZE) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=MAX_LEN,
        bos_token_id=None,
        eos_token_id=None,
    )


def opt_config(vocab_size: int = VOCAB_SIZE) -> OPTConfig:
    """The last hidden state is projected to another width than `hidden_size`."""
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LEN,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        do_layer_norm_before=False,
    )


def save_model(path: Path, config: PretrainedConfig, seed: int, scale: float = 3.0) -> str:
    """A random float32 model; `scale` sharpens its distributions, which small inits leave flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06 * scale)
    model.save_pretrained(path)
    return str(path)


def save_noisy_copy(path: Path, source: str, seed: int, noise: float = 0.02) -> str:
    """A model that mostly agrees with `source`: the same weights with a little noise."""
    torch.manual_seed(seed)
    model = load_reference(source)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(path)
    return str(path)


def save_byte_tokenizer(path: str, extra: Sequence[str] = (), added: Sequence[str] = ()) -> int:
    """Save a byte-level tokenizer beside a model; returns its number of tokens.

    `extra` tokens are the model's own. `added` tokens are special, like those of a fine-tune.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<eos>", *alphabet, *extra]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(path)
    return len(fast)


def load_reference(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def next_logits(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits `[vocab_size]` of the token after `token_ids`."""
    return model(torch.tensor([list(token_ids)])).logits[0, -1]


def greedy_loop(
    references: Sequence[torch.nn.Module],
    combine: Callable[[list[torch.Tensor]], torch.Tensor],
    prompt: Sequence[int],
    num_tokens: int,
) -> list[int]:
    """The tokens that a plain loop over the members' logits gives."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(combine([next_logits(m, tokens) for m in references]).argmax()))
    return tokens[len(prompt) :]


def assert_same_tokens(
    tokens: list[int],
    expected: list[int],
    references: Sequence[torch.nn.Module],
    combine: Callable[[list[torch.Tensor]], torch.Tensor],
    prompt: Sequence[int],
) -> None:
    """Check that outputs are equal token for token; on a GPU the first difference may be a tie.

    A GPU's float32 attention rounds differently from the CPU's. A margin of the top two below `TIE`
    therefore decides nothing.
    """
    if tokens == expected or not torch.cuda.is_available():
        assert tokens == expected
        return
    assert len(tokens) == len(expected)
    at = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
    scores = combine([next_logits(m, [*prompt, *expected[:at]]) for m in references])
    margin = float(scores[expected[at]] - scores[tokens[at]])
    assert margin < TIE, f"token {at}: {tokens[at]} for {expected[at]}, margin {margin}"
    print(f"tie at token {at}: margin {margin:.1e}")
