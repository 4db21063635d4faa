"""What a model folder says about decoding: context length, end tokens, generation_config.json."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig

from config.errors import UserError, first_line
from safer_instruct.generation.weights import UNUSABLE
from safer_instruct.generation.window import UNLIMITED
from safer_instruct.text.chat import chat_end_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def read_generation_config(source: Path | str) -> GenerationConfig | None:
    """Return the generation_config.json of a folder; None if it has none.

    Raises:
        UserError: It cannot be used.
    """
    file = Path(source) / "generation_config.json"
    if isinstance(source, str) or not file.is_file():
        return None
    try:
        config = GenerationConfig.from_pretrained(source)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, name)
            if not all(isinstance(one, int | None) for one in (ids if isinstance(ids, list) else [ids])):
                raise ValueError(f"{name}={ids!r} is not a token id")
        return config
    except UNUSABLE as error:
        raise UserError(
            f"{file} cannot be used ({first_line(error)}). Fix it, or move it away: the command's generation.* "
            "settings control decoding."
        ) from error


def context_of(model: PreTrainedModel) -> int:
    """Return the context length from a model's config, in tokens; UNLIMITED if it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's EOS, its chat template's, and generation_config.json's."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    turn_end = tokenizer.backend_tokenizer.token_to_id(chat_end_token(tokenizer))  # what template=chat trains
    return frozenset(token for token in (*listed, tokenizer.eos_token_id, turn_end) if token is not None)


class TextDecoder:
    """Tokens -> text without special tokens, but for those that are tags of a thought in some families of models."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thought_tags: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        tags = {tag for pair in thought_tags for tag in pair.split()} & set(tokenizer.all_special_tokens)
        self._kept = {tokenizer.convert_tokens_to_ids(tag): tag for tag in tags}

    def __call__(self, tokens: Sequence[int]) -> str:
        """Return the text of new tokens."""
        parts, start = [], 0
        for place, token in enumerate(tokens):
            if token in self._kept:
                parts += [self._decode(tokens[start:place]), self._kept[token]]
                start = place + 1
        return "".join([*parts, self._decode(tokens[start:])])

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def stop_where_answers_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """List all end tokens in the generation config that is saved with a checkpoint.

    Otherwise a base model trained on chats would not stop after its answer when other programs generate from it.
    """
    config = model.generation_config
    ends = end_tokens(model, tokenizer)
    if frozenset(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]) != ends:
        config.eos_token_id = sorted(ends)


def say_what_is_not_read(config: GenerationConfig, read: Collection[str]) -> None:
    """Log once which entries of generation_config.json have no effect here; `read` names those that have one."""
    entries = config.to_diff_dict()
    unread = sorted(entries.keys() - set(read) - {"transformers_version"})
    said = [f"{name}={entries[name]}" for name in unread if not name.startswith("_") and not name.endswith("_token_id")]
    if said:
        _say(", ".join(said))


@cache
def _say(unread: str) -> None:
    log.warning("note: ignored entries of generation_config.json (only the command's generation.* apply): %s", unread)
