"""The rows of one `generate` call to a server: which are in progress, when to retry each, and when to stop the run."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from safer_instruct.generation.completions import Generation, Request, second_answer, second_request
from safer_instruct.generation.faults import KEPT, Failed, Refused, by_proxy
from safer_instruct.generation.pacing import MAX_BACKOFF_SECONDS, Slots, backoff_seconds
from safer_instruct.text.prompts import Prompt

if TYPE_CHECKING:
    from safer_instruct.generation.server import OpenAIGenerator

log = logging.getLogger(__name__)

PROBE_RETRIES = 4  # few, so that an unreachable server is reported within seconds
ROWS_PER_SLOT = 4  # rows in progress per concurrent request: the others wait for their next attempt
REFUSALS = 10  # so many in a row, with no answer in between, are probably not about the rows
PROBE_SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"], "additionalProperties": False,
}  # fmt: skip
PROBE = Request("the test", Prompt("", "Reply with the single word: ready", ""))


class Run:
    """The state of one call of `generate`: rows in progress, and what is known about the server."""

    def __init__(self, generator: OpenAIGenerator, *, is_probe: bool = False) -> None:
        self.generator = generator
        self.settings = generator.settings
        self.slots = Slots(self.settings.concurrency)
        self.stopped: UserError | None = None  # why no more requests are sent; None while they are
        self._is_probe = is_probe
        self._retries = min(PROBE_RETRIES, self.settings.max_retries) if is_probe else self.settings.max_retries
        self._answered_at = time.monotonic()  # time of the last answer, or of the start of the run
        self._answered: Request | None = None  # the last answered request
        self._served_at = 0.0  # latest send time of any answered request
        self._refused: dict[str, Refused] = {}  # by row, until the cause is known
        self._warned: set[str] = set()
        self._one_probe = asyncio.Lock()
        self._jitter = random.Random()
        self._stop = asyncio.Event()

    async def answers(self, requests: Sequence[Request]) -> AsyncIterator[list[Generation]]:
        """Yield lists of the results that have arrived since the previous list."""
        finished: asyncio.Queue[tuple[asyncio.Task, Generation | None]] = asyncio.Queue()
        waiting = deque(requests)
        tasks: set[asyncio.Task] = set()

        async def row(client: Any, request: Request) -> None:
            result = None
            try:
                result = await self._row(client, request)
            except Refused as refused:
                self._refused[request.id] = refused
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
                while self.stopped is None and waiting and len(tasks) < ROWS_PER_SLOT * self.settings.concurrency:
                    tasks.add(asyncio.create_task(row(client, waiting.popleft())))
                if not tasks:
                    break
                batch = [await finished.get()]
                while not finished.empty():
                    batch.append(finished.get_nowait())
                tasks -= {task for task, _ in batch}
                for task, _ in batch:
                    await task  # raises what a bug in a row's code has raised
                if results := [result for _, result in batch if result is not None]:
                    yield results
                    self.slots.written(len(results))  # the caller asks for more only after recording these
                if abstained := await self._settle_refusals(client, is_last=not tasks and not waiting):
                    yield abstained
        if self.stopped is not None:
            raise self.stopped

    async def _settle_refusals(self, client: Any, *, is_last: bool) -> list[Generation]:
        """Return the refused rows as abstentions, once it is clear that the rows themselves are the cause.

        An account without credit also gets every row refused, and not every server reports this by a status or code. So
        a refusal is recorded only after a request that was sent later has been answered.
        """
        pending = [refused for refused in self._refused.values() if refused.at >= self._served_at]
        if pending and self.stopped is None and (is_last or len(pending) >= REFUSALS):
            await self._require_served(client, pending)
        settled = {id: refused for id, refused in self._refused.items() if refused.at < self._served_at}
        for id, refused in settled.items():
            del self._refused[id]
            if refused.reason not in self._warned:
                self._warned.add(refused.reason)
                log.warning("warning: row %s is an abstention, and others like it: %s", id, refused)
        return [Generation(id, "", error=refused.reason) for id, refused in settled.items()]

    async def _require_served(self, client: Any, pending: Sequence[Refused]) -> None:
        """Stop the run if the server refuses a request that it answered before (or a test), or has answered nothing."""
        before, many = self._answered, len(pending) >= REFUSALS
        try:
            if before is None and many:
                raise pending[-1]
            await self.ask(client, before if before is not None and many else PROBE)
        except Refused:
            self._stop_for(self.generator.refusal_error(pending[-1]))  # its message is already known to quote no row
        except UserError as error:
            self._stop_for(error)

    async def _row(self, client: Any, request: Request) -> Generation:
        """Request one row's answer, and ask once more if it cannot be read."""
        if self.generator.takes_schema is False:
            request = replace(request, schema=None)
        try:
            first = await self.ask(client, request)
        except Refused as refused:
            if refused.about_row:
                return Generation(request.id, "", error=refused.reason)
            if request.schema is None or self.generator.takes_schema:
                raise
            # Not known yet whether this server accepts a schema (`check` was not called): try without.
            request = replace(request, schema=None)
            first = await self.ask(client, request)
            self.generator.takes_schema = False
        again = second_request(request, first)
        if again is None:
            return first
        try:
            return second_answer(first, await self.ask(client, again))
        except (Refused, UserError) as error:
            # The first answer was paid for, so record it as it is before the run stops, if it has to.
            if isinstance(error, UserError):
                self._stop_for(error)
            return first

    async def ask(self, client: Any, request: Request) -> Generation:
        """Retry a request until it is answered, refused, or given up.

        If a row keeps failing while other rows, or a test, are answered, only that row is given up (a generation with
        an error). Otherwise the server is considered gone.

        Raises:
            Refused: See `attempt`.
            UserError: The server is gone, the budget is spent, or the run has been stopped because of another row.
        """
        failed_at, failures = time.monotonic(), 0
        while True:
            async with self.slots:
                self._require_going()
                sent_at = time.monotonic()
                try:
                    answer = await self.generator.attempt(client, request)
                except Failed as failed:
                    failure = failed
                else:
                    self._answered_at = time.monotonic()
                    self._answered, self._served_at = request, max(self._served_at, sent_at)
                    self.slots.replied(throttled=False)
                    return answer
                self.slots.replied(throttled=failure.throttled)
            failures += not failure.throttled
            wait = failure.wait_seconds
            if wait is None:
                wait = backoff_seconds(failures + failure.throttled, self._jitter.random())
            too_long = wait > self.settings.patience_seconds
            if failures > self._retries or too_long:
                others_are_answered = self._answered_at > failed_at and not too_long
                if others_are_answered or await self._is_alive(client):
                    return Generation(request.id, "", error=failure.reason.split()[0])
                self._stop_for(self._gone(request.id, failure))
            failed_at = time.monotonic()
            if failed_at - self._answered_at > self.settings.patience_seconds:
                self._stop_for(self._gone(request.id, failure))
            if self.stopped is not None:
                raise self.stopped
            with suppress(TimeoutError):  # wait, unless the run stops
                await asyncio.wait_for(self._stop.wait(), wait)

    def _require_going(self) -> None:
        if self.stopped is None and not self.generator.budget.allows(self.slots.in_flight - 1):
            self._stop_for(
                UserError(
                    f"the expert's budget is spent ({self.generator.budget.spent()}, of this shard): give a larger "
                    f"expert.max_cost or expert.max_tokens to continue. {KEPT}"
                )
            )
        if self.stopped is not None:
            raise self.stopped

    def _stop_for(self, error: UserError) -> None:
        self.stopped = self.stopped or error
        self._stop.set()

    async def _is_alive(self, client: Any) -> bool:
        """Send a test: if it is answered, only the row is at fault. One test at a time serves all rows."""
        if self._is_probe:
            return False
        asked_at = time.monotonic()
        async with self._one_probe:
            for failures in range(1, PROBE_RETRIES):
                if self._answered_at > asked_at:
                    return True
                try:
                    await self.generator.attempt(client, PROBE)
                    self._answered_at = time.monotonic()
                except Refused:
                    self._answered_at = time.monotonic()
                except Failed as failure:
                    wait = failure.wait_seconds
                    wait = backoff_seconds(failures, self._jitter.random()) if wait is None else wait
                    await asyncio.sleep(min(wait, MAX_BACKOFF_SECONDS))
        return self._answered_at > asked_at

    def _gone(self, id: str, failure: Failed) -> UserError:
        what = {
            "timeout": f"no answer within {self.settings.timeout_seconds:g} s",
            "http_429": f"HTTP 429: too many requests, even at {self.slots.limit} at a time",
            "unfinished": "it does not finish any answer",
            "malformed_reply": "it answers, but not with a completion; an OpenAI address usually ends in /v1",
        }.get(failure.reason, failure.reason.replace("http_", "HTTP ").replace("no_connection", "no answer"))
        what += by_proxy(self.generator.address) + (f": {failure.words}" if failure.words else "")
        tail = "" if self._is_probe else f" This was row {id}, with nothing answered in the meantime. {KEPT}"
        return UserError(f"{self.generator.address} ({self.generator.key}.base_url): {what}.{tail}")
