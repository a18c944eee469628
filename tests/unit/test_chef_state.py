"""Windows of requests as device data: what one request's rejection changes, and what it keeps."""

from types import SimpleNamespace

import torch

from vllm.chef.ops import eager as ops
from vllm.chef.sampling import DeviceParams, Processing, SamplerParams
from vllm.chef.state import (
    NO_TOP_K,
    Candidates,
    Cycle,
    ProposalState,
    SlotStates,
    make_cycle,
)
from vllm.chef.stats import TurnStats
from vllm.chef.turns import chef_turns
from vllm.chef.verifier import StepScores, Verifier

TURNS = chef_turns([1, 2, 1], [9, 5, 7], (True, True, True))  # members 0, 2, 1; window 3
NUM_SLOTS, VOCAB_SIZE = 6, 4


def make_state() -> ProposalState:
    device = torch.device("cpu")
    state = ProposalState(TURNS, NUM_SLOTS, 100, VOCAB_SIZE, torch.float32, device)
    state.scores.copy_(torch.randn(state.scores.shape, generator=torch.Generator().manual_seed(0)))
    return state


def load(cycle: Cycle, slots: list[int], prefill_len: torch.Tensor) -> Cycle:
    none = torch.zeros(NUM_SLOTS)
    states = SlotStates(prefill_len, none, none.long(), none.int(), none, none)
    return ops.load(cycle, torch.tensor(slots), states)


def begin_cycle(state, slots, num_computed, num_drafts, input_ids, prefill_len) -> Cycle:
    """Requests that decode: the last committed token, and `num_drafts` drafts."""
    lens = torch.tensor(num_drafts) + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]).int()
    cycle = load(make_cycle(state, NUM_SLOTS), slots, prefill_len)
    seq_lens = (torch.tensor(num_computed) + lens).int()
    ops.begin_cycle(state, cycle, starts, starts, seq_lens, torch.tensor(input_ids).int())
    return cycle


def begin(state: ProposalState) -> Cycle:
    state.lengths[torch.tensor([4, 1, 2])] = torch.tensor([[0, 1, 2], [0, 0, 2], [0, 1, 2]])
    state.scored[:] = 1000
    inputs = [9, 10, 11, 12, 19, 20, 21, 0, 29, 30, 31]
    prefill_len = torch.full((NUM_SLOTS,), 5)
    return begin_cycle(state, [4, 1, 2], [50, 70, 33], [3, 3, 2], inputs, prefill_len)


def append(state, cycle, turn, tokens, gammas=(1, 1, 2)) -> None:
    ops.append(state, cycle, turn, torch.tensor(gammas), torch.tensor(tokens))


def test_a_cycle_begins_with_the_windows_that_were_scheduled():
    state = make_state()
    cycle = begin(state)
    assert cycle.first_position.tolist() == [51, 71, 34]
    assert cycle.end.tolist() == [3, 2, 2], "the third request lost its last token"
    assert cycle.lengths.tolist() == [[0, 1, 2], [0, 0, 2], [0, 1, 1]]
    assert cycle.tokens[:, :2].tolist() == [[10, 11], [20, 21], [30, 31]]
    # Scores reach one position past the window, whatever was kept before.
    assert state.scored[4].tolist() == [55] * 3
    assert state.scored[1].tolist() == [74] * 3
    assert cycle.active.all()


def test_a_request_that_reads_its_prompt_has_no_window():
    state = make_state()
    state.lengths[:], state.scored[:] = 1, 1000
    # Placeholders fill the second request's single token up to the size of a decoding request.
    prefill_len = torch.tensor([5, 0, 0, 8, 0, 0])
    cycle = begin_cycle(state, [0, 3], [50, 7], [3, 3], list(range(8)), prefill_len)
    assert cycle.end.tolist() == [2, 0]
    assert cycle.active.tolist() == [True, True]
    assert state.scored[3].tolist() == [8] * 3, "nothing is known of another request's scores"


