"""How a speculative ensemble takes turns: plain data in `additional_config["chef"]`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from vllm.chef.state import kept_scores_bytes
from vllm.chef.synthetic import common_rate
from vllm.chef.turns import Turns, chef_turns, default_order, sd_turns, spread_gamma
from vllm.ensemble_decode.config import EnsembleConfig
from vllm.ensemble_decode.dtypes import widest
from vllm.ensemble_decode.errors import ConfigFieldError
from vllm.ensemble_decode.members import check_ensemble, member_configs
from vllm.ensemble_decode.plain_data import PlainData

CONFIG_KEY = "chef"
POLICIES = ("chef", "sd")
AUTO, DEFAULT_MAX_GAMMA = "auto", 5
SCHEDULER = "vllm.chef.scheduler.make_scheduler"
# Options of vLLM's own speculation that members in turns would ignore, with their defaults.
CARRIER_OPTIONS = {
    "parallel_drafting": False,
    "use_local_argmax_reduction": False,
    "use_heterogeneous_vocab": False,
    "num_speculative_tokens_per_batch_size": None,
    "kv_cache_dtype": None,
    "quantization": None,
}


@dataclass(frozen=True)
class ChefConfig(PlainData):
    """Turns as the user asks for them, or resolved: with all that follows from the members.

    Resolved, it has a gamma for each member and the order of their calls. Turns are made from that
    alone. `ensemble_args` passes it on like this, so an engine derives nothing again.

    Args:
        policy: `chef`: members take turns. `sd`: the last member always proposes.
        gamma: tokens that a member proposes in its turn. A number is for the cheapest member, and
            every other member proposes one token. A list has one entry per member, in the user's
            order. With "auto", the engine chooses while it runs, by batch size, from 0 to
            `max_gamma` tokens.
        max_gamma: the limit for "auto", a number or a list like `gamma`. None: 5.
        turn_order: the members' places in the user's order, in the order of their calls. None:
            `chef_turns` chooses.

    Raises:
        ConfigFieldError: one line that names the field, for any value that is out of range.
    """

    config_key: ClassVar[str] = CONFIG_KEY
    needed: ClassVar[str] = (
        "a chef worker needs "
        f'additional_config={{"{CONFIG_KEY}": {{"gamma": ...}}, "ensemble": {{...}}}}'
    )

    gamma: int | tuple[int, ...] | str = 1
    policy: str = "chef"
    turn_order: tuple[int, ...] | None = None
    max_gamma: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigFieldError(
                "chef.policy",
                f"unknown policy '{self.policy}'; choose one of {', '.join(POLICIES)}",
            )
        if not self.is_adaptive:
            object.__setattr__(self, "gamma", self._checked_gamma("gamma"))
        elif self.max_gamma is not None:
            object.__setattr__(self, "max_gamma", self._checked_gamma("max_gamma"))
        if self.turn_order is not None:
            self._check_order()

    @property
    def is_adaptive(self) -> bool:
        return self.gamma == AUTO

    @property
    def gamma_limit(self) -> int | tuple[int, ...]:
        """The most tokens that a member proposes in its turn."""
        return self.max_gamma or DEFAULT_MAX_GAMMA if self.is_adaptive else self.gamma

    @property
    def is_resolved(self) -> bool:
        if self.policy == "sd":  # one number, and an order that is always the same
            return not self.is_adaptive or self.max_gamma is not None
        return isinstance(self.gamma_limit, tuple) and self.turn_order is not None

    def resolved(self, costs: Sequence[float], counted: Sequence[bool]) -> Self:
        """The same for members with these relative costs. For `counted`, see `Turns`.

        Raises:
            ConfigFieldError: one line that names the field and the remedy.
        """
        self._check_counted(counted)
        name = "max_gamma" if self.is_adaptive else "gamma"
        limit, order = self.gamma_limit, self.turn_order
        if self.policy == "sd":
            return replace(self, **{name: limit})
        gammas = tuple(spread_gamma(limit, costs)) if isinstance(limit, int) else limit
        self._check_length(gammas, len(counted))
        if order is None:
            order = tuple(default_order(gammas, costs, counted))
        return replace(self, **{name: gammas}, turn_order=order)

    def _checked_gamma(self, name: str) -> int | tuple[int, ...]:
        value = getattr(self, name)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        for gamma in value if is_list else [value]:
            if type(gamma) is not int or gamma < 1:
                words = f', or "{AUTO}"' if name == "gamma" else ""
                raise ConfigFieldError(
                    f"chef.{name}", f"{gamma!r} is out of range; it must be 1 or more{words}"
                )
        if is_list and self.policy == "sd":
            raise ConfigFieldError(
                f"chef.{name}",
                f"{list(value)} is a list, and only the last member proposes; give one number",
            )
        return tuple(value) if is_list else value

    def _check_order(self) -> None:
        order = self.turn_order
        if not isinstance(order, Sequence) or any(type(member) is not int for member in order):
            raise ConfigFieldError(
                "chef.turn_order",
                f"{order!r} is no list of members; name each by its place, from 0",
            )
        if self.policy == "sd":
            raise ConfigFieldError(
                "chef.turn_order", "the last member always proposes; leave it out"
            )
        object.__setattr__(self, "turn_order", tuple(order))

    def make_turns(self, counted: Sequence[bool]) -> Turns:
        """The turns of a resolved configuration. For `counted`, see `Turns`.

        Raises:
            ConfigFieldError: one line that names the field and the remedy.
        """
        assert self.is_resolved
        self._check_counted(counted)
        if self.policy == "sd":
            return sd_turns(len(counted), self.gamma_limit, counted)
        self._check_length(self.gamma_limit, len(counted))
        return chef_turns(self.gamma_limit, None, counted, self.turn_order)

    def _check_counted(self, counted: Sequence[bool]) -> None:
        if sum(counted) < 2:
            raise ConfigFieldError(
                "ensemble.weights",
                f"only member {counted.index(True)} (counted from 0) has a weight above 0, and "
                "turns need two such members; raise another weight",
            )
        if not counted[0]:
            raise ConfigFieldError(
                "ensemble.weights",
                "the first member has weight 0; put a member with a weight above 0 first",
            )
        if self.policy == "sd" and not all(counted[:-1]):
            raise ConfigFieldError(
                "ensemble.weights",
                f"member {counted.index(False)} (counted from 0) has weight 0 and would neither "
                "score nor propose, because with policy sd only the last member proposes; leave "
                "the member out, or put it last",
            )

    def _check_length(self, gammas: Sequence[int], num_members: int) -> None:
        if len(gammas) != num_members:
            key = "max_gamma" if self.is_adaptive else "gamma"
            raise ConfigFieldError(
                f"chef.{key}",
                f"{list(gammas)} has {len(gammas)} entries for {num_members} "
                "members; give one each, in the order of the members",
            )


def check_chef(vllm_config: VllmConfig) -> tuple[EnsembleConfig, list[ModelConfig], Turns]:
    """The ensemble, its members and their turns, checked before any weight is loaded.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    ensemble, members = check_ensemble(vllm_config)
    config = ChefConfig.from_additional_config(vllm_config.additional_config)
    config, turns = resolve_turns(config, ensemble, members)
    _check_kept_scores(vllm_config, turns, members)
    _check_carrier(vllm_config, turns, config.is_adaptive)
    _check_parallel(vllm_config, members)
    _check_states(members, turns)
    _check_budget(vllm_config, turns)
    return ensemble, members, turns


