"""vLLM's sampling parameters on ensembles: each at its place relative to the combination.

`raw-logits` applies them to the combined logits; `logits` and `probs` apply them to every member's.
Greedy decoding shows which one happened, because a parameter in either place picks other tokens.
Members that take turns must give the same.
"""

import math
from collections import Counter

import pytest
import torch
from engines import counted_replays, engine, generate, greedy
from quick import quick
from tiny_models import (
    llama_config,
    load_reference,
    next_logits,
    qwen2_config,
    save_byte_tokenizer,
    save_model,
    save_noisy_copy,
)
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

NUM_TOKENS = 10
PROMPTS = [[1, 2, 3, 4], [9], [20, 21, 22, 20, 21, 22]]
TARGETS = ["raw-logits", "logits", "probs"]
WEIGHTS = [0.6, 0.4]


POLICIES = {"plain": {}, "chef": dict(chef={"gamma": [1, 2]}, window=2)}


@pytest.fixture(scope="module", params=quick(POLICIES, "chef"))
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(policy: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "llama", llama_config(), seed=0)
    if policy == "plain":
        return [first, save_model(root / "qwen2", qwen2_config(), seed=1)]
    return [first, save_noisy_copy(root / "noisy", first, seed=1)]  # some proposals are accepted


@pytest.fixture(scope="module")
def references(models: list[str]) -> list[torch.nn.Module]:
    return [load_reference(path) for path in models]


@pytest.fixture(scope="module", params=quick(TARGETS, "probs"))
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(target: str, policy: str, models: list[str]) -> LLM:
    ensemble = dict(
        extra_model=models[1:], ensemble_fn="weighted", weights=WEIGHTS, ensemble_target=target
    )
    with engine(models[0], ensemble, max_num_seqs=16, **POLICIES[policy]) as llm:
        yield llm


def processed(
    logits: torch.Tensor,  # [vocab_size]
    prompt: list[int],
    output: list[int],
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
) -> torch.Tensor:
    logits = logits.clone()
    for token, bias in (logit_bias or {}).items():
        logits[token] += bias
    if len(output) < min_tokens:
        logits[list(stop_token_ids)] = -math.inf
    for token in {*prompt, *output}:
        sign = logits[token] > 0
        logits[token] = (
            logits[token] / repetition_penalty if sign else (logits[token] * repetition_penalty)
        )
    for token, count in Counter(output).items():
        logits[token] -= frequency_penalty * count + presence_penalty
    return logits


def ensemble_scores(target: str, logits: list[torch.Tensor], process) -> torch.Tensor:
    if target == "raw-logits":
        return process(sum(w * x for w, x in zip(WEIGHTS, logits, strict=True)))
    members = [process(x) for x in logits]
    if target == "probs":
        members = [x.softmax(-1) for x in members]
    return sum(w * x for w, x in zip(WEIGHTS, members, strict=True))


def reference_tokens(target, references, prompt, **params) -> list[int]:
    output: list[int] = []
    stop = params.get("stop_token_ids", ())
    while len(output) < NUM_TOKENS and not (output and output[-1] in stop):
        logits = [next_logits(m, prompt + output) for m in references]
        scores = ensemble_scores(target, logits, lambda x: processed(x, prompt, output, **params))
        output.append(int(scores.argmax()))
    return output


def test_penalties_and_bias_in_one_batch(target, llm, references):
    check_penalties_and_bias(target, llm, references)


@pytest.mark.gpu
def test_penalties_and_bias_in_cuda_graphs(target, policy, models, references, monkeypatch):
    ensemble = dict(
        extra_model=models[1:], ensemble_fn="weighted", weights=WEIGHTS, ensemble_target=target
    )
    replays = counted_replays(monkeypatch)
    with engine(models[0], ensemble, enforce_eager=False, **POLICIES[policy]) as llm:
        replays.clear()  # of steps that warm kernels up, before graphs are captured
        check_penalties_and_bias(target, llm, references)
    assert replays["decisions"] == replays["steps"], "whatever is asked for"
    assert (replays["readings"] > 0) == (policy == "chef")


def check_penalties_and_bias(target, llm, references):
    plain = [reference_tokens(target, references, prompt) for prompt in PROMPTS]
    cases = [
        (prompt, params)
        for prompt, tokens in zip(PROMPTS, plain, strict=True)
        for params in (
            {},
            dict(repetition_penalty=1.7),
            dict(frequency_penalty=0.9),
            dict(presence_penalty=1.5),
            dict(logit_bias={5: 4.0, 6: -100.0, 7: 3.0}),
            # The third token would end it, but for min_tokens.
            dict(min_tokens=6, stop_token_ids=(tokens[2],)),
            dict(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={3: 2.0}),
        )
    ]
    outputs = generate(
        llm,
        [prompt for prompt, _ in cases],
        [
            greedy(
                NUM_TOKENS, **{**params, "stop_token_ids": list(params.get("stop_token_ids", ()))}
            )
            for _, params in cases
        ],
    )
    expected = [reference_tokens(target, references, prompt, **params) for prompt, params in cases]
    assert [list(out.token_ids) for out in outputs] == expected
    assert len({tuple(tokens) for tokens in expected[:7]}) > 3, "the parameters change something"