def test_one_requests_rejection_leaves_the_others_as_they_were():
    state = make_state()
    cycle, untouched = begin(state), begin(make_state())
    for c in (cycle, untouched):
        append(state, c, 0, [13, 23, 33])
        append(state, c, 1, [14, 24, 34])
    scores, scored = state.scores.clone(), state.scored.clone()
    # All drafts of the first and third request are accepted, and one of the second's two.
    sampled = torch.tensor([[10, 11, 12, 5], [20, 8, 5, 5], [30, 31, 5, 5]])
    ops.settle(state, cycle, sampled, torch.tensor([4, 2, 3]), range(2), draws=False)

    assert cycle.tokens[1, :2].tolist() == [20, 8]
    assert (int(cycle.end[1]), int(cycle.num_decided[1])) == (2, 2)
    assert cycle.new_lengths[1].tolist() == [0, 0, 0]
    assert cycle.settled.tolist() == cycle.just_settled.tolist() == [False, True, False]
    # The scores of its own column stay: they depend on the tokens before it.
    assert state.scored[1].tolist() == [73] * 3
    others = torch.tensor([0, 2])
    for name in ("end", "lengths", "new_lengths", "settled"):
        assert getattr(cycle, name)[others].equal(getattr(untouched, name)[others]), name
    assert cycle.num_accepted.tolist() == [3, 1, 2]
    assert cycle.tokens[others, :-1].equal(untouched.tokens[others, :-1])
    assert state.scores.equal(scores)
    unchanged = [slot for slot in range(NUM_SLOTS) if slot != 1]
    assert state.scored[unchanged].equal(scored[unchanged])


def test_a_cycle_ends_with_what_is_pending():
    state = make_state()
    cycle = begin(state)
    append(state, cycle, 0, [13, 23, 33])
    sampled = torch.tensor([[10, 11, 12, 13, 5], [20, 8, 5, 5, 5], [9, 5, 5, 5, 5]])
    ops.settle(state, cycle, sampled, torch.tensor([5, 2, 1]), range(3), draws=False)
    append(state, cycle, 1, [14, 24, 34])
    append(state, cycle, 2, [15, 25, 35])
    stats = TurnStats(TURNS, torch.device("cpu"))
    window = ops.end_cycle(state, cycle, stats, torch.tensor(TURNS.num_calls((1, 1, 2))))

    assert window.tolist() == [[14, 15, 0], [24, 25, 0], [34, 35, 0]]
    assert state.lengths[[4, 1, 2]].tolist() == [[0, 1, 1]] * 3
    tokens, num_decided, num_rejected = ops.outputs(cycle, TURNS.window + 1)
    assert num_decided.tolist() == [4, 2, 1]
    assert num_rejected.tolist() == [0, 2, 2]
    # The lengths of the turns' segments, and how many proposals were accepted and judged.
    assert tokens[0].tolist() == [10, 11, 12, 13, 1, 1, 2, 4, 4]
    # Members 0, 1 (the third turn, two tokens) and 2. All of the first request's proposals were
    # accepted. The second's window began with member 1's proposals, the third's with member 2's.
    assert stats.to_dict() == {
        "num_cycles": 3,
        "num_tokens": 7,
        "num_calls": [3, 6, 3],
        "num_judged": [[1], [2, 2], [2]],
        "num_accepted": [[1], [2, 1], [1]],
    }
    stats.reset()
    assert stats.to_dict()["num_judged"] == [[0], [0, 0], [0]]


def test_a_turn_proposes_as_many_tokens_as_it_has():
    state = make_state()
    cycle = begin(state)
    for token in (1, 2, 3):
        append(state, cycle, 2, [token] * 3)
    assert cycle.new_lengths[:, 2].tolist() == [2, 2, 2]
    append(state, cycle, 1, [4] * 3, gammas=(1, 0, 2))
    assert cycle.new_lengths[:, 1].tolist() == [0, 0, 0]
    # The second request settles a token, which the turn that did so has not read yet.
    ops.settle(state, cycle, cycle.tokens[:, :4], torch.tensor([4, 1, 4]), range(2), draws=False)
    ops.append(state, cycle, 1, torch.tensor([1, 1, 2]), torch.tensor([5] * 3), True)
    assert cycle.new_lengths[:, 1].tolist() == [1, 0, 1]
    # No room: the context ends with the last token.
    cycle.first_position.fill_(state.max_model_len - 1), cycle.end.fill_(1)
    append(state, cycle, 1, [6] * 3, gammas=(1, 9, 2))
    assert cycle.end.tolist() == [1, 1, 1]


def test_scores_are_kept_where_positions_can_be_live():
    state = make_state()
    cycle = begin(state)
    positions = torch.arange(100, 100 + state.ring_size).expand(3, -1)
    keep = torch.ones_like(positions, dtype=torch.bool)
    rows = ops.kept_row(state, cycle, positions, keep)
    assert rows.unique().numel() == 3 * state.ring_size
    nobodys = ops.kept_row(state, cycle, positions, ~keep)[:, 0]
    assert nobodys.tolist() == [(slot + 1) * (state.ring_size + 1) - 1 for slot in (4, 1, 2)]
    assert state.ring_size == 2 * TURNS.window + 2
    assert state.kept_scores[1][rows[0, 0]].equal(state.scores[1, 4, 100 % state.ring_size])


