"""What the rows of a benchmark say together: ratios, time in graphs, and what theory expects.

This module knows results as plain data. It measures nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plans import Run
from benchmarks.theory import run_of, tokens_per_cycle
from vllm.chef.turns import Turn, Turns

Row = dict[str, Any]


def complete(document: dict[str, Any]) -> None:
    """Add to every row what the rows so far allow; call this again when there are more rows."""
    rows = document["results"]
    engines = {entry["run"]: entry for entry in document["configurations"]}
    index = Index(rows)
    for row in rows:
        run, engine = Run.parse(row["run"]), engines.get(row["run"], {})
        row |= compared(row, run, index)
        row |= in_graphs(row, run, engine)
        row["theory"] = expected(row, run, engine, index)
    add_shares(rows)


class Index:
    """Rows of single models and plain ensembles, by batch size and sampling parameters."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {}
        for row in rows:
            run = Run.parse(row["run"])
            if run.policy is None:
                self.rows[run.plain_key[len(run.members) == 1 :], *self._cell(row)] = row

    def plain(self, run: Run, row: Row) -> float | None:
        """Milliseconds per token of the plain ensemble with the same output."""
        if len(run.counted) == 1:
            return self.alone(run.counted[0], row)
        return self._cost(run.plain_key, row)

    def alone(self, model: str, row: Row) -> float | None:
        """Milliseconds per token of one model alone."""
        return self._cost((model,), row)

    def _cost(self, key: tuple[str, ...], row: Row) -> float | None:
        found = self.rows.get((key, *self._cell(row)))
        return found and found["ms_per_token"]

    @staticmethod
    def _cell(row: Row) -> tuple[int, float, str]:
        return row["batch_size"], row["temperature"], str(row["sampling"])


def compared(row: Row, run: Run, index: Index) -> Row:
    """The row's fields that compare its cost with other runs:

    - the speed over each model alone,
    - for a plain ensemble of several members, its cost over the sum of the members' costs,
    - for a run in which tokens are proposed, the speed over the plain ensemble.

    A value is None if the other run was not measured.
    """
    alone = {model: index.alone(model, row) for model in run.models}
    cost = row["ms_per_token"]
    found: Row = {"speed_over_alone": {m: ms and ms / cost for m, ms in alone.items()}}
    if run.policy is None and len(run.members) > 1:
        parts = [alone[model] for model in run.members]
        found["ratio_to_members_alone"] = cost / sum(parts) if all(parts) else None
    if run.policy is not None:
        plain = index.plain(run, row)
        found["speed_over_plain"] = plain and plain / cost
    return found


def add_shares(rows: Sequence[Row]) -> None:
    """What remains of the speed over the plain ensemble if requests ask for more.

    The share is a row's speed over the plain ensemble, divided by the bare request's in the same
    run and batch. A bare request has temperature 0 and nothing else. A share is None if one of the
    two speeds is missing.
    """
    bare = {
        _but_request(row): row.get("speed_over_plain")
        for row in rows
        if row["temperature"] == 0 and not row["sampling"]
    }
    for row in rows:
        if "speed_over_plain" in row:
            speed, whole = row["speed_over_plain"], bare.get(_but_request(row))
            row["share_of_bare_speed"] = speed / whole if speed and whole else None


def _but_request(row: Row) -> tuple[str, int, float | None]:
    return row["run"], row["batch_size"], row["acceptance_set"]


def turns_of(engine: Mapping[str, Any]) -> Turns | None:
    """The turns of an engine's members, as its worker reported them."""
    told = engine.get("turns")
    if told is None:
        return None
    turns = tuple(Turn(tuple(members), gamma) for members, gamma in told["turns"])
    return Turns(turns, tuple(told["scores"]))


