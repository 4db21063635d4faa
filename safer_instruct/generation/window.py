"""The context of a local model: which prompts fit into it, and how they are encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config.errors import UserError
from safer_instruct.text.encoding import prompt_token_ids
from safer_instruct.text.prompts import Prompt, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 2**31


class Window:
    """The part of the context that is left for prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int, max_new_tokens: int, name: str) -> None:
        """Set the limits from the `context` of the model `name`, in tokens.

        Raises:
            UserError: The limit on new tokens leaves no room for a prompt.
        """
        self.max_prompt_tokens = context - max_new_tokens  # the end of a longer prompt's body is cut
        if self.max_prompt_tokens < 1:
            raise UserError(
                f"generation.max_new_tokens must leave room for the prompt: it is {max_new_tokens}, and the "
                f"context of the model {name} is {context} tokens. Use fewer new tokens, for example "
                f"generation.max_new_tokens={max(1, context // 2)}."
            )
        self._tokenizer = tokenizer
        self._words = f"{max_new_tokens} new tokens leave in the context of the model {name}"

    def require_room(self, prompt: Prompt) -> None:
        """Raise a UserError if even the prompt's template alone does not fit, as then no row would."""
        try:
            self.encode(prompt._replace(body=""))
        except Unusable as unusable:
            raise UserError(
                f"the prompt's template alone is longer than the {self.max_prompt_tokens} tokens that {self._words}; "
                "give fewer new tokens or another model"
            ) from unusable

    def encode(self, prompt: Prompt) -> tuple[list[int], bool]:
        """Return (tokens, whether the body was cut).

        Raises:
            Unusable: The prompt does not fit even without its body, or holds a special token's text.
        """
        ids = prompt_token_ids(self._tokenizer, prompt, self.max_prompt_tokens)
        # A cut prompt can be a few tokens short of the limit (the cut is made in the text), so check all close ones.
        near_limit = len(ids) > self.max_prompt_tokens - 16
        return ids, near_limit and len(prompt_token_ids(self._tokenizer, prompt, UNLIMITED)) > len(ids)
