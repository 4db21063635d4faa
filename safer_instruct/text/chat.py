"""The tokenizer's chat template: what it writes before and after the user's message, and around the answer.

Nothing is guessed: the template is rendered with markers in place of the texts, once per tokenizer (a template may be
slow), and the rendering is split at the markers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from config.errors import UserError
from safer_instruct.text.display import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 60.0  # time limit for rendering a few short messages
_MEND = "fix the chat template in the tokenizer's folder"
_OTHERWISE = "; or use template=alpaca, hh, plain or vicuna"
# Template variables that turn thinking off: Qwen 3, GLM 4.5 and SmolLM 3; DeepSeek 3.1 and Granite 3.3.
_SWITCHES = ("enable_thinking", "thinking")
# A template is a program, so it can raise almost anything.
_FAILURES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TimeoutError, TypeError, ValueError,
)  # fmt: skip


class Turn(NamedTuple):
    """What a template writes around an answer."""

    lead: str = ""  # between the prompt and the answer
    close: str = ""  # between the answer and the token that ends it
    end_token: str = ""  # the token that ends the answer; "" for the tokenizer's EOS


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the strings that the tokenizer parses as special tokens anywhere in a text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((added | set(tokenizer.all_special_tokens)) - {""}))


def chat_frames(tokenizer: PreTrainedTokenizerBase | None, roles: Sequence[str]) -> list[str]:
    """Return what the chat template writes around the messages of a conversation that awaits an answer.

    `roles` are the roles of its N messages; the last message is the user's.

    Returns:
        N + 1 texts: before the first message, between each two, and after the last, up to where the answer begins.

    Raises:
        UserError: There is no template, it fails, or it does not show each message exactly once, in order.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"template=chat: the model's tokenizer has no chat template{_OTHERWISE}")
    first, *others = _split(_asked(tokenizer, str(tokenizer.chat_template), tuple(roles)), roles)
    return [without_bos(first, tokenizer), *others]


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Remove a leading BOS token, which many templates write, if the tokenizer adds one anyway."""
    bos = tokenizer.bos_token
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(bos)
    return text


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return what the chat template writes around an answer that follows `chat_frames`.

    Raises:
        UserError: The template does not put an answer where a prompted model would write it, so that training would
            place it inside a thought; or it writes nothing after the answer, so that no end would be trained.
    """
    asked, before, behind = _round_an_answer(tokenizer)
    if not before.startswith(asked):
        # Show only what follows the shared prefix.
        shared = next((i for i, pair in enumerate(zip(before, asked, strict=False)) if pair[0] != pair[1]), len(before))
        raise UserError(
            f"template=chat: a prompt ends in ...{asked[shared:]!r}, but before an answer the same template writes "
            f"...{before[shared:]!r}, so answers would be trained where a model never starts one (inside a thought); "
            f"{_switch(tokenizer)}{_OTHERWISE}"
        )
    lead = before[len(asked) :]
    if lead.strip() and asked == _render(tokenizer, ("user",)):
        raise UserError(
            f"template=chat: the template writes {lead!r} before an answer, but not where it asks for one "
            f"(add_generation_prompt), so the model would have to generate it; {_MEND}{_OTHERWISE}"
        )
    if not behind.strip():
        raise UserError(
            "template=chat: the template writes nothing after an answer, so a model would never learn to end one; "
            f"{_MEND}: write {{{{ eos_token }}}} after an assistant's content{_OTHERWISE}"
        )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    # Special tokens first: other added tokens, such as </think>, may come before the end.
    for tokens in (special_token_texts(tokenizer), added):
        found = sorted((behind.find(token), -len(token), token) for token in tokens if token in behind)
        if found:
            return Turn(lead, behind[: found[0][0]], found[0][2])
    return Turn(lead, behind.rstrip())


def _round_an_answer(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> tuple[str, str, str]:
    """Return (the prompt, what the template writes before an answer to that prompt, what it writes after it)."""
    asked = _render(tokenizer, ("user",), add_generation_prompt=True, **variables)
    both = ("user", "assistant")
    head, between, behind = _split(_render(tokenizer, both, **variables), both)
    return asked, head + _mark(0) + between, behind


def _switch(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fix to suggest: the template variable that makes prompts end where answers begin, if there is one."""
    for name in _SWITCHES:
        asked, before, _ = _round_an_answer(tokenizer, **{name: False})
        if before.startswith(asked):
            return f"write model.chat_template_kwargs.{name}=false"
    return _MEND


def chat_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token with which the chat template ends an answer; "" if there is no template that shows one."""
    if not tokenizer.chat_template:
        return ""
    try:
        return chat_turn(tokenizer).end_token
    except UserError:  # a template that works for prompting, but not for training
        return ""


@lru_cache(maxsize=256)  # a dataset has few distinct sequences of roles
def _asked(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> str:
    """Render messages and the generation prompt; `template`, the tokenizer's own, is only part of the cache key."""
    return _render(tokenizer, roles, add_generation_prompt=True)


def _mark(number: int) -> str:
    """Return the marker that stands for a message's text: no template contains it or has a reason to change it."""
    return f"\u2063Message{number}\u2063"


def _render(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], **options: Any) -> str:
    messages = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
    try:
        text = _applied(tokenizer, messages, **options)
        if any(_mark(number) in text for number in range(len(roles))):
            return text
        # Templates of vision models may only show typed parts (Llama Guard 3 1B and 11B).
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return _applied(tokenizer, parts, **options)
    except _FAILURES as error:
        reason = visible(str(error).strip().split("\n")[0][:200])
        unset = re.fullmatch(r"'(\w+)' is undefined", reason)  # ShieldGemma's guideline
        mend = unset and f"; {unset[1]} is set by chat_template_kwargs.{unset[1]}=TEXT beside the model's name_or_path"
        raise UserError(
            f"template=chat: the tokenizer's chat template fails on {_described(roles)}: {reason} "
            f"({type(error).__name__}){mend or _OTHERWISE}"
        ) from error


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    return _within(RENDER_SECONDS, lambda: str(tokenizer.apply_chat_template(messages, tokenize=False, **options)))


def _within(seconds: float, work: Callable[[], str]) -> str:
    """Return what `work` returns, within a time limit.

    Raises:
        TimeoutError: It takes longer. Its thread cannot be stopped, so it runs on until the process ends.
    """
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # re-raised in the waiting thread
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():
            raise
        raise TimeoutError(f"it has not ended after {seconds:g} s: loops inside loops?") from None


def _described(roles: Sequence[str]) -> str:
    return "one user's turn" if tuple(roles) == ("user",) else f"the turns {', '.join(roles)}"


def _split(text: str, roles: Sequence[str]) -> list[str]:
    """Split a rendering at the markers of its messages."""
    frames = []
    for number, role in enumerate(roles):
        frame, mark, text = text.partition(_mark(number))
        if not mark or _mark(number) in text:
            article = "an assistant's" if role == "assistant" else f"a {role}'s"
            raise UserError(
                f"template=chat: the tokenizer's chat template does not show {article} turn exactly once, in its place "
                f"among {_described(roles)}"
            )
        frames.append(frame)
    return [*frames, text]
