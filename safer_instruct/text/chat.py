"""The tokenizer's chat template: what it writes before a user's words, behind them, and round the answer.

Nothing of it is guessed. The template is rendered with marks in the place of the texts, once for each tokenizer (a
template may be slow), and the rendering is split at the marks.
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

RENDER_SECONDS = 60.0  # of a few short messages
_MEND = "mend the chat template in the tokenizer's folder"
_OTHERWISE = "; or use template=alpaca, hh, plain or vicuna"
# By which templates leave a thought out: Qwen 3, GLM 4.5 and SmolLM 3; DeepSeek 3.1 and Granite 3.3.
_SWITCHES = ("enable_thinking", "thinking")
# A template is a program: it may fail in any way in which a computation on its own data can.
_FAILURES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TimeoutError, TypeError, ValueError,
)  # fmt: skip


class Turn(NamedTuple):
    """What a template writes round an answer."""

    lead: str = ""  # between the prompt and the answer
    close: str = ""  # between the answer and the token that ends it
    end_token: str = ""  # the token that ends it; "" for the tokenizer's EOS


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the strings that the tokenizer would read as a special token wherever they stand in a text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((added | set(tokenizer.all_special_tokens)) - {""}))


def chat_frames(tokenizer: PreTrainedTokenizerBase | None, roles: Sequence[str]) -> list[str]:
    """Return what the chat template writes round the messages of a conversation that asks for an answer.

    `roles` are those of N messages, the last of which is the user's.

    Returns:
        N + 1 texts: before the first message, between every two, and behind the last up to where the answer begins.

    Raises:
        UserError: There is no template, it fails, or it does not show each message exactly once, in order.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"template=chat: the model's tokenizer has no chat template{_OTHERWISE}")
    first, *others = _split(_asked(tokenizer, str(tokenizer.chat_template), tuple(roles)), roles)
    return [without_bos(first, tokenizer), *others]


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning of a prompt without the BOS token that many write, where the tokenizer adds it, too."""
    bos = tokenizer.bos_token
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(bos)
    return text


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return what the chat template writes round an answer behind `chat_frames`.

    Raises:
        UserError: The template does not show an answer where a model that is asked would write it, or writes nothing
            behind it: then a thought, or no end, would be trained.
    """
    asked, before, behind = _round_an_answer(tokenizer)
    if not before.startswith(asked):
        # Where they part: what stands before is of no interest.
        shared = next((i for i, pair in enumerate(zip(before, asked, strict=False)) if pair[0] != pair[1]), len(before))
        raise UserError(
            f"template=chat: a prompt ends in ...{asked[shared:]!r}, but before an answer the same template writes "
            f"...{before[shared:]!r}, so answers would be trained where a model never begins one (inside a thought); "
            f"{_switch(tokenizer)}{_OTHERWISE}"
        )
    lead = before[len(asked) :]
    if lead.strip() and asked == _render(tokenizer, ("user",)):
        raise UserError(
            f"template=chat: the template writes {lead!r} before an answer, but not where it asks for one "
            f"(add_generation_prompt), so a model would have to write it by itself; {_MEND}{_OTHERWISE}"
        )
    if not behind.strip():
        raise UserError(
            "template=chat: the template writes nothing behind an answer, so a model could not tell that one has "
            f"ended; {_MEND}, {{{{ eos_token }}}} behind an assistant's content{_OTHERWISE}"
        )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    # Special tokens first: others, such as </think>, may stand before the end.
    for tokens in (special_token_texts(tokenizer), added):
        found = sorted((behind.find(token), -len(token), token) for token in tokens if token in behind)
        if found:
            return Turn(lead, behind[: found[0][0]], found[0][2])
    return Turn(lead, behind.rstrip())


def _round_an_answer(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> tuple[str, str, str]:
    """Return what a model is asked with, what the template writes before the answer to the same, and behind it."""
    asked = _render(tokenizer, ("user",), add_generation_prompt=True, **variables)
    both = ("user", "assistant")
    head, between, behind = _split(_render(tokenizer, both, **variables), both)
    return asked, head + _mark(0) + between, behind


def _switch(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what to type for a template to ask where it answers: a variable of its own, if one does it."""
    for name in _SWITCHES:
        asked, before, _ = _round_an_answer(tokenizer, **{name: False})
        if before.startswith(asked):
            return f"write model.chat_template_kwargs.{name}=false"
    return _MEND


def chat_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that ends an answer by the chat template; "" where there is no template that says it."""
    if not tokenizer.chat_template:
        return ""
    try:
        return chat_turn(tokenizer).end_token
    except UserError:  # a template that can be asked, and not trained
        return ""


@lru_cache(maxsize=256)  # conversations of a dataset have few shapes
def _asked(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> str:
    """Render messages and the generation prompt; `template`, the tokenizer's, is there for the cache's key."""
    return _render(tokenizer, roles, add_generation_prompt=True)


def _mark(number: int) -> str:
    """Return what stands for a message's text while a template is applied: no template holds it, or may change it."""
    return f"\u2063Message{number}\u2063"


def _render(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], **options: Any) -> str:
    messages = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
    try:
        text = _applied(tokenizer, messages, **options)
        if any(_mark(number) in text for number in range(len(roles))):
            return text
        # Templates of models that see images may show nothing but typed parts (Llama Guard 3 1B and 11B).
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
    """Return what `work` returns.

    Raises:
        TimeoutError: It takes longer. Its thread cannot be stopped; it ends with the process.
    """
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # for the thread that waits
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
    """Split a rendering at the marks of its messages."""
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
