"""Weights, alpha and scale of single requests (`extra_args`), plain and by turns.

Greedy tokens must be those of a loop over transformers models with the request's own parameters.
Drawn ones must pass a chi-square test. Requests of one batch have different parameters.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import (
    P_VALUE,
    chi_square_p_value,
    counted_replays,
    engine,
    generate,
    greedy,
    sampled,
)
from quick import quick
from tiny_models import (
    assert_same_tokens,
    greedy_loop,
    llama_config,
    load_reference,
    next_logits,
    save_model,
    save_noisy_copy,
)
from vllm import LLM
from vllm.exceptions import VLLMValidationError

NUM_TOKENS = 12
PROMPTS = [[1, 2, 3, 4], [9], [20, 21, 22, 20, 21, 22], list(range(30, 50))]
# Of each function: the configuration's parameters, and what requests ask for. None: nothing.
WEIGHTED = (
    dict(ensemble_fn="weighted", weights=[0.6, 0.4]),
    "ensemble_weights",
    [0.6, 0.4],
    [None, [1.0, 0.0], [0.0, 1.0], [0.3, 0.7]],
)
OUTSIDE = (
    dict(ensemble_fn="weighted", weights=[0.6, 0.4, 0]),
    "ensemble_weights",
    [0.6, 0.4, 0],
    [None, [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.3, 0.7, 0.0]],
)
CONTRASTIVE = (
    dict(ensemble_fn="contrastive", alpha=0.1),
    "ensemble_alpha",
    0.1,
    [None, 0.0, 0.5, 0.9],
)
PROXY = (
    dict(ensemble_fn="proxy_tuning"),
    "ensemble_scale",
    1.0,
    [None, 0.0, 0.5, 1.5],
)
PLAIN: dict[str, Any] = {}
CHEF = dict(chef={"gamma": [1, 2]}, window=2)
CHEF_3 = dict(chef={"gamma": [1, 1, 2]}, window=3)
SD = dict(chef={"policy": "sd", "gamma": 2}, window=2)
DRAFT = dict(
    speculative_config={
        "method": "draft_model",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
CASES = {
    "plain raw-logits": (CONTRASTIVE, "raw-logits", PLAIN),
    "plain probs": (WEIGHTED, "probs", PLAIN),
    "plain logits": (PROXY, "logits", PLAIN),
    "turns raw-logits": (CONTRASTIVE, "raw-logits", CHEF),
    "turns probs": (WEIGHTED, "probs", CHEF),
    "turns logits": (PROXY, "logits", CHEF_3),
    "turns proxy probs": (PROXY, "probs", CHEF_3),
    "outside": (OUTSIDE, "probs", CHEF_3),
    "sd raw-logits": (CONTRASTIVE, "raw-logits", SD),
    "sd probs": (WEIGHTED, "probs", SD),
    "draft raw-logits": (CONTRASTIVE, "raw-logits", DRAFT),
    "draft probs": (WEIGHTED, "probs", DRAFT),
    "ngram probs": (WEIGHTED, "probs", dict(speculative_config=NGRAM)),
    "auto": (WEIGHTED, "probs", dict(chef={"gamma": "auto", "max_gamma": [1, 2]}, window=2)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.03) for s in (1, 2)]


@pytest.fixture(scope="module")
def references(models: list[str]) -> list[torch.nn.Module]:
    return [load_reference(path) for path in models]


def settings_of(case: str, models: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    (function, key, default, _), target, turns = CASES[case]
    num_members = {"ensemble_alpha": 2, "ensemble_scale": 3}.get(key) or len(default)
    settings = dict(extra_model=models[1:num_members], ensemble_target=target, **function)
    if turns is DRAFT:
        turns = dict(speculative_config={**DRAFT["speculative_config"], "model": models[2]})
    return models[0], settings, turns


def scores_of(case: str, asked: Any) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The ensemble's log-probabilities, for a request that asks for `asked`."""
    (_, key, default, _), target, _ = CASES[case]
    value = default if asked is None else asked
    if key == "ensemble_weights":
        coefficients = value
    elif key == "ensemble_alpha":
        coefficients = [1, -value]
    else:
        coefficients = [1, value, -value]

    def scores(logits: list[torch.Tensor]) -> torch.Tensor:
        logits = logits[: len(coefficients)]
        if target == "probs" and key != "ensemble_scale":
            logits = [x.softmax(-1) for x in logits]
        total = sum(c * x for c, x in zip(coefficients, logits, strict=True) if c)
        if target == "probs" and key != "ensemble_scale":
            return (total / total.sum()).log()
        return total.log_softmax(-1)

    return scores


