"""Members of one tokenizer with different numbers of rows, plain and by turns.

Rows without a token are removed from every member. A token that a member lacks has no probability
under it. The loop over transformers models, which the engine is compared with, does the same.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import P_VALUE, chi_square_p_value, engine, generate, greedy, sampled
from quick import quick
from tiny_models import (
    llama_config,
    load_reference,
    next_logits,
    save_byte_tokenizer,
    save_model,
)

NUM_TOKENS = 257  # of the byte tokenizer
PADDED = 320
TUNED = 258  # it adds a token
PAD = 257
NEG_INF = float("-inf")
PROMPTS = [[10, 20, 30], [1] * 20, [PAD, 40, 41]]
LENGTH = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "exact": save_model(root / "exact", llama_config(NUM_TOKENS), 0),
        "padded": save_model(root / "padded", llama_config(PADDED, hidden_size=128), 1),
        # Flat, so that all of its tokens are drawn.
        "tuned": save_model(root / "tuned", llama_config(PADDED - 1), 2, scale=1.0),
    }
    for name, path in made.items():
        save_byte_tokenizer(path, added=["<pad>"] if name == "tuned" else [])
    return made


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> dict[str, torch.nn.Module]:
    return {name: load_reference(path) for name, path in models.items()}


def has(name: str) -> int:
    return TUNED if name == "tuned" else NUM_TOKENS


def member_logits(
    references: dict[str, torch.nn.Module], name: str, text: list[int], vocab_size: int
) -> torch.Tensor:  # [vocab_size]
    # A member that lacks a token reads it as its end token, the first.
    read = [token if token < has(name) else 0 for token in text]
    logits = torch.full((vocab_size,), NEG_INF)
    logits[: has(name)] = next_logits(references[name], read)[: has(name)]
    return logits


def weighted(logits: list[torch.Tensor]) -> torch.Tensor:
    return sum(0.5 * x.softmax(-1) for x in logits).log()


def contrast(logits: list[torch.Tensor]) -> torch.Tensor:
    expert, amateur = logits
    lowest = amateur[amateur > NEG_INF].min()
    return expert - 0.5 * amateur.clamp(min=lowest)


FUNCTIONS = {
    "weighted": (dict(ensemble_fn="weighted", ensemble_target="probs"), weighted),
    "mean": (dict(ensemble_fn="mean", ensemble_target="logits"), sum),
    "contrastive": (
        dict(ensemble_fn="contrastive", ensemble_target="raw-logits", alpha=0.5),
        contrast,
    ),
}
PAIRS = [("exact", "padded"), ("padded", "exact"), ("tuned", "exact"), ("padded", "tuned")]


def arguments(models: dict[str, str], pair: tuple[str, str], settings: dict[str, Any]) -> tuple:
    return models[pair[0]], {**settings, "extra_model": [models[pair[1]]]}


@pytest.mark.parametrize("function", quick(FUNCTIONS, "weighted"))
@pytest.mark.parametrize(("pair",), quick([(pair,) for pair in PAIRS], (PAIRS[-1],)), ids="+".join)
def test_greedy_tokens_are_those_of_the_loop(pair, function, models, references):
    settings, combine = FUNCTIONS[function]
    vocab_size = {"exact": NUM_TOKENS, "padded": PADDED, "tuned": PADDED - 1}[pair[0]]
    prompts = [p for p in PROMPTS if max(p) < vocab_size]
    expected = [greedy_tokens(references, pair, combine, p, vocab_size) for p in prompts]
    first, ensemble = arguments(models, pair, settings)
    for chef in (None, dict(gamma=[1, 2], turn_order=[0, 1])):
        with engine(first, ensemble, chef, 2, skip_tokenizer_init=False) as llm:
            outputs = generate(llm, prompts, greedy(LENGTH))
        assert [list(output.token_ids) for output in outputs] == expected


def greedy_tokens(
    references: dict[str, torch.nn.Module],
    pair: tuple[str, str],
    combine: Callable,
    prompt: list[int],
    vocab_size: int,
) -> list[int]:
    text = list(prompt)
    for _ in range(LENGTH):
        scores = combine([member_logits(references, name, text, vocab_size) for name in pair])
        text.append(int(scores.argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("chef", [None, dict(gamma=[1, 2], turn_order=[0, 1])])
def test_the_token_that_is_read_in_place_of_a_missing_one_can_be_named(chef, models, references):
    pair, prompt, read = ("tuned", "exact"), PROMPTS[2], 1  # the byte "!"
    settings, combine = FUNCTIONS["weighted"]
    in_place = {"tuned": prompt, "exact": [read if t == PAD else t for t in prompt]}
    scores = [member_logits(references, name, in_place[name], PADDED - 1) for name in pair]
    first, ensemble = arguments(models, pair, {**settings, "read_as": [None, "!"]})
    with engine(first, ensemble, chef, 2, skip_tokenizer_init=False) as llm:
        (output,) = generate(llm, [prompt], greedy(1))
    assert list(output.token_ids) == [int(combine(scores).argmax())]


@pytest.mark.slow
def test_an_added_token_can_be_emitted_and_draws_keep_the_distribution(models, references):
    pair, temperature, num_draws = ("tuned", "exact"), 2.0, 4000
    first, ensemble = arguments(models, pair, dict(ensemble_fn="weighted", ensemble_target="probs"))
    text = PROMPTS[0]
    logits = [member_logits(references, name, text, PADDED - 1) for name in pair]
    expected = sum(0.5 * (x / temperature).softmax(-1) for x in logits)
    params = [sampled(1, seed=seed, temperature=temperature) for seed in range(num_draws)]
    chef = dict(gamma=[1, 2], turn_order=[0, 1])
    with engine(first, ensemble, chef, 2, skip_tokenizer_init=False) as llm:
        draws = [out.token_ids[0] for out in generate(llm, [text] * num_draws, params)]
    assert PAD in draws
    assert chi_square_p_value(draws, expected) > P_VALUE
