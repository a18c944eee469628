"""Two runs, example by example: whether their scores differ, and where their tokens differ.

This module pairs samples by example index. It does not know how an engine is made, only that one
can be opened for a configuration. The engine gives the margins where completions differ.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import ConfigError, one_line
from reports import statistics
from reports.runs import Run, differing_keys, iterate_samples, plain_runs
from reports.tables import markdown, number, with_interval

# Distance of neighbouring numbers from 16 to 32, by precision: 2 ** 4 times 2 ** -23 or 2 ** -7.
STEPS = {"float32": 2.0**-19, "bfloat16": 2.0**-3}
STEP_NOTE = (
    "Margin: the difference of the two largest log-probabilities of the plain ensemble, given the "
    "prompt and the tokens that both runs have in common. Logits often lie between 16 and 32. "
    f"There, neighbouring numbers are {STEPS['float32']:.1e} apart in float32 and "
    f"{STEPS['bfloat16']} in bfloat16. Adding the same numbers in another order can change a logit "
    "by several of these steps. 'below a step of' names the precisions in which a step is larger "
    "than the margin. In these precisions, both logits can be rounded to the same number."
)
DIVERGENCE_COLUMNS = (
    *("a", "b", "index", "task_id", "position", "token_a", "token_b", "text_a", "text_b"),
    *("top_1", "top_2", "margin", "below_step_of"),
)
# (configuration) -> a context that gives (engine, tokenizer, requests by example index); see
# `harness.run.open_engine`.
OpenEngine = Callable[[Mapping[str, Any]], AbstractContextManager[tuple[Any, Any, Mapping]]]


@dataclass(frozen=True)
class Divergence:
    """The first place where two completions differ.

    Args:
        index, task_id: of the example.
        position: in the completion, counted from 0.
        tokens: the tokens of the first and the second run there; None past the end of a completion.
        prefix: the tokens before the position, which both completions share.
        texts: both tokens as text; None before a tokenizer has decoded them.
        top: the two likeliest tokens of the plain ensemble there.
        margin: the difference of their log-probabilities (nats).
    """

    index: int
    task_id: str
    position: int
    tokens: tuple[int | None, int | None]
    prefix: tuple[int, ...] = ()
    texts: tuple[str, str] | None = None
    top: tuple[int, int] | None = None
    margin: float | None = None

    @property
    def below_steps(self) -> list[str]:
        return [name for name, step in STEPS.items() if self.margin < step]


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and how they differ.

    Args:
        a, b: the runs.
        counts: the number of samples of each run.
        num_both: the number of samples that both runs have.
        num_scored: the number of samples that both runs have a score for.
        means: mean scores of each run over these samples.
        interval: the interval of the mean difference, a minus b.
        test: whether the scores differ.
        differing: configuration keys in which the runs are not comparable.
        divergences: the first one of each sample that differs; None if the completions need not
            be equal, because a temperature is above 0 or `differing` has keys.
        note: why there are no margins, if margins were asked for.
    """

    a: Run
    b: Run
    counts: tuple[int, int]
    num_both: int
    num_scored: int
    means: tuple[float, float] | None
    interval: statistics.Interval | None
    test: statistics.Test | None
    differing: list[str] = field(default_factory=list)
    divergences: list[Divergence] | None = None
    note: str | None = None


def find_pairs(runs: Sequence[Run]) -> tuple[list[tuple[Run, Run]], list[Run]]:
    """Pair every run in which tokens are proposed with a run of its plain ensemble.

    If there are several plain runs, the one with the same seed is taken, else the first. Returns
    the pairs, and the runs that have no plain run.
    """
    pairs, alone = [], []
    for run in runs:
        if not run.scores or not run.config or run.is_plain:
            continue
        plain = [p for p in plain_runs(run, runs) if p.scores.keys() & run.scores.keys()]
        plain.sort(key=lambda other: other.flat.get("seed") != run.flat.get("seed"))
        if plain:
            pairs.append((run, plain[0]))
        else:
            alone.append(run)
    return pairs, alone


