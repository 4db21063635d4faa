"""The rows of one call to a server: which are in play, when each is tried again, and when the run stops."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from config.errors import UserError
from config.settings import ServerSettings
from safer_instruct.generation.completions import Generation, Request
from safer_instruct.generation.pacing import Budget, Slots, backoff_seconds

PROBE = "Reply with the single word: ready"
PROBE_RETRIES = 4  # an unreachable server is to be said within seconds
ROWS_PER_SLOT = 4  # rows in play for each request at a time: the others wait for their next attempt
PROBE_SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"], "additionalProperties": False,
}  # fmt: skip
Messages = list[dict[str, str]]
PROBE_MESSAGES: Messages = [{"role": "user", "content": PROBE}]


KEPT = "Finished rows are kept: the same command goes on from there."


class Refused(Exception):
    """The server refuses this request because of its content; the message is an error of `Generation`."""


class Failed(Exception):
    """An attempt that may succeed later.

    Attributes:
        reason: For the counts: http_500, timeout, no_connection, malformed_reply.
        wait_seconds: What the server asked to wait, None if it did not.
        throttled: True if it was only asked too often.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None, *, throttled: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_seconds = wait_seconds
        self.throttled = throttled


class Server(Protocol):
    """What is asked; `server.OpenAIGenerator` is one. A `client` is its connection on the event loop that runs."""

    settings: ServerSettings
    budget: Budget
    key: str
    takes_schema: bool | None

    def open(self) -> Any:
        """Return a client, an asynchronous context manager with a `base_url`."""

    async def attempt(self, client: Any, id: str, messages: Messages, schema: Any) -> Generation:
        """Send one request; raises Refused, Failed, or a UserError where nothing can work."""


