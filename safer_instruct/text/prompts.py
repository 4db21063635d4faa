"""The prompt templates of training and generation; the experts' prompts are in `experts/`.

Every prompt ends right before the text that the model has to write. As in Alpaca's recipe, no space or newline follows
the last colon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from config.errors import UserError
from config.rules import suggest
from safer_instruct.text.chat import Turn, chat_frames, chat_turn
from safer_instruct.text.examples import Message, transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT, VICUNA, HH = "chat", "vicuna", "hh"

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
_REVERSED_LATER = (
    "Below is a conversation, and a response to the instruction that follows it. "
    "Write the instruction that the response is trying to complete.\n\n### conversation:\n"
)
# github.com/lm-sys/FastChat, conversation "vicuna_v1.1".
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# A (normalised) instruction with one of these has picked up a part of a prompt template.
TEMPLATE_MARKS = ("### instruction", "### response", "### input", "below is a response to a certain instruction")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Unusable(UserError):
    """A prompt that cannot be given to the model; `reason` names the cause in counts and ledgers."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Prompt(NamedTuple):
    """A prompt in three parts: if it is too long, the end of its body is cut, never its head or tail."""

    head: str
    body: str
    tail: str

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return self.head + self.body + self.tail


def cut_the_longer(head: str, first: str, between: str, second: str, tail: str) -> Prompt:
    """Return a prompt of two texts; the longer one is the body, to be cut if the prompt is too long."""
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

    In a dialogue the body is the earlier turns or the last turn, whichever is longer.
    """
    text = reversed_target(instruction, input)
    earlier, turn, last = text.rpartition(HUMAN)
    if turn:
        return cut_the_longer(HUMAN + " ", earlier, HUMAN, last, ASSISTANT)
    return Prompt(HUMAN + " ", text, ASSISTANT)


def render_plain(instruction: str, input: str = "") -> Prompt:
    """Render the instruction (and input) alone; the answer comes on the next line."""
    return Prompt("", reversed_target(instruction, input), "\n")


TEMPLATES: dict[str, Callable[[str, str], Prompt]] = {"alpaca": render_alpaca, HH: render_hh, "plain": render_plain}
TEMPLATE_NAMES = (*TEMPLATES, VICUNA, CHAT)


def render_prompt(
    name: str,
    instruction: str,
    input: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    system: str = "",
    history: Sequence[Message] = (),
) -> Prompt:
    """Render the prompt that asks for a response to `instruction`, the last turn of a conversation.

    Args:
        name: One of TEMPLATE_NAMES.
        instruction: The user's last message.
        input: Alpaca's second field, "" if there is none.
        tokenizer: Needed by `chat` for its chat template, and by `vicuna` for the EOS that ends earlier answers.
        system: The system prompt; "" leaves it to the template.
        history: The user and assistant messages before `instruction`.

    Raises:
        UserError: Unknown name, or `chat` with a tokenizer that has no chat template.
        Unusable: The template has no place for a system prompt or earlier turns, or the chat template rejects them.
    """
    if name not in TEMPLATE_NAMES:
        known = f"{suggest(name, TEMPLATE_NAMES)} Templates: {', '.join(TEMPLATE_NAMES)}"
        raise UserError(f"template={name}: there is no such template{known}")
    if system and name in TEMPLATES:
        raise Unusable("no_place_for_system", f"template={name} has no place for a system prompt; chat and vicuna do")
    if history and name in TEMPLATES and name != HH:
        raise Unusable("no_place_for_turns", f"template={name} has one turn; write template=chat, vicuna or hh")
    if name in TEMPLATES and not history:
        return TEMPLATES[name](instruction, input)
    messages = [*([Message("system", system)] if system else []), *history]
    messages.append(Message("user", reversed_target(instruction, input)))
    roles = [message.role for message in messages]
    try:
        frames = _FRAMES[name](roles, tokenizer)
    except UserError as error:
        if len(roles) == 1:  # fails even on a single question, so the conversation is not the cause
            raise
        raise Unusable("template_refuses", str(error)) from error
    return _put_round(frames, [message.content for message in messages], has_system=bool(system))


def _put_round(frames: Sequence[str], texts: Sequence[str], *, has_system: bool) -> Prompt:
    """Join N texts and the N + 1 pieces around them; the body is the longest turn, to be cut if need be."""
    body = max(range(has_system, len(texts)), key=lambda number: (len(texts[number]), number))
    pieces = [part for pair in zip(frames, texts, strict=False) for part in pair] + [frames[-1]]
    return Prompt("".join(pieces[: 2 * body + 1]), texts[body], "".join(pieces[2 * body + 2 :]))


def render_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Render a whole conversation, including its answer, with the chat template of the model that will judge it.

    Raises:
        UserError: The tokenizer has no chat template, or it does not show each message once.
    """
    frames = chat_frames(tokenizer, [message.role for message in messages])
    return _put_round(frames, [message.content for message in messages], has_system=False)


def _hh_frames(roles: Sequence[str], _: PreTrainedTokenizerBase | None) -> list[str]:
    marks = {"user": HUMAN, "assistant": ASSISTANT}
    return [*(marks[role] + " " for role in roles), ASSISTANT]


def _vicuna_frames(roles: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return frames for USER and ASSISTANT turns after the system prompt; EOS ends each answer, as in training."""
    marks = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
    frames = []
    for before, role in zip([None, *roles[:-1]], roles, strict=True):
        if before is None:
            frames.append("" if role == "system" else f"{_VICUNA} {marks[role]}")
        else:
            frames.append((_eos(tokenizer) if before == "assistant" else " ") + marks[role])
    return [*frames, " ASSISTANT:"]


def _eos(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.eos_token:
        raise UserError("template=vicuna: the tokenizer has no EOS token, with which earlier answers end")
    return str(tokenizer.eos_token)


# Roles of a conversation -> the text before, between and after its messages.
_FRAMES: dict[str, Callable[[Sequence[str], PreTrainedTokenizerBase | None], list[str]]] = {
    HH: _hh_frames,
    VICUNA: _vicuna_frames,
    CHAT: lambda roles, tokenizer: chat_frames(tokenizer, roles),
}


def answer_turn(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Turn:
    """Return what surrounds a response that follows `render_prompt`: text before and after it, and its end token.

    Raises:
        UserError: As in `chat.chat_turn` and `render_prompt`.
    """
    if name != CHAT:
        return Turn(lead=" ") if name in (HH, VICUNA) else Turn()  # a space after the last colon
    chat_frames(tokenizer, ["user"])  # raises if the tokenizer has no chat template
    assert tokenizer is not None
    return chat_turn(tokenizer)


def render_reversed(response: str, history: Sequence[Message] = ()) -> Prompt:
    """Render the prompt of reversed instruction tuning, which asks for the instruction (Safer-Instruct, section 3.1).

    With a `history`, which the paper does not cover, the instruction to write is the user's next turn.
    """
    tail = "\n\n### Instruction:"
    if not history:
        return Prompt(_REVERSED, response, tail)
    return cut_the_longer(_REVERSED_LATER, transcript(history), "\n\n### response:\n", response, tail)


def reversed_target(instruction: str, input: str = "") -> str:
    """Return the reversed model's target: the instruction, with Alpaca's input appended if there is one."""
    return f"{instruction}\n\n{input}" if input else instruction
