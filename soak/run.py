"""The order of a run: the server of turns under load, rest, then the plain ensemble alone."""

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from harness.errors import RunError, one_line
from harness.run import device_name, versions
from harness.serving import Server
from soak.answers import WRONG, compare
from soak.clients import MAX_FAULTS, Crowd, ask_plain
from soak.process import Process
from soak.requests import Limits, RequestMaker
from soak.resources import (
    PREEMPTIONS,
    judge,
    measure,
    read_metrics,
    wait_for,
    what_is_left,
)
from soak.settings import HOST, MODEL_NAME, Plan
from soak.tally import Round, Tally

# Servers close their ends of connections a little later than clients.
HANDLES_S = 15
OVERRIDES = {
    "weighted": "ensemble_weights",
    "product": "ensemble_weights",
    "contrastive": "ensemble_alpha",
    "proxy_tuning": "ensemble_scale",
}


class Soak:
    """One run.

    Args:
        plan: what is run.
        port: at which both servers listen, one after the other.
        environment: of both servers.
    """

    def __init__(self, plan: Plan, port: int, environment: Mapping[str, str]) -> None:
        self.plan, self.settings = plan, plan.settings
        self.url = f"http://{HOST}:{port}"
        self.environment = environment
        self.folder = Path(self.settings.save_path)
        self.tally = Tally()
        self.start_date = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def run(self) -> Tally:
        """
        Raises:
            RunError: a server does not start, or dies. What was counted so far is on disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            maker = self._load_turns()
            self._replay(maker)
        except RunError as error:
            self.tally.faults.append(str(error))
            raise
        finally:
            self._save()
        return self.tally

    def _load_turns(self) -> RequestMaker:
        """The server of turns, from its start to its end."""
        with self._start("turns", self.plan.turns) as server:
            limits = self._limits(self.plan.turns)
            maker = RequestMaker(MODEL_NAME, limits, self.settings.seed, self.settings.distinct)
            crowd = Crowd(
                self.url,
                self.settings.clients,
                self.settings.request_s,
                maker.make,
                self.tally.note,
                server.is_alive,
            )
            for index in range(self.settings.rounds):
                self._round(index, crowd, server)
            allowed = self.settings.memory_allowance_mb, self.settings.handles_allowance
            self.tally.faults += judge(*self.tally.usages(), *allowed)
            if not self.tally.num_preemptions:
                self.tally.faults.append(
                    "no request was preempted; lower method.llm.num_gpu_blocks_override"
                )
            if (fault := server.end()) is not None:
                self.tally.faults.append(fault)
        return maker

    def _round(self, index: int, crowd: Crowd, server: Process) -> None:
        settings, tally = self.settings, self.tally
        num_before, start = tally.num_requests, time.monotonic()
        count = settings.num_requests
        if count is not None:
            count = count * (index + 1) // settings.rounds - count * index // settings.rounds
        crowd.run(settings.duration_s / settings.rounds, count)
        seconds = time.monotonic() - start
        if not server.is_alive():
            raise RunError(f"the turns server died under load: {server.last_line()}")
        if crowd.has_given_up:
            raise RunError(f"{MAX_FAULTS} requests failed; the first: {tally.faults[0]}")
        left = wait_for(
            lambda: self._ask(lambda: what_is_left(read_metrics(self.url))), settings.rest_s
        )
        if left is not None:
            tally.faults.append(f"the server does not rest {settings.rest_s:g} s later: {left}")
        if tally.rounds:
            most = tally.rounds[0].usage.handles + settings.handles_allowance
            wait_for(lambda: "more" if measure(server.pid).handles > most else None, HANDLES_S)
        metrics = self._ask(lambda: read_metrics(self.url))
        preempted = int(metrics[PREEMPTIONS]) - tally.num_preemptions
        done = Round(tally.num_requests - num_before, seconds, preempted, measure(server.pid))
        tally.rounds.append(done)
        print(
            f"round {index + 1} of {settings.rounds}: {done.num_requests} requests in "
            f"{seconds:.0f} s, {preempted} preemptions; at rest {done.usage.memory_mb:.0f} MiB, "
            f"{done.usage.handles} file handles",
            flush=True,
        )

    def _replay(self, maker: RequestMaker) -> None:
        """Each distinct greedy request alone, on the plain server."""
        if not self.tally.greedy:
            self.tally.faults.append("no greedy request was answered; give more duration_s")
            return
        with self._start("plain", self.plan.plain) as server:
            with httpx.Client(base_url=self.url, timeout=self.settings.request_s) as client:
                for distinct, answers in sorted(self.tally.greedy.items()):
                    body, _ = maker.greedy(distinct)
                    try:
                        plain = ask_plain(client, body)
                    except httpx.HTTPError as error:
                        if not server.is_alive():
                            raise RunError(
                                f"the plain server died: {server.last_line()}"
                            ) from error
                        self.tally.faults.append(
                            f"greedy request {distinct}: the plain server does not answer it: "
                            f"{one_line(error) or type(error).__name__}"
                        )
                        continue
                    for answer, greedy in answers.items():
                        verdict = compare(answer, plain, self.settings.tolerance)
                        self.tally.verdicts[verdict.kind] += greedy.count
                        equal = verdict.position
                        equal = len(answer.token_ids) if equal is None else equal
                        self.tally.num_compared += equal * greedy.count
                        if verdict.kind == WRONG:
                            times = f", {greedy.count} times" if greedy.count > 1 else ""
                            self.tally.faults.append(f"{greedy.request}{times}: {verdict.why}")

    def _start(self, name: str, server: Server) -> Process:
        process = Process(
            name,
            server.supervised_command(),
            self.environment,
            self.url,
            self.folder / f"{name}.log",
            server.seconds_to_end,
        )
        print(f"the {name} server starts ...", flush=True)
        try:
            process.wait_until_it_answers(self.settings.start_s)
        except BaseException:
            process.__exit__()
            raise
        return process

    def _limits(self, server: Server) -> Limits:
        """What the server that now runs takes."""
        ensemble = server.spec.engine_args["additional_config"]["ensemble"]
        members = [server.spec.engine_args["model"], *map(_name, ensemble["extra_model"])]
        card = self._ask(lambda: httpx.get(f"{self.url}/v1/models", timeout=30).json()["data"][0])
        asked = {"model": MODEL_NAME, "prompt": "a"}
        tokenized = self._ask(lambda: httpx.post(f"{self.url}/tokenize", json=asked, timeout=30))
        weights = ensemble.get("weights") or [1] * len(members)
        return Limits(
            vocab_size=min(map(_vocab_size, members)),
            max_model_len=card["max_model_len"],
            has_tokenizer=tokenized.status_code == 200,
            weights=tuple(weights),
            overrides=OVERRIDES.get(ensemble["ensemble_fn"]),
        )

    def _ask(self, ask: Any) -> Any:
        """
        Raises:
            RunError: the server does not answer.
        """
        try:
            return ask()
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise RunError(
                f"the server does not answer as it must: {error!r}; see {self.folder}"
            ) from error

    def _save(self) -> None:
        content = {
            "program": "soak",
            "date": self.start_date,
            "versions": versions(),
            "device": device_name(),
            "settings": vars(self.settings),
            "commands": {
                "turns": shlex.join(self.plan.turns.command()),
                "plain": shlex.join(self.plan.plain.command()),
            },
            **self.tally.plain(),
        }
        (self.folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")


def _name(member: str | Mapping[str, Any]) -> str:
    return member if isinstance(member, str) else member["model"]


def _vocab_size(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size
