"""Server errors, classified by status and error code, and the part of them that may be shown."""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from safer_instruct.generation.completions import Request
from safer_instruct.text.display import visible, without_password

KEPT = "Finished rows are kept: the same command goes on from there."
# In an error's code or type: nothing is left to spend; unless it is a rate that is exceeded.
ACCOUNT, RATE = re.compile("arrear|balance(?!r)|billing|credit|payment|quota"), re.compile("rate.?limit|throttl")
# Error codes that are about one request's content or length.
ROW_CODES = {
    "content_filter", "content_policy_violation", "data_inspection_failed", "context_length_exceeded",
    "string_above_max_length",
}  # fmt: skip
MAX_SHOWN = 300  # characters of a server's own words
SAID = ("message", "detail", "status_msg")  # where servers have these
# Words of the prompts that servers use, too: such a word in a message quotes no row.
COMMON = {"answer", "check", "data", "language", "model", "request", "response", "this"}
MIN_SECRET = 8  # minimum characters of a real key; anything shorter is a placeholder for a server without keys


class Refused(Exception):
    """The server refuses a request, and would refuse it again if it were retried unchanged."""

    def __init__(self, status: int, words: str = "", *, about_row: bool = False) -> None:
        super().__init__(f"HTTP {status}{f': {words}' if words else ''}")
        self.reason = f"http_{status}"  # for `Generation.error`: http_400
        self.status = status
        self.about_row = about_row  # True if the server says that the row's content or length is the cause
        self.at = time.monotonic()  # time of the refusal, by the monotonic clock


class Failed(Exception):
    """An attempt that may succeed later."""

    def __init__(
        self, reason: str, wait_seconds: float | None = None, *, throttled: bool = False, words: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason = reason  # for the counts: http_500, timeout, no_connection, malformed_reply, unfinished
        self.words = words  # the server's own message
        self.wait_seconds = wait_seconds  # how long the server asks to wait, None if it does not say
        self.throttled = throttled  # True if requests were only sent too fast


def is_about_account(status: int, codes: Sequence[str]) -> bool:
    """Return whether the account has run out of credit; `codes` are the error's code and type."""
    return status == 402 or any(ACCOUNT.search(code.lower()) and not RATE.search(code.lower()) for code in codes)


def is_about_row(status: int, codes: Sequence[str]) -> bool:
    """Return whether the server says that it refuses this request because of its content or length."""
    return status == 413 or not ROW_CODES.isdisjoint(codes)


def is_address(url: str) -> bool:
    """Return whether a URL is well-formed as the address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = url.isprintable() and " " not in url and bool(parts.hostname)
        return is_whole and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # an unclosed bracket, or a port that is no number
        return False


def by_proxy(url: str) -> str:
    """Say that an address is reached through a proxy of the environment, "" if it is not."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if not urllib.request.getproxies() or urllib.request.proxy_bypass(host):
        return ""
    return f", through the proxy that the environment names (NO_PROXY={host} leaves it out)"


def own_words(fields: dict[str, Any], request: Request, secret: str = "") -> str:
    """Return what the server says in an error, "" where it shares a word with the request: it may quote the row."""
    said = str(next(filter(None, map(fields.get, SAID)), ""))[: 10 * MAX_SHOWN]
    if len(secret) >= MIN_SECRET:
        said = said.replace(secret, "***")
    said = visible(without_password(said))[:MAX_SHOWN]
    shared = set(re.findall(r"[\w-]{4,}", said.lower())) & set(re.findall(r"[\w-]{4,}", request.prompt.text.lower()))
    return "" if request.id != "the test" and shared - COMMON else " ".join(said.split()).rstrip(".")


def cause_of(error: BaseException) -> str:
    """Return the innermost cause: `Connection refused` rather than `Connection error.`.

    For other exceptions, return only the class: their texts may contain the request's headers, and thus the key.
    """
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, socket.gaierror):
        return error.strerror or "name not resolved"
    if isinstance(error, ssl.SSLError):  # its errno is OpenSSL's
        return getattr(error, "verify_message", "") or error.reason or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__
