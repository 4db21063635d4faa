"""The prompt strings of training and generation; those of the experts are in `experts/`.

Every prompt ends right before the text that the model has to write. As in Alpaca's recipe there is no space or newline
behind the last colon.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from config.errors import UserError
from safer_instruct.text.chat import Turn, chat_frame, chat_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_REVERSED = (
    "Below is a response to a certain instruction. "
    "Write the instruction that the response is trying to complete.\n\n### response:\n"
)
# No instruction holds one of these, normalised: it is a prompt's template that has leaked into it.
TEMPLATE_MARKS = ("### instruction", "### response", "### input", "below is a response to a certain instruction")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Prompt(NamedTuple):
    """A prompt in three parts: one that is too long loses the end of its body, never its head or tail."""

    head: str
    body: str
    tail: str

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return self.head + self.body + self.tail


def cut_the_longer(head: str, first: str, between: str, second: str, tail: str) -> Prompt:
    """Return the prompt of two texts, of which the longer is the body: it is what makes a prompt too long."""
    if len(first) > len(second):
        return Prompt(head, first, between + second + tail)
    return Prompt(head + first + between, second, tail)


def render_alpaca(instruction: str, input: str = "") -> Prompt:
    """Render Stanford Alpaca's prompt, with or without an input (github.com/tatsu-lab/stanford_alpaca, train.py)."""
    if input:
        return cut_the_longer(_ALPACA_INPUT, instruction, "\n\n### Input:\n", input, "\n\n### Response:")
    return Prompt(_ALPACA, instruction, "\n\n### Response:")


def render_hh(instruction: str, input: str = "") -> Prompt:
    r"""Render Anthropic's "\n\nHuman: ... \n\nAssistant:" transcript; `instruction` may hold earlier turns.

    Of a dialogue, the earlier turns or the last one, whichever is longer, are the body.
    """
    text = reversed_target(instruction, input)
    earlier, turn, last = text.rpartition(HUMAN)
    if turn:
        return cut_the_longer(HUMAN + " ", earlier, HUMAN, last, ASSISTANT)
    return Prompt(HUMAN + " ", text, ASSISTANT)


def render_plain(instruction: str, input: str = "") -> Prompt:
    """Render the instruction (and input) alone; the answer comes on the next line."""
    return Prompt("", reversed_target(instruction, input), "\n")


TEMPLATES: dict[str, Callable[[str, str], Prompt]] = {
    "alpaca": render_alpaca,
    "hh": render_hh,
    "plain": render_plain,
}
TEMPLATE_NAMES = (*TEMPLATES, CHAT)


def render_prompt(
    name: str, instruction: str, input: str = "", tokenizer: PreTrainedTokenizerBase | None = None
) -> Prompt:
    """Render the prompt that asks for a response to `instruction`.

    Args:
        name: One of TEMPLATE_NAMES.
        instruction: What is asked.
        input: Alpaca's second field, "" if there is none.
        tokenizer: Needed by `chat`, whose template it carries.

    Raises:
        UserError: unknown name, or `chat` with a tokenizer that has no chat template.
    """
    if name == CHAT:
        head, tail = chat_frame(tokenizer)
        return Prompt(head, reversed_target(instruction, input), tail)
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATE_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"template={name}: the templates are {', '.join(TEMPLATE_NAMES)}{hint}")
    return TEMPLATES[name](instruction, input)


def answer_turn(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Turn:
    """Return what stands round a response behind `render_prompt`: before it, behind it, and the token that ends it.

    Raises:
        UserError: See `chat.chat_turn`; and as `render_prompt`.
    """
    if name != CHAT:
        return Turn(lead=" ") if name == "hh" else Turn()  # a transcript has a space behind its last colon
    chat_frame(tokenizer)  # refuses a tokenizer without a template
    assert tokenizer is not None
    return chat_turn(tokenizer)


def render_reversed(response: str) -> Prompt:
    """Render the prompt of reversed instruction tuning: it asks for the instruction (Safer-Instruct, section 3.1)."""
    return Prompt(_REVERSED, response, "\n\n### Instruction:")


def reversed_target(instruction: str, input: str = "") -> str:
    """Return what the reversed model has to write: the instruction, with Alpaca's input appended where there is one."""
    return f"{instruction}\n\n{input}" if input else instruction
