"""The plain ensemble in the engine against a loop over transformers models.

Greedy tokens must be equal in float32. Sampled ones must pass a chi-square test. The tests cover
every target and function, 2 to 4 members of several architectures, chunked prefill and prefix
caching.
"""

import math
from collections.abc import Callable

import pytest
import torch
from engines import P_VALUE, chi_square_p_value, engine, generate, greedy, sampled
from quick import quick
from tiny_models import (
    VOCAB_SIZE,
    assert_same_tokens,
    gpt2_config,
    greedy_loop,
    llama_config,
    load_reference,
    next_logits,
    opt_config,
    qwen2_config,
    save_model,
)

NUM_TOKENS = 12
# Different lengths. The first two share a prefix; the last is prefilled in several chunks.
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 60],
    [3],
    [1, 2, 3, 4],
    [(7 * i) % VOCAB_SIZE for i in range(50)],
]
CHUNKED = dict(
    block_size=32, max_num_batched_tokens=24, max_num_seqs=16, enable_prefix_caching=True
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    configs = {
        "llama": llama_config(),
        "qwen2": qwen2_config(),
        "gpt2": gpt2_config(),
        "opt": opt_config(),
    }
    return {
        name: save_model(root / name, config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def references(models: dict[str, str]) -> dict[str, torch.nn.Module]:
    return {name: load_reference(path) for name, path in models.items()}


def contrast(alpha: float) -> Callable:
    return lambda logits: logits[0] - alpha * logits[1]


def plausible(logits: list[torch.Tensor]) -> torch.Tensor:
    probs = logits[0].softmax(-1)
    return contrast(0.5)(logits).masked_fill(probs < 0.2 * probs.max(), -math.inf)


def weighted_probs(*weights: float) -> Callable:
    return lambda logits: sum(w * x.softmax(-1) for w, x in zip(weights, logits, strict=True)).log()


def own_function(scores: torch.Tensor, power: float) -> torch.Tensor:
    """An example of a user's `package.module:function`."""
    return scores.pow(power).mean(dim=0)


GREEDY_CASES = {
    "cd": (
        ["llama", "qwen2"],
        dict(ensemble_fn="contrastive", ensemble_target="raw-logits", alpha=0.3),
        contrast(0.3),
    ),
    "cd-plausible": (
        ["qwen2", "llama"],
        dict(
            ensemble_fn="contrastive_plausible",
            ensemble_target="raw-logits",
            alpha=0.5,
            ensemble_args={"plausibility": 0.2},
        ),
        plausible,
    ),
    "cd-logits": (
        ["gpt2", "qwen2"],
        dict(ensemble_fn="contrastive", ensemble_target="logits", alpha=0.4),
        contrast(0.4),
    ),
    "mean-3": (
        ["llama", "qwen2", "gpt2"],
        dict(ensemble_fn="mean", ensemble_target="logits"),
        lambda logits: sum(logits) / 3,
    ),
    "product-3": (
        ["opt", "qwen2", "llama"],
        dict(ensemble_fn="product", ensemble_target="probs"),
        lambda logits: sum(x.log_softmax(-1) for x in logits),
    ),
    "weighted-probs-2": (
        ["llama", "gpt2"],
        dict(ensemble_fn="weighted", ensemble_target="probs", weights=[0.7, 0.3]),
        weighted_probs(0.7, 0.3),
    ),
    "weighted-probs-4": (
        ["qwen2", "opt", "llama", "gpt2"],
        dict(ensemble_fn="weighted", ensemble_target="probs"),
        weighted_probs(0.25, 0.25, 0.25, 0.25),
    ),
    "own-function": (
        ["llama", "qwen2"],
        dict(
            ensemble_fn="test_plain_ensemble:own_function",
            ensemble_target="probs",
            ensemble_args={"power": 0.5},
        ),
        lambda logits: sum(x.softmax(-1).sqrt() for x in logits),
    ),
}


def check_greedy(case, models, references, **arguments):
    names, ensemble, combine = GREEDY_CASES[case]
    ensemble = {**ensemble, "extra_model": [models[name] for name in names[1:]]}
    members = [references[name] for name in names]
    with engine(models[names[0]], ensemble, **CHUNKED, **arguments) as llm:
        first = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        again = generate(llm, PROMPTS, greedy(NUM_TOKENS))  # from cached prefixes
        hits = llm.get_metrics()
    for prompt, *outputs in zip(PROMPTS, first, again, strict=True):
        expected = greedy_loop(members, combine, prompt, NUM_TOKENS)
        for output in outputs:
            assert_same_tokens(list(output.token_ids), expected, members, combine, prompt)
    assert any(m.name == "vllm:prefix_cache_hits" and m.value > 0 for m in hits)


@pytest.mark.parametrize("case", quick(GREEDY_CASES, "weighted-probs-2"))
def test_greedy_tokens_equal_a_transformers_loop(case, models, references):
    check_greedy(case, models, references)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["cd", "mean-3", "weighted-probs-4"])
def test_greedy_tokens_with_compilation_and_cuda_graphs(case, models, references):
    check_greedy(case, models, references, enforce_eager=False)


# What vLLM's sampling parameters do to one member's logits: a reference of the tests' own.
def process(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    logits = logits / temperature
    if min_p:
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # Kept: tokens before which the sum of the better ones is below top_p.
        kept = order[ordered.cumsum(-1) - ordered < top_p]
        mask = torch.full_like(logits, -math.inf)
        mask[kept] = 0
        logits = logits + mask
    return logits


PARAMETERS = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_p=0.8),
    dict(temperature=1.5, top_k=7),
    dict(temperature=0.9, min_p=0.1),
]
NUM_DRAWS = 1500
THREE_WEIGHTS = [0.5, 0.3, 0.2]


def raw_logits_target(logits: list[torch.Tensor], params: dict) -> torch.Tensor:
    return process(contrast(0.3)(logits), **params).softmax(-1)


def logits_target(logits: list[torch.Tensor], params: dict) -> torch.Tensor:
    return sum(w * process(x, **params) for w, x in zip([0.6, 0.4], logits, strict=True)).softmax(
        -1
    )


def probs_target(logits: list[torch.Tensor], params: dict) -> torch.Tensor:
    weights = THREE_WEIGHTS if len(logits) == 3 else [0.6, 0.4]
    return sum(w * process(x, **params).softmax(-1) for w, x in zip(weights, logits, strict=True))


SAMPLING_CASES = {
    "raw-logits": (dict(ensemble_fn="contrastive", alpha=0.3), raw_logits_target),
    "logits": (dict(ensemble_fn="weighted", weights=[0.6, 0.4]), logits_target),
    "probs": (dict(ensemble_fn="weighted", weights=THREE_WEIGHTS), probs_target),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", SAMPLING_CASES)
def test_sampling_follows_the_ensemble_distribution(target, models, references):
    """First tokens, and second tokens after the likeliest first; one batch has all parameters."""
    function, distribution = SAMPLING_CASES[target]
    names = ["llama", "qwen2", "gpt2"] if target == "probs" else ["llama", "qwen2"]
    extra = [models[name] for name in names[1:]]
    ensemble = {**function, "extra_model": extra, "ensemble_target": target}
    members = [references[name] for name in names]
    prompt = PROMPTS[3]
    with engine(models["llama"], ensemble) as llm:
        outputs = generate(
            llm,
            [prompt] * (NUM_DRAWS * len(PARAMETERS)),
            [sampled(2, seed=i, **params) for i in range(NUM_DRAWS) for params in PARAMETERS],
        )
        logprobs = generate(llm, [prompt], sampled(1, temperature=0.5, logprobs=5))[0].logprobs[0]
    for i, params in enumerate(PARAMETERS):
        pairs = [list(out.token_ids) for out in outputs[i :: len(PARAMETERS)]]
        first_probs = distribution([next_logits(m, prompt) for m in members], params)
        assert chi_square_p_value([first for first, _ in pairs], first_probs) > P_VALUE
        likeliest = int(first_probs.argmax())
        second_probs = distribution([next_logits(m, [*prompt, likeliest]) for m in members], params)
        seconds = [second for first, second in pairs if first == likeliest]
        assert chi_square_p_value(seconds, second_probs) > P_VALUE
    # Log-probabilities are the ensemble's, before the sampling parameters.
    plain = distribution([next_logits(m, prompt) for m in members], {}).log()
    assert len(logprobs) >= 5
    for token, logprob in logprobs.items():
        assert logprob.logprob == pytest.approx(float(plain[token]), abs=1e-4)


def test_chi_square_finds_a_wrong_distribution(models, references):
    """The test itself must fail if the members are confused or a parameter is dropped."""
    members = [references["llama"], references["qwen2"]]
    ensemble = dict(extra_model=[models["qwen2"]], ensemble_fn="weighted", weights=[0.6, 0.4])
    with engine(models["llama"], ensemble) as llm:
        outputs = generate(
            llm, [PROMPTS[3]] * NUM_DRAWS, [sampled(1, seed=i) for i in range(NUM_DRAWS)]
        )
    draws = [out.token_ids[0] for out in outputs]
    logits = [next_logits(m, PROMPTS[3]) for m in members]
    assert chi_square_p_value(draws, probs_target(logits, {})) > P_VALUE
    assert chi_square_p_value(draws, probs_target(logits[::-1], {})) < P_VALUE
    assert chi_square_p_value(draws, probs_target(logits, {"temperature": 0.8})) < P_VALUE
