"""An inflated checkpoint computes what its source does, and fits no smaller shape."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny_models import VOCAB_SIZE, llama_config, load_reference, save_byte_tokenizer, save_model

from benchmarks import inflate
from benchmarks.inflate import Shape, ShapeError

HEADS = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32)
SOURCES = {
    "grouped": dict(HEADS, layers=3),
    "tied": dict(HEADS, tie_word_embeddings=True),
    "biased": dict(HEADS, head_dim=16, attention_bias=True, mlp_bias=True),
    "head_dim from hidden size": {},
}
TARGETS = {
    "wider": dict(hidden_size=114, intermediate_size=160),
    "deeper": dict(num_hidden_layers=5),
    "more heads to a key": dict(num_attention_heads=16, num_key_value_heads=4),
    "fewer heads to a key": dict(num_attention_heads=16, num_key_value_heads=8),
    "a key to each head": dict(num_attention_heads=8, num_key_value_heads=8),
    "all": dict(
        hidden_size=252,
        intermediate_size=300,
        num_hidden_layers=4,
        num_attention_heads=18,
        num_key_value_heads=6,
    ),
}


def save_source(path, **kwargs) -> str:
    """A random model; its norms and biases are random too."""
    source = save_model(path, llama_config(**kwargs), seed=0)
    model = load_reference(source)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source") / "model", **SOURCES[request.param])


def shape_of(folder) -> Shape:
    return Shape.of(inflate.read_config(folder))


@torch.inference_mode()
def logits(folder) -> torch.Tensor:
    tokens = torch.randint(VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))
    return load_reference(str(folder))(tokens).logits


@pytest.mark.parametrize("target", TARGETS)
def test_logits_are_the_source_s(source, tmp_path, target):
    shape = replace(shape_of(source), **TARGETS[target])
    inflate.inflate(source, tmp_path / "inflated", shape)

    model = load_reference(str(tmp_path / "inflated"))
    assert shape_of(tmp_path / "inflated") == shape
    assert model.model.layers[-1].mlp.up_proj.weight.shape == (
        shape.intermediate_size,
        shape.hidden_size,
    )
    expected = logits(source)
    error = (logits(tmp_path / "inflated") - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_eps_is_scaled_with_the_width(tmp_path):
    """If eps matters, a target that kept the old eps would differ."""
    source = save_source(tmp_path / "source", rms_norm_eps=0.5)
    shape = replace(shape_of(source), hidden_size=256)
    inflate.inflate(source, tmp_path / "inflated", shape)
    assert torch.allclose(logits(tmp_path / "inflated"), logits(source), rtol=1e-5, atol=1e-5)

    config = json.loads((tmp_path / "inflated" / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "inflated" / "config.json").write_text(json.dumps(config))
    assert not torch.allclose(logits(tmp_path / "inflated"), logits(source), rtol=1e-2, atol=1e-2)


def test_bfloat16_is_exact_where_the_width_is_fourfold(tmp_path):
    source = save_source(tmp_path / "source")
    inflate.inflate(source, tmp_path / "same", shape_of(source), dtype="bfloat16")
    shape = replace(shape_of(source), hidden_size=4 * 64)
    inflate.inflate(source, tmp_path / "inflated", shape, dtype="bfloat16")
    assert json.loads((tmp_path / "inflated" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = logits(tmp_path / "same")
    error = (logits(tmp_path / "inflated") - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_shards_are_small_and_hold_every_parameter(tmp_path):
    source = save_source(tmp_path / "source", **HEADS, layers=3)
    shape = replace(shape_of(source), hidden_size=132, num_hidden_layers=6)
    shard_bytes = 150_000
    num_bytes = inflate.inflate(
        source, tmp_path / "inflated", shape, dtype="float32", shard_gib=shard_bytes / 2**30
    )
    shards = sorted((tmp_path / "inflated").glob("*.safetensors"))
    index = json.loads((tmp_path / "inflated" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    sizes = []
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            sizes.append(sum(tensors.get_tensor(name).nbytes for name in tensors.keys()))
    assert max(sizes) <= shard_bytes
    assert sum(sizes) == num_bytes == 4 * shape.num_parameters


def test_tokenizer_is_the_source_s_and_its_other_papers_are_not(tmp_path):
    source = save_source(tmp_path / "source")
    save_byte_tokenizer(str(source))
    (source / "README.md").write_text("of the source")
    inflate.inflate(source, tmp_path / "inflated", shape_of(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "inflated" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "inflated" / "README.md").exists()
    assert not (tmp_path / "inflated" / "model.safetensors").exists()


@pytest.mark.parametrize("name", inflate.SIZES)
@pytest.mark.parametrize("tie", [True, False])
def test_named_sizes_have_the_public_models_parameters(name, tie):
    smollm2 = Shape(576, 1536, 30, 9, 3, 64, 49152, tie)
    shape = inflate.shape_of_size(smollm2, name)
    inflate.check(smollm2, shape)
    assert shape.num_parameters == pytest.approx(inflate.SIZES[name].num_parameters, rel=0.01)
    assert shape.head_dim == 64


def test_7b_is_llama_2_s_shape_for_a_source_of_its_heads_and_vocabulary():
    source = Shape(1024, 2048, 8, 8, 8, 128, 32000, False)
    shape = inflate.shape_of_size(source, "7b")
    assert shape == Shape(4096, 11008, 32, 32, 32, 128, 32000, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_size=90), "hidden_size 90 is less than the source's 96"),
        (dict(hidden_size=100), "hidden_size 100 is no multiple of 6 heads"),
        (dict(intermediate_size=32), "intermediate_size 32 is less than the source's 96"),
        (dict(num_hidden_layers=1), "num_hidden_layers 1 is less than the source's 2"),
        (dict(hidden_size=98, num_attention_heads=7), "7 heads cannot share 2 key-value heads"),
        (dict(num_attention_heads=4), "at 2 to one, 4 key-value heads are needed"),
        (dict(num_attention_heads=1, num_key_value_heads=1), "6 over 2"),
    ],
)
def test_smaller_shapes_are_refused(tmp_path, change, message):
    source = save_source(tmp_path / "source", **HEADS)
    with pytest.raises(ShapeError, match=message):
        inflate.inflate(source, tmp_path / "inflated", replace(shape_of(source), **change))
    assert [folder.name for folder in tmp_path.iterdir()] == ["source"]


def test_heads_follow_the_hidden_size(tmp_path):
    source = save_source(tmp_path / "source", **HEADS)
    inflate.main([str(source), str(tmp_path / "t"), "--hidden-size", "288"])
    assert shape_of(tmp_path / "t") == replace(
        shape_of(source), hidden_size=288, num_attention_heads=9, num_key_value_heads=3
    )
    given = ["--hidden-size", "288", "--heads", "12", "--kv-heads", "2"]
    inflate.main([str(source), str(tmp_path / "u"), *given])
    assert shape_of(tmp_path / "u").num_attention_heads == 12
    for name in ("t", "u"):
        assert torch.allclose(logits(tmp_path / name), logits(source), rtol=1e-4, atol=1e-4)


def test_faults_are_one_line(tmp_path, capsys):
    source = save_source(tmp_path / "source")
    with pytest.raises(SystemExit, match="hidden_size 32 is less"):
        inflate.main([str(source), str(tmp_path / "t"), "--hidden-size", "32"])
    with pytest.raises(SystemExit, match="has no config.json"):
        inflate.main([str(tmp_path / "none"), str(tmp_path / "t")])
    with pytest.raises(SystemExit, match="must be 1 or more"):
        inflate.main([str(source), str(tmp_path / "t"), "--kv-heads", "0"])
    inflate.main([str(source), str(tmp_path / "t"), "--layers", "3"])
    assert "3 layers, 2 heads over 1 of 32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there"):
        inflate.main([str(source), str(tmp_path / "t"), "--layers", "3"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(SystemExit, match="'gpt2', not 'llama'"):
        inflate.main([str(source), str(tmp_path / "t2")])
