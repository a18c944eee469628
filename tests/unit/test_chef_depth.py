"""The depth of speculation: the choice for known costs and acceptance."""

import random
from itertools import accumulate, takewhile
from operator import mul
from types import SimpleNamespace

import pytest
from quick import quick

from vllm.chef import depth as depth_module
from vllm.chef import scheduler as scheduler_module
from vllm.chef.depth import DepthChooser
from vllm.chef.turns import chef_turns

MAX_DEPTH = 5
# One turn proposes all tokens, as with gammas 1, 5.
PLACES = [[(1, at) for at in range(depth)] for depth in range(MAX_DEPTH + 1)]


class World:
    """Cycles whose proposals are accepted with probability `acceptance`.

    A cycle of depth k takes `base + k * each` seconds.
    """

    def __init__(self, acceptance: float, base: float, each: float, seed: int = 0) -> None:
        self.acceptance, self.base, self.each = acceptance, base, each
        self.random = random.Random(seed)
        self.tokens, self.seconds = 0, 0.0

    def expected(self, depth: int) -> float:
        return sum(self.acceptance**i for i in range(depth + 1)) / self.time(depth)

    def time(self, depth: int) -> float:
        return self.base + depth * self.each

    def run(self, chooser: DepthChooser, num_reqs: int, num_steps: int) -> list[int]:
        depths = []
        for _ in range(num_steps):
            depth = chooser[num_reqs]
            decided = [self.decided(depth) for _ in range(num_reqs)]
            seconds = self.time(depth) * self.random.uniform(0.95, 1.05)
            chooser.observe(num_reqs, depth, decided, seconds)
            self.tokens += sum(decided)
            self.seconds += seconds
            depths.append(depth)
        return depths

    def decided(self, depth: int) -> int:
        accepted = 0
        while accepted < depth and self.random.random() < self.acceptance:
            accepted += 1
        return accepted + 1


@pytest.mark.parametrize("num_reqs", quick([1, 3, 64], 3))
@pytest.mark.parametrize(
    ("acceptance", "base", "each"),
    [
        (0.8, 5.0, 0.2),  # a small proposer: as deep as possible
        (0.8, 1.0, 0.45),  # one with about the same cost
        (0.5, 1.0, 0.3),
        (0.3, 1.0, 0.6),  # speculation loses
        (0.0, 1.0, 0.01),
        (1.0, 1.0, 0.9),
    ],
)
def test_best_depth_is_found_and_held(num_reqs, acceptance, base, each):
    world, chooser = World(acceptance, base, each), DepthChooser(PLACES)
    depths = world.run(chooser, num_reqs, 4000)
    best = max(world.expected(depth) for depth in range(MAX_DEPTH + 1))
    assert world.expected(chooser.best(num_reqs)) > 0.96 * best
    held = max(set(depths[1000:]), key=depths[1000:].count)
    assert world.expected(held) > 0.96 * best
    # The time of everything that was tried on the way counts.
    assert world.tokens / num_reqs / world.seconds > 0.95 * best


