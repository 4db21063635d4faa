"""How fast to send requests to a server, how long to wait between attempts, and when the budget is spent."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

BACKOFF_SECONDS = 0.5  # maximum wait after a first failure (the mean is half of it); doubles with each further one
MAX_BACKOFF_SECONDS = 30.0
WINDOW = 100  # replies after which the number of concurrent requests is adjusted
THROTTLED_SHARE = 1 / 3  # a window with a larger share of 429 replies lowers the limit
TOKENS_PER_PRICE = 1_000_000
MAX_WAIT_SECONDS = 86_400.0  # a longer wait cannot be meant seriously and is ignored


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
    """At most `limit` concurrent requests; the limit adapts to the share of "too many requests" replies.

    After each WINDOW of replies the limit shrinks by a quarter if more than a THROTTLED_SHARE of them were 429;
    otherwise it grows by a quarter, up to `maximum`. Waiters are served in order. An answer keeps its slot until it has
    been recorded, so that killing the process loses at most `limit` paid calls.
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
        """Keep a slot for an answer until it is recorded; call this before another waiter can take the slot."""
        self._unwritten += 1

    def written(self, count: int) -> None:
        """Free the slots of `count` recorded answers."""
        self._unwritten -= count
        self._wake()

    def replied(self, *, throttled: bool) -> None:
        """Count a reply, and adjust the limit at the end of a window."""
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
    """The limits on spending, what has been spent, and a reserve for the requests in flight."""

    max_cost: float | None = None  # in the currency of the prices; None: no limit
    max_tokens: int | None = None  # prompt and completion together; None: no limit
    price_prompt: float = 0.0  # per million prompt tokens
    price_completion: float = 0.0  # per million completion tokens
    cost: float = 0.0  # spent so far, including by earlier processes
    tokens: int = 0  # used so far, including by earlier processes
    # Largest cost of an answer so far, reserved for each request in flight. Until the first answer nothing is reserved,
    # so the first concurrent requests may exceed the budget.
    largest_cost: float = 0.0
    largest_tokens: int = 0  # the same in tokens

    def allows(self, in_flight: int) -> bool:
        """Return whether one more request may be sent while `in_flight` others are in flight."""
        reserved = in_flight + 1
        if self.max_tokens is not None and self.tokens + max(1, reserved * self.largest_tokens) > self.max_tokens:
            return False
        if self.max_cost is None:
            return True
        return self.cost < self.max_cost and self.cost + reserved * self.largest_cost <= self.max_cost

    def charge(self, prompt_tokens: int, new_tokens: int) -> float:
        """Count an answer, and return its cost."""
        cost = (prompt_tokens * self.price_prompt + new_tokens * self.price_completion) / TOKENS_PER_PRICE
        self.count(cost, prompt_tokens + new_tokens)
        return cost

    def count(self, cost: float, tokens: int) -> None:
        """Add the cost and tokens of one row."""
        self.cost += cost
        self.tokens += tokens
        self.largest_cost = max(self.largest_cost, cost)
        self.largest_tokens = max(self.largest_tokens, tokens)

    def spent(self) -> str:
        """Describe what has been spent of each limit, for messages."""
        parts = []
        if self.max_cost is not None:
            parts.append(f"cost {self.cost:.4f} of at most {self.max_cost:g}")
        if self.max_tokens is not None:
            parts.append(f"{self.tokens} of at most {self.max_tokens} tokens")
        return ", ".join(parts)
