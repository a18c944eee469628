"""Members of different families: no member changes what another computes.

vLLM keeps one configuration per engine. It takes parts of it from the engine's own model: sliding
windows, head counts, whether there are experts. Here every family is first once, with all the
others beside it. The mean of the logits must be the mean of what transformers computes for each
family alone. Pairs that differ in one setting also run by turns, in both orders.
"""

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import counted_replays, engine, generate, greedy
from families import FAMILIES, NO_DRAFT, RECURRENT, logits_of, save_family
from PIL import Image
from tiny_models import VOCAB_SIZE, assert_same_tokens, greedy_loop, load_reference
from vllm.engine.arg_utils import EngineArgs

from vllm.chef.arguments import ENSEMBLE_WORKER
from vllm.ensemble_decode import ConfigFieldError
from vllm.ensemble_decode.members import check_ensemble

# The second prompt is longer than all windows. The third is too, with the tokens that follow it.
PROMPTS = [[5, 6, 7], [(7 * i + 3) % VOCAB_SIZE for i in range(40)], [9] * 15]
FORCED, NUM_TOKENS = 5, 4
# The best logits of members differ by more than 1.
TOLERANCE = 5e-3
# Settings that vLLM keeps once per engine; one family for each.
KINDS = ["llama", "llama_wide", "mistral_16", "gemma2", "gpt_oss", "mixtral", "bloom"]
# In a pair, a chunk meets blocks that fit it; with all the others, blocks get larger.
ALL = [name for name in FAMILIES if name != "llama4"]
# As first members these add no kind of setting. Each takes one more engine of 39 members.
OTHERS = [name for name in ALL if name not in KINDS]
# Turns, and the tokens that their window carries.
BY_TURNS = (dict(gamma=[1, 2], turn_order=[0, 1]), 2)
only_on_demand = pytest.mark.skipif(
    not os.environ.get("ALL_FAMILIES"), reason="set ALL_FAMILIES=1 to put every family first"
)
PAIRS = [
    ("llama", "mistral_16"),
    ("mistral_16", "mistral_32"),
    ("mistral", "mistral_16"),
    ("llama", "llama_wide"),
    ("llama", "mixtral"),
    ("mistral_32", "gpt_oss"),
    ("gemma2", "qwen3_moe"),
    ("opt", "olmo3"),
    ("gemma3", "gemma3_multimodal"),
    ("qwen2_5_vl", "qwen2"),
    ("qwen3_vl", "mistral3"),
]

pytestmark = pytest.mark.slow

