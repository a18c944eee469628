"""Clients that send requests to a server at the same time, over HTTP."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from soak.answers import Answer, PlainAnswer, find_malformed
from soak.requests import BAD, Request

ANSWERED, CANCELLED, REFUSED, FAULT = "answered", "cancelled", "refused", "fault"
# The most that vLLM's server gives by default.
NUM_LOGPROBS = 20
# The run ends when so many requests have failed. The others would say nothing new.
MAX_FAULTS = 20
PATH = "/v1/completions"


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Args:
        kind: ANSWERED, CANCELLED (by its client), REFUSED (as it must be) or FAULT.
        answers: what was read, one for each of `n`.
        why: one line if there is a fault.
    """

    request: Request
    kind: str
    answers: tuple[Answer, ...] = ()
    why: str | None = None


@dataclass
class _Read:
    """What was read of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: tuple[str, int | str | None] | None = None

    def add(self, choice: dict[str, Any]) -> None:
        self.token_ids += choice.get("token_ids") or ()
        self.text += choice["text"] or ""
        if choice["finish_reason"] is not None:
            self.reason = choice["finish_reason"], choice.get("stop_reason")

    def answer(self) -> Answer:
        return Answer(tuple(self.token_ids), self.text, self.reason)


async def send(client: httpx.AsyncClient, request: Request, timeout_s: float) -> Outcome:
    """Send one request, and read its answer as far as its client stays."""
    reads: dict[int, _Read] = {}
    leave_s = None if request.is_stream else request.leaves_after
    try:
        async with asyncio.timeout(timeout_s), _leaving(leave_s) as leaving:
            reading = _read_stream if request.is_stream else _read_whole
            kind, why = await reading(client, request, reads)
        if leaving.expired():
            kind, why = CANCELLED, None
    except TimeoutError:
        kind, why = FAULT, f"it has no whole answer after {timeout_s:g} s"
    except httpx.HTTPError as error:
        kind, why = FAULT, f"the connection broke: {error!r}"
    answers = tuple(reads[index].answer() for index in sorted(reads))
    if kind == ANSWERED and (why := find_malformed(answers, request.body)):
        kind = FAULT
    return Outcome(request, kind, answers, why)


@contextlib.asynccontextmanager
async def _leaving(seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
    """Break off after this time. The timeout that is yielded says whether it did."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield timeout
    except TimeoutError:
        if not timeout.expired():
            raise


Result = tuple[str, str | None]


async def _read_whole(
    client: httpx.AsyncClient, request: Request, reads: dict[int, _Read]
) -> Result:
    response = await client.post(PATH, json=request.body)
    if (result := _refusal(request, response.status_code, response.text)) is not None:
        return result
    for choice in response.json()["choices"]:
        reads.setdefault(choice["index"], _Read()).add(choice)
    return ANSWERED, None


async def _read_stream(
    client: httpx.AsyncClient, request: Request, reads: dict[int, _Read]
) -> Result:
    num_chunks = 0
    async with client.stream("POST", PATH, json=request.body) as response:
        if response.status_code != 200:
            await response.aread()
            return _refusal(request, response.status_code, response.text)
        if request.kind == BAD:
            return FAULT, "it must be refused, but is answered"
        if request.leaves_after == 0:
            return CANCELLED, None
        async for line in response.aiter_lines():
            content = line.removeprefix("data: ")
            if not content or content == "[DONE]":
                continue
            chunk = json.loads(content)
            if "error" in chunk:
                return FAULT, f"its stream has an error: {chunk['error']}"
            for choice in chunk["choices"]:
                reads.setdefault(choice["index"], _Read()).add(choice)
            num_chunks += 1
            if request.leaves_after is not None and num_chunks >= request.leaves_after:
                return CANCELLED, None
    return ANSWERED, None


def _refusal(request: Request, status: int, text: str) -> Result | None:
    """None if the answer is there, and may be."""
    if request.kind != BAD:
        return None if status == 200 else (FAULT, f"HTTP {status}: {' '.join(text.split())[:300]}")
    if status != 400:
        return FAULT, f"it must be refused with HTTP 400, but the answer has {status}"
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return FAULT, f"its refusal names no reason: {text[:300]!r}"
    if not message or len(message.splitlines()) != 1:
        return FAULT, f"its refusal is not one line: {message!r}"
    return REFUSED, None


class Crowd:
    """Clients that take one request after another, until a deadline or a number.

    Args:
        make: from the number of a request to the request.
        note: called with each outcome.
        is_alive: whether the server still runs.
    """

    def __init__(
        self,
        url: str,
        num_clients: int,
        timeout_s: float,
        make: Callable[[int], Request],
        note: Callable[[Outcome], None],
        is_alive: Callable[[], bool],
    ) -> None:
        self.url, self.num_clients, self.timeout_s = url, num_clients, timeout_s
        self._make, self._note, self._is_alive = make, note, is_alive
        self._numbers: Iterator[int] = itertools.count()
        self._num_faults = 0

    @property
    def has_given_up(self) -> bool:
        return self._num_faults >= MAX_FAULTS or not self._is_alive()

    def run(self, seconds: float, num_requests: int | None) -> None:
        """Send requests for this time, at most `num_requests`. All connections are closed then."""
        numbers = itertools.islice(self._numbers, num_requests)
        asyncio.run(self._run(time.monotonic() + seconds, numbers))

    async def _run(self, end: float, numbers: Iterator[int]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.num_clients // 2)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as client:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.num_clients):
                    group.create_task(self._client(client, end, numbers))

    async def _client(self, client: httpx.AsyncClient, end: float, numbers: Iterator[int]) -> None:
        while time.monotonic() < end and not self.has_given_up:
            number = next(numbers, None)
            if number is None:
                return
            outcome = await send(client, self._make(number), self.timeout_s)
            self._num_faults += outcome.kind == FAULT
            self._note(outcome)


def ask_plain(client: httpx.Client, body: dict[str, Any]) -> PlainAnswer:
    """The plain server's answer to a greedy request, sent alone.

    Raises:
        httpx.HTTPError: the server does not answer, or refuses the request.
    """
    asked = {**body, "logprobs": NUM_LOGPROBS, "return_tokens_as_token_ids": True}
    response = client.post(PATH, json=asked)
    if response.status_code != 200:
        text = " ".join(response.text.split())[:300]
        raise httpx.HTTPError(f"HTTP {response.status_code}: {text}")
    (choice,) = response.json()["choices"]
    read = _Read()
    read.add(choice)
    logprobs = [
        {int(name.removeprefix("token_id:")): value for name, value in at_position.items()}
        for at_position in choice["logprobs"]["top_logprobs"]
    ]
    return PlainAnswer(read.answer(), logprobs)
