"""Models made of stored weights: what is merged and assembled, when, and from which files."""

import io
import json
import sys
import time
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, load_reference, save_byte_tokenizer, save_model

from scripts import prepare_models as prepare

QUERY = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
NAMES = [prepare.FULL, prepare.SHALLOW, prepare.PYTHON, prepare.AMATEUR]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """MODEL_PATH with a tiny base, and an empty folder of weights."""
    monkeypatch.setattr(prepare, "read_env", lambda: None)
    monkeypatch.setattr(prepare, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(sys, "argv", ["prepare_models.py"])
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "models"))
    base = tmp_path / "models" / prepare.FULL
    save_model(base, llama_config(layers=3, tie_word_embeddings=True), seed=0)
    load_reference(str(base)).bfloat16().save_pretrained(base)
    save_byte_tokenizer(str(base))
    (base.parent / prepare.SHALLOW).mkdir()
    return base.parent


def store_adapter(seed: int = 0):
    """Rank 2 of two projections; returns the factors by module: (A, B)."""
    folder = prepare.WEIGHTS / prepare.PYTHON
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    sizes = {QUERY: (64, 64), UP: (96, 64)}
    factors, tensors = {}, {}
    for module, (rows, columns) in sizes.items():
        down = torch.randn(2, columns, generator=generator).bfloat16()
        up = torch.randn(rows, 2, generator=generator).bfloat16()
        factors[module] = (down, up)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, folder / prepare.ADAPTER)
    (folder / prepare.ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    prepare.write_sums(folder)
    return factors


def store_layers(root, drop: str = ""):
    """Layers 2 and 0 of the base, in bytes of scale 1/64; the base has other values."""
    folder = prepare.WEIGHTS / prepare.AMATEUR
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in load_file(root / prepare.FULL / "model.safetensors").items():
        parts = name.split(".")
        if name == "model.norm.weight":
            tensors[name] = tensor * 2
        elif "layers" in parts and parts[2] in "20":
            name = ".".join(["model.layers", {"2": "0", "0": "1"}[parts[2]], *parts[3:]])
            if tensor.dim() == 1:
                tensors[name] = tensor
            else:
                tensors[name] = (tensor.float() * 64).round().clamp(-127, 127).to(torch.int8)
                tensors[f"{name}_scale"] = torch.full((len(tensor), 1), 1 / 64)
    tensors.pop(drop, None)
    save_file(tensors, folder / prepare.LAYERS)
    prepare.write_sums(folder)
    return tensors


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def stamps(root) -> dict:
    return {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}


def test_without_stored_weights_there_are_two_models(root, capsys):
    prepare.main()
    assert capsys.readouterr().out.count("is there") == 2
    assert sorted(folder.name for folder in root.iterdir()) == sorted(NAMES[:2])


def test_the_adapter_is_merged(root):
    factors = store_adapter()
    prepare.main()
    base, merged = weights_of(root / prepare.FULL), weights_of(root / prepare.PYTHON)
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        module = name.removesuffix(".weight")
        if module in factors:
            down, up = (factor.double() for factor in factors[module])
            expected = base[name].double() + 6 / 2 * up @ down
            assert torch.allclose(weight.double(), expected, rtol=2**-7, atol=1e-5)
            assert not torch.allclose(weight, base[name], atol=0.1)
        else:
            assert torch.equal(weight, base[name])


def test_the_amateur_is_the_stored_layers_between_the_base_s_tables(root):
    stored = store_layers(root)
    prepare.main()
    base, made = weights_of(root / prepare.FULL), weights_of(root / prepare.AMATEUR)
    config = json.loads((root / prepare.AMATEUR / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert made.keys() == {name for name in stored if not name.endswith("_scale")} | {
        "model.embed_tokens.weight"
    }
    assert torch.equal(made["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], 2 * base["model.norm.weight"])
    up = "mlp.up_proj.weight"
    expected = base[f"model.layers.2.{up}"].float()
    assert (made[f"model.layers.0.{up}"].float() - expected).abs().max() < 0.55 / 64
    assert (made[f"model.layers.1.{up}"].float() - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", [prepare.PYTHON, prepare.AMATEUR])
def test_members_load_as_checkpoints_with_the_base_s_tokenizer(root, name):
    store_adapter()
    store_layers(root)
    prepare.main()
    logits = load_reference(str(root / name))(torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    tokenizer = (root / prepare.FULL / "tokenizer.json").read_bytes()
    assert (root / name / "tokenizer.json").read_bytes() == tokenizer


def test_what_is_there_is_left_until_the_weights_change(root, capsys):
    store_adapter()
    store_layers(root)
    prepare.main()
    before = stamps(root)
    capsys.readouterr()
    prepare.main()
    assert capsys.readouterr().out.count("is there") == 4
    assert stamps(root) == before

    old = weights_of(root / prepare.PYTHON)
    store_adapter(seed=1)
    prepare.main()
    changed = {file for file, stamp in stamps(root).items() if before.get(file) != stamp}
    assert {file.parent.name for file in changed} == {prepare.PYTHON}
    assert not torch.equal(
        weights_of(root / prepare.PYTHON)[f"{QUERY}.weight"], old[f"{QUERY}.weight"]
    )
    assert sorted(folder.name for folder in root.iterdir()) == sorted(NAMES)


def test_a_model_of_that_name_that_somebody_made_is_left_alone(root):
    store_adapter()
    (root / prepare.PYTHON).mkdir()
    (root / prepare.PYTHON / "config.json").write_text("{}")
    prepare.main()
    assert [file.name for file in (root / prepare.PYTHON).iterdir()] == ["config.json"]


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_weights_that_are_not_whole_are_named_and_make_nothing(root, fault):
    store_layers(root)
    file = prepare.WEIGHTS / prepare.AMATEUR / prepare.LAYERS
    if fault == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        file.unlink()
    with pytest.raises(SystemExit, match=r"layers\.safetensors is not what SHA256SUMS says"):
        prepare.main()
    assert sorted(folder.name for folder in root.iterdir()) == sorted(NAMES[:2])


def test_layers_that_are_not_all_there_are_refused(root):
    store_layers(root, drop="model.layers.1.input_layernorm.weight")
    with pytest.raises(SystemExit, match="not 2 layers and a norm"):
        prepare.main()
    assert not (root / prepare.AMATEUR).exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_seconds_are_counted_on_a_terminal(monkeypatch):
    """The seconds stay in one line, cut to the terminal's width."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(prepare, "TICK_S", 0.01)
    terminal = Terminal()
    with redirect_stdout(terminal), pytest.raises(KeyboardInterrupt):
        with prepare.counting_seconds("writing a model ..."):
            time.sleep(0.1)
            raise KeyboardInterrupt
    line, end, rest = terminal.getvalue().partition("\n")
    start, *seconds = line.split("\r")
    assert start == "g a model ..." and set(seconds) == {"g a model ... 0 s"}
    assert (end, rest) == ("\n", "")


def test_a_log_has_one_line(capsys):
    with prepare.counting_seconds("writing a model ..."):
        pass
    assert capsys.readouterr().out == "writing a model ...\n"


def test_sums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "README.md").write_text("changes freely")
    prepare.write_sums(tmp_path)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert (tmp_path / prepare.SUMS).read_text() == f"{digest}  file\n"
    prepare.write_sums(tmp_path)
    assert (tmp_path / prepare.SUMS).read_text() == f"{digest}  file\n"
