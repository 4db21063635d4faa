"""The context of a model on this machine: which prompts fit it, and how they are encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config.errors import UserError
from safer_instruct.text.encoding import prompt_token_ids
from safer_instruct.text.prompts import Prompt, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 2**31


class Window:
    """Room for prompts, beside the new tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int, max_new_tokens: int, name: str) -> None:
        """Take the context of the model `name`, in tokens.

        Raises:
            UserError: The limit on new tokens leaves no room for a prompt.
        """
        self.max_prompt_tokens = context - max_new_tokens  # the longest prompt; a longer one loses the end of its body
        if self.max_prompt_tokens < 1:
            raise UserError(
                f"generation.max_new_tokens must leave room for the prompt: it is {max_new_tokens}, and the "
                f"context of the model {name} is {context} tokens. Give fewer new tokens, for example "
                f"generation.max_new_tokens={max(1, context // 2)}."
            )
        self._tokenizer = tokenizer
        self._words = f"{max_new_tokens} new tokens leave in the context of the model {name}"

    def require_room(self, prompt: Prompt) -> None:
        """Raise a UserError if not even the prompt's template fits: then no row would."""
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
            Unusable: For a prompt that does not fit even without its body, or holds a special token's text.
        """
        ids = prompt_token_ids(self._tokenizer, prompt, self.max_prompt_tokens)
        # A cut can leave a few tokens of room (a body is cut between characters), so look at all that come close.
        near_limit = len(ids) > self.max_prompt_tokens - 16
        return ids, near_limit and len(prompt_token_ids(self._tokenizer, prompt, UNLIMITED)) > len(ids)
