"""Who opens a step, who follows, what is decided when: the turns and their configuration."""

from types import SimpleNamespace

import pytest

from vllm.chef.config import CARRIER_OPTIONS, ChefConfig, _check_carrier, _check_parallel
from vllm.chef.turns import Turn, Turns, chef_turns, sd_turns, spread_gamma

ALL = (True, True, True)


def members(turns: Turns) -> list[int]:
    return [turn.members[0] for turn in turns]


def test_the_costliest_that_proposes_one_token_opens():
    assert members(chef_turns([1, 5], [10, 1], ALL[:2])) == [0, 1]
    assert members(chef_turns([5, 1], [1, 10], ALL[:2])) == [1, 0]
    assert members(chef_turns([1, 1], [3, 3], ALL[:2])) == [0, 1]
    # The members with most proposals come last, so that all others see their proposals at once.
    assert members(chef_turns([4, 1, 2], [1, 9, 5], ALL)) == [1, 2, 0]
    assert members(chef_turns([1, 1, 1], [1, 2, 3], ALL)) == [2, 0, 1]


def test_a_member_without_a_say_never_opens():
    assert members(chef_turns([1, 1, 1], [1, 2, 3], (True, True, False))) == [1, 0, 2]
    with pytest.raises(ValueError, match=r"^chef\.gamma: \[2, 1\] has no 1; .*gamma 1$"):
        chef_turns([2, 1], [1, 2], (True, False))


def test_turn_order_is_checked():
    assert members(chef_turns([1, 2, 1], [1, 1, 1], ALL, [2, 1, 0])) == [2, 1, 0]
    for order in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match=r"^chef\.turn_order: .*each member once"):
            chef_turns([1, 1, 1], [1, 1, 1], ALL, order)
    with pytest.raises(
        ValueError, match=r"^chef\.turn_order: member 1 \(counted from 0\) cannot be the first"
    ):
        chef_turns([1, 2, 1], [1, 1, 1], ALL, [1, 0, 2])


def test_one_number_is_the_cheapest_members():
    assert spread_gamma(5, [10, 1]) == [1, 5]
    assert spread_gamma(5, [1, 10]) == [5, 1]
    assert spread_gamma(3, [2, 2, 2]) == [1, 1, 3]


def test_three_members():
    turns = chef_turns([1, 2, 3], [9, 5, 1], ALL)
    assert (turns.window, turns.draws, turns.last_scorer) == (5, False, 2)
    # Each call decides the segment of the turn after it; the last call decides the opener's
    # proposal.
    assert [turns.num_decidable(t) for t in range(3)] == [1, 2, 3]
    assert [turns.decidable(t) for t in range(3)] == [range(1), range(1, 2), range(2, 3)]
    assert [turns.max_tokens(turns.decidable(t)) for t in range(3)] == [2, 3, 1]
    assert [turns.num_new(t) for t in (1, 2)] == [1, 3]
    assert [turns.num_unscored(t) for t in range(3)] == [6, 5, 4]
    assert [turns.num_passes(t, turns[t].gamma) for t in (1, 2)] == [1, 2]


def test_a_proposer_outside_the_ensemble_is_never_waited_for():
    turns = chef_turns([1, 1, 4], [9, 5, 1], (True, True, False))
    assert members(turns) == [0, 1, 2]
    assert turns.last_scorer == 1
    # After the second call, everything that the third member proposed is decided, and the first's
    # token.
    assert [turns.num_decidable(t) for t in range(3)] == [1, 3, 0]
    assert [turns.decidable(t) for t in range(2)] == [range(1), range(1, 3)]
    assert turns.max_tokens(turns.decidable(1)) == 5


def test_sd():
    turns = sd_turns(3, 4)
    assert tuple(turns) == (Turn((0, 1), 0), Turn((2,), 4))
    assert (turns.window, turns.draws, turns.last_scorer) == (4, True, 1)
    assert [turns.max_tokens(turns.decidable(t)) for t in range(2)] == [4, 0], "then it draws"
    assert turns.num_new(1) == 1
    # One pass more: the drawn token goes through before anything is proposed.
    assert turns.num_passes(1, turns[1].gamma) == 4