def test_rows_that_fill_a_graphs_batch_up_are_of_no_request():
    state, num_padded = make_state(), 5
    everything = make_cycle(state, NUM_SLOTS)
    prefill_len = torch.full((NUM_SLOTS,), 5)
    load(everything, [0, 1, 2, 3], prefill_len)  # another step's
    everything.active.fill_(True)
    load(everything, [4, 1, 2], prefill_len)
    padded, expected = everything.rows(num_padded), begin(make_state())
    assert padded.slots.tolist() == [4, 1, 2, -1, -1]
    # Kernels leave such rows at once.
    filters = [padded.temperature, padded.top_k, padded.top_p, padded.min_p]
    assert [of_all[3:].unique().tolist() for of_all in filters] == [[0], [NO_TOP_K], [1], [0]]
    state.lengths[torch.tensor([4, 1, 2])] = torch.tensor([[0, 1, 2], [0, 0, 2], [0, 1, 2]])
    state.lengths[-1] = 3
    state.scored[:] = 1000
    # Uniform, as in a graph. The last two requests hold only what was there before.
    starts = torch.arange(num_padded + 1) * 4
    seq_lens = torch.tensor([54, 74, 37, 60, 0])
    inputs = [9, 10, 11, 12, 19, 20, 21, 0, 29, 30, 31]
    inputs = torch.tensor([*inputs, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    ops.begin_cycle(state, padded, starts, starts, seq_lens, inputs)
    assert padded.active.tolist() == [True, True, True, False, False]
    assert padded.end.tolist()[3:] == [0, 0]
    for c, num_reqs in ((padded, num_padded), (expected, 3)):
        append(state, c, 1, list(range(num_reqs)))
    done = everything.rows(3)
    for name in ("active", "new_lengths", "num_decided"):
        assert getattr(done, name).equal(getattr(expected, name)), name
    assert done.tokens[:2, :-1].equal(expected.tokens[:2, :-1])
    assert padded.new_lengths[3:].sum() == 0
    # Writes for slot -1 land where no request has anything.
    state.scored[padded.slots, 1] = 77
    assert state.scored[:, 1].ne(77).sum() == NUM_SLOTS - 3
    assert len(state.scored) == len(state.lengths) == state.scores.shape[1] == NUM_SLOTS + 1


def test_members_are_judged_by_the_scores_that_they_proposed_from():
    """If a model's logits are wider than those that are kept, none is rounded."""
    state = ProposalState(TURNS, NUM_SLOTS, 100, VOCAB_SIZE, torch.bfloat16, torch.device("cpu"))
    state.scores.fill_(3)
    first = torch.full((2, VOCAB_SIZE), 1 + 2.0**-20)
    rows = torch.tensor([[0, 1]])
    candidates = Candidates(rows, rows, rows, step_rows=rows, kept_rows=rows)
    verifier = SimpleNamespace(
        state=state,
        turns=TURNS,
        turn_of=TURNS.turn_of,
        ops=ops,
        proposers=[0, 1, 2],
        ensemble=SimpleNamespace(num_members=3),
    )
    scores = StepScores([first], SamplerParams(None, None))  # which takes raw logits
    cycle, segments = make_cycle(state, 1), range(3)
    members, proposal = Verifier._gather(verifier, cycle, candidates, scores, segments, False)
    assert members.shape == (3, 1, 2, VOCAB_SIZE)
    assert members[0, 0].equal(first)
    assert (members[1:] == 3).all()
    assert proposal.dtype == torch.float32
    assert proposal[0, 0].equal(first[0])  # of segment 0
    assert (proposal[0, 1] == 3).all()
    # If nobody asks for more than a temperature, the logits are ready for the filters.
    cycle = make_cycle(state, 1)
    cycle.temperature.fill_(0.7)
    for samples_members, expected in ((True, torch.tensor(3.0) / 0.7), (False, 3.0)):
        params = DeviceParams(samples_members, Processing.FILTERS, None)
        scores = StepScores([first.bfloat16()], params)
        members, proposal = Verifier._gather(
            verifier, cycle, candidates, scores, segments, params.scales
        )
        assert members.dtype == (torch.float32 if samples_members else torch.bfloat16)
        assert (members[1:] == expected).all()
        assert proposal.dtype == torch.bfloat16
        assert (proposal[0, 1] == 3).all()
