"""Requests to a text generator and its results; this module loads no model library, so importing it is fast."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from config.settings import THOUGHT_TAGS, BackendSettings
from safer_instruct.text.examples import Message
from safer_instruct.text.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One text to generate; `id` names it in the results and seeds its sampling."""

    id: str  # unique among the requests of one call
    prompt: Prompt  # the text to continue or to answer
    # JSON schema of the answer, for servers that can enforce one; the answer is parsed strictly in any case.
    schema: Mapping[str, Any] | None = None
    # Maps the answer's text to a complaint for the model if it cannot be parsed, or to None if it can.
    repair: Callable[[str], str | None] | None = None
    turns: tuple[str, ...] = ()  # the turns after the prompt: the model's first answer, and the complaint about it
    # Instead of a prompt: messages to render with the model's own chat template.
    conversation: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of the request `id`."""

    id: str
    text: str  # the generated text without special tokens and without the thought before it
    truncated: bool = False  # True if the limit on new tokens ended the text, or the thought never ended
    prompt_tokens: int = 0  # tokens of the prompt, including the template; after a repair, of both requests
    new_tokens: int = 0  # tokens generated, including the end-of-sequence token; after a repair, of both requests
    prompt_cut: bool = False  # True if the prompt's body was cut to fit the context
    error: str = ""  # why there is no text ("" if there is one), from a small closed vocabulary such as "http_400"
    cost: float = 0.0  # cost of the tokens at the server's prices, in their currency
    thought: str = ""  # what a reasoning model wrote before its answer, tags included

    @property
    def tokens(self) -> int:
        """The tokens that it took, prompt and completion together."""
        return self.prompt_tokens + self.new_tokens


class TextGenerator(Protocol):
    """Anything that turns requests into texts."""

    name: str
    fingerprint: str

    def check(self) -> None:
        """Raise a UserError if generation cannot work (no key, no server). Cheap: loads nothing."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request, in any order, each as soon as it is ready."""


def describe_decoding(generation: BackendSettings) -> dict[str, Any]:
    """Return the settings that determine the output: no batch size, and no seed for greedy decoding."""
    names = ["max_new_tokens", "temperature"] + ["top_p", "seed"] * (generation.temperature > 0)
    backend = {} if generation.backend == "hf" else {"backend": generation.backend}
    tags = {} if generation.thought_tags == list(THOUGHT_TAGS) else {"thought_tags": list(generation.thought_tags)}
    return {**{name: vars(generation)[name] for name in names}, **backend, **tags}


def row_seed(seed: int, id: str, num_bytes: int = 8) -> int:
    """Return a row's sampling seed, which depends on (seed, id) only: non-negative, fits `num_bytes` signed bytes."""
    digest = hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little") >> 1


def split_thought(text: str, tags: Sequence[str], *, prompt: str = "") -> tuple[str, str, bool]:
    """Split the thought of a reasoning model from its answer, which follows the last closing tag (case-insensitive).

    If a later line opens another thought, the thought has not ended. Each tag is the "OPENING CLOSING" pair of a model
    family. Many chat templates end in the opening tag, so that `text` lacks it; hence the look at `prompt`.

    Returns:
        (thought, answer, whether the thought has ended); ("", text, True) if there is no thought.
    """
    pairs = [[re.compile(re.escape(part), re.IGNORECASE) for part in tag.split()] for tag in tags]
    end = max((found.end() for _, closing in pairs for found in closing.finditer(text)), default=0)
    spoken = _SPOKEN.match(text) if tags else None
    if spoken is not None and spoken[1]:
        end = max(end, spoken.end())
    thought, answer = text[:end], text[end:].lstrip() if end else text
    begun = [re.compile(rf"^[ \t]*{opening.pattern}", re.IGNORECASE | re.MULTILINE) for opening, _ in pairs]
    opened = not end and any(re.search(rf"{opening.pattern}\s*$", prompt, re.IGNORECASE) for opening, _ in pairs)
    if (
        opened
        or (spoken is not None and not spoken[1])
        or any(opening.search(answer) for opening in begun)
        or (tags and _CHANNEL.search(thought))
    ):
        return text, "", False
    wrapped = _WRAPPED.fullmatch(answer.strip()) if end else None
    return thought, wrapped[2].strip() if wrapped else answer, True


_CHANNEL = re.compile(r"<\|channel\|>(?!\s*final)[^<]*<\|message\|>$")  # of GPT-OSS: all but one are thoughts
_WRAPPED = re.compile(r"<(answer|response)>(.*)</\1>", re.IGNORECASE | re.DOTALL)  # behind a thought
# What begins a text where there are no tags: GPT-OSS's channels without their special tokens, Granite 3.2's sentences.
_SPOKEN = re.compile(
    r"\s*(?:analysis(?=\w)|Here(?:'s| is) my thought process:)(?s:.*?(assistantfinal|Here(?:'s| is) my response:))?"
)


def without_thought(generation: Generation, tags: Sequence[str], prompt: Prompt) -> Generation:
    """Move the thought out of the text; every generator passes its results through this."""
    thought, text, ended = split_thought(generation.text, tags, prompt=prompt.tail)
    truncated = generation.truncated or not ended
    return replace(generation, text=text, truncated=truncated, thought=generation.thought + thought)


def second_request(request: Request, first: Generation) -> Request | None:
    """Return a request for another answer if the first cannot be read; None if it can."""
    complaint = request.repair(first.text) if request.repair and not first.error else None
    return None if complaint is None else replace(request, repair=None, turns=(first.text.strip(), complaint))


def second_answer(first: Generation, second: Generation) -> Generation:
    """Return the second answer with the tokens and cost of both; if it failed, the first answer's text stays."""
    if second.error:  # for example, its longer prompt does not fit
        second = replace(second, text=first.text, truncated=first.truncated, thought=first.thought, error="")
    return replace(
        second,
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        new_tokens=first.new_tokens + second.new_tokens,
        cost=first.cost + second.cost,
    )
