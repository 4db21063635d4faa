"""Text to tokens: one rule for where a prompt ends and its response begins, in training and generation.

A prompt is always encoded on its own, so a model sees the same prompt tokens in training and in generation. Prompt +
response are then encoded as one string; if that encoding begins with the prompt's tokens, the rest is the response. If
a merge straddles the boundary (":" + ")" may be one token ":)"), the prompt keeps its own tokens and the response is
encoded as it would be after them. BOS is left to the tokenizer. Every response that is not cut ends in the template's
end token, or in EOS if the template names none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from config.errors import UserError
from safer_instruct.text.chat import special_token_texts
from safer_instruct.text.prompts import Prompt, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# At least one of these texts ends in a token that does not merge with what follows. They show how a response is encoded
# when it is not at the start of a string (where sentencepiece would prepend a space).
_ANCHORS = ("\n", "a", "0", ".", "\n\n", " .")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of a prompt and its responses (one, or chosen and rejected)."""

    prompt: list[int]  # BOS (where the tokenizer adds it) and the prompt; the same for all responses
    responses: tuple[list[int], ...]  # each ends in its end token unless it was cut
    prompt_cut: bool  # whether the end of the prompt's body was cut
    responses_cut: tuple[bool, ...]  # for each response, whether its end was cut
    straddled: int  # responses whose first token would have merged with the prompt's last


class Encoder:
    """Encodes rows of text in batches; the fast tokenizer spreads each batch over the CPU cores.

    Args:
        tokenizer: A fast tokenizer from transformers.
        max_length: Maximum tokens of prompt + response, including BOS and EOS.
        max_prompt_length: Maximum tokens of the prompt, including BOS; less than max_length.

    Raises:
        UserError: The tokenizer is not a fast one, or has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_prompt_length: int) -> None:
        if not 0 < max_prompt_length < max_length:
            raise UserError(f"max_prompt_length={max_prompt_length} must be in 1..{max_length - 1} (max_length - 1)")
        if tokenizer.eos_token_id is None or not tokenizer.eos_token:  # old LLaMA conversions have ""
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so no response could end")
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self._eos: int = tokenizer.eos_token_id
        self._tokenizer = _Tokenizer(tokenizer)

    def encode(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]], *, end_token: str = ""
    ) -> list[EncodedRow | str]:
        """Encode N prompts, each with the same number of responses.

        Args:
            prompts: N prompts.
            responses: For each prompt, the text(s) that directly follow it.
            end_token: What ends each response; "" for EOS.

        Returns:
            N entries: a row, or the reason why there is none: "prompt_too_long" (the template leaves no room for the
            body) or "no_tokens" (the tokenizer encodes a response to nothing).
        """
        end = self._tokenizer.id_of(end_token) if end_token else self._eos
        fitted, prompt_ids = self._fit(prompts)
        pairs = list(zip(fitted, responses, strict=True))
        joint = iter(self._tokenizer.ids([prompt.text + text for prompt, texts in pairs if prompt for text in texts]))
        rows: list[EncodedRow | str] = []
        for original, ids, (prompt, texts) in zip(prompts, prompt_ids, pairs, strict=True):
            if prompt is None:
                rows.append("prompt_too_long")
                continue
            encoded = [self._response_ids(ids, next(joint), text) for text in texts]
            complete = all(response for response, _ in encoded)
            rows.append(self._finish(ids, encoded, end, prompt != original) if complete else "no_tokens")
        return rows

    def _fit(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt | None], list[list[int]]]:
        ids = self._tokenizer.ids([prompt.text for prompt in prompts])
        fitted: list[Prompt | None] = list(prompts)
        for i, prompt in enumerate(prompts):
            if len(ids[i]) > self.max_prompt_length:
                fitted[i], ids[i] = self._tokenizer.cut(prompt, self.max_prompt_length)
        return fitted, ids

    def _response_ids(self, prompt: list[int], joint: list[int], response: str) -> tuple[list[int], bool]:
        """Return the response's tokens after the prompt, and whether a merge straddled the boundary."""
        n = len(prompt)
        if joint[:n] == prompt:
            return joint[n:], False
        return self._tokenizer.ids_after_other_tokens(response), True

    def _finish(
        self, prompt: list[int], responses: list[tuple[list[int], bool]], end: int, prompt_cut: bool
    ) -> EncodedRow:
        """Append the end token to each response; each one that does not fit with it is cut independently."""
        room = self.max_length - len(prompt)
        ended = [[*ids, end] for ids, _ in responses]
        return EncodedRow(
            prompt=prompt,
            responses=tuple(ids[:room] for ids in ended),
            prompt_cut=prompt_cut,
            responses_cut=tuple(len(ids) > room for ids in ended),
            straddled=sum(straddled for _, straddled in responses),
        )


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int) -> list[int]:
    """Return the prompt's tokens for generation: exactly those used in training.

    `max_tokens` includes BOS; the end of a longer prompt's body is cut.

    Raises:
        Unusable: The prompt's template alone does not fit into `max_tokens` (reason "prompt_too_long"), or its body
            holds the text of a special token ("special_token"): the model would read the end or the beginning of a
            turn in the middle of the request. Such rows are never trained on either.
    """
    if any(token in prompt.body for token in special_token_texts(tokenizer)):
        raise Unusable("special_token", "a prompt holds the text of one of the tokenizer's special tokens")
    encode = _Tokenizer(tokenizer)
    ids = encode.ids([prompt.text])[0]
    if len(ids) > max_tokens:
        fitted, ids = encode.cut(prompt, max_tokens)
        if fitted is None:
            raise Unusable(
                "prompt_too_long",
                f"a prompt does not fit into {max_tokens} tokens: its template alone fills them; raise the limit",
            )
    return ids


