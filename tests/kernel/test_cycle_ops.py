"""What a cycle does with its columns: the Triton kernels against their namesakes in torch.

Both go through the same random cycles, call by call, in every order that turns have. `TurnRunner`
tells the order. After each call, everything that it may have changed must be the same.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from compile_for_cuda import compile_launches, recorded
from quick import quick
from vllm.triton_utils import HAS_TRITON

from vllm.chef.cycle import TokenReading, TurnRunner
from vllm.chef.ops import eager, fused
from vllm.chef.passes import reading_query_start_loc
from vllm.chef.state import Candidates, Cycle, ProposalState, SlotStates, make_cycle
from vllm.chef.stats import TurnStats
from vllm.chef.turns import Turns, chef_turns, sd_turns

if not HAS_TRITON:
    pytest.skip("no Triton", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_NUM_REQS, MAX_MODEL_LEN, VOCAB_SIZE = 7, 60, 50
TURNS = {
    "two": chef_turns([1, 5], [9, 1], (True, True)),
    "equal": chef_turns([1, 1], [9, 9], (True, True)),
    "three": chef_turns([1, 2, 4], [9, 5, 1], (True, True, True)),
    "outside": chef_turns([1, 1, 3], [9, 5, 1], (True, True, False)),
    "sd": sd_turns(3, 4),
    "sd outside": sd_turns(3, 4, (True, True, False)),
}
SEEDS = range(2)


class World:
    """Requests in the middle of their texts, and one way to compute on them.

    Each public method after `compare` stands for the call of `TurnRunner` that has its name.
    """

    def __init__(self, turns: Turns, ops: ModuleType, seed: int) -> None:
        self.turns, self.ops = turns, ops
        self.random = torch.Generator().manual_seed(seed)
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        self.state = ProposalState(turns, MAX_NUM_REQS, MAX_MODEL_LEN, VOCAB_SIZE, dtype, DEVICE)
        self.stats = TurnStats(turns, DEVICE)
        self.all_cycle = make_cycle(self.state, MAX_NUM_REQS)
        self.returned: list[torch.Tensor] = []
        self.with_forbidden = False
        self.judges_again = False
        """Whether a decision judges all columns, also those that were decided before"""
        self.state.lengths.copy_(self.lengths())
        self.state.scored.copy_(self.numbers(0, 2 * MAX_MODEL_LEN, self.state.scored.shape))
        self.all_token_ids = self.numbers(0, VOCAB_SIZE, (MAX_NUM_REQS, MAX_MODEL_LEN)).int()
        self.gammas = torch.tensor(turns.gammas(turns.window), device=DEVICE)
        self.state.scores.copy_(torch.randn(self.state.scores.shape, generator=self.random))

    def numbers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.random).to(DEVICE)

    def lengths(self) -> torch.Tensor:
        max_gammas = torch.tensor([0, *self.turns.max_gammas[1:]], device=DEVICE)
        return self.numbers(0, 100, (MAX_NUM_REQS + 1, len(self.turns))) % (max_gammas + 1)

    def compare(self) -> dict[str, torch.Tensor]:
        """Everything that is read later, without the last column and the slot of no request."""
        state, cycle = self.state, self.all_cycle
        found = {field.name: getattr(cycle, field.name) for field in fields(Cycle)}
        found["tokens"] = cycle.tokens[:, :-1]
        found |= {"state lengths": state.lengths[:-1], "state scored": state.scored[:-1]}
        found |= {name: getattr(self.stats, name) for name in ("judged", "accepted", "totals")}
        found["calls"] = self.stats.calls
        found |= {f"returned {at}": tensor for at, tensor in enumerate(self.returned)}
        return copy.deepcopy(found)

    def begin_cycle(self) -> None:
        num_reqs = int(self.numbers(1, MAX_NUM_REQS, ()))
        slots = torch.randperm(MAX_NUM_REQS, generator=self.random)[:num_reqs].to(DEVICE)
        prefill_len = self.numbers(1, 30, (MAX_NUM_REQS,)).int()
        temperature, top_p, min_p = torch.rand(3, MAX_NUM_REQS, generator=self.random).to(DEVICE)
        temperature *= self.numbers(0, 3, (MAX_NUM_REQS,)) > 0  # or greedy
        seeds = self.numbers(-(2**62), 2**62, (MAX_NUM_REQS,))
        top_k = self.numbers(1, VOCAB_SIZE + 1, (MAX_NUM_REQS,)).int()
        states = SlotStates(prefill_len, temperature, seeds, top_k, top_p, min_p)
        self.ops.load(self.all_cycle, slots.int(), states)
        # As in a CUDA graph: some rows may belong to no request.
        num_reqs = min(MAX_NUM_REQS, num_reqs + int(self.numbers(0, 3, ())))
        self.cycle = self.all_cycle.rows(num_reqs)
        # Some requests read their prompts. Of these and of some others, not all tokens have rows.
        num_drafts = self.numbers(0, self.turns.window + 1, (num_reqs,))
        query_lens = num_drafts + self.numbers(0, 3, (num_reqs,)).clamp(min=1)
        self.starts = [
            torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (query_lens, num_drafts + 1)
        ]
        seq_lens = query_lens + self.numbers(0, MAX_MODEL_LEN - 20, (num_reqs,))
        input_ids = self.numbers(0, VOCAB_SIZE, (int(self.starts[0][-1]),)).int()
        forbidden = self.numbers(-1, 3, (num_reqs,)) if self.with_forbidden else None
        self.ops.begin_cycle(
            self.state, self.cycle, *self.starts, seq_lens.int(), input_ids, forbidden
        )

    def decide(self, turn: int) -> None:
        segments = self.turns.decidable(turn)
        if self.judges_again:
            segments = range(segments.stop)
        num_columns = self.turns.max_tokens(segments) + 1
        candidates = self.ops.candidates(self.state, self.cycle, segments, num_columns)
        self.returned = list(candidates)
        for scales in (False, True):
            self.returned += self._gather(candidates, segments, scales)
        # What vLLM's verification returns: at most all candidates, then one more token.
        num_candidates = (candidates.proposed >= 0).sum(1)
        num_sampled = 1 + self.numbers(0, 100, num_candidates.shape) % (num_candidates + 1)
        if self.judges_again:
            # Tokens that were accepted before are accepted again.
            num_sampled = num_sampled.maximum(self.cycle.num_accepted + 1)
        num_sampled = num_sampled.int()
        sampled = self.numbers(0, VOCAB_SIZE, (self.cycle.num_reqs, num_columns))
        draws = turn == self.turns.last_scorer and self.turns.draws
        self.ops.settle(self.state, self.cycle, sampled, num_sampled, segments, draws)

    def _gather(self, candidates: Candidates, segments: range, scales: bool) -> list[torch.Tensor]:
        """As the verifier asks for it, of members whose logits may differ in type."""
        step_rows, kept_rows = candidates.step_rows, candidates.kept_rows
        num_rows, proposers = int(step_rows.max()) + 1, []
        for turn in self.turns.in_window[segments.start : segments.stop]:
            proposers.append(self.turns[turn].members[0])
        sources, rows = [], []
        for member, turn in sorted(self.turns.turn_of.items()):
            kept = self.state.kept_scores[turn - 1] if turn else None
            # From a vocabulary that was padded, as in vLLM.
            step = torch.randn(num_rows, VOCAB_SIZE + 14, generator=self.random).bfloat16()
            sources.append(step.to(DEVICE)[:, :VOCAB_SIZE] if kept is None else kept)
            rows.append(step_rows if kept is None else kept_rows)
            assert member == len(sources) - 1
        dtype = torch.float32 if scales else self.state.scores.dtype
        members, proposal = self.ops.gather_scores(
            self.cycle, sources, rows, candidates.segment, proposers, dtype, scales
        )
        judged_by_token = self.cycle.temperature == 0
        return [members, proposal.masked_fill(judged_by_token[:, None, None], 0)]

    def last_scored(self) -> None:
        self.returned = list(self.ops.last_scored(self.cycle))

    def append(self, turn: int, has_decided: bool = False) -> None:
        tokens = self.numbers(0, VOCAB_SIZE, (self.cycle.num_reqs,))
        self.ops.append(self.state, self.cycle, turn, self.gammas, tokens, has_decided)

    def read(self, turn: int) -> None:
        # Some requests decode, and their members read only what is new to them.
        query_start_loc = reading_query_start_loc(self.turns, turn, MAX_MODEL_LEN, *self.starts)
        num_tokens = int(query_start_loc[-1])
        written = [torch.zeros(num_tokens, dtype=d, device=DEVICE) for d in (torch.int32,) * 2]
        seq_lens = torch.zeros(self.cycle.num_reqs, dtype=torch.int32, device=DEVICE)
        prepared = self.ops.prepare_tokens(
            self.state, self.cycle, self.all_token_ids, query_start_loc, *written, seq_lens
        )
        self.reading = query_start_loc, prepared.read_start
        self.returned = [*written, seq_lens, *prepared]

    def place_scores(self, turn: int, count: int) -> None:
        self.returned = list(
            self.ops.place_scores(self.state, self.cycle, turn, count, *self.reading)
        )

    def read_token(self, turn: int, number: int) -> None:
        num_reqs = self.cycle.num_reqs
        written = [torch.zeros(num_reqs, dtype=torch.int64, device=DEVICE) for _ in range(3)]
        last = self.ops.prepare_token(self.state, self.cycle, self.all_token_ids, *written)
        self.returned = [*written, last]

    def place_score(self, turn: int) -> None:
        self.returned = [self.ops.place_score(self.state, self.cycle, turn, self.gammas)]

    def outputs(self, num_tokens: int) -> None:
        self.returned = list(self.ops.outputs(self.cycle, num_tokens))

    def end_cycle(self) -> None:
        calls = torch.tensor(self.turns.num_calls(self.gammas.tolist()), device=DEVICE)
        self.returned = [self.ops.end_cycle(self.state, self.cycle, self.stats, calls)]


class Recorder:
    """Stands in for the operations, the verifier and the passes of a `TurnRunner`.

    It computes nothing. It notes each call with the numbers among its arguments: a turn, a count.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*args: Any) -> Any:
            self.calls.append((name, tuple(arg for arg in args if isinstance(arg, int))))
            return TokenReading(MagicMock(), MagicMock()) if name == "read_token" else MagicMock()

        return note


