"""The tokenizer's chat template: what it writes before a user's words, behind them, and round the answer.

Nothing of it is guessed. The template is rendered with marks in the place of the texts, once for each tokenizer (a
template may be slow), and the rendering is split at the marks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from config.errors import UserError
from safer_instruct.text.display import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# They stand for the texts while a template is applied: no template holds them.
_ASKED, _ANSWERED = "\u2063ASKED\u2063", "\u2063ANSWERED\u2063"
_USER = {"role": "user", "content": _ASKED}
_ASSISTANT = {"role": "assistant", "content": _ANSWERED}
_OTHERWISE = "; use template=alpaca, hh or plain"


class Turn(NamedTuple):
    """What a template writes round an answer.

    Attributes:
        lead: Between the prompt and the answer.
        close: Between the answer and the token that ends it.
        end_token: The token that ends it; "" for the tokenizer's EOS.
    """

    lead: str = ""
    close: str = ""
    end_token: str = ""


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the strings that the tokenizer would read as a special token wherever they stand in a text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((added | set(tokenizer.all_special_tokens)) - {""}))


def chat_frame(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """Return what the chat template writes before a user's words, and behind them up to where the answer begins.

    Raises:
        UserError: There is no template, it fails, or it does not show the words exactly once.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(f"template=chat: the model's tokenizer has no chat template{_OTHERWISE}")
    head, tail = _split(_asked(tokenizer, str(tokenizer.chat_template)), _ASKED, "a user's")
    # Many chat templates write the BOS token; where the tokenizer adds it too, the model would see it twice.
    bos = tokenizer.bos_token
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(bos)
    return head, tail


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return what the chat template writes round an answer behind `chat_frame`.

    Raises:
        UserError: The template does not show an answer where a model that is asked would write it: then no end, or a
            thought, would be trained.
    """
    asked = _asked(tokenizer, str(tokenizer.chat_template))
    before, behind = _split(_render(tokenizer, [_USER, _ASSISTANT]), _ANSWERED, "an assistant's")
    if not before.startswith(asked):
        # Where they part: what stands before is of no interest.
        shared = next((i for i, pair in enumerate(zip(before, asked, strict=False)) if pair[0] != pair[1]), len(before))
        raise UserError(
            f"template=chat: a model is asked with ...{asked[shared:]!r} at the end, where the same template writes "
            f"...{before[shared:]!r} before an answer, so answers would be trained in another place (inside a thought) "
            "than they have; set what the template offers, such as model.chat_template_kwargs.enable_thinking=false, "
            f"mend the template{_OTHERWISE}"
        )
    lead = before[len(asked) :]
    if lead.strip() and asked == _render(tokenizer, [_USER]):
        raise UserError(
            f"template=chat: the template writes {lead!r} before an answer, but not where it asks for one "
            f"(add_generation_prompt), so a model would have to write it by itself; mend the template{_OTHERWISE}"
        )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
    # Special tokens first: others, such as </think>, may stand before the end.
    for tokens in (special_token_texts(tokenizer), added):
        found = sorted((behind.find(token), -len(token), token) for token in tokens if token in behind)
        if found:
            return Turn(lead, behind[: found[0][0]], found[0][2])
    return Turn(lead, behind.rstrip())


def chat_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that ends an answer by the chat template; "" where there is no template that says it."""
    if not tokenizer.chat_template:
        return ""
    try:
        return chat_turn(tokenizer).end_token
    except UserError:  # a template that can be asked, and not trained
        return ""


@lru_cache(maxsize=8)
def _asked(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Render a user's turn and the generation prompt; `template`, the tokenizer's, is there for the cache's key."""
    return _render(tokenizer, [_USER], add_generation_prompt=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    # A template is a program: it may fail in any way in which a computation on its own data can.
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = visible(str(error).strip().split("\n")[0][:200])
        raise UserError(
            f"template=chat: the tokenizer's chat template fails on one user's turn: {reason} "
            f"({type(error).__name__}){_OTHERWISE}"
        ) from error


def _split(text: str, mark: str, whose: str) -> list[str]:
    if text.count(mark) != 1:
        raise UserError(f"template=chat: the tokenizer's chat template does not show {whose} turn exactly once")
    return text.split(mark)
