"""What has been counted in a run, and the table and the document made of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from soak.answers import EQUAL, TIE, WRONG, Answer
from soak.clients import ANSWERED, CANCELLED, FAULT, REFUSED, Outcome
from soak.requests import SHARES, Request
from soak.resources import Usage

OUTCOMES = (ANSWERED, CANCELLED, REFUSED, FAULT)


@dataclass
class Greedy:
    """All equal answers to one greedy request.

    Args:
        request: the first one that got this answer.
        count: how often it came.
    """

    request: Request
    count: int = 0


@dataclass(frozen=True)
class Round:
    """What was measured at rest, after a round.

    Args:
        num_requests: in this round.
        seconds: from its first request to its last answer.
        num_preemptions: in this round.
    """

    num_requests: int
    seconds: float
    num_preemptions: int
    usage: Usage

    def plain(self) -> dict[str, Any]:
        counts = {"num_requests": self.num_requests, "seconds": round(self.seconds, 1)}
        return {**counts, "num_preemptions": self.num_preemptions, **self.usage.plain()}


@dataclass
class Tally:
    """Counts of a run, which `note` and the run fill in.

    Args:
        outcomes: by kind of request and of outcome.
        features: how often each parameter was asked for.
        greedy: answers by number of the greedy request.
        verdicts: how many answers were EQUAL, TIE or WRONG.
        num_compared: tokens that were the plain ensemble's.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    greedy: dict[int, dict[Answer, Greedy]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    num_compared: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        request = outcome.request
        self.outcomes[request.kind, outcome.kind] += 1
        self.features.update(request.features)
        self.num_tokens += sum(len(answer.token_ids) for answer in outcome.answers)
        if outcome.kind == FAULT:
            self.faults.append(f"{request}: {outcome.why}")
        elif request.distinct is not None:
            for answer in outcome.answers:
                if answer.token_ids:
                    of_request = self.greedy.setdefault(request.distinct, {})
                    of_request.setdefault(answer, Greedy(request)).count += 1

    def usages(self) -> tuple[Usage, Usage]:
        """What the server held after the warm-up, the first half of the rounds, and at last.

        Caches of the allocator and of kernels grow with each new shape of a batch. Later they
        stop. What is leaked does not.
        """
        return self.rounds[(len(self.rounds) - 1) // 2].usage, self.rounds[-1].usage

    @property
    def num_requests(self) -> int:
        return self.outcomes.total()

    @property
    def num_preemptions(self) -> int:
        return sum(each.num_preemptions for each in self.rounds)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "requests": {
                kind: {outcome: self.outcomes[kind, outcome] for outcome in OUTCOMES}
                for kind in SHARES
            },
            "features": dict(sorted(self.features.items())),
            "num_tokens": self.num_tokens,
            "num_preemptions": self.num_preemptions,
            "greedy": {
                "num_requests": len(self.greedy),
                **{kind: self.verdicts[kind] for kind in (EQUAL, TIE, WRONG)},
                "num_equal_tokens": self.num_compared,
            },
            "rounds": [each.plain() for each in self.rounds],
            "faults": self.faults,
        }

    def table(self) -> str:
        """What a user reads at the end."""
        rows: list[tuple[str, str]] = []
        for kind in SHARES:
            counts = [
                f"{self.outcomes[kind, outcome]} {outcome}"
                for outcome in OUTCOMES
                if self.outcomes[kind, outcome]
            ]
            rows.append((f"{kind} requests", ", ".join(counts) or "none"))
        rows += [
            ("tokens read", f"{self.num_tokens:,}"),
            ("preemptions", f"{self.num_preemptions:,}"),
            ("greedy answers", f"{self.verdicts.total()} to {len(self.greedy)} requests"),
            ("  equal", f"{self.verdicts[EQUAL]}, {self.num_compared:,} tokens in all"),
            ("  equal up to a tie", f"{self.verdicts[TIE]}"),
            ("  wrong", f"{self.verdicts[WRONG]}"),
        ]
        if self.rounds:
            before, after = self.usages()
            rows += [
                ("memory", f"{before.memory_mb:.0f} MiB, then {after.memory_mb:.0f} MiB"),
                ("file handles", f"{before.handles}, then {after.handles}"),
            ]
            if before.device_mb is not None and after.device_mb is not None:
                text = f"{before.device_mb:.0f} MiB, then {after.device_mb:.0f} MiB"
                rows.append(("GPU memory", text))
        rows.append(("faults", f"{len(self.faults)}"))
        return tabulate(rows, tablefmt="plain")