def compare(a: Run, b: Run) -> Comparison:
    """What two runs have in common, and how they differ.

    Raises:
        ConfigError: the runs have no sample in common, or do not have the same examples.
    """
    first, second = _samples(a), _samples(b)
    both = sorted(first.keys() & second.keys())
    if not both:
        raise ConfigError(f"'{a.path}' and '{b.path}' have no sample in common")
    for index in both:
        _check_same_task(a, b, first[index], second[index])
    pairs = [(first[index].get("score"), second[index].get("score")) for index in both]
    scored = [pair for pair in pairs if None not in pair]
    scores = [list(column) for column in zip(*scored, strict=True)]
    differing = differing_keys(a, b)
    greedy = a.temperature == 0 and b.temperature == 0 and not differing
    return Comparison(
        a,
        b,
        counts=(len(first), len(second)),
        num_both=len(both),
        num_scored=len(scored),
        means=tuple(sum(column) / len(column) for column in scores) if scored else None,
        interval=statistics.mean_interval([x - y for x, y in scored]),
        test=statistics.paired_test(*scores, a.is_graded or b.is_graded) if scored else None,
        differing=differing,
        divergences=_divergences(first, second, both) if greedy else None,
    )


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where two sequences differ, or one ends; None if they are equal."""
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def plain_config(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The configuration of the plain ensemble of a run: nobody proposes."""
    left_out = ("draft_model", "gamma", "max_gamma", "turn_order")
    method = {key: value for key, value in config["method"].items() if key not in left_out}
    llm = {**method.get("llm", {}), "speculative_config": None}
    return {**config, "method": {**method, "name": family, "llm": llm}}


def add_margins(
    comparisons: Sequence[Comparison], open_engine: OpenEngine, say: Callable[[str], None] = print
) -> list[Comparison]:
    """The same comparisons, with the texts and margins of their divergences filled in.

    The plain ensemble starts once for all comparisons of the same ensemble and data. If it cannot
    start, for example because the models are elsewhere, the comparison's `note` has the reason.
    """
    groups: list[list[int]] = []
    for i, comparison in enumerate(comparisons):
        if comparison.divergences:
            same = (g for g in groups if not differing_keys(comparisons[g[0]].a, comparison.a))
            group = next(same, None)
            if group is None:
                groups.append(group := [])
            group.append(i)
    done = list(comparisons)
    for group in groups:
        run = comparisons[group[0]].a
        wanted = [divergence for i in group for divergence in comparisons[i].divergences]
        say(f"starting the plain ensemble of {run.name} for {len(wanted)} margins")
        try:
            measured = iter(_measure(wanted, plain_config(run.config, run.family), open_engine))
        except (ValueError, RuntimeError, OSError) as error:
            for i in group:
                done[i] = replace(done[i], note=f"no margins: {one_line(error)}")
            continue
        for i in group:
            done[i] = replace(done[i], divergences=[next(measured) for _ in done[i].divergences])
    return done