def extra_args(case: str, asked: Any) -> dict[str, Any]:
    (_, key, _, _), _, _ = CASES[case]
    return {} if asked is None else {"extra_args": {key: asked}}


def check_greedy(case: str, llm: LLM, references: list[torch.nn.Module]) -> None:
    requests = [(prompt, asked) for asked in CASES[case][0][3] for prompt in PROMPTS]
    expected = [
        greedy_loop(references, scores_of(case, asked), prompt, NUM_TOKENS)
        for prompt, asked in requests
    ]
    assert len({tuple(tokens) for tokens in expected}) > 2 * len(PROMPTS), "they matter"
    # Once more in another order: requests get slots that had others' parameters.
    for order in (range(len(requests)), reversed(range(len(requests)))):
        order = list(order)
        params = [greedy(NUM_TOKENS, **extra_args(case, requests[i][1])) for i in order]
        outputs = generate(llm, [requests[i][0] for i in order], params)
        for i, output in zip(order, outputs, strict=True):
            prompt, asked = requests[i]
            tokens = list(output.token_ids)
            scores = scores_of(case, asked)
            assert_same_tokens(tokens, expected[i], references, scores, prompt)


@pytest.mark.parametrize("case", quick(CASES, "turns probs"))
def test_greedy_tokens_are_those_of_the_requests_own_parameters(case, models, references):
    model, settings, turns = settings_of(case, models)
    with engine(model, settings, max_num_seqs=5, **turns) as llm:
        check_greedy(case, llm, references)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_in_cuda_graphs(case, models, references, monkeypatch):
    replays = counted_replays(monkeypatch)
    model, settings, turns = settings_of(case, models)
    with engine(model, settings, max_num_seqs=5, enforce_eager=False, **turns) as llm:
        replays.clear()
        check_greedy(case, llm, references)
    assert replays["decisions"] == replays["steps"]
    assert (replays["readings"] > 0) == ("chef" in turns)


LOGPROBS_CASES = [
    "plain raw-logits",
    "plain probs",
    "turns probs",
    "turns raw-logits",
    "sd probs",
    "draft raw-logits",
    "draft probs",
]


@pytest.mark.parametrize("mode", quick(["raw_logprobs", "processed_logprobs"], "raw_logprobs"))
@pytest.mark.parametrize("case", quick(LOGPROBS_CASES))
def test_logprobs_are_of_the_requests_own_parameters(case, mode, models, references):
    """Of sampled tokens and of prompts, which are read in chunks."""
    model, settings, turns = settings_of(case, models)
    requests = [(prompt, asked) for asked in CASES[case][0][3] for prompt in PROMPTS[::3]]
    limit = "max_num_scheduled_tokens" if "chef" in turns else "max_num_batched_tokens"
    arguments = {"logprobs_mode": mode, limit: 24, "max_num_seqs": 5}
    with engine(model, settings, **arguments, **turns) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                greedy(3, logprobs=4, prompt_logprobs=2, **extra_args(case, asked))
                for _, asked in requests
            ],
            use_tqdm=False,
        )
    for (prompt, asked), out in zip(requests, outputs, strict=True):
        scores = scores_of(case, asked)
        sequence = prompt + list(out.outputs[0].token_ids)
        rows = list(out.prompt_logprobs[1:]) + list(out.outputs[0].logprobs)
        assert len(rows) == len(sequence) - 1
        for position, row in enumerate(rows, start=1):
            expected = scores([next_logits(m, sequence[:position]) for m in references])
            assert sequence[position] in row
            for token, value in row.items():
                assert value.logprob == pytest.approx(float(expected[token]), abs=1e-4)


VOCAB_SIZE = 12
NUM_DRAWS = 600
DRAW_CASES = ["turns probs", "turns raw-logits", "turns logits", "outside", "sd probs", "auto"]
DRAW_CASES += ["draft raw-logits", "draft probs"]


@pytest.fixture(scope="module")
def narrow_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("narrow-models")
    first = save_model(root / "0", llama_config(vocab_size=VOCAB_SIZE), seed=0)
    return [first] + [save_noisy_copy(root / str(s), first, s, 0.02 * s) for s in (1, 2)]


def num_accepted(llm: LLM, by_turns: bool) -> tuple[int, int]:
    """Tokens that were accepted, and that were proposed."""
    if by_turns:
        stats = llm.collective_rpc("turn_stats")[0]
        return sum(map(sum, stats["num_accepted"])), sum(map(sum, stats["num_judged"]))
    metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    name = "vllm:spec_decode_num_{}_tokens"
    return metrics[name.format("accepted")], metrics[name.format("draft")]


