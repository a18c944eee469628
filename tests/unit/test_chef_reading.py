"""What members have read when their scores are used: all of the text, and nothing else.

The tests run the engine's cycle on random texts and random decisions, without models. A member's
cache has a token at each position. Its hidden state and its scores at a position are the cache up
to there. So the scores that a turn keeps show which text they follow.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from quick import quick

from vllm.chef.cycle import EngineStep, Reading, TokenReading, TurnRunner
from vllm.chef.gammas import StepGammas
from vllm.chef.graphs import CycleGraphs
from vllm.chef.ops import eager as ops
from vllm.chef.passes import reading_query_start_loc
from vllm.chef.prompt_logprobs import at_step_tokens
from vllm.chef.sampling import DeviceParams, Processing
from vllm.chef.state import Cycle, Outputs, ProposalState, SlotStates, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.step import CycleStep, EagerDecisions, EagerReadings
from vllm.chef.turns import Turns, chef_turns, sd_turns
from vllm.chef.verifier import StepScores

DEVICE = torch.device("cpu")
NUM_REQS, MAX_MODEL_LEN, VOCAB_SIZE, NUM_STEPS = 6, 50, 1000, 200
# In place of a token: not read by the member, and past the end of what it has read.
UNREAD, PAST_THE_END = -1, -2
NO_PARAMS = DeviceParams(False, Processing.TEMPERATURE, None)
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
    "sd, the last outside": sd_turns(3, 4, (True, True, False)),
}
QUICK = ("1, 5", "1, 3, 2", "1, 1, 5, the last outside", "sd")


class Request:
    def __init__(self, rng: random.Random, num_turns: int) -> None:
        self.text = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        self.start_again(num_turns)

    def start_again(self, num_turns: int) -> None:
        """Start again, as a new or preempted request does."""
        self.prefill_len, self.num_computed = len(self.text), 0
        self.pending: list[int] = []
        self.caches = [[UNREAD] * MAX_MODEL_LEN for _ in range(num_turns)]


class World:
    """Requests that are all in each step, and members of the turns after the first."""

    def __init__(self, turns: Turns, seed: int, reads_less: bool = False) -> None:
        self.turns, self.rng = turns, random.Random(seed)
        self.state = ProposalState(
            turns, NUM_REQS, MAX_MODEL_LEN, MAX_MODEL_LEN, torch.float32, DEVICE
        )
        self.state.scores.fill_(UNREAD)
        self.all_cycle = make_cycle(self.state, NUM_REQS)
        self.stats = TurnStats(turns, DEVICE)
        self.gammas = StepGammas(turns, range(turns.window + 1), DEVICE)
        self.requests = [Request(self.rng, len(turns)) for _ in range(NUM_REQS)]
        self.all_token_ids = torch.zeros(NUM_REQS, MAX_MODEL_LEN, dtype=torch.int32)
        self.reads_less = reads_less
        self.turn_runner = TurnRunner(
            self.state,
            ops,
            self.gammas.on_device,
            self,
            lambda turn, hidden_states: hidden_states,
            lambda logits, cycle, position: torch.randint(VOCAB_SIZE, (len(logits),)),
        )
        self.num_used = self.num_replaced = 0

    def text(self, at: int) -> list[int]:
        """All committed and pending tokens of a request."""
        cycle = self.cycle
        pending = cycle.tokens[at, : int(cycle.end[at])].tolist()
        return self.requests[at].text[: int(cycle.first_position[at])] + pending

    def schedule(self) -> tuple[list[list[int]], list[int], list[int]]:
        """For each request: its query, the number of drafts in it, and what a grammar left out."""
        queries, nums_drafts, forbidden = [], [], []
        for request in self.requests:
            at, length = request.num_computed, len(request.text)
            nums_drafts.append(0)
            forbidden.append(-1)
            if at >= request.prefill_len:
                room = MAX_MODEL_LEN - length
                max_drafts = min(len(request.pending), room)
                num_drafts = (
                    max_drafts if self.rng.random() < 0.8 else self.rng.randint(0, max_drafts)
                )
                drafts = request.pending[:num_drafts]
                if num_drafts < max_drafts and self.rng.random() < 0.5:
                    forbidden[-1] = request.pending[num_drafts]
            elif at == length - 1 and length + self.turns.window <= MAX_MODEL_LEN:
                # Placeholders, with which vLLM fills up its batches.
                drafts = [7] * self.rng.choice([0, self.turns.window])
            else:
                drafts, length = [], self.rng.randint(at + 1, length)
            nums_drafts[-1] = len(drafts)
            queries.append(request.text[at:length] + drafts)
        return queries, nums_drafts, forbidden

    def step(self) -> None:
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
        step = EngineStep(
            *starts,
            torch.tensor([r.num_computed for r in self.requests]) + starts[0].diff(),
            torch.tensor(sum(queries, [])),
            StepScores([torch.zeros(int(starts[1][-1]), MAX_MODEL_LEN)], NO_PARAMS),
            torch.tensor(forbidden),
        )
        shallower = self.rng.random() < 0.3
        window = self.turns.window
        self.gammas.set_depth(self.rng.randint(0, window) if shallower else window)
        passes = CachePasses(self, step)
        cycle_step = CycleStep(
            self.cycle,
            step,
            self.turn_runner,
            EagerDecisions(self.turn_runner, self.cycle, step),
            EagerReadings(passes, self.cycle),
            passes,
            self.gammas,
            CycleGraphs(None, DEVICE),
        )
        self.commit(queries, cycle_step.run(), cycle_step.finish(self.stats))

    def decide(self, turn: int, scores: StepScores, cycle: Cycle) -> None:
        """A random decision in place of the verifier's; its scores must be there."""
        turns = self.turns
        segments = turns.decidable(turn)
        num_columns = turns.max_tokens(segments) + 1
        candidates = ops.candidates(self.state, cycle, segments, num_columns)
        num_candidates = (candidates.proposed >= 0).sum(1).tolist()
        draws = turns.draws and turn == turns.last_scorer
        num_sampled = []
        for at, max_accepted in enumerate(num_candidates):
            num_sampled.append(1 + self.rng.randint(0, max_accepted))
            if not cycle.active[at] or cycle.settled[at]:
                continue
            text = self.text(at)
            first_position = int(cycle.first_position[at] + cycle.num_decided[at])
            for column in range(max_accepted + draws):
                at_segment = segments.start + int(candidates.segment[at, column])
                proposer = turns.in_window[at_segment]
                for used in range(1, len(turns)):
                    if turns.is_scorer(used) or (used == proposer and column < max_accepted):
                        kept = self.state.kept_scores[used - 1][candidates.kept_rows[at, column]]
                        has_read = kept.equal(as_scores(text[: first_position + column]))
                        assert has_read, f"turn {used} has not read what comes before {column}"
                        self.num_used += 1
        sampled = torch.randint(VOCAB_SIZE, (NUM_REQS, num_columns))
        ops.settle(self.state, cycle, sampled, torch.tensor(num_sampled), segments, draws)
        self.num_replaced += int(cycle.just_settled.sum())

    def commit(
        self,
        queries: list[list[int]],
        outputs: Outputs,
        pending: torch.Tensor,  # [num_reqs, window]
    ) -> None:
        """Update the requests as vLLM's scheduler does with the result of a step."""
        for at, request in enumerate(self.requests):
            if not self.cycle.active[at]:
                request.num_computed += len(queries[at])
                continue
            decided = outputs.tokens[at, : int(outputs.num_decided[at])].tolist()
            assert decided
            request.text += decided
            request.num_computed = len(request.text) - 1
            request.prefill_len = min(request.prefill_len, request.num_computed)
            num_pending = int(self.state.lengths[at].sum())
            request.pending = pending[at, :num_pending].tolist()
            if len(request.text) >= MAX_MODEL_LEN:  # vLLM drops what does not fit
                self.requests[at] = Request(self.rng, len(self.turns))
            elif self.rng.random() < 0.02:
                request.start_again(len(self.turns))