def pairs_table(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """A row per comparison, in numbers."""
    return pd.DataFrame([_pair_row(comparison) for comparison in comparisons])


def divergences_table(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """A row per divergence."""
    rows = [
        _divergence_row(c, divergence) for c in comparisons for divergence in c.divergences or ()
    ]
    return pd.DataFrame(rows, columns=DIVERGENCE_COLUMNS)


def text(comparisons: Sequence[Comparison], alone: Sequence[Run] = ()) -> str:
    """Markdown for screen and file."""
    parts = [
        markdown(pd.DataFrame([_shown(c) for c in comparisons])),
        "Differences are a minus b, over the samples with a score in both runs, with a 95% "
        "bootstrap interval. p-values are not corrected for the number of comparisons.",
        *(_divergence_text(c) for c in comparisons if c.divergences),
    ]
    if any(d.margin is not None for c in comparisons for d in c.divergences or ()):
        parts.append(STEP_NOTE)
    if alone:
        parts.append(f"No run of the plain ensemble for: {', '.join(run.name for run in alone)}.")
    return "\n\n".join(parts) + "\n"


def _samples(run: Run) -> dict[int, dict[str, Any]]:
    return {sample["index"]: sample for sample in iterate_samples(Path(run.path))}


def _check_same_task(a: Run, b: Run, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    if first["task_id"] != second["task_id"]:
        raise ConfigError(
            f"sample {first['index']} is {first['task_id']} in '{a.path}' and {second['task_id']} "
            f"in '{b.path}': these runs have different data"
        )


def _divergences(
    first: Mapping[int, Any], second: Mapping[int, Any], both: Iterable[int]
) -> list[Divergence]:
    found = []
    for index in both:
        a, b = first[index]["token_ids"], second[index]["token_ids"]
        at = first_divergence(a, b)
        if at is not None:
            tokens = tuple(ids[at] if at < len(ids) else None for ids in (a, b))
            found.append(Divergence(index, first[index]["task_id"], at, tokens, tuple(a[:at])))
    return found


def _measure(
    divergences: Sequence[Divergence], config: Mapping[str, Any], open_engine: OpenEngine
) -> list[Divergence]:
    with open_engine(config) as (engine, tokenizer, requests):
        asked = []
        for i, divergence in enumerate(divergences):
            request = requests[divergence.index]
            asked.append(
                replace(
                    request,
                    index=i,  # one example may appear twice, with different prefixes
                    prompt_token_ids=[*request.prompt_token_ids, *divergence.prefix],
                    choices={},
                    sampling_params={"max_tokens": 1, "min_tokens": 0, "logprobs": 2},
                )
            )
        # One request at a time: other requests in the batch would change the rounding.
        answers = {answer.index: answer.logprobs[0] for answer in engine.generate(asked, 1)}
        return [
            _measured(divergence, answers[i], tokenizer) for i, divergence in enumerate(divergences)
        ]


def _measured(divergence: Divergence, logprobs: Mapping[int, float], tokenizer: Any) -> Divergence:
    top = sorted(logprobs, key=logprobs.get, reverse=True)[:2]
    return replace(
        divergence,
        texts=tuple("" if t is None else tokenizer.decode([t]) for t in divergence.tokens),
        top=tuple(top),
        margin=logprobs[top[0]] - logprobs[top[1]],
    )


def _pair_row(c: Comparison) -> dict[str, Any]:
    means, interval, test = c.means or (None, None), c.interval, c.test
    return {
        "a": c.a.name,
        "b": c.b.name,
        "method_a": c.a.flat.get("method.name"),
        "method_b": c.b.flat.get("method.name"),
        "dataset": c.a.flat.get("dataset.name"),
        "temperature": c.a.temperature,
        "samples_a": c.counts[0],
        "samples_b": c.counts[1],
        "samples_both": c.num_both,
        "samples_scored": c.num_scored,
        "score_a": means[0],
        "score_b": means[1],
        "difference": means[0] - means[1] if c.means else None,
        "difference_low": interval.low if interval else None,
        "difference_high": interval.high if interval else None,
        "difference_interval": interval.kind if interval else None,
        "test": test.kind if test else None,
        "p_value": test.p_value if test else None,
        "completions_equal": None if c.divergences is None else c.num_both - len(c.divergences),
        "differing_keys": " ".join(c.differing),
    }


def _shown(c: Comparison) -> dict[str, str]:
    row = _pair_row(c)
    if c.divergences is None:
        equal = "not compared: " + (", ".join(c.differing) or "temperature above 0")
    else:
        equal = f"{row['completions_equal']} of {c.num_both}"
    return {
        "a": c.a.name,
        "b": c.b.name,
        "data set": row["dataset"],
        "samples a, b, both": f"{c.counts[0]}, {c.counts[1]}, {c.num_both}",
        "score a": number(row["score_a"], 3),
        "score b": number(row["score_b"], 3),
        "difference": with_interval(row["difference"], c.interval, 3),
        "test": row["test"] or "no scores",
        "p": number(row["p_value"], 4),
        "equal completions": equal,
    }


def _divergence_row(c: Comparison, d: Divergence) -> tuple:
    texts, top = d.texts or (None, None), d.top or (None, None)
    below = None if d.margin is None else " ".join(d.below_steps)
    place = (c.a.name, c.b.name, d.index, d.task_id, d.position)
    return (*place, *d.tokens, *texts, *top, d.margin, below)


def _divergence_text(c: Comparison) -> str:
    rows = []
    for d in c.divergences:
        texts = d.texts or ("", "")
        row = {"sample": d.task_id, "position": str(d.position)}
        for name, token, string in zip("ab", d.tokens, texts, strict=True):
            row[f"token {name}"] = _token(token, string)
        if d.margin is not None:
            row["top two"] = ", ".join(map(str, d.top))
            row["margin"] = f"{d.margin:.3g}"
            row["below a step of"] = ", ".join(d.below_steps) or "neither"
        rows.append(row)
    heading = f"First divergences of {c.a.name} (a) from {c.b.name} (b)"
    if c.note:
        heading += f" ({c.note})"
    return f"{heading}:\n\n" + markdown(pd.DataFrame(rows), right=["position", "margin"])


def _token(token: int | None, string: str) -> str:
    if token is None:
        return "(end)"
    # Shown as code, which Markdown does not interpret. The quotes are double backticks, because the
    # text may hold a single one.
    return f"{token} `` {string!r} ``" if string else str(token)