def steps(turns: Turns) -> list[tuple[str, Callable[[World], None]]]:
    """The calls of a cycle, in the order of `TurnRunner`."""
    recorder, anything = Recorder(), MagicMock()
    state = SimpleNamespace(turns=turns, kept_scores=MagicMock())
    runner = TurnRunner(state, recorder, anything, recorder, anything, anything)

    step = MagicMock(scores=SimpleNamespace(logits=anything, bitmask=None))
    parts = SimpleNamespace(
        open=lambda: runner.open(anything, step),
        read=lambda turn: recorder.read(turn, anything),
        judge=lambda turn, _: runner.judge(turn, anything, step, anything),
        # One pass more than the turn has room for.
        propose_more=lambda turn: runner.propose_more(
            turn, turns.num_passes(turn, turns[turn].gamma) + 1, anything, recorder
        ),
    )
    runner.run(anything, parts)
    runner.finish(anything, parts, anything, anything)
    return [
        (f"{name}{numbers}", lambda w, n=name, given=numbers: getattr(w, n)(*given))
        for name, numbers in recorder.calls
    ]


@pytest.mark.parametrize("seed", quick(SEEDS, 0))
@pytest.mark.parametrize("case", quick(TURNS, "sd"))
def test_kernels_do_what_torch_does(case, seed, monkeypatch):
    # A vocabulary of several blocks.
    monkeypatch.setattr(fused, "VOCAB_BLOCK", 16)
    turns = TURNS[case]
    worlds = [World(turns, ops, seed) for ops in (eager, fused)]
    for number in range(3):
        for name, step in steps(turns):
            for world in worlds:
                world.with_forbidden = number == 1
                world.judges_again = number == 2
                step(world)
            expected, found = (world.compare() for world in worlds)
            for key, tensor in expected.items():
                # A GPU's division by temperatures may differ in the last place.
                rtol = 1e-6 if tensor.is_floating_point() else 0
                where = f"{key} after '{name}' of cycle {number}"
                torch.testing.assert_close(
                    found[key], tensor, rtol=rtol, atol=0, msg=lambda m, w=where: f"{w}: {m}"
                )
    assert worlds[0].stats.totals[0] > 0
    assert (worlds[0].stats.judged > 0).any()


