"""Inflated members in the engine give the tokens of the models that they were inflated from."""

from dataclasses import replace

import pytest
from engines import engine, generate, greedy
from tiny_models import (
    assert_same_tokens,
    greedy_loop,
    llama_config,
    load_reference,
    next_logits,
    save_model,
)

from benchmarks import inflate

PROMPTS = [[5, 6, 7, 8, 9, 10], [3], [60, 2, 2, 17]]
NUM_TOKENS = 12
ALPHA = 0.3


def contrast(logits):
    return logits[0] - ALPHA * logits[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Expert and amateur, of different shapes, and the same two inflated to two other shapes."""
    root = tmp_path_factory.mktemp("models")
    heads = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32)
    save_model(root / "expert", llama_config(**heads, layers=3, rms_norm_eps=0.01), seed=0)
    save_model(root / "amateur", llama_config(tie_word_embeddings=True), seed=1)
    wider = dict(hidden_size=256, intermediate_size=192, num_hidden_layers=4)
    for name, heads in {"expert": (8, 8), "amateur": (4, 2)}.items():
        source = inflate.Shape.of(inflate.read_config(root / name))
        shape = replace(source, **wider, num_attention_heads=heads[0], num_key_value_heads=heads[1])
        inflate.inflate(root / name, root / f"wide-{name}", shape)
        wider["hidden_size"] = 128
    return root


@pytest.mark.slow
def test_an_ensemble_of_inflated_members_gives_the_sources_tokens(models):
    references = [load_reference(str(models / name)) for name in ("expert", "amateur")]
    ensemble = dict(
        extra_model=[str(models / "wide-amateur")],
        ensemble_fn="contrastive",
        ensemble_target="raw-logits",
        alpha=ALPHA,
    )
    with engine(str(models / "wide-expert"), ensemble) as llm:
        outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_loop(references, contrast, prompt, NUM_TOKENS)
        assert_same_tokens(list(output.token_ids), expected, references, contrast, prompt)
    # The members do not agree by themselves, so a missing member would show.
    assert (
        next_logits(references[0], PROMPTS[0]).argmax()
        != next_logits(references[1], PROMPTS[0]).argmax()
    )