def test_logprobs_and_prompt_logprobs_are_the_ensembles(target, llm, references):
    check_logprobs(target, llm, references)


@pytest.mark.gpu
def test_logprobs_with_compilation_and_cuda_graphs(policy, models, references):
    """Graphs are larger than a batch, and their outputs are too."""
    ensemble = dict(extra_model=models[1:], ensemble_fn="weighted", weights=WEIGHTS)
    with engine(models[0], ensemble, enforce_eager=False, **POLICIES[policy]) as llm:
        check_logprobs("probs", llm, references)


def check_logprobs(target, llm, references):
    prompt = PROMPTS[2]
    out = llm.generate(
        [{"prompt_token_ids": prompt}],
        greedy(2, logprobs=20, prompt_logprobs=3),
        use_tqdm=False,
    )[0]

    def logprobs(prefix: list[int]) -> torch.Tensor:
        scores = ensemble_scores(target, [next_logits(m, prefix) for m in references], lambda x: x)
        return scores.log() if target == "probs" else scores.log_softmax(-1)

    sequence = prompt + list(out.outputs[0].token_ids)
    rows = list(out.prompt_logprobs[1:]) + list(out.outputs[0].logprobs)
    assert len(rows) == len(sequence) - 1
    for position, row in enumerate(rows, start=1):
        expected = logprobs(sequence[:position])
        assert sequence[position] in row
        for token, value in row.items():
            assert value.logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert expected[token] <= expected.sort(descending=True).values[value.rank - 1] + 1e-5


def test_seeds_repeat_a_sample(llm):
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=8, ignore_eos=True, detokenize=False)
        for seed in (1, 2, 1, 3)
    ]
    first, second = (
        [list(out.token_ids) for out in generate(llm, [PROMPTS[0]] * 4, params)] for _ in range(2)
    )
    assert first == second
    assert first[0] == first[2]
    assert first[0] != first[1]


@pytest.fixture(scope="module")
def text_models(policy: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("text-models")
    paths = [
        save_model(root / str(seed), llama_config(vocab_size=257, layers=1 + seed), seed)
        for seed in range(2)
    ]
    if policy == "chef":
        paths[1] = save_noisy_copy(root / "noisy", paths[0], seed=1)
    for path in paths:
        save_byte_tokenizer(path)
    return paths


@pytest.mark.parametrize("target", quick(["raw-logits", "probs"], "probs"))
@pytest.mark.slow
def test_text_parameters(target, policy, text_models):
    """Parameters that need a tokenizer: stop strings, bad words and structured outputs."""
    check_text_parameters(target, policy, text_models)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["raw-logits", "probs"])
def test_text_parameters_in_cuda_graphs(target, policy, text_models, monkeypatch):
    replays = counted_replays(monkeypatch)
    check_text_parameters(target, policy, text_models, replays.clear, enforce_eager=False)
    assert replays["decisions"] == replays["steps"], "whatever is asked for"


def check_text_parameters(target, policy, text_models, when_started=lambda: None, **arguments):
    ensemble = dict(extra_model=text_models[1:], ensemble_fn="mean", ensemble_target=target)
    arguments |= dict(skip_tokenizer_init=False, max_num_seqs=4, **POLICIES[policy])
    with engine(text_models[0], ensemble, **arguments) as llm:
        when_started()

        def text(**params) -> str:
            params = SamplingParams(
                **{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
            )
            return llm.generate(["ab"], params, use_tqdm=False)[0].outputs[0].text

        plain = text()
        assert len(plain) > 4
        ascii_text = text(structured_outputs=StructuredOutputsParams(regex="[a-z]{12}"))
        choice = StructuredOutputsParams(choice=["yes", "no"])
        assert len(ascii_text) == 12 and ascii_text.isascii() and ascii_text.islower()
        assert text(structured_outputs=choice, ignore_eos=False) in (
            "yes",
            "no",
        )
        word = ascii_text[3]
        regex = StructuredOutputsParams(regex="[a-z]{12}")
        assert word not in text(structured_outputs=regex, bad_words=[word])
        assert text(structured_outputs=regex, stop=[word]) == ascii_text[: ascii_text.index(word)]


@pytest.mark.slow
def test_processed_logprobs_are_of_what_is_sampled(policy, models, references):
    """With `logprobs_mode` `processed_logprobs`: after the sampling parameters of each member."""
    ensemble = dict(extra_model=models[1:], ensemble_fn="weighted", weights=WEIGHTS)
    prompt, temperature = PROMPTS[0], 0.5
    arguments = dict(logprobs_mode="processed_logprobs", **POLICIES[policy])
    with engine(models[0], ensemble, **arguments) as llm:
        params = SamplingParams(temperature=temperature, max_tokens=1, logprobs=5, seed=0)
        row = generate(llm, [prompt], params)[0].logprobs[0]
    members = [(next_logits(m, prompt) / temperature).softmax(-1) for m in references]
    expected = sum(w * p for w, p in zip(WEIGHTS, members, strict=True)).log()
    for token, value in row.items():
        assert value.logprob == pytest.approx(float(expected[token]), abs=1e-4)