def test_sd_with_a_proposer_outside_of_the_ensemble():
    turns = sd_turns(3, 4, (True, True, False))
    assert (turns.window, turns.draws, turns.last_scorer) == (4, True, 0)
    assert [turns.max_tokens(turns.decidable(t)) for t in range(2)] == [4, 0]
    # The token is drawn before the proposer reads. It reads that token and its own last proposal.
    assert (turns.num_new(1), turns.num_unscored(1)) == (1, 2)
    assert turns.num_passes(1, 4) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(gamma=0), r"^chef\.gamma: 0 is out of range"),
        (dict(gamma=True), r"^chef\.gamma: True is out of range"),
        (dict(gamma=[1, 2.5]), r"^chef\.gamma: 2\.5 is out of range"),
        (dict(gamma="5"), r"^chef\.gamma: '5' is out of range"),
        (dict(policy="best"), r"^chef\.policy: unknown policy 'best'"),
        (dict(policy="sd", gamma=[1, 2]), r"^chef\.gamma: \[1, 2\] is a list"),
        (dict(policy="sd", turn_order=[1, 0]), r"^chef\.turn_order: .*leave it out"),
        (dict(turn_order=["a"]), r"^chef\.turn_order: \['a'\] is no list of members"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ChefConfig(**config)


@pytest.mark.parametrize(
    ("config", "scores", "message"),
    [
        (dict(gamma=[1, 2]), ALL, r"^chef\.gamma: \[1, 2\] has 2 entries for 3 members"),
        (dict(gamma=[2, 2, 3]), ALL, r"^chef\.gamma: \[2, 2, 3\] has no 1"),
        (
            dict(),
            (True, False, False),
            r"^ensemble\.weights: only member 0 \(counted from 0\) has a weight above 0",
        ),
        (dict(), (False, True, True), r"^ensemble\.weights: the first member has weight 0"),
        (
            dict(policy="sd"),
            (True, False, True),
            r"^ensemble\.weights: member 1 \(counted from 0\) has weight 0 and would neither score "
            "nor propose",
        ),
    ],
)
def test_turns_that_do_not_fit_the_members_are_refused(config, scores, message):
    with pytest.raises(ValueError, match=message):
        ChefConfig(**config).resolved([3.0, 2.0, 1.0], scores).make_turns(scores)
    resolved = dict(gamma=1) if "policy" in config else dict(gamma=[1, 2], turn_order=[0, 1])
    if scores != ALL or len(config.get("gamma", ())) == 2:
        with pytest.raises(ValueError, match=message):
            ChefConfig(**{**config, **resolved}).make_turns(scores)


@pytest.mark.parametrize(
    ("config", "is_resolved"),
    [
        (dict(gamma=5), False),
        (dict(gamma=[1, 2, 3]), False),
        (dict(gamma=3, turn_order=[0, 1, 2]), False),
        (dict(gamma="auto"), False),
        (dict(gamma="auto", max_gamma=[1, 1, 4]), False),
        (dict(policy="sd", gamma="auto"), False),
        (dict(policy="sd", gamma=3), True),
        (dict(gamma=[1, 2, 3], turn_order=[0, 2, 1]), True),
    ],
)
def test_a_resolved_configuration_needs_no_costs(config, is_resolved):
    config = ChefConfig(**config)
    assert config.is_resolved == is_resolved
    resolved = config.resolved([3.0, 2.0, 1.0], ALL)
    assert resolved.is_resolved
    assert resolved.resolved([1.0, 2.0, 3.0], ALL) == resolved
    again = ChefConfig.from_dict(resolved.to_dict())
    turns = again.make_turns(ALL)
    assert again == resolved and turns == resolved.make_turns(ALL)
    assert sorted(member for turn in turns for member in turn.members) == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"num_speculative_tokens": 3},
        {"kv_cache_dtype": "fp8"},
        {"num_speculative_tokens_per_batch_size": [(1, 8, 2)]},
        {"quantization": "fp8"},
    ],
)
def test_speculation_that_turns_do_not_do_is_refused(options):
    asked = dict(num_speculative_tokens=2, rejection_sample_method="standard")
    speculative = SimpleNamespace(method="draft_model", **asked, **CARRIER_OPTIONS)
    turns = chef_turns([1, 2], [2, 1], ALL[:2])
    _check_carrier(SimpleNamespace(speculative_config=speculative), turns, False)
    vars(speculative).update(options)
    with pytest.raises(ValueError, match=r"^--speculative-config[.:]") as error:
        _check_carrier(SimpleNamespace(speculative_config=speculative), turns, False)
    assert "\n" not in str(error.value)
    for missing in (None, SimpleNamespace(method="ngram", num_speculative_tokens=2)):
        with pytest.raises(ValueError, match=r'turns need \{"method": "draft_model"'):
            _check_carrier(SimpleNamespace(speculative_config=missing), turns, False)


def test_plain_data_and_back():
    config = ChefConfig(gamma=[1, 3], turn_order=[0, 1])
    data = config.to_dict()
    assert data == {"gamma": [1, 3], "policy": "chef", "turn_order": [0, 1]}
    assert ChefConfig.from_additional_config({"chef": data}) == config
    for data in (None, {}, {"chef": 5}):
        with pytest.raises(ValueError, match=r"^chef: missing"):
            ChefConfig.from_additional_config(data)
    with pytest.raises(ValueError, match=r"^chef\.gama: unknown key"):
        ChefConfig.from_additional_config({"chef": {"gama": 1}})


def test_a_shallower_step_leaves_out_those_that_come_first():
    turns = chef_turns([1, 2, 3], [9, 5, 1], (True, True, True))
    assert [turns.gammas(depth) for depth in range(6)] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 0, 2),
        (1, 0, 3),
        (1, 1, 3),
        (1, 2, 3),
    ]
    assert turns.num_passes(2, 0) == turns.num_passes(2, 1) == 0
    turns = sd_turns(3, 4)
    assert [turns.gammas(depth) for depth in (0, 4)] == [(0, 0), (0, 4)]
    assert [turns.num_passes(1, depth) for depth in (0, 4)] == [0, 4]


def test_experts_do_not_take_turns_in_parallel():
    def check(has_experts: bool, data_parallel_size: int) -> None:
        parallel = SimpleNamespace(data_parallel_size=data_parallel_size)
        members = [SimpleNamespace(model=f"m{i}", is_moe=has_experts and i == 1) for i in range(2)]
        _check_parallel(SimpleNamespace(parallel_config=parallel), members)

    check(True, 1)
    check(False, 2)
    with pytest.raises(ValueError, match=r"^--data-parallel-size: 2 .*'m1' has experts"):
        check(True, 2)
