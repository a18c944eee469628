"""What a benchmark runs: how a run is written, which runs belong together, and the targets.

Plain data. This module starts no engine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
ACCEPTANCES = (0.8, 0.6, 0.7, 0.9, 0.95)

GRAMMAR = (
    "a run is MEMBER[+MEMBER...][/PROPOSER][@GAMMAS], where GAMMAS are 1,5 (one per member, who "
    "take turns), auto1,5 (these at most), sd5 (the last always proposes) or 5 (with a PROPOSER); "
    "`name:0` is a member "
    "without a say, and `cd0.1:` before all combines contrastively, here with alpha 0.1"
)
_RUN = re.compile(
    r"(?:cd(?P<alpha>\d*\.?\d+):)?(?P<members>[^/@:+]+(?::0)?(?:\+[^/@:+]+(?::0)?)*)"
    r"(?:/(?P<proposer>[^/@:+]+))?(?:@(?P<policy>sd|auto)?(?P<gammas>\d+(?:,\d+)*))?"
)


@dataclass(frozen=True)
class Run:
    """Models, and who proposes: one engine.

    Args:
        text: the run as the user wrote it.
        members: names, in the user's order.
        scores: by member, whether it has a say.
        alpha: of a contrastive ensemble; None: weighted, all weights equal.
        policy: `chef` or `sd` if members take turns; `draft_model` if vLLM's own speculation
            proposes with `proposer`; None: no model proposes.
        gammas: of all members (`chef`), else one number.
        is_adaptive: the gammas are chosen at run time; `gammas` holds the maxima.
    """

    text: str
    members: tuple[str, ...]
    scores: tuple[bool, ...]
    alpha: float | None
    policy: str | None
    gammas: tuple[int, ...]
    is_adaptive: bool
    proposer: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError with one line."""
        match = _RUN.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}': {GRAMMAR}")
        members = match["members"].split("+")
        gammas = tuple(int(gamma) for gamma in (match["gammas"] or "").split(",") if gamma)
        policy = None
        if match["proposer"]:
            policy = "draft_model"
        elif gammas:
            policy = "sd" if match["policy"] == "sd" else "chef"
        run = cls(
            text=text,
            members=tuple(member.removesuffix(":0") for member in members),
            scores=tuple(not member.endswith(":0") for member in members),
            alpha=float(match["alpha"]) if match["alpha"] else None,
            policy=policy,
            gammas=gammas,
            is_adaptive=match["policy"] == "auto",
            proposer=match["proposer"],
        )
        run._check(match["policy"])
        return run

    def _check(self, named_policy: str | None) -> None:
        expected = len(self.members) if self.policy == "chef" else 1 if self.policy else 0
        if len(self.gammas) != expected or 0 in self.gammas:
            raise ValueError(f"'{self.text}': needs {expected} gammas of 1 or more; {GRAMMAR}")
        if self.policy == "draft_model" and named_policy:
            raise ValueError(f"'{self.text}': a PROPOSER has a plain gamma; {GRAMMAR}")
        if self.policy in ("chef", "sd") and len(self.members) == 1:
            raise ValueError(f"'{self.text}': one member cannot take turns; {GRAMMAR}")
        # With `sd`, only the last of three or more members may be without a say.
        may_be_outside = self.policy == "sd" and len(self.members) > 2
        must_score = self.scores[:-1] if may_be_outside else self.scores
        if self.policy != "chef" and not all(must_score):
            raise ValueError(f"'{self.text}': a member without a say takes turns; {GRAMMAR}")

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.members, self.proposer) if self.proposer else self.members

    @property
    def takes_turns(self) -> bool:
        return self.policy in ("chef", "sd")

    @property
    def window(self) -> int:
        """The number of tokens that are carried from step to step."""
        return sum(self.gammas) - (self.policy == "chef")

    @property
    def counted(self) -> tuple[str, ...]:
        return tuple(m for m, scores in zip(self.members, self.scores, strict=True) if scores)

    @property
    def plain_key(self) -> tuple[str, ...]:
        """A run and the plain ensemble with the same output have the same key.

        The key leaves out alpha, which does not change the cost.
        """
        return ("weighted" if self.alpha is None else "contrastive", *self.counted)


@dataclass(frozen=True)
class Plan:
    """One engine and the cells measured in it.

    Args:
        run: the run as text.
        acceptances: the synthetic acceptances; if empty, the models' own acceptance counts. The
            first one is measured at all batch sizes, the others at `sweep_batch_sizes`.
    """

    run: str
    acceptances: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    sweep_batch_sizes: tuple[int, ...] = (1,)

    def cells(self) -> list[tuple[float | None, int]]:
        """(acceptance, batch size), in the order of measurement."""
        first, *others = self.acceptances or (None,)
        cells = [(first, size) for size in self.batch_sizes]
        return cells + [(rate, size) for rate in others for size in self.sweep_batch_sizes]


