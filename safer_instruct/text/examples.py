"""The Example that the stages pass on, its id, and the shard and split that it belongs to.

Nothing here prints corpus text or raises it: errors name the file and line, the column, or the row's id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ID_HEX_DIGITS = 16


class Message(NamedTuple):
    """One message of a conversation; its role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row on its way through the pipeline; None means "not known yet", and each stage fills in its results."""

    id: str  # hash of the text that the row was made from, or the id from its file
    instruction: str | None = None  # the user's request (induced, in Safer-Instruct)
    input: str = ""  # Alpaca's second field: the material that the instruction is about
    chosen: str | None = None  # the safe response
    rejected: str | None = None  # the unsafe response
    label: str = ""  # category of harm, "" if there is none
    # What made the row: models, prompts, seeds. Never needed to train.
    provenance: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""  # system prompt of the conversation, "" if there is none
    # The messages before `instruction`, which is the user's last message; () if there are none.
    history: tuple[Message, ...] = ()

    @property
    def user_turns(self) -> list[tuple[str, str]]:
        """What the user says, turn by turn, each with its `input`."""
        earlier = [(message.content, "") for message in self.history if message.role == "user"]
        return [*earlier, (self.instruction or "", self.input)]

    @property
    def response_id(self) -> str:
        """Id of the unsafe response and the conversation before it, from which an instruction is induced."""
        return text_id(*(text for message in self.history for text in message), self.rejected or "")

    @property
    def before(self) -> tuple[Message, ...]:
        """The messages before the instruction, with the system message first."""
        return ((Message("system", self.system),) if self.system else ()) + self.history

    @property
    def asked(self) -> str:
        """The instruction, preceded by the conversation that it continues, as a readable text."""
        instruction = self.instruction or ""
        return transcript((*self.before, Message("user", instruction))) if self.before else instruction


def transcript(messages: Sequence[Message]) -> str:
    """Return a conversation as one text."""
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def text_id(*texts: str) -> str:
    """Return the id of a row: 16 hex digits of blake2b over its texts. ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=ID_HEX_DIGITS // 2)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def short_hash(text: str, num_bytes: int = 8) -> str:
    """Return the blake2b hex digest of a text, which names a model, a prompt or a configuration in files."""
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).hexdigest()


def normalise(text: str) -> str:
    """Return the form in which instructions are compared, ignoring case and the kind and amount of whitespace."""
    return " ".join(text.split()).casefold()


def is_unicode(*texts: str) -> bool:
    r"""Return whether texts have no lone surrogate, such as JSON's "\ud800", which no tokenizer accepts."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _uniform_hash(text: str, salt: bytes) -> int:
    """Return a 64-bit hash that is uniform over texts and the same on every machine."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=salt).digest(), "little")


def in_shard(id: str, index: int, count: int) -> bool:
    """Return whether the row belongs to shard `index` (from 0) of `count`: a function of its id alone."""
    if not 0 <= index < count:
        raise ValueError(f"shard index must be in 0..{count - 1}; it is {index}")
    return _uniform_hash(id, b"shard") % count == index


def held_out(instruction: str, fraction: float) -> bool:
    """Return whether rows with this instruction are held out for evaluation, as about `fraction` of all instructions.

    It depends on the (normalised) instruction alone, so rows that share it never straddle the split, and the rows
    held out at a smaller fraction are a subset of those held out at a larger one.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the held-out fraction must be in 0..1; it is {fraction}")
    return _uniform_hash(normalise(instruction), b"held out") < fraction * 2.0**64