@pytest.mark.parametrize("num_reqs", quick([1, 8], 8))
@pytest.mark.parametrize(
    "acceptance", [(0.9, 0.5), (0.4, 0.8), (0.3, 0.9), (0.5, 0.9), (0.9, 0.7), (0.8, 0.8)]
)
@pytest.mark.parametrize("extra", [0.15, 0.6])
def test_turns_may_be_accepted_differently(acceptance, extra, num_reqs):
    """Gammas 1, 1, 5: at depth 6 turn 1 has the first place, else turn 2 has it."""
    turns = chef_turns([1, 1, 5], [9, 9, 1], (True, True, False))
    places = [turns.places(depth) for depth in range(turns.window + 1)]
    assert places[5] == [(2, at) for at in range(5)] and places[6] == [(1, 0), *places[5]]
    chance, chooser = random.Random(0), DepthChooser(places)

    def rates(depth: int) -> list[float]:
        return [acceptance[turn - 1] for turn, _ in places[depth]]

    def seconds(depth: int) -> float:
        return 8.67 + 0.1 * min(depth, 5) + extra * (depth == 6)

    def speed(depth: int) -> float:
        kept = accumulate(rates(depth), mul)
        return (1 + sum(kept)) / seconds(depth)

    def decided(depth: int) -> int:
        return 1 + len(list(takewhile(lambda rate: chance.random() < rate, rates(depth))))

    num_tokens, time = 0, 0.0
    for _ in range(4000):
        depth = chooser[num_reqs]
        tokens = [decided(depth) for _ in range(num_reqs)]
        chooser.observe(num_reqs, depth, tokens, seconds(depth))
        num_tokens, time = num_tokens + sum(tokens), time + seconds(depth)
    best = max(speed(depth) for depth in range(turns.window + 1))
    assert num_tokens / num_reqs / time > 0.94 * best


def test_plain_speed_is_kept_where_every_proposal_is_lost():
    world, chooser = World(0.0, 1.0, 0.5), DepthChooser(PLACES)
    world.run(chooser, 8, 3000)
    assert world.tokens / 8 / world.seconds > 0.97 * world.expected(0)


def test_depth_follows_the_acceptance():
    world, chooser = World(0.0, 5.0, 0.5), DepthChooser(PLACES)
    world.run(chooser, 2, 1000)
    assert chooser.best(2) == 0
    world.acceptance = 0.9
    world.run(chooser, 2, 4000)
    assert chooser.best(2) == MAX_DEPTH