def test_every_kernel_has_its_namesake():
    functions = {
        name: function
        for name, function in vars(fused).items()
        if inspect.isfunction(function) and function.__module__ == fused.__name__
    }
    assert {"load", "begin_cycle", "settle", "end_cycle", "outputs"} < set(functions)
    for name, function in functions.items():
        assert inspect.signature(function) == inspect.signature(getattr(eager, name)), name


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled by the tests above")
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    launches = recorded(fused, monkeypatch)
    for case in ("three", "sd"):
        world = World(TURNS[case], fused, seed=0)
        for with_forbidden in (False, True):
            world.with_forbidden = with_forbidden
            for _, step in steps(TURNS[case]):
                step(world)
    for where in (False, True):
        masked(fused, where)
    compile_launches(launches, fused, tmp_path)


def masked(ops: ModuleType, where: bool) -> torch.Tensor:
    """Scores of a vocabulary that ends inside a word of the mask, and with a stride of its own."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 80, generator=random).to(DEVICE)
    bitmask = torch.randint(-(2**31), 2**31, (5, 3), generator=random).int().to(DEVICE)
    bitmask[1] = -1
    rows = torch.randint(0, 5, (9,), generator=random).to(DEVICE)
    chosen = torch.rand(9, generator=random).to(DEVICE) < 0.5
    ops.mask_scores(scores[:, :75], bitmask, rows, chosen if where else None)
    for row, tokens in enumerate(scores.tolist()):
        for token, score in enumerate(tokens):
            is_allowed = int(bitmask[rows[row], token // 32]) >> (token % 32) & 1
            is_masked = token < 75 and not is_allowed and (bool(chosen[row]) or not where)
            assert (score == -float("inf")) == is_masked
    return scores


@pytest.mark.parametrize("where", [False, True])
def test_tokens_that_a_grammar_forbids_are_masked(where, monkeypatch):
    monkeypatch.setattr(fused, "VOCAB_BLOCK", 16)
    assert masked(eager, where).equal(masked(fused, where))


@pytest.mark.parametrize("ops", [eager, fused], ids=["eager", "fused"])
def test_no_row_lies_outside_the_logits_when_graphs_are_captured(ops):
    """Then no request is there, and all inputs are 0. A row -1 would lie before the logits."""
    turns = TURNS["sd outside"]
    world = World(turns, ops, seed=0)
    world.cycle = world.all_cycle
    no_slots = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    ops.load(world.cycle, no_slots, world.cycle.slot_states)
    zeros = torch.zeros(MAX_NUM_REQS + 1, dtype=torch.int32, device=DEVICE)
    ops.begin_cycle(world.state, world.cycle, zeros, zeros, zeros[1:], zeros)
    found = ops.candidates(world.state, world.cycle, range(2), turns.window + 1)
    rows = [found.step_rows, found.kept_rows, ops.last_scored(world.cycle).rows]
    assert all((of_columns >= 0).all() for of_columns in rows)