Tables = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(root, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tables(models: dict[str, str]) -> Tables:
    """By family and prompt: the logits of the prompt and of the tokens that follow it."""
    texts = [prompt + [FORCED] * NUM_TOKENS for prompt in PROMPTS]
    return {name: logits_of(path, texts) for name, path in models.items()}


def run(models: dict[str, str], names: Sequence[str], *args: Any, **arguments: Any) -> list[Any]:
    """The outputs of an engine whose members are `names`, with all tokens forced."""
    ensemble = dict(
        extra_model=[models[name] for name in names[1:]],
        ensemble_fn="mean",
        ensemble_target="raw-logits",
    )
    defaults = dict(
        max_logprobs=VOCAB_SIZE,
        logprobs_mode="raw_logits",
        kv_cache_memory_bytes=(32 + 8 * len(names)) << 20,
    )
    params = greedy(NUM_TOKENS, logprobs=VOCAB_SIZE, allowed_token_ids=[FORCED])
    with engine(models[names[0]], ensemble, *args, **{**defaults, **arguments}) as llm:
        return generate(llm, PROMPTS, params)


def assert_mean_of(tables: Tables, names: Sequence[str], outputs: list[Any]) -> None:
    for at, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        assert list(output.token_ids) == [FORCED] * NUM_TOKENS
        rows = torch.tensor(
            [[row[token].logprob for token in range(VOCAB_SIZE)] for row in output.logprobs]
        )
        last = len(prompt) - 1
        expected = sum(tables[name][at][last : last + NUM_TOKENS] for name in names) / len(names)
        # One member that is off by the tolerance moves the mean by a share of it.
        torch.testing.assert_close(rows, expected, rtol=0, atol=TOLERANCE / len(names))


@pytest.mark.parametrize(
    "first", [*KINDS, *(pytest.param(n, marks=only_on_demand) for n in OTHERS)]
)
def test_every_family_computes_the_same_beside_all_others(first, models, tables):
    names = [first, *(name for name in ALL if name != first)]
    assert_mean_of(tables, names, run(models, names))


@pytest.mark.parametrize(
    "family",
    [*KINDS, *(pytest.param(n, marks=only_on_demand) for n in FAMILIES if n not in KINDS)],
)
@pytest.mark.parametrize("role", ["alone", "plain", "opens", "follows", "proposes"])
def test_a_family_in_a_role(role, family, models, tables):
    """The rows of the first table in docs/compatibility.md."""
    if family in RECURRENT and role not in ("alone", "plain"):
        pytest.skip("test_recurrent.py has what recurrent layers allow")
    if family in NO_DRAFT and role == "proposes":
        with pytest.raises(ConfigFieldError, match="^speculative_config.model: vLLM takes"):
            check_outside_proposer(family, models)
        return
    other = "llama_wide" if family == "llama" else "llama"
    if role == "alone":
        params = greedy(NUM_TOKENS, logprobs=VOCAB_SIZE, allowed_token_ids=[FORCED])
        arguments = dict(max_logprobs=VOCAB_SIZE, logprobs_mode="raw_logits")
        arguments["language_model_only"] = True
        with engine(models[family], **arguments) as llm:
            assert_mean_of(tables, [family], generate(llm, PROMPTS, params))
    elif role == "plain":
        for names in ([family, other], [other, family]):
            assert_mean_of(tables, names, run(models, names))
    elif role == "proposes":
        check_outside_proposer(family, models)
    else:
        names = [family, other] if role == "opens" else [other, family]
        assert_mean_of(tables, names, run(models, names, *BY_TURNS))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("swapped", [False, True])
def test_pairs_compute_the_same_plain_and_by_turns(pair, swapped, models, tables):
    names = list(reversed(pair)) if swapped else list(pair)
    assert_mean_of(tables, names, run(models, names))
    assert_mean_of(tables, names, run(models, names, *BY_TURNS))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pair", [*PAIRS[:4], ("gpt2", "mistral_16")], ids="+".join)
@pytest.mark.parametrize("swapped", [False, True])
def test_pairs_emit_the_same_in_cuda_graphs(pair, swapped, compiled, models, tables, monkeypatch):
    """Requests without options run in the graphs of turns. `tables` must precede any engine."""
    names = list(reversed(pair)) if swapped else list(pair)
    references = [load_reference(models[name]) for name in names]
    expected = [greedy_loop(references, sum, prompt, 12) for prompt in PROMPTS]
    ensemble = dict(
        extra_model=[models[names[1]]], ensemble_fn="mean", ensemble_target="raw-logits"
    )
    mode = {} if compiled else {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    replays = counted_replays(monkeypatch)
    for policy in ((None,), BY_TURNS):
        with engine(
            models[names[0]], ensemble, *policy, enforce_eager=False, compilation_config=mode
        ) as llm:
            outputs = generate(llm, PROMPTS, greedy(12))
        for prompt, output, tokens in zip(PROMPTS, outputs, expected, strict=True):
            assert_same_tokens(list(output.token_ids), tokens, references, sum, prompt)
    assert replays["readings"] > 0


@pytest.mark.parametrize(
    "draft", ["mistral_16", "mixtral", "llama_wide", "phi", "qwen2_5_vl", "qwen3_vl"]
)
def test_a_proposer_outside_keeps_its_own_settings(draft, models):
    check_outside_proposer(draft, models)


def check_outside_proposer(draft: str, models: dict[str, str]) -> None:
    """One member decides alone; the ensemble accepts everything that the same model proposes."""
    ensemble = dict(
        extra_model=[models[draft]],
        ensemble_fn="weighted",
        weights=[0.0, 1.0],
        ensemble_target="raw-logits",
    )
    speculative = {"method": "draft_model", "model": models[draft], "num_speculative_tokens": 3}
    with engine(models["llama"], ensemble, speculative_config=speculative) as llm:
        generate(llm, PROMPTS, greedy(24))
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    drafted = metrics["vllm:spec_decode_num_draft_tokens"]
    # Proposals past a request's last token are not accepted.
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0.9 * drafted > 0


@pytest.mark.parametrize(
    ("names", "policy"),
    [
        pytest.param(("llava", "llama"), (None,), id="llava+llama-plain"),
        pytest.param(("llava", "llama"), BY_TURNS, id="llava+llama-turns"),
        pytest.param(("llama", "llava"), BY_TURNS, id="llama+llava-turns"),
    ],
)
def test_a_request_with_an_image_is_refused_alone(names, policy, models):
    ensemble = dict(extra_model=[models[names[1]]], ensemble_fn="mean")
    image = {
        "prompt_token_ids": PROMPTS[0],
        "multi_modal_data": {"image": Image.new("RGB", (28, 28))},
    }
    with engine(models[names[0]], ensemble, *policy) as llm:
        expected = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        with pytest.raises(ValueError, match="(?i)image|multi-?modal"):
            llm.generate(image, greedy(NUM_TOKENS))
        found = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    assert [list(o.token_ids) for o in found] == [list(o.token_ids) for o in expected]


def test_an_engine_whose_requests_may_bring_images_is_refused(models):
    """`vllm serve` without the flag; `ensemble_args` sets it."""
    config = EngineArgs(
        models["llava"],
        skip_tokenizer_init=True,
        max_model_len=96,
        worker_cls=ENSEMBLE_WORKER,
        additional_config={"ensemble": {"extra_model": [models["llama"]]}},
    ).create_engine_config()
    with pytest.raises(ConfigFieldError, match="^--language-model-only: '.*llava' is multimodal"):
        check_ensemble(config)
