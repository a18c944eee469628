"""lm-eval's requests, answered by engines with tiny models, against a transformers loop.

Other tests run the command as a user calls it, offline, with its own tasks and data.
"""

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import engines  # noqa: F401  (the settings of its processes)
import pytest
import torch
from hydra import compose, initialize_config_dir
from lm_eval.api.instance import Instance
from omegaconf import OmegaConf
from quick import quick
from tiny_models import (
    greedy_loop,
    llama_config,
    load_reference,
    save_byte_tokenizer,
    save_model,
    save_noisy_copy,
)
from transformers import AutoTokenizer
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from harness.lm_eval_model import SpeculativeEnsembleLM
from harness.session import Session
from repository import ROOT

EOS, VOCAB_SIZE, CONTEXT = 0, 257, 192
TOLERANCE = 1e-4
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
ALPHA, WEIGHTS = 0.3, (0.7, 0.3)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    config = llama_config(VOCAB_SIZE, max_position_embeddings=CONTEXT, eos_token_id=EOS)
    first = save_model(root / "first", config, seed=1)
    save_noisy_copy(root / "second", first, seed=2)
    for name in ("first", "second"):
        assert save_byte_tokenizer(str(root / name)) == VOCAB_SIZE
        (root / name / "chat_template.jinja").write_text(CHAT)
    return root


@pytest.fixture(scope="module")
def references(root) -> list[torch.nn.Module]:
    return [load_reference(str(root / name)) for name in ("first", "second")]


# Methods, and the log-probabilities that each makes from the members' logits [..., vocab_size].
def contrastive(logits: list[torch.Tensor]) -> torch.Tensor:
    return (logits[0] - ALPHA * logits[1]).log_softmax(-1)


def weighted(logits: list[torch.Tensor]) -> torch.Tensor:
    probs = [row.double().softmax(-1) for row in logits]
    return sum(w * p for w, p in zip(WEIGHTS, probs, strict=True)).log()


CD = f"method.alpha={ALPHA}", "method.amateur_model=second"
METHODS = {
    "cd": (contrastive, CD),
    "cd_chef": (contrastive, (*CD, "method.gamma=3")),
    "ensemble": (weighted, (f"method.weights={list(WEIGHTS)}", "method.extra_model=second")),
}


@pytest.fixture(scope="module", params=quick(METHODS, "cd_chef"))
def method(request, root) -> Iterator[tuple]:
    """What a method makes of logits, its session, and its engine without sampling parameters."""
    combine, overrides = METHODS[request.param]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "lm_eval",
            [
                f"method={request.param}",
                "method.model=first",
                "method.llm.dtype=float32",
                "method.llm.enforce_eager=true",
                "method.llm.gpu_memory_utilization=0.05",
                "method.llm.kv_cache_memory_bytes=33554432",
                # Prompts are read in chunks.
                "method.llm.max_num_batched_tokens=64",
                "method.generate.temperature=null",
                *overrides,
            ],
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_PATH", str(root))
        session = Session.prepare(OmegaConf.to_container(config.method), seed=0, num_slots=8)
        gc.freeze()
        with session.start() as engine:
            yield combine, session, engine
    cleanup_dist_env_and_memory()
    gc.collect()


@pytest.fixture
def combine(method):
    return method[0]


def make_model(method: tuple, **params) -> SpeculativeEnsembleLM:
    _, session, engine = method
    return SpeculativeEnsembleLM(
        lambda: engine, session.tokenizer, session.max_model_len, params, batch_size=4
    )


@pytest.fixture
def model(method) -> SpeculativeEnsembleLM:
    return make_model(method)


