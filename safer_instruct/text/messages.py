"""Conversations in the formats of data files, read into one internal form: system, user and assistant messages."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from config.errors import UserError
from safer_instruct.text.examples import Message
from safer_instruct.text.prompts import ASSISTANT, HUMAN
from safer_instruct.text.row_log import BadRow

# Names of the three roles in data files.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
_SPEAKER = re.compile(f"({HUMAN}|{ASSISTANT})")
_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|from|content|value)\1\s*:""")  # messages in JSON or Python
_PAIR = ("user", "assistant")
_EXPECTED = "a list of messages, each with a role (or from) and a content (or value)"

Messages = tuple[Message, ...]


def read_messages(value: Any, column: str) -> Messages:
    """Read a list of {"role", "content"} or {"from", "value"} messages, or the same list as text (in a CSV cell).

    Raises:
        BadRow: It is not such a list, or a role is unknown.
    """
    if isinstance(value, str):
        try:
            value = _read_literal(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow("not_messages", column, _EXPECTED) from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("not_messages", column, _EXPECTED)
    return tuple(_read_message(one, f"{column}[{number}]") for number, one in enumerate(value))


def _read_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text.strip())  # pandas writes lists as Python literals


def _read_message(value: Any, column: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow("not_messages", column, _EXPECTED)
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or role.casefold() not in ROLES:
        raise BadRow("unknown_role", column, "one of system, user, assistant (or human, gpt)")
    unread = [key for key in ("tool_calls", "function_call") if value.get(key)]
    unread += ["weight"] if value.get("weight", 1) == 0 else []  # OpenAI's mark of what is not to be trained on
    if unread:
        raise BadRow(f"unread_{unread[0]}", column, f"a message without {unread[0]}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise BadRow("not_text", column, "a text as content")
    return Message(ROLES[role.casefold()], content)


def is_messages(value: Any) -> bool:
    """Return whether a cell holds a conversation, possibly serialised as text, rather than a plain text."""
    return bool(_AS_TEXT.match(value)) if isinstance(value, str) else isinstance(value, Sequence)


def read_transcript(text: Any, column: str) -> Messages:
    r"""Read Anthropic's "\n\nHuman: ... \n\nAssistant: ..." transcript.

    Raises:
        BadRow: It does not begin with the human's turn, or it has no assistant turn.
    """
    _, *parts = _SPEAKER.split(text) if isinstance(text, str) and text.startswith(HUMAN) else [""]
    if ASSISTANT not in parts:
        dialogue = r'a dialogue from "\n\nHuman:" to "\n\nAssistant:", or datasets=[custom], which reads messages,'
        raise BadRow("broken_transcript", column, dialogue)
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return tuple(Message(roles[mark], said) for mark, said in zip(parts[::2], parts[1::2], strict=True))


def prompt_fields(messages: Messages, column: str) -> dict[str, Any]:
    """Return the Example fields of a conversation that awaits an answer: `system`, `history`, `instruction`.

    Raises:
        BadRow: The last message is not the user's, or a system message is not the first message.
    """
    system = messages[0].content if messages and messages[0].role == "system" else ""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns or turns[-1].role != "user":
        raise BadRow("no_user_turn", column, "a user's message before each answer")
    if any(turn.role == "system" for turn in turns):
        raise BadRow("late_system", column, "a system message in the first place only")
    return {"system": system, "history": turns[:-1], "instruction": turns[-1].content}


def read_to_answer(value: Any, column: str) -> tuple[Messages, str]:
    """Read a conversation as (messages before its last answer, that answer); any messages after it are left out.

    Raises:
        BadRow: It is not a conversation, or it has no answer.
    """
    messages = read_messages(value, column)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadRow("no_answer", column, "an assistant's message")
    return messages[: answers[-1]], messages[answers[-1]].content


def split_last(messages: Messages, column: str) -> tuple[Messages, str]:
    """Split a conversation into the messages before its last one, which is the assistant's, and that message's text.

    Raises:
        BadRow: It does not end with an assistant message.
    """
    if messages[-1].role != "assistant":
        raise BadRow("no_answer", column, "a conversation that ends with the assistant's message")
    return messages[:-1], messages[-1].content


def split_pair(chosen: Messages, rejected: Messages | None) -> tuple[Messages, str, str | None]:
    """Split two conversations into their shared prompt, the chosen answer and the rejected answer.

    Raises:
        BadRow: Their prompts differ, or one of them does not end with an assistant message.
    """
    asked, answer = split_last(chosen, "chosen")
    if rejected is None:
        return asked, answer, None
    asked_too, other = split_last(rejected, "rejected")
    if asked_too != asked:
        raise BadRow("prompts_differ", "rejected", "what chosen holds up to its last answer")
    return asked, answer, other


def read_response(cell: Any, column: str) -> tuple[Any, str, Messages]:
    """Split a conversation into its last answer, its system message, and the messages before the request.

    The user turn right before the answer is left out, because it is to be induced. Any other cell is a plain response.

    Raises:
        BadRow: The messages cannot be read, or there is no answer among them.
    """
    if not is_messages(cell):
        return cell, "", ()
    before, response = read_to_answer(cell, column)
    if before and before[-1].role == "user":
        before = before[:-1]
    if before and before[0].role == "assistant":
        before = before[1:]  # a greeting, or the rest of a truncated conversation: no request precedes it
    fields = prompt_fields((*before, Message("user", "")), column)
    history = tuple(Message(role, content.strip()) for role, content in fields["history"])
    if any(not message.content for message in history):
        raise BadRow("empty_turn", column, "a text in each message")
    return response, fields["system"].strip(), history


def write_history(messages: Messages) -> str:
    """Return the messages before an instruction (`Example.before`) as JSON; "" if there are none."""
    return json.dumps([message._asdict() for message in messages], ensure_ascii=False) if messages else ""


def has_history(value: Any) -> bool:
    """Return whether a cell of the column `history` holds messages before the instruction."""
    return bool(value) and value != "[]"


def history_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `read_history` of a row's column `history`, for callers that cannot drop the row.

    Raises:
        UserError: It holds something else (training would count this as a bad row).
    """
    try:
        return read_history(row.get("history"))
    except BadRow as bad:
        raise UserError(
            f"{where}: {bad.reason} in column {bad.column}: expected {bad.expected}; fix the row, or rename the "
            "column if it holds something else"
        ) from None


def read_history(value: Any) -> dict[str, Any]:
    """Read an Example's `system` and `history` from `write_history`'s JSON, messages, or (request, answer) pairs.

    Raises:
        BadRow: It is not such a list.
    """
    if not has_history(value):
        return {}
    if isinstance(value, list) and all(isinstance(one, list) and len(one) == len(_PAIR) for one in value):
        value = [{"role": role, "content": said} for one in value for role, said in zip(_PAIR, one, strict=True)]
    fields = prompt_fields((*read_messages(value, "history"), Message("user", "")), "history")
    return {name: fields[name] for name in ("system", "history")}