def test_a_lucky_probe_is_soon_found_out():
    world, chooser = World(1.0, 1.0, 0.5), DepthChooser(PLACES)
    while chooser.batches[0].probes:
        world.run(chooser, 1, 1)
    assert chooser[1] == MAX_DEPTH
    world.acceptance = 0.0
    depths = world.run(chooser, 1, depth_module.MIN_HOLD_STEPS // 2)
    assert depths[0] == MAX_DEPTH and depths[-1] == 0


def test_each_size_of_a_batch_has_times_of_its_own():
    chooser = DepthChooser(PLACES)
    World(0.9, 5.0, 0.02).run(chooser, 1, 500)
    World(0.9, 1.0, 2.0).run(chooser, 64, 500)
    assert (chooser.best(1), chooser.best(64)) == (MAX_DEPTH, 0)
    assert chooser[33] == chooser[64] and chooser[1] == MAX_DEPTH


def test_tokens_of_a_depth_are_known_from_others():
    chooser = DepthChooser(PLACES[:4])
    assert chooser.tokens(2) == 1
    for decided in ([4, 1], [2, 3]) * 100:
        chooser.observe(2, 3, decided, 1.0)
    found = [chooser.tokens(depth) for depth in range(4)]
    assert found == pytest.approx([1, 1.75, 2.25, 2.5], abs=0.01)
    # Many cycles that proposed one token tell nothing about the second.
    for _ in range(500):
        chooser.observe(2, 1, [2, 1], 1.0)
    first = chooser.tokens(1) - 1
    assert 0.5 < first < 0.6
    expected = [1, 1 + first, 1 + first * (1 + 2 / 3), 1 + first * (1 + 2 / 3 + 1 / 3)]
    found = [chooser.tokens(depth) for depth in range(4)]
    assert found == pytest.approx(expected, abs=0.02)


def test_a_place_of_few_proposals_has_the_others_acceptance():
    chooser = DepthChooser(PLACES[:5])
    for _ in range(100):
        chooser.observe(1, 2, [3], 1.0)
    assert [chooser.tokens(depth) for depth in (2, 3, 4)] == pytest.approx([3, 4, 5], abs=0.01)
    chooser.observe(1, 3, [3], 1.0)
    assert 3.3 < chooser.tokens(3) < 3.9


def test_a_few_slow_steps_and_a_short_one_do_not_count():
    chooser = DepthChooser(PLACES[:3])
    seconds = iter([9, 9, 1.0, 7.0, 0.1, 6.0])
    for _ in range(depth_module.PROBE_STEPS):
        chooser.observe(1, 2, [3], next(seconds))
    assert list(chooser.batches[0].times()) == [1.0] * 3


def test_steps_under_way_when_the_depth_changes_are_not_timed():
    chooser = DepthChooser(PLACES[:3])
    for _ in range(depth_module.PROBE_STEPS):
        chooser.observe(1, 2, [1], 1.0)
    assert chooser[1] == 0
    chooser.observe(1, 2, [1], 99.0)
    chooser.observe(1, 2, [1], 99.0)
    assert chooser[1] == 0
    assert max(chooser.batches[0].measured[2]) == 1.0


# The scheduler


class StockScheduler:
    num_spec_tokens = 2

    def __init__(self, vllm_config) -> None:
        self.vllm_config = vllm_config
        self.dynamic_sd_lookup = [0, 2, 2]

    def update_from_output(self, scheduler_output, model_runner_output):
        return "updated"


class Scheduler(scheduler_module._AdaptiveDepth, StockScheduler):
    pass


def step(num_scheduled: dict[str, int], depth: int, drafts: int | None = None, new=()):
    drafts = len(num_scheduled) if drafts is None else drafts
    return SimpleNamespace(
        num_scheduled_tokens=num_scheduled,
        num_spec_tokens_to_schedule=depth,
        scheduled_new_reqs=new,
        scheduled_spec_decode_tokens={str(i): [0] * depth for i in range(drafts) if depth},
    )


@pytest.fixture
def scheduler(monkeypatch):
    monkeypatch.setattr(scheduler_module.time, "perf_counter", iter(range(100)).__next__)
    turns = chef_turns([1, 2], [2, 1], (True, True))
    monkeypatch.setattr(scheduler_module, "engine_turns", lambda _: turns)
    scheduler = Scheduler(vllm_config=None)
    scheduler.observed = []
    monkeypatch.setattr(scheduler.depths, "observe", lambda *args: scheduler.observed.append(args))
    return scheduler


def test_vllm_asks_the_chooser_for_the_depth(scheduler):
    assert scheduler.dynamic_sd_lookup[1] == 2
    assert isinstance(scheduler.dynamic_sd_lookup, DepthChooser)


@pytest.mark.parametrize(
    "steps",
    [
        [step({"0": 3, "1": 3}, 2)],  # what was before is not known
        [step({"0": 3, "1": 3}, 2), step({"0": 3}, 2)],  # another batch
        [step({"0": 3}, 2), step({"0": 3}, 1)],  # the depth changes
        [step({"0": 3}, 2), step({"0": 9}, 2)],  # a prompt
        [step({"0": 3}, 2), step({"0": 3}, 2, drafts=0)],  # a prompt of three tokens
        [step({"0": 1}, 0), step({"0": 1}, 0, new=["0"])],
        [step({"0": 3}, 2), step({}, 2)],
    ],
)
def test_steps_that_are_not_like_those_before_are_not_timed(scheduler, steps):
    for output in steps:
        answer = scheduler.update_from_output(output, SimpleNamespace(sampled_token_ids=[[1]] * 2))
        assert answer == "updated"
    assert scheduler.observed == []


def test_steps_that_only_decode_are_observed(scheduler):
    tokens = SimpleNamespace(sampled_token_ids=[[4, 5, 6], [7]])
    for _ in range(3):
        scheduler.update_from_output(step({"0": 3, "1": 3}, 2), tokens)
    assert scheduler.observed == [(2, 2, [3, 1], 1)] * 2
    for _ in range(2):
        tokens = SimpleNamespace(sampled_token_ids=[[4]])
        scheduler.update_from_output(step({"0": 1}, 0), tokens)
    assert scheduler.observed[2:] == [(1, 0, [1], 1)]