@dataclass(frozen=True)
class Target:
    """A number to reach, at batch size 1.

    Args:
        runs: the runs that may reach the target; the best of them counts.
        field: a field of the results, or `speed_over:RUN` for the speed over another run.
        value: the lower bound, or the upper bound if `at_most`.
    """

    name: str
    runs: tuple[str, ...]
    field: str
    value: float
    acceptance: float | None = None
    at_most: bool = False

    def judge(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The target's entry of the document; what was reached is None if no run was measured."""
        found = [(self._value(row, rows), row["run"]) for row in rows if self._is_meant(row)]
        found = [(value, run) for value, run in found if value is not None]
        best, run = (min if self.at_most else max)(found, default=(None, None))
        reached = None
        if best is not None:
            reached = best <= self.value if self.at_most else best >= self.value
        sign = "<=" if self.at_most else ">="
        return {
            "name": self.name,
            "target": f"{self.field} {sign} {self.value:.4g}",
            "acceptance": self.acceptance,
            "reached_value": best,
            "reached": reached,
            "run": run,
        }

    def _is_meant(self, row: dict[str, Any]) -> bool:
        return (
            row["run"] in self.runs
            and row["batch_size"] == 1
            and row["temperature"] == 0
            and not row["sampling"]
            and row["acceptance_set"] == self.acceptance
        )

    def _value(self, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
        if not self.field.startswith("speed_over:"):
            return row.get(self.field)
        other = replace(self, runs=(self.field.removeprefix("speed_over:"),))
        costs = [row["ms_per_token"] for row in rows if other._is_meant(row)]
        return costs[0] / row["ms_per_token"] if costs else None


BIG, SMALL = "llama-7b", "llama-68m"
TWO, THREE = f"{BIG}+{BIG}", f"{BIG}+{BIG}+{BIG}"
CHEF_CD, SD_TARGET_ALONE = f"cd0.1:{BIG}+{SMALL}@1,5", f"cd0:{BIG}+{SMALL}@sd5"
STOCK = f"{BIG}/{SMALL}@5"
OUTSIDE = (f"{TWO}+{SMALL}:0@1,1,5", f"{TWO}/{SMALL}@5", f"{TWO}+{SMALL}:0@sd5")

# The most important runs come first, because a killed benchmark lacks the last ones. Groups of four
# fit into 139 GiB together (--engines-at-once 4).
DESIGN = [
    *(Plan(BIG), Plan(TWO), Plan(f"{TWO}@1,1", ACCEPTANCES)),
    *(Plan(f"cd0.1:{BIG}+{SMALL}"), Plan(CHEF_CD, ACCEPTANCES), Plan(STOCK, (0.8,))),
    *(Plan(SD_TARGET_ALONE, (0.8,)), Plan(OUTSIDE[0], (0.8,)), Plan(SMALL)),
    *(
        Plan(f"cd0.1:{BIG}+{SMALL}@auto1,5", (0.8,)),
        Plan(f"{TWO}@auto1,1", (0.8,)),
        Plan(OUTSIDE[1], (0.8,)),
        Plan(OUTSIDE[2], (0.8,)),
    ),
    Plan(THREE, batch_sizes=(1, 8, 64)),
    Plan(f"{THREE}@1,1,1", (0.95,), batch_sizes=(1, 8, 64)),
]
DESIGN_TARGETS = [
    Target("two 7B plain", (TWO,), "ratio_to_members_alone", 1.0, at_most=True),
    Target("cd_chef 7B + 68M", (CHEF_CD,), "speed_over_plain", 2.8, 0.8),
    *(
        Target(
            "ensemble_chef 7B + 7B, 0.95 of 2/(2-a)",
            (f"{TWO}@1,1",),
            "speed_over_plain",
            0.95 * 2 / (2 - rate),
            rate,
        )
        for rate in sorted(ACCEPTANCES)
    ),
    Target("two 7B, 68M outside", OUTSIDE, "speed_over_plain", 3.0, 0.8),
    Target("three 7B", (f"{THREE}@1,1,1",), "speed_over_plain", 2.7, 0.95),
    Target("target alone over stock", (SD_TARGET_ALONE,), f"speed_over:{STOCK}", 2.2, 0.8),
    *(
        Target("step overhead", (run,), "overhead_share", 0.05, 0.8, at_most=True)
        for run in (f"{TWO}@1,1", CHEF_CD, OUTSIDE[0], SD_TARGET_ALONE)
    ),
]

TINY = "llama-tiny"
SMOKE_BATCH_SIZES = (1, 4)
SMOKE = [
    Plan(TINY, batch_sizes=SMOKE_BATCH_SIZES),
    Plan(f"{TINY}+{TINY}", batch_sizes=SMOKE_BATCH_SIZES),
    Plan(f"{TINY}+{TINY}@1,1", (0.9, 0.6), SMOKE_BATCH_SIZES),
    Plan(f"{TINY}+{TINY}/{TINY}@3", (0.9, 0.6), SMOKE_BATCH_SIZES),
]
SMOKE_TARGETS = [
    Target("mechanism", (f"{TINY}+{TINY}@1,1",), "speed_over_plain", 0.95 * 2 / 1.1, 0.9),
]

EXPERT, PYTHON, AMATEUR = "smollm2-135m", "smollm2-python", "smollm2-amateur"
REAL = [
    Plan(EXPERT),
    Plan(f"{EXPERT}+{PYTHON}"),
    Plan(f"{EXPERT}+{PYTHON}@1,1"),
    Plan(f"cd0.1:{EXPERT}+{AMATEUR}"),
    Plan(f"cd0.1:{EXPERT}+{AMATEUR}@1,5"),
    Plan(f"cd0.1:{EXPERT}+{AMATEUR}@sd5"),
    Plan(f"{EXPERT}+{PYTHON}+{AMATEUR}:0@1,1,5"),
    Plan(f"{EXPERT}/{AMATEUR}@5"),
    Plan(PYTHON),
    Plan(AMATEUR),
]

# Pairs and triples of the paper by shape. Its contrastive pairs have gammas of their own.
PAPER_BATCH_SIZES = (1, 32)


def by_turns(plain: str, gammas: str) -> list[Plan]:
    """The plain ensemble and the same by turns, as the paper's shapes are measured."""
    return [
        Plan(plain, batch_sizes=PAPER_BATCH_SIZES),
        Plan(f"{plain}@{gammas}", (0.9,), PAPER_BATCH_SIZES),
    ]


QWEN_SMALL, QWEN = "qwen-1.5b", "qwen-3b"
PAPER = [
    *by_turns("cd0.1:llama-8b+llama-1b", "1,3"),
    *by_turns(f"{QWEN_SMALL}+{QWEN_SMALL}", "1,1"),
    *by_turns(f"{QWEN_SMALL}+{QWEN_SMALL}+{QWEN_SMALL}", "1,1,1"),
    *by_turns(f"{QWEN}+{QWEN}", "1,1"),
    *by_turns(TWO, "1,1"),
    *by_turns(f"cd0.1:{BIG}+{SMALL}", "1,5"),
]

# One engine measures all kinds of requests.
REQUESTS_BATCH_SIZES = (1, 32)
REQUESTS = [
    Plan(TWO, batch_sizes=REQUESTS_BATCH_SIZES),
    Plan(f"{TWO}@1,1", (0.8,), REQUESTS_BATCH_SIZES),
    Plan(f"cd0.1:{BIG}+{SMALL}", batch_sizes=REQUESTS_BATCH_SIZES),
    Plan(CHEF_CD, (0.8,), REQUESTS_BATCH_SIZES),
    Plan(OUTSIDE[0], (0.8,), REQUESTS_BATCH_SIZES),
    Plan(BIG, batch_sizes=REQUESTS_BATCH_SIZES),
    Plan(STOCK, (0.8,), REQUESTS_BATCH_SIZES),
]

PRESETS: dict[str, tuple[list[Plan], list[Target]]] = {
    "design": (DESIGN, DESIGN_TARGETS),
    "real": (REAL, []),
    "smoke": (SMOKE, SMOKE_TARGETS),
    "paper": (PAPER, []),
    "requests": (REQUESTS, []),
}
# Of a cell, at least; 200 without a preset.
MIN_CYCLES = {"design": 1000, "paper": 1000, "smoke": 60}

# Runs under load: the plain ensemble first, because its capacity sets the rates of all others.
LOADS: dict[str, list[str]] = {
    "two-7b": [TWO, f"{TWO}@1,1", OUTSIDE[0], BIG, STOCK],
    "7b-68m": [f"cd0.1:{BIG}+{SMALL}", CHEF_CD, BIG, STOCK],
    "three-7b": [THREE, f"{THREE}@1,1,1", BIG],
    "real": [
        f"{EXPERT}+{PYTHON}",
        f"{EXPERT}+{PYTHON}@1,1",
        f"{EXPERT}+{PYTHON}+{AMATEUR}:0@1,1,5",
        EXPERT,
        f"{EXPERT}/{AMATEUR}@5",
    ],
    "smoke": [
        f"{TINY}+{TINY}",
        f"{TINY}+{TINY}@1,1",
        f"{TINY}+{TINY}+{TINY}:0@1,1,3",
        TINY,
        f"{TINY}/{TINY}@3",
    ],
}