class CachePasses:
    """Passes of members that are caches; each gives its request's cache up to a token."""

    def __init__(self, world: World, step: EngineStep) -> None:
        self.world, self.step = world, step

    def read(self, turn: int, cycle: Cycle) -> Reading:
        turns, step = self.world.turns, self.step
        query_start_loc = reading_query_start_loc(
            turns, turn, MAX_MODEL_LEN, step.query_start_loc, step.cu_num_logits
        )
        num_tokens, count = int(query_start_loc[-1]), turns.num_unscored(turn)
        # As in a CUDA graph, where all requests decode.
        starts = (step.query_start_loc, step.cu_num_logits, query_start_loc)
        for step_len, num_rows, length in zip(*(s.diff().tolist() for s in starts), strict=True):
            assert step_len != num_rows or length == turns.num_read(turn, step_len)
        ids, positions = torch.zeros(2, num_tokens, dtype=torch.int64)
        read_start, is_again = ops.prepare_tokens(
            self.world.state,
            cycle,
            self.world.all_token_ids,
            query_start_loc,
            ids,
            positions,
            torch.zeros(NUM_REQS),
        )
        if self.world.reads_less:
            is_again[query_start_loc[:-1][query_start_loc.diff() == count].long()] = True
        read = []
        for request, tokens in zip(self.world.requests, ranges(query_start_loc), strict=True):
            cache = request.caches[turn]
            for token in tokens:
                if not is_again[token]:
                    cache[int(positions[token])] = int(ids[token])
            read += [as_scores(cache[: int(positions[token]) + 1]) for token in tokens]
        return Reading(query_start_loc, read_start, torch.stack(read))

    def read_token(self, turn: int, cycle: Cycle, number: int) -> TokenReading:
        ids, positions, seq_lens = torch.zeros(3, NUM_REQS, dtype=torch.int64)
        state, all_token_ids = self.world.state, self.world.all_token_ids
        last = ops.prepare_token(state, cycle, all_token_ids, ids, positions, seq_lens)
        read = []
        for at, request in enumerate(self.world.requests):
            cache, position = request.caches[turn], int(positions[at])
            cache[position] = int(ids[at])
            read.append(as_scores(cache[: position + 1]))
        return TokenReading(last, torch.stack(read))