def engine_turns(vllm_config: VllmConfig) -> Turns:
    """The turns of an engine whose worker has checked its configuration (`check_chef`)."""
    ensemble = EnsembleConfig.from_additional_config(vllm_config.additional_config)
    config = ChefConfig.from_additional_config(vllm_config.additional_config)
    members = [] if config.is_resolved else member_configs(vllm_config, ensemble)
    return resolve_turns(config, ensemble, members)[1]


def resolve_turns(
    config: ChefConfig, ensemble: EnsembleConfig, members: Sequence[ModelConfig]
) -> tuple[ChefConfig, Turns]:
    """The configuration, resolved for these members, and the turns that it means.

    Raises:
        ConfigFieldError: one line that names the field and the remedy.
    """
    counted = ensemble.make_function().counted
    if not config.is_resolved:
        config = config.resolved([relative_cost(member) for member in members], counted)
    return config, config.make_turns(counted)


def relative_cost(member: ModelConfig) -> float:
    """Roughly the number of the member's weights that one token reads, from its config alone."""
    config = member.hf_text_config
    hidden = member.get_hidden_size()
    head_size = member.get_head_size()
    num_heads = getattr(config, "num_attention_heads", 1)
    attention = 2 * hidden * head_size * (num_heads + member.get_total_num_kv_heads())
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = getattr(config, "num_hidden_layers", 1)
    return layers * (attention + 3 * hidden * width) + hidden * member.get_vocab_size()


def max_scheduled_tokens(vllm_config: VllmConfig, turns: Turns) -> int:
    """The most tokens that a step may schedule.

    With more, a member's pass could be longer than vLLM compiles for. The last member sees the
    scheduled tokens, and also the tokens that the others proposed in the same step. vLLM's
    scheduler itself reserves room for one such token per request.
    """
    scheduler = vllm_config.scheduler_config
    more = turns.num_new(len(turns) - 1) - 1
    return scheduler.max_num_batched_tokens - scheduler.max_num_seqs * more


def scheduled_tokens(vllm_config: VllmConfig, turns: Turns) -> int:
    """The `max_num_scheduled_tokens` of an engine whose user leaves it open.

    It is 1 where no value is possible. `check_chef` then says why.
    """
    limit = max(1, max_scheduled_tokens(vllm_config, turns))
    return min(_configured_tokens(vllm_config), limit)


def _configured_tokens(vllm_config: VllmConfig) -> int:
    scheduler = vllm_config.scheduler_config
    return scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens


