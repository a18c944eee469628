"""How deep to speculate: chosen from the tokens and the time of past cycles.

Plain numbers. This module knows neither models nor vLLM. The depth is the number of tokens that a
step leaves pending for the next step. At depth 0, a cycle decides one token with one call of each
member, like the plain ensemble. Depth 0 is the best choice where speculation loses.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np

logger = logging.getLogger(__name__)

# Steps of a trial, and how many of them are not timed: the first ones are still affected by the
# previous depth.
PROBE_STEPS, SKIPPED_STEPS = 6, 2
# Steps between two trials. The number grows fourfold each time that no better depth is found.
MIN_HOLD_STEPS, MAX_HOLD_STEPS = 64, 2048
# Steps between two reviews of the chosen depth. A trial's few steps may have been lucky, or the
# interpolation may be wrong.
REVIEW_STEPS = 16
# Approximate number of request cycles that are remembered, and number of step times.
NUM_CYCLES, NUM_TIMES = 4000, 32
# Weight of a prior, in proposals. A turn's mean acceptance is the prior for each of its places. The
# mean acceptance of all turns is the prior for each turn.
PRIOR_WEIGHT = 2


class DepthChooser:
    """Chooses the depth with the most expected tokens per second, for each batch size.

    It regularly tries other depths for a few steps. Between trials it changes the depth if newer
    measurements favour another one.

    The tokens of a depth are estimated over all batches, place by place (`tokens`). The time of a
    depth is measured per batch size. Depths that were not tried are interpolated linearly.

    Args:
        places: by depth, `Turns.places`.
    """

    def __init__(self, places: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.max_depth = max_depth = len(places) - 1
        kinds = sorted({place for of_depth in places for place in of_depth})
        self.places = [np.array([kinds.index(p) for p in of_depth], int) for of_depth in places]
        """By depth, the kind of each place. A kind is a turn and a place in its segment."""
        self.turns = np.array([turn for turn, _ in kinds], int)
        """[num_kinds] turn of each kind"""
        self.judged, self.accepted = np.zeros((2, len(kinds)))
        """[num_kinds] tokens at such places. Older tokens count less."""
        self.batches: dict[int, _Batch] = defaultdict(lambda: _Batch(max_depth))

    def __getitem__(self, num_reqs: int) -> int:
        """The depth for the next step of a batch of `num_reqs` requests."""
        return self.batches[_size(num_reqs)].depth

    def observe(
        self,
        num_reqs: int,
        depth: int,
        num_decided: Sequence[int],  # [num_reqs]
        seconds: float,
    ) -> None:
        """Record a step in which all requests were at `depth` and stayed there."""
        for counts in (self.judged, self.accepted):
            counts *= (1 - 1 / NUM_CYCLES) ** num_reqs
        decided = np.asarray(num_decided)[:, None]  # the last decided token was not pending
        place = np.arange(1, depth + 1)
        self.judged[self.places[depth]] += (decided >= place).sum(axis=0)
        self.accepted[self.places[depth]] += (decided > place).sum(axis=0)
        batch = self.batches[_size(num_reqs)]
        batch.observe(depth, seconds)
        if batch.is_probed:
            batch.settle(self.best(num_reqs))
            self._log(num_reqs)
        elif batch.is_due:
            batch.chosen = self.best(num_reqs)

    def _log(self, num_reqs: int) -> None:
        batch = self.batches[_size(num_reqs)]
        depths = range(self.max_depth + 1)
        logger.debug(
            "depth %d for batches like %d; tokens by depth: %s; milliseconds: %s",
            *(batch.chosen, num_reqs),
            " ".join(f"{self.tokens(depth):.2f}" for depth in depths),
            " ".join(f"{1000 * seconds:.2f}" for seconds in batch.times()),
        )

    def tokens(self, depth: int) -> float:
        """Expected tokens that a cycle of this depth decides per request. At least 1.

        The value is `1 + sum_j h_1 ... h_j`. `h_j` is the rate at which the token at place `j` is
        accepted if the tokens before it are (estimator of Kaplan and Meier, 1958). Cycles of every
        depth therefore count for the places that they have. Rates belong to a turn and a place in
        its segment, because the turn at place `j` differs by depth.
        """
        overall = _rates(self.accepted.sum(), self.judged.sum(), 0.0)
        of_turns = [np.bincount(self.turns, counts) for counts in (self.accepted, self.judged)]
        rates = _rates(self.accepted, self.judged, _rates(*of_turns, overall)[self.turns])
        return 1.0 + float(rates[self.places[depth]].cumprod().sum())

    def best(self, num_reqs: int) -> int:
        """The depth with the most tokens per second. If two are equal, the smaller one."""
        times = self.batches[_size(num_reqs)].times()
        return max(range(self.max_depth + 1), key=lambda depth: self.tokens(depth) / times[depth])


class _Batch:
    """Batches of similar size: step times by depth, and the schedule of trials."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.measured: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_TIMES))
        # The deepest first, because it shows what all the other depths would bring.
        self.probes = deque(dict.fromkeys([max_depth, 0, max_depth // 2]))
        self.chosen = max_depth
        self.hold = MIN_HOLD_STEPS
        self.num_steps = 0

    @property
    def depth(self) -> int:
        return self.probes[0] if self.probes else self.chosen

    @property
    def is_probed(self) -> bool:
        """Whether all planned trials have just ended."""
        return not self.probes and self.num_steps == 0

    @property
    def is_due(self) -> bool:
        return not self.probes and self.num_steps % REVIEW_STEPS == 0

    def observe(self, depth: int, seconds: float) -> None:
        if depth != self.depth:
            return  # the step was under way when the depth changed
        self.num_steps += 1
        if self.num_steps > SKIPPED_STEPS:
            self.measured[depth].append(seconds)
        if self.probes and self.num_steps >= PROBE_STEPS:
            self.probes.popleft()
            self.num_steps = 0
        elif not self.probes and self.num_steps >= self.hold:
            self.probes.extend(self._candidates())
            self.num_steps = 0

    def settle(self, depth: int) -> None:
        is_same = depth == self.chosen
        self.hold = min(4 * self.hold, MAX_HOLD_STEPS) if is_same else MIN_HOLD_STEPS
        self.chosen = depth
        self.num_steps = 1  # of the steps that the depth is held

    def times(self) -> np.ndarray:  # [max_depth + 1]
        """Seconds per step by depth.

        Each is a lower quartile, because a delayed step says nothing about its depth.
        """
        depths = sorted(depth for depth, times in self.measured.items() if times)
        seconds = [np.quantile(self.measured[depth], 0.25, method="higher") for depth in depths]
        return np.interp(range(self.max_depth + 1), depths, seconds)

    def _candidates(self) -> list[int]:
        """Depths that may have become better since the last trial.

        The deepest is always among them, because a shallow depth does not show what a deeper one
        would bring.
        """
        near = [self.max_depth, self.chosen - 1, self.chosen + 1]
        known = dict.fromkeys(depth for depth in near if 0 <= depth <= self.max_depth)
        return [depth for depth in known if depth != self.chosen]


def _rates(accepted: np.ndarray, judged: np.ndarray, prior: np.ndarray | float) -> np.ndarray:
    return (accepted + PRIOR_WEIGHT * prior) / (judged + PRIOR_WEIGHT)


def _size(num_reqs: int) -> int:
    """Batches of similar size share their times: 1, 2, 3 to 4, 5 to 8, ..."""
    return (num_reqs - 1).bit_length()
