"""How deep to speculate: chosen from what cycles have brought and taken so far.

Plain numbers; knows neither models nor vLLM.  Depth is the number of tokens that a step leaves
pending for the next.  At depth 0 a cycle decides one token with one call of each member, as the
plain ensemble does; so depth 0 is where speculation loses.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np

logger = logging.getLogger(__name__)

# Steps that a depth is tried for; the first ones still have something of the depth before.
PROBE_STEPS, SKIPPED_STEPS = 6, 2
# Steps between two probes: four times as many each time that nothing better is found.
MIN_HOLD_STEPS, MAX_HOLD_STEPS = 64, 2048
# Steps between two looks at whether the depth still seems the best: the few steps of a probe may
# have been lucky, and the straight line wrong.
REVIEW_STEPS = 16
# About how many cycles of requests are remembered, and how many times of steps.
NUM_CYCLES, NUM_TIMES = 4000, 32
# What the acceptance of a turn counts for at each of its places, and that of all turns at each
# turn, in proposals.
PRIOR_WEIGHT = 2


class DepthChooser:
    """Chooses the depth of most expected tokens per second, for each size of a batch.

    Every so often it tries others for a few steps; in between it takes another one if what came
    since speaks for that.

    What a depth brings is estimated over all batches, place by place (`tokens`).  What it takes is
    measured by batch size, between those depths that were tried by straight lines.

    Args:
        places: of each depth, `Turns.places`.
    """

    def __init__(self, places: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.max_depth = max_depth = len(places) - 1
        kinds = sorted({place for of_depth in places for place in of_depth})
        self.places = [np.array([kinds.index(p) for p in of_depth], int) for of_depth in places]
        """Of each depth, the kind of each place"""
        self.turns = np.array([turn for turn, _ in kinds], int)
        """[num_kinds]"""
        self.judged, self.accepted = np.zeros((2, len(kinds)))
        """[num_kinds] tokens at such places, old ones counting less"""
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
        """Take account of a step all of whose requests were at `depth`, and stayed there."""
        for counts in (self.judged, self.accepted):
            counts *= (1 - 1 / NUM_CYCLES) ** num_reqs
        decided = np.asarray(num_decided)[:, None]  # the last of them is not a pending token
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
        """Tokens that a cycle of this depth decides per request, expected; at least 1.

        `1 + sum_j h_1 ... h_j`, where `h_j` is how often the token at place `j` is accepted if
        those before it are (the estimator of Kaplan and Meier, 1958). So cycles of any depth tell
        of the places that they have; whose place it is decides, which differs by depth.
        """
        overall = _rates(self.accepted.sum(), self.judged.sum(), 0.0)
        of_turns = [np.bincount(self.turns, counts) for counts in (self.accepted, self.judged)]
        rates = _rates(self.accepted, self.judged, _rates(*of_turns, overall)[self.turns])
        return 1.0 + float(rates[self.places[depth]].cumprod().sum())

    def best(self, num_reqs: int) -> int:
        """The depth of most tokens per second; the smaller one where two are equal."""
        times = self.batches[_size(num_reqs)].times()
        return max(range(self.max_depth + 1), key=lambda depth: self.tokens(depth) / times[depth])


class _Batch:
    """Batches of about one size: times by depth, and which depth is tried when."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.measured: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_TIMES))
        # The deepest first: it tells what all the others bring.
        self.probes = deque(dict.fromkeys([max_depth, 0, max_depth // 2]))
        self.chosen = max_depth
        self.hold = MIN_HOLD_STEPS
        self.num_steps = 0

    @property
    def depth(self) -> int:
        return self.probes[0] if self.probes else self.chosen

    @property
    def is_probed(self) -> bool:
        """Whether all that was to be tried has been."""
        return not self.probes and self.num_steps == 0

    @property
    def is_due(self) -> bool:
        return not self.probes and self.num_steps % REVIEW_STEPS == 0

    def observe(self, depth: int, seconds: float) -> None:
        if depth != self.depth:
            return  # a step that was under way when the depth changed
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
        self.num_steps = 1  # of those that it is held for

    def times(self) -> np.ndarray:  # [max_depth + 1]
        """Seconds per step by depth: lower quartiles, since what delays a step is no depth's."""
        depths = sorted(depth for depth, times in self.measured.items() if times)
        seconds = [np.quantile(self.measured[depth], 0.25, method="higher") for depth in depths]
        return np.interp(range(self.max_depth + 1), depths, seconds)

    def _candidates(self) -> list[int]:
        """What may have become better meanwhile. The deepest is always among them, since a shallow
        depth does not tell what a deeper one would bring."""
        near = [self.max_depth, self.chosen - 1, self.chosen + 1]
        known = dict.fromkeys(depth for depth in near if 0 <= depth <= self.max_depth)
        return [depth for depth in known if depth != self.chosen]


def _rates(accepted: np.ndarray, judged: np.ndarray, prior: np.ndarray | float) -> np.ndarray:
    return (accepted + PRIOR_WEIGHT * prior) / (judged + PRIOR_WEIGHT)


def _size(num_reqs: int) -> int:
    """Batches of like sizes share their times: 1, 2, 3 to 4, 5 to 8, ..."""
    return (num_reqs - 1).bit_length()