def in_graphs(row: Row, run: Run, engine: Mapping[str, Any]) -> Row:
    """Milliseconds of a cycle that are spent in each turn's CUDA graphs, and the rest.

    All values are None on a CPU. They are also None for turns whose requests use more than a
    temperature, because these requests run in other graphs, or without graphs. Only the first
    graph's time is known, and the rest is None, in two cases:
    - vLLM's own speculation, whose drafts are not timed,
    - gammas that change.
    """
    found: Row = {"graph_ms": None, "overhead_ms": None, "overhead_share": None}
    times, size = engine.get("graph_ms"), row["batch_size"]
    if times is None or (run.takes_turns and row["sampling"]):
        return found
    primary = at_least(times["primary"], size * (1 + run.window))
    found["graph_ms"] = {"primary": primary}
    turns = turns_of(engine)
    further = [] if turns is None else range(1, len(turns))
    if run.policy == "draft_model" or run.is_adaptive or len(times["turns"]) != len(further):
        return found
    parts = [in_turn(times["turns"][turn - 1], turn, turns, size) for turn in further]
    found["graph_ms"]["turns"] = parts
    spent = [primary, *(ms for part in parts for ms in part.values())]
    if None not in spent:
        found["overhead_ms"] = row["ms_per_cycle"] - sum(spent)
        found["overhead_share"] = found["overhead_ms"] / row["ms_per_cycle"]
        found["graph_ms"]["sum"] = sum(spent)
    return found


def in_turn(times: Mapping[str, Any], turn: int, turns: Turns, size: int) -> Row:
    """The times of a turn after the first: the pass that reads, and all passes of one token."""
    reading = at_least(times["reading"], size * turns.num_read(turn, 1 + turns.window))
    num_passes, passes = turns.num_passes(turn, turns[turn].gamma), 0.0
    if num_passes:
        one = at_least(times["passes"], size)
        passes = one and one * num_passes / times["passes_per_replay"]
    return {"reading": reading, "passes": passes}


def at_least(times: Mapping[Any, float], num_tokens: int) -> float | None:
    """The time of the smallest graph that holds `num_tokens`; vLLM pads the batch to it."""
    fitting = [int(size) for size in times if int(size) >= num_tokens]
    return {int(size): ms for size, ms in times.items()}[min(fitting)] if fitting else None


def expected(row: Row, run: Run, engine: Mapping[str, Any], index: Index) -> Row | None:
    """What `docs/algorithm.md` expects from the measured acceptance and costs.

    The cost of a cycle is the time of its graphs, compared with a token of the plain ensemble. If
    the time of the graphs is missing, each call costs as much as a token of its model alone.
    """
    if run.policy is None or run.is_adaptive:
        return None
    rates = [row["acceptance_set"] if rate is None else rate for rate in row["acceptance"]]
    tokens = expected_tokens(run, turns_of(engine), rates)
    cycle_ms, plain_ms, basis = (row["graph_ms"] or {}).get("sum"), index.plain(run, row), "graphs"
    if cycle_ms is None:
        alone = {model: index.alone(model, row) for model in run.models}
        if None not in alone.values():
            # A token of a model alone contains an engine step. So the plain ensemble is counted by
            # its models alone too, and the engine's overhead cancels out.
            basis, plain_ms = "models alone", sum(alone[model] for model in run.counted)
            calls = zip(row["calls_per_cycle"], run.models, strict=True)
            cycle_ms = sum(count * alone[model] for count, model in calls)
    ratio = plain_ms / cycle_ms if plain_ms and cycle_ms else None
    return {
        "tokens_per_cycle": tokens,
        "cycle_ms": cycle_ms,
        "cycle_ms_from": basis if cycle_ms else None,
        # Times the tokens of a cycle, this is the speed over the plain ensemble.
        "cost_ratio": ratio,
        "speed_over_plain": ratio and tokens and ratio * tokens,
    }


def expected_tokens(run: Run, turns: Turns | None, rates: Sequence[float | None]) -> float | None:
    """Tokens per cycle.

    Args:
        rates: acceptance by member; for vLLM's own speculation the last one is the proposer's.
    """
    if run.policy == "draft_model":
        return run_of(rates[-1], run.gammas[0])
    if turns is None:
        return None
    order = [(turn.members, turn.gamma) for turn in turns]
    if any(rates[members[0]] is None for members, gamma in order if gamma):
        return None
    return tokens_per_cycle(order, turns.counted, rates)
