"""`EnsembleModel` with members that are tables: what it runs, keeps and combines."""

import pytest
import torch
from fakes import TableMember
from vllm.model_executor.models.interfaces_base import is_text_generation_model

from vllm.ensemble_decode.functions import make_function
from vllm.ensemble_decode.model import EnsembleModel

VOCAB_SIZE = 5
INPUT_IDS = torch.tensor([3, 0, 4])
POSITIONS = torch.arange(3)


def make_model(samples_members: bool, pool: torch.Tensor | None = None) -> EnsembleModel:
    generator = torch.Generator().manual_seed(0)
    members = [
        TableMember(torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator), width, pool)
        for width in (4, 2, 3)
    ]
    return EnsembleModel(
        members=members,
        function=make_function("weighted", len(members), {"weights": [0.5, 0.3, 0.2]}),
        samples_members=samples_members,
        combines_probs=samples_members,
        model_state_cls=object,
    )


def test_every_member_sees_every_token():
    model = make_model(samples_members=False)
    hidden_states = model(INPUT_IDS, POSITIONS)
    assert hidden_states.shape == (3, 4 + 2 + 3)
    assert [member.num_calls for member in model.members] == [1, 1, 1]
    expected = sum(
        w * m.table[INPUT_IDS] for w, m in zip([0.5, 0.3, 0.2], model.members, strict=True)
    )
    torch.testing.assert_close(model.compute_logits(hidden_states), expected)


def test_members_that_are_sampled_first_keep_their_logits_apart():
    model = make_model(samples_members=True)
    logits = model.compute_logits(model(INPUT_IDS, POSITIONS))
    assert torch.equal(logits, torch.cat([m.table[INPUT_IDS] for m in model.members], dim=-1))
    mixture = sum(
        w * m.table[INPUT_IDS].softmax(-1)
        for w, m in zip([0.5, 0.3, 0.2], model.members, strict=True)
    )
    torch.testing.assert_close(model.ensemble_logits(logits).softmax(-1), mixture)


@pytest.mark.parametrize("samples_members", [False, True])
def test_a_members_output_may_die_with_the_next_members_pass(samples_members):
    """The members' piecewise CUDA graphs share a memory pool, as these members share a buffer."""
    expected_model = make_model(samples_members)
    expected = expected_model.compute_logits(expected_model(INPUT_IDS, POSITIONS))
    model = make_model(samples_members, pool=torch.zeros(64))
    model(INPUT_IDS, POSITIONS)  # the first pass is never a CUDA graph
    hidden_states = model(INPUT_IDS, POSITIONS)
    assert torch.equal(model.compute_logits(hidden_states), expected)


def test_vllm_takes_it_for_a_text_generation_model():
    assert is_text_generation_model(make_model(samples_members=False))
