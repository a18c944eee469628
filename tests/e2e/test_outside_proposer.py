"""Stock speculation with the ensemble as its target: a proposer that has no say in the output.

Greedy tokens equal those without a proposer; sampled tokens keep the ensemble's distribution.
"""

from collections import Counter

import pytest
import torch
from engines import P_VALUE, chi_square_p_value, engine, generate, greedy, sampled
from quick import quick
from tiny_models import (
    greedy_loop,
    llama_config,
    load_reference,
    next_logits,
    qwen2_config,
    save_model,
    save_noisy_copy,
)

NUM_TOKENS = 14
NUM_DRAWS = 1200
PROMPTS = [[1, 2, 3, 4], [9], [20, 21, 22, 20, 21, 22, 20, 21], [5] * 30]
WEIGHTS = [0.8, 0.2]
PROPOSERS = [
    ("draft_model", "raw-logits"),
    ("draft_model", "logits"),
    ("draft_model", "probs"),
    ("ngram", "probs"),
]
COMBINE = {
    "raw-logits": lambda logits: 0.8 * logits[0] + 0.2 * logits[1],
    "logits": lambda logits: 0.8 * logits[0] + 0.2 * logits[1],
    "probs": lambda logits: (0.8 * logits[0].softmax(-1) + 0.2 * logits[1].softmax(-1)).log(),
}
VOCAB_SIZE = 16  # narrow, so that few draws show a bias


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "llama", llama_config(vocab_size=VOCAB_SIZE), seed=0)
    return {
        "first": first,
        "second": save_model(root / "qwen2", qwen2_config(vocab_size=VOCAB_SIZE), seed=1),
        # Agrees with the first member often, but not always.
        "draft": save_noisy_copy(root / "draft", first, seed=2, noise=0.01),
    }


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> list[torch.nn.Module]:
    return [load_reference(models["first"]), load_reference(models["second"])]


def speculation(method: str, models: dict[str, str]) -> dict:
    if method == "ngram":
        return {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    return {
        "method": "draft_model",
        "model": models["draft"],
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }


@pytest.mark.parametrize(("method", "target"), quick(PROPOSERS, ("draft_model", "probs")))
def test_output_is_the_ensembles(method, target, models, references):
    combine = COMBINE[target]
    ensemble = dict(
        extra_model=[models["second"]],
        ensemble_fn="weighted",
        weights=WEIGHTS,
        ensemble_target=target,
    )
    prompts = [[token % VOCAB_SIZE for token in prompt] for prompt in PROMPTS]
    with engine(models["first"], ensemble, speculative_config=speculation(method, models)) as llm:
        greedy_outputs = generate(llm, prompts, greedy(NUM_TOKENS, logprobs=1))
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        draws = generate(
            llm,
            [prompts[0]] * NUM_DRAWS,
            [sampled(3, seed=seed, temperature=0.9) for seed in range(NUM_DRAWS)],
        )
    for prompt, output in zip(prompts, greedy_outputs, strict=True):
        assert list(output.token_ids) == greedy_loop(references, combine, prompt, NUM_TOKENS)
        # Log-probabilities are the ensemble's at every accepted position.
        for at, row in enumerate(output.logprobs):
            prefix = prompt + list(output.token_ids[:at])
            scores = combine([next_logits(m, prefix) for m in references]).log_softmax(-1)
            token = output.token_ids[at]
            assert row[token].logprob == pytest.approx(float(scores[token]), abs=1e-4)
    if method == "draft_model":
        drafted = metrics["vllm:spec_decode_num_draft_tokens"]
        accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
        assert 0.2 * drafted < accepted < drafted, "acceptance and rejection are both at work"

    sequences = [list(out.token_ids) for out in draws]
    prefix = list(prompts[0])
    for position in range(3):
        p_value = chi_square_p_value(
            [tokens[position] for tokens in sequences],
            target_distribution(target, references, prefix),
        )
        assert p_value > P_VALUE, f"position {position}"
        # Go on with the most frequent token; the next token is tested given this one.
        ((best, _),) = Counter(tokens[position] for tokens in sequences).most_common(1)
        sequences = [tokens for tokens in sequences if tokens[position] == best]
        prefix.append(best)


def target_distribution(target, references, prefix) -> torch.Tensor:
    logits = [next_logits(m, prefix) for m in references]
    if target == "probs":
        return sum(w * (x / 0.9).softmax(-1) for w, x in zip(WEIGHTS, logits, strict=True))
    return (COMBINE[target](logits) / 0.9).softmax(-1)