@torch.inference_mode()
def logprobs(references, combine, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of every token but the first, `[num_tokens - 1, vocab_size]`."""
    return combine([model(torch.tensor([tokens])).logits[0, :-1] for model in references])


def expected_score(references, combine, context: list[int], continuation: list[int]) -> float:
    rows = logprobs(references, combine, [*context, *continuation])[len(context) - 1 :]
    return float(rows.gather(-1, torch.tensor(continuation)[:, None]).sum())


def ask(model, kind: str, *arguments: tuple) -> list:
    requests = [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


PAIRS = [
    ("The sky is", " blue"),
    ("The sky is ", "green"),
    ("", "no context"),
    ("Ünïcode: ", "žluťoučký kůň"),
    ("long " * 12, "and more"),
    # As long as allowed, and too long: the beginning is left out.
    ("x" * (CONTEXT - 6), " last"),
    ("0123456789" * 30, " last"),
]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5, "repetition_penalty": 1.5, "min_tokens": 4, "top_k": 2}],
    ids=["no parameters", "parameters of the run"],
)
def test_scores_are_the_ensembles(method, combine, references, params):
    model = make_model(method, **params)
    answers = ask(model, "loglikelihood", *PAIRS)
    for (context, continuation), (score, _) in zip(PAIRS, answers, strict=True):
        tokens = [] if context else [EOS]
        tokens = [*tokens, *model.tok_encode(context + continuation)][-(CONTEXT - 1) :]
        # A token is a byte. A space after the context belongs to the continuation.
        length = len(continuation.encode()) + context.endswith(" ")
        expected = expected_score(references, combine, tokens[:-length], tokens[-length:])
        assert score == pytest.approx(expected, abs=TOLERANCE), context


def test_greedy_is_what_the_ensemble_would_generate(model, combine, references):
    prompt = model.tok_encode("Once upon a time")
    tokens = greedy_loop(references, combine, prompt, 12)
    other = [*tokens[:-1], (tokens[-1] + 1) % VOCAB_SIZE]
    requests = [(None, prompt, tokens), (None, prompt, other), (None, prompt, tokens[:1])]
    answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False, True]
    for (score, _), (_, _, continuation) in zip(answers, requests, strict=True):
        expected = expected_score(references, combine, prompt, continuation)
        assert score == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("length", [1, CONTEXT - 2, CONTEXT - 1, 2 * CONTEXT + 10])
def test_rolling_scores_are_the_ensembles(model, combine, references, length):
    text = ("All happy families are alike. " * 20)[:length]
    tokens = model.tok_encode(text)
    # Each window is as long as allowed, and overlaps with the one before.
    width = CONTEXT - 2
    expected = expected_score(references, combine, [EOS], tokens[:width])
    for start in range(width, length, width):
        end = min(start + width, length)
        context = tokens[max(0, start - 1 if end - start == width else end - width - 1) : start]
        expected += expected_score(references, combine, context, tokens[start:end])
    (total,) = ask(model, "loglikelihood_rolling", (text,))
    # The error of a sum grows with the sum.
    assert total == pytest.approx(expected, abs=TOLERANCE, rel=1e-6)


def test_texts_are_the_ensembles_up_to_the_first_stop(model, combine, references):
    prompts = ["Once upon a time", "Question: 1 + 1", "z"]
    expected, num_tokens = [], 0
    for prompt in prompts:
        tokens = greedy_loop(references, combine, model.tok_encode(prompt), 30)
        end = tokens.index(EOS) if EOS in tokens else len(tokens)
        # vLLM leaves out last bytes that are not a whole character.
        expected.append(model.tokenizer.decode(tokens[:end]).rstrip(NO_CHARACTER))
        num_tokens += min(end + 1, len(tokens))
    whole = [(prompt, {"until": [], "max_gen_toks": 30}) for prompt in prompts]
    texts = ask(model, "generate_until", *whole)
    assert [text.rstrip(NO_CHARACTER) for text in texts] == expected
    assert model.num_tokens == num_tokens

    stop, at = (_some_character(text) for text in expected[:2])
    until = [
        (prompts[0], {"until": [stop, "never"], "max_gen_toks": 30, "do_sample": False}),
        (prompts[1], {"until": ["never", at], "max_gen_toks": 30, "temperature": 0.0}),
    ]
    first, second, third = ask(model, "generate_until", *until, whole[2])
    assert first == expected[0].partition(stop)[0] != expected[0]
    assert second == expected[1].partition(at)[0] != expected[1]
    assert third == texts[2]


def _some_character(text: str) -> str:
    return next(c for c in text[3:] if c != NO_CHARACTER)


def test_sampled_texts_depend_on_the_seed_only(method):
    asked = [("Once upon", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16})] * 3
    first = ask(make_model(method), "generate_until", *asked)
    assert first == ask(make_model(method), "generate_until", *asked)
    assert len(set(first)) == 3


def test_only_generated_texts_count_as_proposals(method, model):
    ask(model, "loglikelihood", *PAIRS)
    assert model.counts == {}
    ask(model, "generate_until", ("Once upon", {"max_gen_toks": 24}))
    takes_turns = method[1].spec.turns is not None
    assert ("num_calls" in model.counts) == takes_turns
    if takes_turns:
        cycles = model.counts["num_calls"][0]
        # 24 tokens, at most five a cycle. The scores would add seven more calls.
        assert math.ceil(24 / 5) <= cycles <= 24


# The command


DOCS = [
    {"q": "What is two and two?", "options": ["four", "five", "1"], "gold": 0},
    {"q": "What colour is the sky?", "options": ["green", "blue as the sea", "x"], "gold": 1},
    {"q": "Is it so?", "options": ["yes", "no", "perhaps"], "gold": 2},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA, train: DATA}}
test_split: test
fewshot_split: train
doc_to_text: "{{q}}"
"""
TASKS = {
    "tiny_choice": 'output_type: multiple_choice\ndoc_to_choice: "{{options}}"\n'
    "doc_to_target: gold\nmetric_list: [{metric: acc}]",
    "tiny_text": 'output_type: generate_until\ndoc_to_target: "{{options[gold]}}"\n'
    "generation_kwargs: {until: [' '], max_gen_toks: 6, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]",
    "tiny_rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{q}}"\n'
    "metric_list: [{metric: bits_per_byte}]",
}


def command(root: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`main_lm_eval.py` as a user calls it."""
    names = ("VLLM_", "TORCH_", "TRANSFORMERS_", "OMP_", "HYDRA_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return subprocess.run(
        [sys.executable, ROOT / "main_lm_eval.py", *arguments],
        cwd=cwd,
        env={**clean, "MODEL_PATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


ARGUMENTS = (
    *("method=cd_chef", "method.model=first", *CD, "method.gamma=3", "save_path=run"),
    *("tasks=[tiny_choice,tiny_text,tiny_rolling]", "include_path=tasks", "num_fewshot=1"),
    *("apply_chat_template=true", "limit=2", "method.llm.kv_cache_memory_bytes=33554432"),
)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "tasks").mkdir()
    (cwd / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        common = COMMON.replace("DATA", str(cwd / "data.jsonl"))
        if "rolling" in name:  # takes no examples
            common = common.replace('"{{q}}"', '""') + "num_fewshot: 0\n"
        (cwd / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}\n")
    return cwd


@pytest.mark.slow
def test_command(root, cwd, references):
    result = command(root, cwd, *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    run = cwd / "run"
    assert sorted(os.listdir(run)) == ["config.yaml", "results.json", "summary.json"]
    assert OmegaConf.load(run / "config.yaml").method.name == "cd_chef"

    results = json.loads((run / "results.json").read_text())
    check_samples(root, results["samples"], references)
    assert results["n-shot"] == {"tiny_choice": 1, "tiny_text": 1, "tiny_rolling": 0}

    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "cd_chef" and summary["gamma"] == [1, 3]
    assert summary["num_samples"] == dict.fromkeys(TASKS, 2)
    assert summary["tasks"].keys() == TASKS.keys()
    assert 0 < summary["num_tokens"] <= 2 * 6
    assert summary["tokens_per_second"] == summary["num_tokens"] / summary["total_time_s"]
    assert summary["tokens_per_cycle"] >= 1 and len(summary["acceptance"]) == 2

    assert result.stdout.splitlines()[0] == "results go to run"
    assert "|tiny_choice |Yaml   |none  |     1|acc" in result.stdout
    assert "tokens a cycle" in result.stdout
    assert "WARNING" not in result.stderr and "ERROR" not in result.stderr

    again = command(root, cwd, *ARGUMENTS)
    assert again.returncode == 1
    message = "error: save_path: 'run' already holds results.json; choose another folder\n"
    assert (again.stdout, again.stderr) == ("", message)
    assert json.loads((run / "results.json").read_text()) == results


def check_samples(root: Path, samples: dict, references) -> None:
    """Chats with an example before the question, and the ensemble's scores of each option."""
    tokenizer = AutoTokenizer.from_pretrained(root / "first")
    assert len(samples["tiny_choice"]) == 2
    for sample in samples["tiny_choice"]:
        arguments, scores = sample["arguments"], []
        for option, pair, answer in zip(
            sample["doc"]["options"], arguments, sample["resps"], strict=True
        ):
            context, continuation = pair
            assert continuation.strip() == option
            assert context.count("<user>") == 2 and context.startswith("<user>")
            assert context.endswith(f"<user>{sample['doc']['q']}\n<assistant>")
            tokens = [tokenizer.encode(text) for text in pair]
            scores.append(expected_score(references, contrastive, *tokens))
            assert float(answer[0][0]) == pytest.approx(scores[-1], abs=TOLERANCE)
        assert sample["acc"] == float(scores.index(max(scores)) == sample["doc"]["gold"])


@pytest.mark.slow
def test_multirun_is_refused(root, cwd):
    result = command(root, cwd, "--multirun", *ARGUMENTS)
    assert result.returncode != 0
    assert (
        result.stderr == "error: --multirun: sweeps are main_dataset.py's; call this once a run\n"
    )
