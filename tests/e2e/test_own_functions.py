"""Functions of the user's own, plain and by turns, in CUDA graphs where they can be.

Greedy tokens must be those of a loop over transformers models, and drawn tokens must follow the
function's distribution.
"""

from collections.abc import Callable

import pytest
import torch
from engines import P_VALUE, chi_square_p_value, counted_replays, engine, generate, greedy, sampled
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

from vllm.chef import graphs
from vllm.ensemble_decode.functions import make_function
from vllm.ensemble_decode.ops.eager import combine

NUM_TOKENS, NUM_DRAWS = 12, 2000
PROMPTS = [[1, 2, 3, 4], [9], [20, 21, 22, 20, 21, 22], list(range(30, 50))]
TURNS = dict(chef={"gamma": [1, 3]}, window=3)
# By function: whether decisions run in graphs.
FUNCTIONS = {"sharper": True, "by_margin": True, "reads_on_the_host": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "0", llama_config(), seed=0)
    return [first, save_noisy_copy(root / "1", first, 1, 0.03)]


@pytest.fixture(scope="module")
def references(models: list[str]) -> list[torch.nn.Module]:
    return [load_reference(path) for path in models]


def log_probs(name: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    function = make_function(f"own_functions:{name}", 2, {})
    return lambda logits: combine(function, torch.stack(logits)[:, None], True)[0]


def settings_of(name: str, models: list[str]) -> dict:
    return dict(extra_model=models[1:], ensemble_fn=f"own_functions:{name}")


def check(name: str, models, references, when_started=lambda: None, **arguments) -> None:
    scores = log_probs(name)
    expected = [greedy_loop(references, scores, prompt, NUM_TOKENS) for prompt in PROMPTS]
    alone = [greedy_loop(references, lambda x: x[0], prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert expected != alone, "the function matters"
    with engine(models[0], settings_of(name, models), **arguments) as llm:
        when_started()
        outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        draws = generate(
            llm, [PROMPTS[0]] * NUM_DRAWS, [sampled(2, seed=s) for s in range(NUM_DRAWS)]
        )
    for prompt, output, wanted in zip(PROMPTS, outputs, expected, strict=True):
        assert_same_tokens(list(output.token_ids), wanted, references, scores, prompt)
    first = chi_square_p_value([out.token_ids[0] for out in draws], probs(scores, references, []))
    assert first > P_VALUE
    # The second token comes from a window.
    best = int(probs(scores, references, []).argmax())
    seconds = [out.token_ids[1] for out in draws if out.token_ids[0] == best]
    assert chi_square_p_value(seconds, probs(scores, references, [best])) > P_VALUE


def probs(scores, references, generated: list[int]) -> torch.Tensor:
    prefix = [*PROMPTS[0], *generated]
    return scores([next_logits(model, prefix) for model in references]).softmax(-1)


@pytest.mark.parametrize("policy", quick(["plain", "turns"]))
@pytest.mark.parametrize("name", quick(FUNCTIONS, "by_margin"))
def test_the_function_decides(name, policy, models, references):
    check(name, models, references, **(TURNS if policy == "turns" else {}))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_cuda_graphs(name, models, references, monkeypatch):
    replays, lines = counted_replays(monkeypatch), []
    monkeypatch.setattr(
        graphs.logger, "warning_once", lambda line, *args: lines.append(line % args)
    )
    arguments = dict(enforce_eager=False, when_started=replays.clear)
    check(name, models, references, **arguments, **TURNS)
    assert replays["decisions"] == (replays["steps"] if FUNCTIONS[name] else 0)
    assert replays["readings"] > 0, "members' passes are in graphs in any case"
    lines = [line for line in lines if "Decisions run without CUDA graphs" in line]
    if FUNCTIONS[name]:
        assert not lines
    else:
        assert f"own_functions:{name}" in lines[0] and "cannot be captured" in lines[0]
