"""What members have read when their scores are used: all of the text, and nothing else.

The speculator's cycle on random texts and random decisions, without models. A member's cache has a
token by position; what it makes of a position is what its cache has up to there.
"""

import random
from types import SimpleNamespace

import pytest
import torch

from vllm.chef.ops import eager as ops
from vllm.chef.speculator import ChefSpeculator, Reading
from vllm.chef.state import ProposalState, SlotStates, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.turns import Turns, chef_turns, sd_turns

DEVICE = torch.device("cpu")
NUM_REQS, MAX_MODEL_LEN, VOCAB_SIZE, NUM_STEPS = 6, 50, 1000, 200
UNREAD = -1
TURNS = {
    "1, 1": chef_turns([1, 1], [9, 9], (True, True)),
    "1, 5": chef_turns([1, 5], [9, 1], (True, True)),
    "1, 1, 1": chef_turns([1, 1, 1], [9, 9, 9], (True, True, True)),
    "1, 3, 2": chef_turns([1, 3, 2], [9, 5, 1], (True, True, True), order=[0, 1, 2]),
    "1, 1, 2, 3": chef_turns([1, 1, 2, 3], [9, 8, 5, 1], (True,) * 4),
    "1, 1, 5, the last outside": chef_turns([1, 1, 5], [9, 9, 1], (True, True, False)),
    "1, 3, 1, the second outside": chef_turns(
        [1, 3, 1], [9, 1, 9], (True, False, True), order=[0, 1, 2]
    ),
    "sd": sd_turns(2, 4),
    "sd of three": sd_turns(3, 1),
}


class Request:
    def __init__(self, rng: random.Random, num_turns: int) -> None:
        self.text = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        self.start_again(num_turns)

    def start_again(self, num_turns: int) -> None:
        """As a new request does, and one that was preempted."""
        self.prefill_len, self.num_computed = len(self.text), 0
        self.pending: list[int] = []
        self.caches = [[UNREAD] * MAX_MODEL_LEN for _ in range(num_turns)]