class Run:
    """One call of `generate`: what is in play, and what the server has shown of itself.

    Attributes:
        stopped: Why no further request is sent; None while they are.
    """

    def __init__(self, generator: Server, *, is_probe: bool = False) -> None:
        self.generator = generator
        self.settings = generator.settings
        self.slots = Slots(self.settings.concurrency)
        self.stopped: UserError | None = None
        self._is_probe = is_probe
        self._retries = min(PROBE_RETRIES, self.settings.max_retries) if is_probe else self.settings.max_retries
        self._answered_at = time.monotonic()  # or when the run began
        self._one_probe = asyncio.Lock()
        self._jitter = random.Random()
        self._stop = asyncio.Event()

    async def answers(self, requests: Sequence[Request]) -> AsyncIterator[list[Generation]]:
        """Yield the results that have come in since the last time, in lists."""
        finished: asyncio.Queue[tuple[asyncio.Task, Generation | None]] = asyncio.Queue()
        waiting = iter(requests)
        tasks: set[asyncio.Task] = set()

        async def row(client: Any, request: Request) -> None:
            result = None
            try:
                result = await self._row(client, request)
            except UserError as error:
                self._stop_for(error)
            finally:
                task = asyncio.current_task()
                assert task is not None
                if result is not None:
                    self.slots.hold()
                finished.put_nowait((task, result))

        async with self.generator.open() as client:
            while True:
                while self.stopped is None and len(tasks) < ROWS_PER_SLOT * self.settings.concurrency:
                    request = next(waiting, None)
                    if request is None:
                        break
                    tasks.add(asyncio.create_task(row(client, request)))
                if not tasks:
                    break
                batch = [await finished.get()]
                while not finished.empty():
                    batch.append(finished.get_nowait())
                tasks -= {task for task, _ in batch}
                for task, _ in batch:
                    await task  # a defect in a row's code is not swallowed
                if results := [result for _, result in batch if result is not None]:
                    yield results
                    self.slots.written(len(results))  # whoever asks for more has written these down
        if self.stopped is not None:
            raise self.stopped

    async def _row(self, client: Any, request: Request) -> Generation:
        """One request, and one more where its answer cannot be read."""
        messages = [{"role": "user", "content": request.prompt.text}]
        schema = request.schema if self.generator.takes_schema is not False else None
        try:
            first = await self.ask(client, request.id, messages, schema)
        except Refused as error:
            if schema is None or self.generator.takes_schema:
                return Generation(request.id, "", error=str(error))
            # Nobody has asked yet whether this server takes a schema (`check` was not called).
            try:
                first = await self.ask(client, request.id, messages, None)
            except Refused as again:
                return Generation(request.id, "", error=str(again))
            self.generator.takes_schema = False
        complaint = request.repair(first.text) if request.repair and not first.error else None
        if complaint is None:
            return first
        messages += [{"role": "assistant", "content": first.text}] if first.text.strip() else []
        messages += [{"role": "user", "content": complaint}]
        try:
            second = await self.ask(client, request.id, messages, schema)
        except (Refused, UserError) as error:
            # The first answer was paid for: it is recorded as what it is, and the run stops behind it if it must.
            if isinstance(error, UserError):
                self._stop_for(error)
            return replace(first, repaired=True)
        if second.error:
            second = replace(second, text=first.text, truncated=first.truncated, error="")
        return replace(
            second,
            prompt_tokens=first.prompt_tokens + second.prompt_tokens,
            new_tokens=first.new_tokens + second.new_tokens,
            cost=first.cost + second.cost,
            repaired=True,
        )

    async def ask(self, client: Any, id: str, messages: Messages, schema: Any) -> Generation:
        """Send a request until it is answered, refused, or given up.

        A row that fails again and again is given up alone (a generation with an error) where others were answered in
        the meantime, or a test is now; else the server is gone.

        Raises:
            Refused: See `attempt`.
            UserError: The server is gone, the budget is spent, or the run stops for another row's reason.
        """
        failed_at, failures = time.monotonic(), 0
        while True:
            async with self.slots:
                self._require_going()
                try:
                    answer = await self.generator.attempt(client, id, messages, schema)
                except Failed as failed:
                    failure = failed
                else:
                    self._answered_at = time.monotonic()
                    self.slots.replied(throttled=False)
                    return answer
                self.slots.replied(throttled=failure.throttled)
            failures += not failure.throttled
            if failures > self._retries:
                if self._answered_at > failed_at or await self._is_alive(client):
                    return Generation(id, "", error=failure.reason.split()[0])
                self._stop_for(self._gone(client, id, failure))
            failed_at = time.monotonic()
            wait = failure.wait_seconds
            if wait is None:
                wait = backoff_seconds(failures + failure.throttled, self._jitter.random())
            if max(wait, failed_at - self._answered_at) > self.settings.patience_seconds:
                self._stop_for(self._gone(client, id, failure))
            if self.stopped is not None:
                raise self.stopped
            with suppress(TimeoutError):  # a stop ends all waits
                await asyncio.wait_for(self._stop.wait(), wait)

    def _require_going(self) -> None:
        if self.stopped is None and not self.generator.budget.allows(self.slots.in_flight - 1):
            self._stop_for(
                UserError(
                    f"the expert's budget is spent ({self.generator.budget.spent()}, of this shard): give a larger "
                    f"expert.max_cost or expert.max_tokens to go on. {KEPT}"
                )
            )
        if self.stopped is not None:
            raise self.stopped

    def _stop_for(self, error: UserError) -> None:
        self.stopped = self.stopped or error
        self._stop.set()

    async def _is_alive(self, client: Any) -> bool:
        """Whether the server answers a test: then it is the row that it fails on. One test at a time, for all rows."""
        if self._is_probe:
            return False
        asked_at = time.monotonic()
        async with self._one_probe:
            for failures in range(1, PROBE_RETRIES):
                if self._answered_at > asked_at:
                    return True
                try:
                    await self.generator.attempt(client, "", PROBE_MESSAGES, None)
                    self._answered_at = time.monotonic()
                except Refused:
                    self._answered_at = time.monotonic()
                except Failed as failure:
                    wait = failure.wait_seconds
                    await asyncio.sleep(backoff_seconds(failures, self._jitter.random()) if wait is None else wait)
        return self._answered_at > asked_at

    def _gone(self, client: Any, id: str, failure: Failed) -> UserError:
        # The server's own words may quote the request, so only the row's id is shown.
        what = {
            "timeout": f"no answer within {self.settings.timeout_seconds:g} s",
            "http_429": f"HTTP 429: too many requests, even at {self.slots.limit} at a time",
            "malformed_reply": "it answers, but not with a completion; an OpenAI address usually ends in /v1",
        }.get(failure.reason, failure.reason.replace("http_", "HTTP ").replace("no_connection", "no answer"))
        tail = "" if self._is_probe else f" This was row {id}, with nothing answered in the meantime. {KEPT}"
        return UserError(f"{client.base_url} ({self.generator.key}.base_url): {what}.{tail}")
