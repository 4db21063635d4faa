"""What is asked of a text generator and what comes back; no model and no library here, so importing it is quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from safer_instruct.text.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One text to generate; `id` names it in the results and seeds its sampling.

    Attributes:
        id: Unique among the requests of one call.
        prompt: What to continue or to answer.
        schema: JSON schema of the answer, for servers that can hold to one; the answer is read strictly in any case.
        repair: Told the answer's text; returns what to say to a model whose answer cannot be read, None if it can.
    """

    id: str
    prompt: Prompt
    schema: Mapping[str, Any] | None = None
    repair: Callable[[str], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What came back for the request `id`.

    Attributes:
        id: The request's id.
        text: The generated text without special tokens.
        truncated: True if the limit on new tokens ended the text.
        prompt_tokens: Tokens of the prompt, template included; with a repair, of both requests.
        new_tokens: Tokens generated, the end-of-sequence token included; with a repair, of both requests.
        prompt_cut: True if the prompt's body was cut to fit the context.
        error: Why there is no text ("" if there is), from a small closed vocabulary such as "http_400".
        cost: What the server's prices make of the tokens, in the currency of the prices.
        repaired: True if a second answer was asked for because the first could not be read.
    """

    id: str
    text: str
    truncated: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    prompt_cut: bool = False
    error: str = ""
    cost: float = 0.0
    repaired: bool = False


class TextGenerator(Protocol):
    """Anything that turns requests into texts."""

    name: str
    fingerprint: str

    def check(self) -> None:
        """Raise a UserError if generation cannot work (no key, no server). Cheap: loads nothing."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request, in any order, each as soon as it is there."""