def check_draws(case: str, narrow_models: list[str], when_started=lambda: None, **arguments):
    model, settings, turns = settings_of(case, narrow_models)
    references = [load_reference(path) for path in narrow_models]
    all_asked, prompt = CASES[case][0][3], PROMPTS[0]
    params = [
        sampled(3, seed=seed, **extra_args(case, asked))
        for seed in range(NUM_DRAWS)
        for asked in all_asked
    ]
    with engine(model, settings, **turns, **arguments) as llm:
        when_started()
        draws = generate(llm, [prompt] * len(params), params)
        accepted, judged = num_accepted(llm, "chef" in turns)
    # vLLM also counts proposals behind a rejected one, and past the end of a request.
    least = 0.3 if "chef" in turns else 0.05
    assert least * judged < accepted < 0.99 * judged, "acceptance and rejection are both at work"
    for at, asked in enumerate(all_asked):
        sequences = [list(o.token_ids) for o in draws[at :: len(all_asked)]]
        prefix = list(prompt)
        for position in range(3):
            logits = [next_logits(m, prefix) for m in references]
            found = [tokens[position] for tokens in sequences]
            assert chi_square_p_value(found, scores_of(case, asked)(logits).exp()) > P_VALUE
            ((best, _),) = Counter(found).most_common(1)
            sequences = [tokens for tokens in sequences if tokens[position] == best]
            prefix.append(best)


@pytest.mark.slow  # many draws; the quick set has the same requests at temperature 0
@pytest.mark.parametrize("case", DRAW_CASES)
def test_turns_sample_from_each_requests_own_ensemble(case, narrow_models):
    check_draws(case, narrow_models)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DRAW_CASES)
def test_turns_sample_in_half_precision_and_cuda_graphs(case, narrow_models, monkeypatch):
    replays = counted_replays(monkeypatch)
    arguments = dict(dtype="bfloat16", enforce_eager=False, when_started=replays.clear)
    check_draws(case, narrow_models, **arguments)
    assert replays["decisions"] == replays["steps"]


BAD = [
    {"ensemble_weights": [1.0]},
    {"ensemble_weights": [0.0, 0.0]},
    {"ensemble_weights": [1.0, -1.0]},
    {"ensemble_weights": "both"},
    {"ensemble_alpha": 0.2},
    {"ensemble_weight": [1.0, 0.0]},
]


@pytest.mark.parametrize("case", quick(["plain probs", "turns probs"]))
def test_a_bad_value_ends_its_request_only(case, models, references):
    model, settings, turns = settings_of(case, models)
    prompt, asked = PROMPTS[0], [0.3, 0.7]
    expected = greedy_loop(references, scores_of(case, asked), prompt, 4)
    with engine(model, settings, max_num_seqs=4, **turns) as llm:
        for bad in BAD:
            (key,) = bad
            with pytest.raises(VLLMValidationError, match=f"^{key}: ") as error:
                generate(llm, [prompt], greedy(4, extra_args=bad))
            assert "\n" not in str(error.value)
            (out,) = generate(llm, [prompt], greedy(4, **extra_args(case, asked)))
            assert list(out.token_ids) == expected
        # Keys of others are not ours.
        (out,) = generate(llm, [prompt], greedy(4, extra_args={"other": "key"}))
        assert list(out.token_ids) == greedy_loop(references, scores_of(case, None), prompt, 4)


@pytest.mark.slow
@pytest.mark.parametrize("async_scheduling", [False, True])
# The likeliest token of the ensemble is left. With other targets it would be each member's.
@pytest.mark.parametrize("case", ["plain raw-logits", "turns raw-logits"])
def test_weights_survive_preemption_and_hold_for_n(case, async_scheduling, models, references):
    """The KV cache holds few requests, and `n` copies of each share its prompt."""
    model, settings, turns = settings_of(case, models)
    requests = [(prompt, asked) for asked in CASES[case][0][3] for prompt in PROMPTS]
    arguments = dict(
        num_gpu_blocks_override=14, enable_prefix_caching=True, async_scheduling=async_scheduling
    )
    arguments |= dict(max_num_seqs=16, max_model_len=64, block_size=32)
    with engine(model, settings, **turns, **arguments) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                sampled(40, n=2, temperature=1.0, top_k=1, **extra_args(case, asked))
                for _, asked in requests
            ],
            use_tqdm=False,
        )
        found = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(found) > 0
    for (prompt, asked), output in zip(requests, outputs, strict=True):
        expected = greedy_loop(references, scores_of(case, asked), prompt, 40)
        assert [list(out.token_ids) for out in output.outputs] == [expected] * 2