class World:
    """Requests that are all in each step, and what turns after the first keep of them."""

    def __init__(self, turns: Turns, seed: int, reads_less: bool = False) -> None:
        self.turns, self.rng, self.reads_less = turns, random.Random(seed), reads_less
        self.state = ProposalState(turns, NUM_REQS, MAX_MODEL_LEN, 1, torch.float32, DEVICE)
        self.all_cycle = make_cycle(self.state, NUM_REQS)
        self.stats = TurnStats(turns, DEVICE)
        self.requests = [Request(self.rng, len(turns)) for _ in range(NUM_REQS)]
        self.all_token_ids = torch.zeros(NUM_REQS, MAX_MODEL_LEN, dtype=torch.int32)
        self.kept: list[dict[int, list[int]]] = [{} for _ in turns.turns]
        """By turn and row of its kept scores, the text that they follow"""
        self.num_used = self.num_replaced = 0

    def text(self, at: int) -> list[int]:
        """Of a request, all that is committed or pending."""
        cycle = self.cycle
        pending = cycle.tokens[at, : int(cycle.end[at])].tolist()
        return self.requests[at].text[: int(cycle.first[at])] + pending

    def schedule(self) -> tuple[list[list[int]], list[int], list[int]]:
        """Of each request its query, how many of that are drafts, and what a grammar left out."""
        queries, nums_drafts, forbidden = [], [], []
        for request in self.requests:
            at, length = request.num_computed, len(request.text)
            nums_drafts.append(0)
            forbidden.append(-1)
            if at >= request.prefill_len:
                room = MAX_MODEL_LEN - length
                most = min(len(request.pending), room)
                num_drafts = most if self.rng.random() < 0.8 else self.rng.randint(0, most)
                drafts = request.pending[:num_drafts]
                if num_drafts < most and self.rng.random() < 0.5:
                    forbidden[-1] = request.pending[num_drafts]
            elif at == length - 1 and length + self.turns.window <= MAX_MODEL_LEN:
                # Placeholders, which vLLM fills its batches up with.
                drafts = [7] * self.rng.choice([0, self.turns.window])
            else:
                drafts, length = [], self.rng.randint(at + 1, length)
            nums_drafts[-1] = len(drafts)
            queries.append(request.text[at:length] + drafts)
        return queries, nums_drafts, forbidden

    def step(self) -> None:
        turns = self.turns
        queries, nums_drafts, forbidden = self.schedule()
        starts = [
            torch.tensor([0, *lens]).cumsum(0)
            for lens in ([len(q) for q in queries], [n + 1 for n in nums_drafts])
        ]
        for row, request in zip(self.all_token_ids, self.requests, strict=True):
            row[: len(request.text)] = torch.tensor(request.text)
        prefill_len = torch.tensor([request.prefill_len for request in self.requests])
        none = torch.zeros(NUM_REQS)
        states = SlotStates(prefill_len, none, none.long(), none.int(), none, none)
        self.cycle = ops.load(self.all_cycle, torch.arange(NUM_REQS), states)
        ops.begin_cycle(
            self.state,
            self.cycle,
            *starts,
            torch.tensor([r.num_computed for r in self.requests]) + starts[0].diff(),
            torch.tensor(sum(queries, [])),
            torch.tensor(forbidden),
        )
        gammas = turns.gammas(turns.window)
        if self.rng.random() < 0.3:
            gammas = turns.gammas(self.rng.randint(0, turns.window))
        self.gammas = torch.tensor(gammas)
        self.decide(0)
        if not turns.draws:
            self.append(0)
        for turn in range(1, len(turns)):
            self.read(turn, *starts)
            decides = turns.is_scorer(turn)
            if decides:
                self.decide(turn)
            if not (decides and turns.draws):
                self.append(turn, decides)
            for _ in range(turns.num_passes(gammas[turn])):
                self.read_token(turn)
                self.append(turn)
        self.end(torch.tensor(turns.num_calls(gammas)), queries)

    def decide(self, turn: int) -> None:
        turns, cycle = self.turns, self.cycle
        num_segments = turns.num_decidable(turn)
        num_columns = turns.max_decided(turn) + 1
        proposed, segment, _, _, kept_rows = ops.candidates(
            self.state, cycle, num_segments, num_columns
        )
        num_candidates = (proposed >= 0).sum(1).tolist()
        draws = turns.draws and turn == turns.last_scorer
        num_sampled = []
        for at, most in enumerate(num_candidates):
            accepted = int(cycle.num_accepted[at])
            num_sampled.append(1 + (self.rng.randint(accepted, most) if most > accepted else most))
            if not cycle.active[at] or cycle.settled[at]:
                continue
            text, first = self.text(at), int(cycle.first[at])
            for column in range(most + draws):
                proposer = turns.in_window[int(segment[at, column])]
                for used in range(1, len(turns)):
                    if turns.is_scorer(used) or (used == proposer and column < most):
                        kept = self.kept[used].get(int(kept_rows[at, column]))
                        has_read = kept == text[: first + column]
                        assert has_read, f"turn {used} has not read what comes before {column}"
                        self.num_used += 1
        sampled = torch.randint(VOCAB_SIZE, (NUM_REQS, num_columns))
        ops.settle(self.state, cycle, sampled, torch.tensor(num_sampled), num_segments, draws)
        self.num_replaced += int(cycle.just_settled.sum())

    def append(self, turn: int, has_decided: bool = False) -> None:
        tokens = torch.randint(VOCAB_SIZE, (NUM_REQS,))
        ops.append(self.state, self.cycle, turn, self.gammas, tokens, has_decided)

    def read(self, turn: int, step_start: torch.Tensor, row_start: torch.Tensor) -> None:
        cycle, reader = self.cycle, SimpleNamespace(turns=self.turns, max_model_len=MAX_MODEL_LEN)
        query_start = ChefSpeculator._reading_start(reader, turn, step_start, row_start)
        num_tokens, count = int(query_start[-1]), self.turns.num_unscored(turn)
        # As in a CUDA graph, where all requests decode.
        for step_len, num_rows, length in zip(
            *(start.diff().tolist() for start in (step_start, row_start, query_start)), strict=True
        ):
            assert step_len != num_rows or length == self.turns.num_read(turn, step_len)
        ids, positions = torch.zeros(2, num_tokens, dtype=torch.int64)
        start, is_again = ops.prepare_tokens(
            self.state,
            cycle,
            self.all_token_ids,
            query_start,
            ids,
            positions,
            torch.zeros(NUM_REQS),
        )
        if self.reads_less:
            is_again[query_start[:-1][query_start.diff() == count].long()] = True
        rows, kept_rows, _ = ops.place_scores(self.state, cycle, turn, count, query_start, start)
        made = []
        for at, request in enumerate(self.requests):
            cache = request.caches[turn]
            for token in range(int(query_start[at]), int(query_start[at + 1])):
                if not is_again[token]:
                    cache[int(positions[token])] = int(ids[token])
            for token in range(int(query_start[at]), int(query_start[at + 1])):
                made.append(cache[: int(positions[token]) + 1])
        for row, kept in zip(rows.flatten().tolist(), kept_rows.flatten().tolist(), strict=True):
            self.kept[turn][kept] = made[row]

    def read_token(self, turn: int) -> None:
        ids, positions, seq_lens = torch.zeros(3, NUM_REQS, dtype=torch.int64)
        cycle = self.cycle
        ops.prepare_token(self.state, cycle, self.all_token_ids, ids, positions, seq_lens)
        kept_rows = ops.place_score(self.state, cycle, turn, self.gammas).tolist()
        for at, request in enumerate(self.requests):
            cache, position = request.caches[turn], int(positions[at])
            cache[position] = int(ids[at])
            self.kept[turn][kept_rows[at]] = cache[: position + 1]

    def end(self, calls: torch.Tensor, queries: list[list[int]]) -> None:
        tokens, num_decided, _ = ops.outputs(self.cycle, self.turns.window + 1)
        pending = ops.end_cycle(self.state, self.cycle, self.stats, calls)
        for at, request in enumerate(self.requests):
            if not self.cycle.active[at]:
                request.num_computed += len(queries[at])
                continue
            decided = tokens[at, : int(num_decided[at])].tolist()
            assert decided
            request.text += decided
            request.num_computed = len(request.text) - 1
            request.prefill_len = min(request.prefill_len, request.num_computed)
            num_pending = int(self.state.lengths[at].sum())
            request.pending = pending[at, :num_pending].tolist()
            if len(request.text) >= MAX_MODEL_LEN:  # vLLM leaves off what does not fit
                self.requests[at] = Request(self.rng, len(self.turns))
            elif self.rng.random() < 0.02:
                request.start_again(len(self.turns))


