"""The prompt strings of training and generation; those of the experts are in `experts/`.

Every prompt ends right before the text that the model has to write. As in Alpaca's recipe there is no space or newline
behind the last colon.
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
# No instruction holds one of these, normalised: it is a prompt's template that has leaked into it.
TEMPLATE_MARKS = ("### instruction", "### response", "### input", "below is a response to a certain instruction")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Unusable(UserError):
    """A prompt that no model can be asked; `reason` is the word for it in counts and ledgers."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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
        instruction: What is asked.
        input: Alpaca's second field, "" if there is none.
        tokenizer: Needed by `chat`, whose template it carries, and by `vicuna`, whose answers end in its EOS.
        system: What the assistant is told first; "" leaves it to the template.
        history: The messages before; the user's and the assistant's.

    Raises:
        UserError: unknown name, or `chat` with a tokenizer that has no chat template.
        Unusable: the template has no place for a system prompt or for earlier turns, or a chat template refuses these.
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
        if len(roles) == 1:  # what cannot ask one question has nothing to do with the conversation
            raise
        raise Unusable("template_refuses", str(error)) from error
    return _put_round(frames, [message.content for message in messages], has_system=bool(system))


def _put_round(frames: Sequence[str], texts: Sequence[str], *, has_system: bool) -> Prompt:
    """Join N texts and the N + 1 pieces round them. The body is the longest turn: it makes a prompt too long."""
    body = max(range(has_system, len(texts)), key=lambda number: (len(texts[number]), number))
    pieces = [part for pair in zip(frames, texts, strict=False) for part in pair] + [frames[-1]]
    return Prompt("".join(pieces[: 2 * body + 1]), texts[body], "".join(pieces[2 * body + 2 :]))


def render_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Render a whole conversation, its answer included, by the chat template of a model that is to judge it.

    Raises:
        UserError: The tokenizer has no chat template, or it does not show each message once.
    """
    frames = chat_frames(tokenizer, [message.role for message in messages])
    return _put_round(frames, [message.content for message in messages], has_system=False)


def _hh_frames(roles: Sequence[str], _: PreTrainedTokenizerBase | None) -> list[str]:
    marks = {"user": HUMAN, "assistant": ASSISTANT}
    return [*(marks[role] + " " for role in roles), ASSISTANT]


def _vicuna_frames(roles: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Write USER and ASSISTANT turns behind the system prompt; EOS ends each answer, as in training."""
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


# Of a conversation: its roles -> what is written before, between and behind its messages.
_FRAMES: dict[str, Callable[[Sequence[str], PreTrainedTokenizerBase | None], list[str]]] = {
    HH: _hh_frames,
    VICUNA: _vicuna_frames,
    CHAT: lambda roles, tokenizer: chat_frames(tokenizer, roles),
}


def answer_turn(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Turn:
    """Return what stands round a response behind `render_prompt`: before it, behind it, and the token that ends it.

    Raises:
        UserError: See `chat.chat_turn`; and as `render_prompt`.
    """
    if name != CHAT:
        return Turn(lead=" ") if name in (HH, VICUNA) else Turn()  # a space behind the last colon
    chat_frames(tokenizer, ["user"])  # refuses a tokenizer without a template
    assert tokenizer is not None
    return chat_turn(tokenizer)


def render_reversed(response: str, history: Sequence[Message] = ()) -> Prompt:
    """Render the prompt of reversed instruction tuning: it asks for the instruction (Safer-Instruct, section 3.1).

    With the messages that stood before it, for which the paper has no form, the instruction is the user's next turn.
    """
    tail = "\n\n### Instruction:"
    if not history:
        return Prompt(_REVERSED, response, tail)
    return cut_the_longer(_REVERSED_LATER, transcript(history), "\n\n### response:\n", response, tail)


def reversed_target(instruction: str, input: str = "") -> str:
    """Return what the reversed model has to write: the instruction, with Alpaca's input appended where there is one."""
    return f"{instruction}\n\n{input}" if input else instruction
