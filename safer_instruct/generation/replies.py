"""Parse a server's reply, a text and how it ended, or an error, in the formats of the various servers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safer_instruct.generation.faults import MAX_SHOWN, SAID, Failed
from safer_instruct.text.display import visible

MAX_TOKENS = 10**9  # more than any reply can have used
# Words in a finish_reason: the text was withheld; it calls a tool, though none was offered; it was cut; it has ended.
_ENDS = {
    "content_filter": re.compile("block|filter|guardrail|moderat|prohibit|recitation|refus|safety|sensitive|toxic"),
    "tool_calls": re.compile("function|tool"),
    "truncated": re.compile("incomplete|length|limit|max_|not_finish|unfinish|window"),
    "": re.compile("complete|done|^end|eos|finish|stop"),
}
_ANSWERS = ("text", "output_text", "refusal")  # types of parts of a message; the others are thoughts


def error_fields(body: Any) -> dict[str, Any]:
    """Return the fields of an error (message, code, type, param): an object or a text, alone, in a list, or inside."""
    while inner := body[:1] if isinstance(body, list) else isinstance(body, dict) and _holder(body):
        body = inner[0] if isinstance(body, list) else inner
    if isinstance(body, str):
        return {} if body.lstrip().startswith("<") else {"message": body}  # HTML pages are for a browser
    return body if isinstance(body, dict) else {}


def _holder(body: Mapping[str, Any]) -> Any:
    return body.get("error") or body.get("base_resp")  # MiniMax has the latter


def error_status(fields: Mapping[str, Any], status: int) -> int:
    """Return the status of an error: a gateway may wrap the one that it got, as its code, into one of its own."""
    code = str(fields.get("code"))
    return int(code) if re.fullmatch("[45][0-9][0-9]", code) else status


def error_inside(body: Any) -> tuple[int, dict[str, Any]] | None:
    """Return the status and fields of an error that was sent as a completion; None if the reply holds no error."""
    choices = body.get("choices") if isinstance(body, dict) else None
    holders = [one for one in (body, *(choices or ())[:1]) if isinstance(one, dict) and one.get("error")]
    fields = error_fields(holders[0] if holders else {} if choices or isinstance(body, str) else body)
    if not holders and not any(isinstance(fields.get(name), str) for name in SAID):
        return None
    return error_status(fields, 500), fields


def read_finish(reason: Any) -> tuple[bool, str]:
    """Return, from a finish_reason, whether a text was cut at a limit, and why it is no answer ("" if it is one).

    Raises:
        Failed: The finish_reason is unknown, or says that the server broke off.
    """
    said = str(reason or "stop").lower()  # some servers give no reason
    for what, words in _ENDS.items():
        if words.search(said):
            return what == "truncated", what.replace("truncated", "")
    raise Failed("unfinished", words=f"finish_reason={visible(said)[:MAX_SHOWN]}")


def token_count(value: Any) -> int:
    """Return a number of tokens, 0 if the server does not report it.

    Raises:
        ValueError: It is not a plausible number; charging it to the budget would end the run.
    """
    if not isinstance(value, int | float | None) or not 0 <= (value or 0) <= MAX_TOKENS:
        raise ValueError("not a number of tokens")
    return int(value or 0)


def message_texts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return the answer in a message, and the thought that the server has split from it.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: It is not a message.
    """
    # Gemini leaves the content out where the thought took all tokens; OpenAI's models decline in a field of its own.
    content = message.get("content") or message.get("refusal") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if isinstance(content, list):  # parts, of which some are thoughts (Mistral)
        thought = "".join(_joined(part["thinking"]) for part in content if part.get("type") == "thinking")
    return _joined(content), thought if isinstance(thought, str) else ""


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    answers = (part for part in content if part.get("type", "text") in _ANSWERS)
    return "".join(part.get("text") or part.get("refusal") or "" for part in answers)


def utf8(text: str) -> str:
    """Return a text without lone surrogates, which JSON can contain."""
    return text.encode("utf-8", "replace").decode()