@pytest.mark.parametrize("case", TURNS)
def test_members_have_read_all_that_they_score(case):
    torch.manual_seed(0)
    world = World(TURNS[case], seed=0)
    for _ in range(NUM_STEPS):
        world.step()
    assert world.num_used > NUM_STEPS * NUM_REQS / 2 and world.num_replaced > NUM_STEPS / 4


@pytest.mark.parametrize("case", TURNS)
def test_with_one_token_less_they_would_not_have(case):
    torch.manual_seed(0)
    world = World(TURNS[case], seed=0, reads_less=True)
    with pytest.raises(AssertionError, match="has not read"):
        for _ in range(NUM_STEPS):
            world.step()


def test_hidden_states_of_prompts_are_found_beside_requests_that_decode():
    """The first reads three tokens of its prompt, and one before; the second had a window of five,
    of which little is left to read."""
    step_start = torch.tensor([0, 3, 9])
    of_turn = Reading(torch.tensor([0, 4, 6]), torch.tensor([9, 31]), torch.arange(6)[:, None])
    speculator = SimpleNamespace(
        device=DEVICE,
        batch=SimpleNamespace(query_start_loc=step_start, query_start_loc_np=step_start.numpy()),
        cycle=SimpleNamespace(num_reqs=2, start=torch.tensor([10, 30])),
        readings=[of_turn],
    )
    (found,) = ChefSpeculator.hidden_states(speculator)
    assert found.shape == (9, 1)
    assert found[:3, 0].tolist() == [1, 2, 3]