def as_scores(text: list[int]) -> torch.Tensor:  # [MAX_MODEL_LEN]
    return torch.tensor([*text, *[PAST_THE_END] * (MAX_MODEL_LEN - len(text))]).float()


def ranges(query_start_loc: torch.Tensor) -> list[range]:
    """Each request's tokens in a batch."""
    bounds = query_start_loc.tolist()
    return [range(*pair) for pair in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("case", quick(TURNS, *QUICK))
def test_members_have_read_all_that_they_score(case):
    torch.manual_seed(0)
    world = World(TURNS[case], seed=0)
    for _ in range(NUM_STEPS):
        world.step()
    assert world.num_used > NUM_STEPS * NUM_REQS / 2 and world.num_replaced > NUM_STEPS / 4


@pytest.mark.parametrize("case", quick(TURNS, *QUICK))
def test_with_one_token_less_they_would_not_have(case):
    torch.manual_seed(0)
    world = World(TURNS[case], seed=0, reads_less=True)
    with pytest.raises(AssertionError, match="has not read"):
        for _ in range(NUM_STEPS):
            world.step()


def test_hidden_states_of_prompts_are_found_beside_requests_that_decode():
    """The first request reads three tokens of its prompt, and one before them.

    The second had a window of five, and little of it is left to read.
    """
    query_start_loc = torch.tensor([0, 3, 9])
    of_turn = Reading(torch.tensor([0, 4, 6]), torch.tensor([9, 31]), torch.arange(6)[:, None])
    batch = SimpleNamespace(
        query_start_loc=query_start_loc, query_start_loc_np=query_start_loc.numpy()
    )
    cycle = SimpleNamespace(num_reqs=2, step_start=torch.tensor([10, 30]))
    (found,) = at_step_tokens([of_turn], cycle, batch)
    assert found.shape == (9, 1)
    assert found[:3, 0].tolist() == [1, 2, 3]
