"""At temperature 0, members that take turns emit the plain ensemble's tokens, one for one.

The requests are random. They vary in numbers of members, turns, batch sizes and prompt lengths.
They end by eos, by a stop token, by `max_tokens` inside a window, or at the end of the context.
"""

import random
from typing import Any

import pytest
import torch
from engines import counted_replays, engine, generate, greedy
from quick import quick
from tiny_models import TIE, VOCAB_SIZE, llama_config, save_model, save_noisy_copy
from vllm import SamplingParams

MAX_MODEL_LEN = 96
EOS = 9
NUM_REQUESTS = 30  # for each of the policies below
ENSEMBLES = {
    "contrastive-2": dict(ensemble_fn="contrastive", ensemble_target="raw-logits", alpha=0.3),
    "weighted-3": dict(ensemble_fn="weighted", ensemble_target="probs", weights=[0.5, 0.3, 0.2]),
    # The last member proposes and has no say.
    "outside-3": dict(ensemble_fn="weighted", ensemble_target="logits", weights=[0.6, 0.4, 0]),
    "mean-4": dict(ensemble_fn="mean", ensemble_target="logits"),
}
POLICIES = {
    "contrastive-2": [
        (dict(gamma=1), 1),
        (dict(gamma=[1, 5]), 5),
        (dict(gamma=[4, 1]), 4),
        (dict(policy="sd", gamma=3), 3),
        (dict(gamma="auto", max_gamma=[1, 4]), 4),
        (dict(policy="sd", gamma="auto", max_gamma=2), 2),
    ],
    "weighted-3": [
        (dict(gamma=[1, 1, 1]), 2),
        (dict(gamma=[3, 1, 2], turn_order=[1, 0, 2]), 5),
        (dict(gamma=[2, 1, 1], turn_order=[2, 1, 0]), 3),
        (dict(policy="sd", gamma=2), 2),
        (dict(gamma="auto", max_gamma=[1, 2, 1]), 3),
    ],
    "outside-3": [
        (dict(gamma=[1, 1, 3]), 4),
        (dict(gamma=[2, 1, 2], turn_order=[1, 2, 0]), 4),
        (dict(policy="sd", gamma=3), 3),
    ],
    "mean-4": [(dict(gamma=[1, 2, 1, 1]), 4)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    config = llama_config(eos_token_id=EOS)
    first = save_model(root / "0", config, seed=0)
    # They often agree with the first, but not always.
    noise = [0.01, 0.02, 0.03]
    return [first] + [save_noisy_copy(root / str(s), first, s, noise[s - 1]) for s in (1, 2, 3)]


def requests(seed: int, logprobs: int | None) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    made = []
    for _ in range(NUM_REQUESTS):
        kind = rng.choice(["short", "short", "short", "stop", "eos", "context"])
        length = rng.randint(MAX_MODEL_LEN - 12, MAX_MODEL_LEN - 1) if kind == "context" else 0
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length or rng.randint(1, 40))]
        params = greedy(40 if kind != "short" else rng.randint(1, 20), logprobs=logprobs)
        params.ignore_eos = kind != "eos"
        if kind == "stop":
            params.stop_token_ids = rng.sample(range(VOCAB_SIZE), 6)
        made.append((prompt, params))
    return made


def outputs(llm: Any, seed: int, logprobs: int | None = 2) -> list[Any]:
    """Outputs in batches of 1 to 8 requests."""
    rng, made, finished = random.Random(seed), requests(seed, logprobs), []
    while made:
        size = rng.randint(1, 8)
        batch, made = made[:size], made[size:]
        finished += generate(llm, [p for p, _ in batch], [params for _, params in batch])
    return finished


def assert_same_output(output: Any, expected: Any) -> None:
    """A GPU's attention rounds differently for other shapes, so ties may go either way there."""
    tokens, wanted = list(output.token_ids), list(expected.token_ids)
    if tokens != wanted and torch.cuda.is_available():
        at = next(i for i, pair in enumerate(zip(tokens, wanted, strict=False)) if len({*pair}) > 1)
        best, second = sorted((x.logprob for x in expected.logprobs[at].values()), reverse=True)[:2]
        assert best - second < TIE, f"token {at}: {tokens[at]} for {wanted[at]}"
        assert tokens[at] in expected.logprobs[at]
        print(f"tie at token {at}: margin {best - second:.1e}")
        return
    assert tokens == wanted
    assert output.finish_reason == expected.finish_reason
    if output.logprobs is None:
        return
    for row, expected_row in zip(output.logprobs, expected.logprobs, strict=True):
        assert row.keys() == expected_row.keys()
        for token, value in row.items():
            assert value.logprob == pytest.approx(expected_row[token].logprob, abs=1e-3)


@pytest.fixture(scope="module", params=quick(ENSEMBLES, "mean-4"))
def ensemble(request: pytest.FixtureRequest, models: list[str]) -> tuple[str, dict[str, Any]]:
    size = int(request.param[-1])
    return request.param, {**ENSEMBLES[request.param], "extra_model": models[1:size]}


@pytest.fixture(scope="module")
def expected(models: list[str], ensemble: tuple[str, dict[str, Any]]) -> list[list[Any]]:
    """Outputs of the plain ensemble, for each policy's requests."""
    name, settings = ensemble
    with engine(models[0], settings, max_model_len=MAX_MODEL_LEN) as llm:
        made = [outputs(llm, seed) for seed in range(len(POLICIES[name]))]
    reasons = [out.finish_reason for outs in made for out in outs]
    assert min(reasons.count("stop"), reasons.count("length")) > 3, "requests end in every way"
    return made


def check_policies(models, ensemble, expected, monkeypatch, logprobs=(2,), **arguments):
    name, settings = ensemble
    replays = counted_replays(monkeypatch)
    for seed, (chef, window) in enumerate(POLICIES[name]):
        with engine(
            models[0], settings, chef, window, max_model_len=MAX_MODEL_LEN, **arguments
        ) as llm:
            for number in logprobs:
                replays.clear()
                found = outputs(llm, seed, number)
                if arguments.get("enforce_eager", True):
                    assert replays["decisions"] == replays["readings"] == 0
                else:
                    assert replays["decisions"] == replays["steps"] > 0, "whatever is asked for"
                    assert replays["readings"] > replays["steps"] / 2, "most steps only decode"
                for output, wanted in zip(found, expected[seed], strict=True):
                    assert_same_output(output, wanted)
            stats = llm.collective_rpc("turn_stats")[0]
        judged = sum(sum(row) for row in stats["num_judged"])
        accepted = sum(sum(row) for row in stats["num_accepted"])
        assert 0.2 * judged < accepted < judged, "acceptance and rejection are both at work"


def test_turns_emit_what_the_plain_ensemble_emits(models, ensemble, expected, monkeypatch):
    check_policies(models, ensemble, expected, monkeypatch)


@pytest.mark.gpu
def test_turns_with_compilation_and_cuda_graphs(models, ensemble, expected, monkeypatch):
    check_policies(models, ensemble, expected, monkeypatch, (None, 2), enforce_eager=False)
