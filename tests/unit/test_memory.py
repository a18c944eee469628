"""What members take of the memory: the table before weights load, and what does not fit."""

import pytest
import torch
from tiny_models import llama_config, save_model
from vllm.engine.arg_utils import EngineArgs

from vllm.chef.state import ProposalState, kept_scores_bytes
from vllm.chef.turns import chef_turns
from vllm.ensemble_decode import members as members_module
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.memory import (
    GIB,
    MemberMemory,
    member_memory,
    memory_table,
    out_of_memory,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "0", llama_config(), seed=0)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_member(model, dtype, size):
    vllm_config = EngineArgs(model, dtype=dtype, skip_tokenizer_init=True).create_engine_config()
    found = member_memory(vllm_config, vllm_config.model_config, kept_scores=7)
    config = llama_config()
    head_size = config.hidden_size // config.num_attention_heads
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    assert found.cache == 1000 * of_a_token * size
    # The checkpoint has float32; the model is loaded in its own dtype.
    rows = 2 * config.vocab_size * config.hidden_size
    assert found.weights > rows * size and found.weights % size == 0
    assert found.kept_scores == 7


def test_weights_that_are_not_on_disk_are_unknown(model, tmp_path):
    llama_config().save_pretrained(tmp_path)
    arguments = EngineArgs(str(tmp_path), dtype="float32", skip_tokenizer_init=True)
    vllm_config = arguments.create_engine_config()
    assert member_memory(vllm_config, vllm_config.model_config).weights is None


def test_table():
    members = [MemberMemory("a", 3 * GIB, GIB // 2), MemberMemory("b", GIB, GIB // 2, GIB // 4)]
    assert memory_table(members, 10 * GIB).splitlines() == [
        "Memory on each device:",
        "  member 0: weights 3.00 GiB, KV cache 512.0 MiB per 1,000 tokens ('a')",
        "  member 1: weights 1.00 GiB, KV cache 512.0 MiB per 1,000 tokens, "
        "kept scores 256.0 MiB ('b')",
        "  left of 10.00 GiB: about 5.75 GiB, or 5,750 tokens of all members",
    ]
    assert "left" not in memory_table(members, None)
    unknown = [*members, MemberMemory("c", None, GIB)]
    assert (
        memory_table(unknown, 10 * GIB).splitlines()[-1].startswith("  member 2: weights unknown")
    )


def test_kept_scores_are_those_of_the_state():
    turns = chef_turns([1, 1, 5], [9, 5, 1], (True,) * 3)
    state = ProposalState(turns, 4, 32, 64, torch.float32, torch.device("cpu"))
    by_member = kept_scores_bytes(turns, 4, 64, torch.float32)
    assert by_member == {turn.members[0]: state.scores[0].nbytes for turn in turns.sequence[1:]}


@pytest.mark.parametrize("index", [0, 1])
def test_a_member_that_does_not_fit_is_named(model, index, monkeypatch):
    vllm_config = EngineArgs(
        model, dtype="float32", skip_tokenizer_init=True
    ).create_engine_config()

    def get_model(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(members_module, "get_model", get_model)
    ensemble = EnsembleConfig([model])
    configs = [vllm_config.model_config] * 2
    line = (
        rf"out of memory: member {index} \(counted from 0\), '{model}', does not fit; take a small"
    )
    with pytest.raises(RuntimeError, match=line):
        members_module.load_member(vllm_config, ensemble, configs, index, {})


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="^other$"), out_of_memory("x", "y"):
        raise RuntimeError("other")