def depth_schedule(turns: Turns) -> list[list[int]]:
    """All depths, as `num_speculative_tokens_per_batch_size`, so that vLLM prepares for each depth.

    The schedule has one depth per batch size, so there must be as many batch sizes as depths. The
    scheduler decides which depth a step uses.
    """
    depths = list(reversed(range(turns.window + 1)))
    return [[size, size, depth] for size, depth in enumerate(depths, start=1)]


def _check_kept_scores(
    vllm_config: VllmConfig, turns: Turns, members: Sequence[ModelConfig]
) -> None:
    """Refuse gammas whose scores the device's memory cannot hold."""
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    dtype = widest(member.head_dtype for member in members)
    by_member = kept_scores_bytes(turns, max_num_reqs, members[0].get_vocab_size(), dtype)
    kept = sum(by_member.values())
    total = current_platform.get_device_total_memory()
    if kept >= total:
        raise ConfigFieldError(
            "chef.gamma",
            f"turns would keep {kept >> 30} GiB of scores of {max_num_reqs} requests, and the "
            f"device has {total >> 30} GiB; choose fewer tokens, or lower --max-num-seqs",
        )


def _check_carrier(vllm_config: VllmConfig, turns: Turns, is_adaptive: bool) -> None:
    """Check the speculation that carries the window.

    vLLM carries a window from step to step as the draft tokens of a draft model.
    """
    speculative = vllm_config.speculative_config
    given = None if speculative is None else speculative.num_speculative_tokens
    if speculative is None or speculative.method != "draft_model" or given != turns.window:
        raise ConfigFieldError(
            "--speculative-config",
            "turns need "
            '{"method": "draft_model", "model": <a member with as many vocabulary rows as the '
            f'first>, "num_speculative_tokens": {turns.window}}}',
        )
    if is_adaptive:
        _check_adaptive(vllm_config, turns)
    common_rate(speculative)  # raises
    for option, default in CARRIER_OPTIONS.items():
        if is_adaptive and option == "num_speculative_tokens_per_batch_size":
            continue
        if getattr(speculative, option) != default:
            raise ConfigFieldError(
                f"--speculative-config.{option}", "turns make no use of it; leave it out"
            )


def _check_adaptive(vllm_config: VllmConfig, turns: Turns) -> None:
    scheduler, schedule = vllm_config.scheduler_config, depth_schedule(turns)
    given = vllm_config.speculative_config.num_speculative_tokens_per_batch_size or []
    if [list(entry) for entry in given] != schedule:
        raise ConfigFieldError(
            "chef.gamma",
            f"{AUTO} needs --speculative-config.num_speculative_tokens_per_batch_size={schedule}",
        )
    if scheduler.scheduler_cls != SCHEDULER:
        raise ConfigFieldError("--scheduler-cls", f"gamma {AUTO} needs {SCHEDULER}")
    if scheduler.max_num_seqs < len(schedule):
        raise ConfigFieldError(
            "--max-num-seqs", f"gamma {AUTO} with these turns needs {len(schedule)} or more"
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigFieldError(
            "chef.gamma", f"{AUTO} does not go with data parallelism; give numbers"
        )


def _check_parallel(vllm_config: VllmConfig, members: Sequence[ModelConfig]) -> None:
    """Refuse members whose ranks would wait for each other in passes that not all ranks make."""
    parallel = vllm_config.parallel_config
    experts = [member.model for member in members if member.is_moe]
    if experts and parallel.data_parallel_size > 1:
        raise ConfigFieldError(
            "--data-parallel-size",
            f"{parallel.data_parallel_size} is too large for turns, because '{experts[0]}' has "
            "experts; set it to 1",
        )


def _check_states(members: Sequence[ModelConfig], turns: Turns) -> None:
    """Refuse recurrent layers in the turns after the first.

    Their members read what earlier turns proposed. If some of that is rejected, a recurrent state
    cannot be taken back. In the first turn, vLLM keeps a state per token and goes on from the right
    one.
    """
    late = [member for turn in turns.sequence[1:] for member in turn.members]
    for member in late:
        if members[member].is_hybrid:
            raise ConfigFieldError(
                "chef.turn_order",
                f"member {member} (counted from 0), '{members[member].model}', has recurrent "
                "layers, whose states cannot be taken back; let it open the cycle, or run the "
                "plain ensemble",
            )


def _check_budget(vllm_config: VllmConfig, turns: Turns) -> None:
    limit, scheduled = max_scheduled_tokens(vllm_config, turns), _configured_tokens(vllm_config)
    if limit < 1:
        batched = vllm_config.scheduler_config.max_num_batched_tokens
        raise ConfigFieldError(
            "--max-num-scheduled-tokens",
            "no value is possible with these turns, because --max-num-batched-tokens is "
            f"{batched}; raise that above {batched - limit}, or lower --max-num-seqs",
        )
    if scheduled > limit:
        raise ConfigFieldError(
            "--max-num-scheduled-tokens",
            f"{scheduled} is too large for these turns; set it to {limit} or less, lower "
            "--max-num-seqs or raise --max-num-batched-tokens",
        )