class _Tokenizer:
    """The operations that we need from a fast tokenizer, without the EOS that some append to every text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: a fast tokenizer is needed (a folder with tokenizer.json)")
        self._tokenizer = tokenizer
        mask = tokenizer("a", return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
        self._num_suffix = next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def id_of(self, token: str) -> int:
        """Return the id of the token with this text."""
        return int(self._tokenizer.backend_tokenizer.token_to_id(token))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with BOS if the tokenizer adds it, and without EOS."""
        backend = self._tokenizer.backend_tokenizer  # what `tokenizer(texts)` calls, without its Python work per row
        backend.no_truncation()
        backend.no_padding()
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]
        return [ids[: len(ids) - self._num_suffix] for ids in encoded] if self._num_suffix else encoded

    def ids_after_other_tokens(self, text: str) -> list[int]:
        """Return the token ids of `text` when it follows tokens that it does not merge with."""
        joint = self.ids([anchor + text for anchor in _ANCHORS])
        for anchor_ids, ids in zip(self.ids(_ANCHORS), joint, strict=True):
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(self, prompt: Prompt, max_tokens: int) -> tuple[Prompt | None, list[int]]:
        """Return the prompt with as much of its body's start as fits, and its token ids; (None, []) if nothing does.

        The text itself is cut, at the end of a token, so that the result is an ordinary prompt.
        """
        body = prompt.body
        while True:
            shorter = prompt._replace(body=body)
            encoded = self._tokenizer(shorter.text, return_offsets_mapping=True, verbose=False)
            num_tokens = len(encoded["input_ids"]) - self._num_suffix
            if num_tokens <= max_tokens:
                return shorter, encoded["input_ids"][:num_tokens]
            start, stop = len(prompt.head), len(prompt.head) + len(body)
            ends = [end - start for begin, end in encoded["offset_mapping"] if start <= begin < end <= stop]
            excess = num_tokens - max_tokens
            body = body[: min(ends[-excess - 1], len(body) - 1)] if len(ends) > excess else ""
            if not body:
                return None, []


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that determines how a text is encoded and where an answer ends."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["truncation"], state["padding"]  # left over from the tokenizer's last call; the encoder uses neither
    state = [state, tokenizer.eos_token_id, tokenizer.chat_template, special_token_texts(tokenizer)]
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())
