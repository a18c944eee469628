"""Prometheus counters of what members propose, in the front end: vLLM's stat logger plugin.

vLLM makes a `TurnMetrics` in every server, also for engines without members that take turns. It
does nothing there.
"""

from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm.chef.config import SCHEDULER, engine_turns
from vllm.chef.counts import CYCLES, TurnCounts, key, received

DOCUMENTATION = {
    "draft": "Tokens that members proposed, and that were to be judged.",
    "judged": "Draft tokens that were accepted or refused. The others follow a refused one.",
    "accepted": "Draft tokens that were accepted.",
}


class TurnMetrics(AggregateStatLoggerBase):
    """Counts of engines whose members take turns.

    - `vllm:ensemble_num_cycles`
    - `vllm:ensemble_num_draft_tokens`, `vllm:ensemble_num_judged_tokens` and
      `vllm:ensemble_num_accepted_tokens`, with the labels `member` and `position`
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.vllm_config, self.engine_indexes = vllm_config, engine_indexes
        self.counters: dict[int, dict[str, Counter]] = {}
        """By engine, and by the keys of `TurnCounts.sums`"""

    def log_engine_initialized(self) -> None:
        # vLLM's own logger is made after this one, and unregisters all metrics of vLLM first. So
        # ours are made here.
        config = self.vllm_config
        if config.scheduler_config.scheduler_cls != SCHEDULER:
            return
        names = ["model_name", "engine"]
        model = config.model_config.served_model_name
        cycles = Counter(
            "vllm:ensemble_num_cycles", "Steps in which tokens were decided, by request.", names
        )
        proposals = {
            kind: Counter(f"vllm:ensemble_num_{kind}_tokens", text, [*names, "member", "position"])
            for kind, text in DOCUMENTATION.items()
        }
        places = list(TurnCounts(engine_turns(config)).places())
        for engine in self.engine_indexes:
            self.counters[engine] = {CYCLES: cycles.labels(model, str(engine))} | {
                key(kind, *place): counter.labels(model, str(engine), *map(str, place))
                for kind, counter in proposals.items()
                for place in places
            }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        counters = self.counters.get(engine_idx)
        if counters is None or scheduler_stats is None:
            return
        for name, number in received(scheduler_stats).items():
            counters[name].inc(number)
