"""Members that take turns sample from the ensemble's distribution, whatever is accepted.

The vocabulary is narrow, so that few draws show a bias. One batch has several sampling parameters.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import P_VALUE, chi_square_p_value, counted_replays, engine, generate, sampled
from quick import quick
from test_plain_ensemble import process
from tiny_models import (
    llama_config,
    load_reference,
    next_logits,
    save_byte_tokenizer,
    save_model,
    save_noisy_copy,
)
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import vllm.chef.verifier

VOCAB_SIZE = 12
NUM_DRAWS = 600
NUM_TOKENS = 3
PROMPT = [1, 2, 3, 4]
PARAMETERS = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_p=0.8),
    dict(temperature=1.5, top_k=5, repetition_penalty=1.3),
    dict(temperature=0.9, min_p=0.1),
]
# The same without penalties. Decisions with penalties have CUDA graphs of their own.
FILTERS = [
    {key: value for key, value in parameters.items() if key != "repetition_penalty"}
    for parameters in PARAMETERS
]
TEMPERATURES = [dict(temperature=t) for t in (1.0, 0.6, 1.5)]
WEIGHTS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2], "outside": [0.6, 0.4, 0]}
# target, weights, turns, tokens carried from step to step
CASES = {
    "raw-logits": ("raw-logits", 2, dict(gamma=[1, 2]), 2),
    "logits": ("logits", 2, dict(gamma=1), 1),
    "probs": ("probs", 2, dict(gamma=[3, 1]), 3),
    "probs-3": ("probs", 3, dict(gamma=[1, 2, 1]), 3),
    "raw-logits-3": ("raw-logits", 3, dict(gamma=[1, 1, 1]), 2),
    "outside": ("probs", "outside", dict(gamma=[1, 1, 2]), 3),
    "sd outside": ("probs", "outside", dict(policy="sd", gamma=2), 2),
    "auto": ("probs", 2, dict(gamma="auto", max_gamma=[1, 3]), 3),
    "sd": ("probs", 2, dict(policy="sd", gamma=2), 2),
    "sd-3": ("logits", 3, dict(policy="sd", gamma=2), 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(vocab_size=VOCAB_SIZE), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.02 * s) for s in (1, 2)]


@pytest.fixture(scope="module")
def references(models: list[str]) -> list[torch.nn.Module]:
    return [load_reference(path) for path in models]


def distribution(
    target: str,
    weights: list[float],
    references: list[torch.nn.Module],
    prefix: list[int],
    params: dict[str, Any],
) -> torch.Tensor:
    logits = [next_logits(m, prefix) for m in references]
    params = dict(params)
    penalty = params.pop("repetition_penalty", 1.0)

    def processed(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        seen = list({*prefix})
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        return process(scores, **params)

    def weighted(scores: list[torch.Tensor]) -> torch.Tensor:
        return sum(w * x for w, x in zip(weights, scores, strict=True))

    if target == "raw-logits":
        return processed(weighted(logits)).softmax(-1)
    if target == "logits":
        return weighted([processed(x) for x in logits]).softmax(-1)
    return weighted([processed(x).softmax(-1) for x in logits])


def p_values(
    case: str,
    models: list[str],
    references: list[torch.nn.Module],
    all_parameters: list[dict[str, Any]] = PARAMETERS,
    num_at_once: int = NUM_DRAWS * len(PARAMETERS),
    when_started: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> list[float]:
    """The p-value of every position, given the likeliest token at each position before."""
    target, members, chef, window = CASES[case]
    weights = WEIGHTS[members]
    ensemble = dict(
        extra_model=models[1 : len(weights)],
        ensemble_fn="weighted",
        weights=weights,
        ensemble_target=target,
    )
    params = [
        sampled(NUM_TOKENS, seed=seed, **parameters)
        for seed in range(NUM_DRAWS)
        for parameters in all_parameters
    ]
    with engine(models[0], ensemble, chef, window, **arguments) as llm:
        when_started()
        draws = []
        for start in range(0, len(params), num_at_once):
            here = params[start : start + num_at_once]
            draws += generate(llm, [PROMPT] * len(here), here)
        stats = llm.collective_rpc("turn_stats")[0]
    accepted = sum(sum(row) for row in stats["num_accepted"])
    judged = sum(sum(row) for row in stats["num_judged"])
    assert 0.3 * judged < accepted < 0.99 * judged, "acceptance and rejection are both at work"
    found = []
    for at, parameters in enumerate(all_parameters):
        sequences = [list(o.token_ids) for o in draws[at :: len(all_parameters)]]
        prefix = list(PROMPT)
        for position in range(NUM_TOKENS):
            probs = distribution(target, weights, references[: len(weights)], prefix, parameters)
            found.append(chi_square_p_value([tokens[position] for tokens in sequences], probs))
            ((best, _),) = Counter(tokens[position] for tokens in sequences).most_common(1)
            sequences = [tokens for tokens in sequences if tokens[position] == best]
            prefix.append(best)
    return found


@pytest.mark.parametrize("case", quick(CASES, "logits"))
def test_turns_sample_from_the_ensemble(case, models, references):
    assert min(p_values(case, models, references)) > P_VALUE


BLOCK = {"rejection_sample_method": "block"}
# Decisions that judge several tokens.
BLOCK_CASES = ["raw-logits", "probs", "probs-3", "outside", "sd", "sd-3", "sd outside"]


@pytest.mark.parametrize("case", quick(BLOCK_CASES))
def test_blocks_leave_the_distribution_what_it_is(case, models, references):
    """Requests with penalties are judged token by token, so these ask for filters only."""
    found = p_values(case, models, references, FILTERS, speculative_config=BLOCK)
    assert min(found) > P_VALUE


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["raw-logits", "probs-3", "outside", "sd", "sd outside"])
def test_blocks_in_half_precision_and_cuda_graphs(case, models, references, monkeypatch):
    replays = counted_replays(monkeypatch)
    arguments = dict(dtype="bfloat16", enforce_eager=False, when_started=replays.clear)
    arguments["speculative_config"] = BLOCK
    assert min(p_values(case, models, references, FILTERS, 60, **arguments)) > P_VALUE
    assert replays["decisions"] == replays["steps"]


@pytest.mark.gpu
# vLLM filters few rows with other kernels than many rows. A batch of three fills a graph up.
# Without filters there are graphs of their own.
@pytest.mark.parametrize(
    ("case", "num_at_once", "asked"),
    [
        ("raw-logits", 60, FILTERS),
        ("raw-logits", 3, FILTERS),
        ("probs-3", 60, FILTERS),
        ("sd", 60, FILTERS),
        ("raw-logits", 60, TEMPERATURES),
        ("probs-3", 60, TEMPERATURES),
        ("outside", 3, TEMPERATURES),
        ("sd outside", 60, TEMPERATURES),
        ("raw-logits", 60, PARAMETERS),
        ("probs-3", 60, PARAMETERS),
        ("logits", 3, PARAMETERS),
        ("sd", 60, PARAMETERS),
        ("outside", 60, PARAMETERS),
    ],
)
def test_turns_sample_in_half_precision_and_cuda_graphs(
    case, num_at_once, asked, models, references, monkeypatch
):
    """Scores are rounded but the rule is the same; as many draws cannot show the rounding."""
    replays = counted_replays(monkeypatch)
    arguments = dict(dtype="bfloat16", enforce_eager=False, when_started=replays.clear)
    # At once, as many as one step reads: the next step only decodes.
    found = p_values(case, models, references, asked, num_at_once, **arguments)
    assert min(found) > P_VALUE
    num_batches = NUM_DRAWS * len(asked) / num_at_once
    assert replays["readings"] >= num_batches, "turns run in CUDA graphs"
    assert replays["decisions"] == replays["steps"]


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("text-models")
    first = save_model(root / "0", llama_config(vocab_size=257), seed=0, scale=2.0)
    models = [first, save_noisy_copy(root / "1", first, seed=1)]
    for path in models:
        save_byte_tokenizer(path)
    return models


@pytest.mark.slow
@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("policy", ["chef", "sd"])
def test_a_grammar_leaves_the_distribution_what_it_is(policy, async_scheduling, text_models):
    """Proposals know no grammar: vLLM drops forbidden ones, although they were judged."""
    ensemble = dict(extra_model=text_models[1:], ensemble_fn="weighted", weights=[0.6, 0.4])
    chef = dict(gamma=[1, 2] if policy == "chef" else 2, policy=policy)
    arguments = dict(skip_tokenizer_init=False, async_scheduling=async_scheduling)
    params = [
        SamplingParams(
            seed=seed,
            max_tokens=3,
            ignore_eos=True,
            structured_outputs=StructuredOutputsParams(regex="[ -~]{3}"),
        )
        for seed in range(1500)
    ]
    with engine(text_models[0], ensemble, chef, 2, **arguments) as llm:
        prefix = llm.get_tokenizer().encode("ab")
        allowed = [t for t in range(257) if " " <= llm.get_tokenizer().decode([t])[:1] <= "~"]
        sequences = [list(out.token_ids) for out in generate(llm, [prefix] * len(params), params)]
        stats = llm.collective_rpc("turn_stats")[0]
    assert sum(sum(row) for row in stats["num_accepted"]) > 300
    members = [load_reference(path) for path in text_models]
    mask = torch.full((257,), -torch.inf)
    mask[allowed] = 0
    for position in range(3):
        # Each sequence has its own prefix, so this is a mean of distributions. It does not make the
        # test stricter.
        texts = torch.tensor([prefix + tokens[:position] for tokens in sequences])
        with torch.inference_mode():
            probs = [(m(texts).logits[:, -1] + mask).softmax(-1) for m in members]
        target = (0.6 * probs[0] + 0.4 * probs[1]).mean(0)
        drawn = [tokens[position] for tokens in sequences]
        assert chi_square_p_value(drawn, target) > P_VALUE, f"position {position}"


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["judged-as-uniform", "always-accepted"])
def test_a_broken_acceptance_rule_is_found(mutation, models, references, monkeypatch):
    """The test above must fail if proposals are judged by a distribution that is not theirs."""
    verify = vllm.chef.verifier.rejection_sample

    def broken(target_logits, proposal_logits, *args, **kwargs):
        wrong = torch.zeros_like(proposal_logits)
        if mutation == "always-accepted":
            wrong = target_logits.view_as(proposal_logits).clamp(min=-1e4)
        return verify(target_logits, wrong, *args, **kwargs)

    monkeypatch.setattr(vllm.chef.verifier, "rejection_sample", broken)
    assert min(p_values("raw-logits", models, references)) < P_VALUE
