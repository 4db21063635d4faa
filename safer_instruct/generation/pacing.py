"""How fast a server is asked, how long to wait between attempts, and when the budget is spent."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

BACKOFF_SECONDS = 0.5  # mean wait behind a first failure is half of it; doubles with each further one
MAX_BACKOFF_SECONDS = 30.0
WINDOW = 100  # replies after which the number of requests at a time is reconsidered
THROTTLED_SHARE = 1 / 3  # of a window's replies that are 429: more than that is no accident
TOKENS_PER_PRICE = 1_000_000
MAX_WAIT_SECONDS = 86_400.0  # longer than a server can seriously ask for


def backoff_seconds(failures: int, uniform: float) -> float:
    """Return a capped exponential back-off with full jitter: uniform in [0, min(cap, base x 2^(failures - 1)))."""
    return uniform * min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures - 1, 30))


def retry_after_seconds(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return how long the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date (RFC 9110).

    `now` is in seconds since the epoch.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name) or "") * unit
        except ValueError:
            continue
        if 0 <= seconds <= MAX_WAIT_SECONDS:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after") or "").timestamp()
    except (ValueError, OverflowError):  # no date, or one in the year 99999
        return None
    seconds = max(0.0, date - (time.time() if now is None else now))
    return seconds if seconds <= MAX_WAIT_SECONDS else None


class Slots:
    """At most `limit` requests at a time; the limit follows the share of replies that say "too many requests".

    After each WINDOW of replies it is cut by a quarter where more than a THROTTLED_SHARE of them were 429, and grows
    back by a quarter otherwise, up to `maximum`. Waiters are served in their order. An answer that has come but is not
    written down yet holds its place, so that a kill costs no more calls than run at a time.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = maximum
        self.in_flight = 0
        self._unwritten = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._replies = 0
        self._throttled = 0

    async def __aenter__(self) -> None:
        while self.in_flight + self._unwritten >= self.limit:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.in_flight += 1

    async def __aexit__(self, *_: object) -> None:
        self.in_flight -= 1
        self._wake()

    def hold(self) -> None:
        """Keep a place for an answer until it is written down; to be called before anything else can take the place."""
        self._unwritten += 1

    def written(self, count: int) -> None:
        """Free the places of `count` answers."""
        self._unwritten -= count
        self._wake()

    def replied(self, *, throttled: bool) -> None:
        """Count a reply."""
        self._replies += 1
        self._throttled += throttled
        if self._replies < WINDOW:
            return
        if self._throttled > THROTTLED_SHARE * self._replies:
            self.limit = max(1, self.limit * 3 // 4)
        else:
            self.limit = min(self.maximum, self.limit * 5 // 4 + 1)
        self._replies = self._throttled = 0
        self._wake()

    def _wake(self) -> None:
        for _ in range(min(len(self._waiting), max(0, self.limit - self.in_flight - self._unwritten))):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)


@dataclass
class Budget:
    """What may be spent, what has been, and what the requests under way may still cost."""

    max_cost: float | None = None  # in the currency of the prices; None: no limit
    max_tokens: int | None = None  # prompt and completion together; None: no limit
    price_prompt: float = 0.0  # of a million prompt tokens
    price_completion: float = 0.0  # of a million completion tokens
    cost: float = 0.0  # spent so far, by earlier processes too
    tokens: int = 0  # used so far, by earlier processes too
    # Of one answer: what each request under way is reckoned with. Before the first one is known, as many requests as
    # run at a time may exceed the budget.
    largest_cost: float = 0.0
    largest_tokens: int = 0  # the same in tokens

    def allows(self, in_flight: int) -> bool:
        """Return whether one more request may be sent while `in_flight` others are under way."""
        reserved = in_flight + 1
        if self.max_tokens is not None and self.tokens + max(1, reserved * self.largest_tokens) > self.max_tokens:
            return False
        if self.max_cost is None:
            return True
        return self.cost < self.max_cost and self.cost + reserved * self.largest_cost <= self.max_cost

    def charge(self, prompt_tokens: int, new_tokens: int) -> float:
        """Count an answer; returns what it cost."""
        cost = (prompt_tokens * self.price_prompt + new_tokens * self.price_completion) / TOKENS_PER_PRICE
        self.count(cost, prompt_tokens + new_tokens)
        return cost

    def count(self, cost: float, tokens: int) -> None:
        """Count what has been spent on one row."""
        self.cost += cost
        self.tokens += tokens
        self.largest_cost = max(self.largest_cost, cost)
        self.largest_tokens = max(self.largest_tokens, tokens)

    def spent(self) -> str:
        """Say what has been spent, against which limit."""
        parts = []
        if self.max_cost is not None:
            parts.append(f"cost {self.cost:.4f} of at most {self.max_cost:g}")
        if self.max_tokens is not None:
            parts.append(f"{self.tokens} of at most {self.max_tokens} tokens")
        return ", ".join(parts)
