"""Windows of requests as device data: what one request's rejection does, and does not do."""

from types import SimpleNamespace

import torch

from vllm.chef.state import Cycle, ProposalState, begin_cycle, end_cycle, make_pending
from vllm.chef.stats import TurnStats
from vllm.chef.turns import chef_turns

TURNS = chef_turns([1, 2, 1], [9, 5, 7], (True, True, True))  # members 0, 2, 1; window 3
NUM_SLOTS, VOCAB_SIZE = 6, 4


def make_state() -> ProposalState:
    state = ProposalState(TURNS, NUM_SLOTS, VOCAB_SIZE, torch.float32, torch.device("cpu"))
    state.scores.copy_(torch.randn(state.scores.shape, generator=torch.Generator().manual_seed(0)))
    return state


def make_batch(slots, num_computed, num_drafts, input_ids) -> SimpleNamespace:
    """Requests that decode: the last committed token, and as many drafts."""
    lens = torch.tensor(num_drafts) + 1
    ends = lens.cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping=torch.tensor(slots),
        cu_num_logits=offsets.int(),
        query_start_loc=offsets.int(),
        seq_lens=(torch.tensor(num_computed) + lens).int(),
        logits_indices=torch.arange(int(ends[-1])),
        input_ids=torch.tensor(input_ids).int(),
    )


def begin(state: ProposalState) -> Cycle:
    state.lengths[torch.tensor([4, 1, 2])] = torch.tensor([[0, 1, 2], [0, 0, 2], [0, 1, 2]])
    state.scored[:] = 1000
    inputs = [9, 10, 11, 12, 19, 20, 21, 0, 29, 30, 31]
    batch = make_batch([4, 1, 2], [50, 70, 33], [3, 3, 2], inputs)
    prefill_len = torch.full((NUM_SLOTS,), 5)
    return begin_cycle(state, batch, prefill_len)


def test_a_cycle_begins_with_the_windows_that_were_scheduled():
    state = make_state()
    cycle = begin(state)
    assert cycle.first.tolist() == [51, 71, 34]
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
    # Placeholders fill the second one's single token up to the size of a decoding request.
    batch = make_batch([0, 3], [50, 7], [3, 3], list(range(8)))
    cycle = begin_cycle(state, batch, torch.tensor([5, 0, 0, 8, 0, 0]))
    assert cycle.end.tolist() == [2, 0]
    assert cycle.active.tolist() == [True, True]
    assert state.scored[3].tolist() == [8] * 3, "nothing is known of another request's scores"


def test_one_requests_rejection_leaves_the_others_as_they_were():
    state = make_state()
    cycle, untouched = begin(state), begin(make_state())
    for c in (cycle, untouched):
        c.append(torch.tensor([13, 23, 33]), torch.tensor([True] * 3), c.lengths[:, 0])
        c.append(torch.tensor([14, 24, 34]), torch.tensor([True] * 3), c.new_lengths[:, 1])
    scores, scored = state.scores.clone(), state.scored.clone()
    where = torch.tensor([False, True, False])
    cycle.accept(torch.tensor([0, 1, 0]), where)
    cycle.settle(torch.tensor([7, 8, 9]), where, state)

    assert cycle.tokens[1, :2].tolist() == [20, 8]
    assert (int(cycle.end[1]), int(cycle.num_decided[1])) == (2, 2)
    assert cycle.new_lengths[1].tolist() == [0, 0, 0]
    # Its own column's scores stay: they depend on what stands before it.
    assert state.scored[1].tolist() == [73] * 3
    others = torch.tensor([0, 2])
    for name in ("end", "lengths", "new_lengths", "num_accepted", "num_decided", "settled"):
        assert getattr(cycle, name)[others].equal(getattr(untouched, name)[others]), name
    assert cycle.tokens[others, :-1].equal(untouched.tokens[others, :-1])
    assert state.scores.equal(scores)
    unchanged = [slot for slot in range(NUM_SLOTS) if slot != 1]
    assert state.scored[unchanged].equal(scored[unchanged])


def test_a_cycle_ends_with_what_is_pending():
    state = make_state()
    cycle = begin(state)
    everyone = torch.tensor([True] * 3)
    cycle.append(torch.tensor([13, 23, 33]), everyone, cycle.lengths[:, 0])
    cycle.accept(torch.tensor([4, 1, 0]), everyone)
    cycle.settle(torch.tensor([0, 8, 9]), torch.tensor([False, True, True]), state)
    cycle.append(
        torch.tensor([14, 24, 34]), torch.tensor([True, False, True]), cycle.new_lengths[:, 1]
    )
    cycle.append(torch.tensor([15, 25, 35]), everyone, cycle.new_lengths[:, 2])
    stats = TurnStats(TURNS, torch.device("cpu"))
    cycle.replaced = torch.tensor([False, True, True])
    stats.add(cycle, (1, 1, 2))

    assert end_cycle(state, cycle).tolist() == [[14, 15, 0], [25, 0, 0], [34, 35, 0]]
    assert state.lengths[4].tolist() == [0, 1, 1]
    assert state.lengths[1].tolist() == [0, 0, 1]
    assert cycle.num_decided.tolist() == [4, 2, 1]
    # Members 0, 1 (the third turn, two tokens) and 2. All of the first request's were accepted;
    # the second's window began with member 1's, the third's with member 2's.
    assert stats.to_dict() == {
        "num_cycles": 3,
        "num_tokens": 7,
        "num_calls": [3, 6, 3],
        "num_judged": [[1], [2, 2], [2]],
        "num_accepted": [[1], [2, 1], [1]],
    }
    stats.reset()
    assert stats.to_dict()["num_judged"] == [[0], [0, 0], [0]]


def test_rows_of_the_ring_are_the_positions_that_can_be_live():
    state = make_state()
    positions = torch.arange(100, 100 + state.ring_size)
    assert state.ring(positions).unique().numel() == state.ring_size
    keep = torch.zeros(state.ring_size, dtype=torch.bool)
    assert (state.ring(positions, keep) == state.ring_size).all()
    assert state.ring_size == 2 * TURNS.window + 2


def test_rows_that_fill_a_graphs_batch_up_are_of_no_request():
    state, num_padded = make_state(), 5
    cycle, expected = begin(state), begin(make_state())
    pending = make_pending(state, NUM_SLOTS)
    pending.load(cycle)
    pending.load(cycle)  # where another step's requests were
    padded = pending.rows(num_padded)
    assert padded.slots.tolist() == [*cycle.slots.tolist(), -1, -1]
    assert padded.active.tolist() == [True, True, True, False, False]
    tokens, everyone = torch.arange(num_padded), torch.tensor([True] * num_padded)
    padded.append(tokens, everyone & padded.active, padded.new_lengths[:, 1])
    expected.append(tokens[:3], everyone[:3], expected.new_lengths[:, 1])
    done = pending.rows(3)
    for name in ("slots", "active", "first", "end", "new_lengths"):
        assert getattr(done, name).equal(getattr(expected, name)), name
    assert done.tokens[:, :-1].equal(expected.tokens[:, :-1])
    assert done.last_position.equal(expected.last_position)
    # What is written for slot -1 lands where no request has anything.
    state.scored[padded.slots, 1] = 77
    assert state.scored[:, 1].ne(77).sum() == NUM_SLOTS - 3
    assert len(state.scored) == len(state.lengths) == state.scores.shape[1] == NUM_SLOTS + 1
