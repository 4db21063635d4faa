"""Prompts -> texts: one protocol, a causal LM here (`HFGenerator`) or a server (`server.OpenAIGenerator`).

The text of a row does not depend on the rows beside it: greedy decoding, or sampling from random numbers that are
a function of (seed, row id) alone. So shards, restarts and batch sizes change nothing (up to ties that floating-point
noise can turn). B = rows of a batch, T = prompt positions, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from config.errors import UserError
from config.settings import GenerationSettings
from safer_instruct.generation.completions import Generation, Request, TextGenerator
from safer_instruct.text.chat import chat_end_token
from safer_instruct.text.encoding import Unusable, prompt_token_ids
from safer_instruct.text.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generation", "HFGenerator", "Request", "TextGenerator", "nucleus", "row_uniforms"]

ROUND_TOKENS = 16  # finished rows leave the batch every so many new tokens (2.4 x the tokens/s where a few are long)
# Entries of generation_config.json that count from the start of a `generate` call: with these there is one round.
COUNTING_ENTRIES = (
    "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "min_length", "min_new_tokens",
)  # fmt: skip


class HFGenerator:
    """Batched generation with a causal LM of transformers.

    Requests are sorted by length, longest first, and batched under a budget of padded positions
    (`settings.max_batch_tokens`); prompts are padded on the left; rows that met their end leave the batch. The
    model's generation_config.json is respected (`suppress_tokens`, further end tokens, ...), except for its sampling
    parameters, which are ours.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        *,
        name: str = "local",
        fingerprint: str = "",
        max_length: int | None = None,
    ) -> None:
        """Bind a model; nothing is computed.

        Args:
            model: A causal LM on its device.
            tokenizer: Its tokenizer, with a pad token.
            settings: Decoding.
            name: Shown in reports.
            fingerprint: Identifies weights and tokenizer in ledgers.
            max_length: Context in tokens; None: the model's `max_position_embeddings`.

        Raises:
            UserError: The limit on new tokens leaves no room for a prompt.
        """
        self.name = name
        self.fingerprint = fingerprint
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        context = max_length or model.config.max_position_embeddings
        self.max_prompt_tokens = context - settings.max_new_tokens
        if self.max_prompt_tokens < 1:
            raise UserError(
                f"generation.max_new_tokens must leave room for the prompt: it is {settings.max_new_tokens}, and the "
                f"context of the model {name} is {context} tokens. Give fewer new tokens, for example "
                f"generation.max_new_tokens={max(1, context // 2)}."
            )
        self.end_tokens = _end_tokens(model, tokenizer)
        configured = model.generation_config.to_dict()
        counts = any(configured.get(name) for name in COUNTING_ENTRIES)
        self._round_tokens = settings.max_new_tokens if counts else ROUND_TOKENS

    def check(self) -> None:
        """Nothing can be missing: the model is here."""

    def require_room(self, prompt: Prompt) -> None:
        """Raise a UserError if not even the prompt's template fits: then no row would."""
        room = self.max_prompt_tokens
        try:
            prompt_token_ids(self.tokenizer, prompt._replace(body=""), room)
        except UserError:
            raise UserError(
                f"the prompt's template alone is longer than the {room} tokens that {self.settings.max_new_tokens} new "
                f"tokens leave in the context of the model {self.name}; give fewer new tokens or another model"
            ) from None

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield the generations batch by batch, longest prompts first.

        A row whose prompt cannot be asked gets the error that `prompt_token_ids` names: "prompt_too_long", for example.
        """
        encoded: dict[str, list[int]] = {}
        by_id = {request.id: request for request in requests}
        for request in by_id.values():
            try:
                encoded[request.id] = prompt_token_ids(self.tokenizer, request.prompt, self.max_prompt_tokens)
            except Unusable as unusable:
                yield Generation(request.id, "", error=unusable.reason)
        for generation in self.generate_from_tokens(encoded):
            prompt = by_id[generation.id].prompt
            yield replace(generation, prompt_cut=self._was_cut(prompt, encoded[generation.id]))

    @torch.no_grad()
    def generate_from_tokens(self, prompts: Mapping[str, list[int]]) -> Iterator[Generation]:
        """Yield the generations behind prompts that are token ids already: id -> at most `max_prompt_tokens` of them.

        For prompts of a token store: decoding and encoding them again need not give the same tokens.
        """
        ids = list(prompts)
        for rows in self._batches([len(prompts[id]) for id in ids]):
            yield from self._generate_batch([ids[i] for i in rows], [prompts[ids[i]] for i in rows])

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Cut the row numbers, sorted by falling length, so that rows x (longest prompt + new tokens) <= budget."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        start = 0
        while start < len(order):
            width = lengths[order[start]] + self.settings.max_new_tokens
            num_rows = max(1, self.settings.max_batch_tokens // width)
            yield order[start : start + num_rows]
            start += num_rows

    def _generate_batch(self, ids: Sequence[str], prompts: Sequence[list[int]]) -> Iterator[Generation]:
        was_training = self.model.training
        self.model.eval()
        try:
            new_tokens = self._decode(ids, prompts)
        finally:
            self.model.train(was_training)
        for id, prompt, tokens in zip(ids, prompts, new_tokens, strict=True):
            ended = tokens[-1] in self.end_tokens
            yield Generation(
                id=id,
                text=str(self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)),
                truncated=not ended,
                prompt_tokens=len(prompt),
                new_tokens=len(tokens),
            )

    def _was_cut(self, prompt: Prompt, tokens: list[int]) -> bool:
        # A cut can leave a few tokens of room (a body is cut between characters), so look at all that come close.
        near_limit = len(tokens) > self.max_prompt_tokens - 16
        return near_limit and len(prompt_token_ids(self.tokenizer, prompt, 2**31)) > len(tokens)

    def _decode(self, ids: Sequence[str], prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return the new tokens of each row, its end token included where it met one.

        Works in rounds of a few tokens: after each, the rows that have ended leave batch and cache.
        """
        input_ids, mask = _pad_left(prompts, self.tokenizer.pad_token_id, self.model.device)
        width = input_ids.shape[1]
        uniforms = self._uniforms(ids)
        alive = torch.arange(len(prompts))  # row numbers still in the batch
        new_tokens: list[list[int]] = [[] for _ in prompts]
        cache = None
        done = 0
        while len(alive):
            room = self.settings.max_new_tokens - done
            output = self.model.generate(  # type: ignore[operator]  # hidden from mypy by Module.__getattr__
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=self._generation_config(min(room, self._round_tokens)),
                logits_processor=self._processors(uniforms, alive, width),
            )
            input_ids, cache = output.sequences, output.past_key_values
            fresh = input_ids[:, width + done :].tolist()
            going = []
            for position, (row, tokens) in enumerate(zip(alive.tolist(), fresh, strict=True)):
                end = next((i for i, token in enumerate(tokens) if token in self.end_tokens), None)
                new_tokens[row] += tokens if end is None else tokens[: end + 1]
                if end is None:
                    going.append(position)
            done = input_ids.shape[1] - width
            if done >= self.settings.max_new_tokens or not going:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)
            keep = torch.tensor(going)
            alive, input_ids, mask = alive[keep], input_ids[keep], mask[keep]
            if len(going) < len(fresh):
                cache.batch_select_indices(keep.to(self.model.device))
        return new_tokens

    def _generation_config(self, num_tokens: int) -> GenerationConfig:
        # What is None here is filled from the model's own generation_config.json by transformers.
        return GenerationConfig(
            do_sample=False,  # sampling is done by _RowSampler, whose scores leave one token
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,  # the values that mean "unset" to transformers
            max_new_tokens=num_tokens,
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def _uniforms(self, ids: Sequence[str]) -> Tensor | None:
        """Return the random numbers of each row (B, max_new_tokens), a function of (seed, id) alone; None if greedy."""
        if self.settings.temperature == 0:
            return None
        rows = [row_uniforms(self.settings.seed, id, self.settings.max_new_tokens) for id in ids]
        return torch.stack(rows).to(self.model.device)

    def _processors(self, uniforms: Tensor | None, alive: Tensor, width: int) -> LogitsProcessorList:
        if uniforms is None:
            return LogitsProcessorList()
        rows = uniforms[alive.to(uniforms.device)]
        return LogitsProcessorList([_RowSampler(rows, width, self.settings.temperature, self.settings.top_p)])


class _RowSampler(LogitsProcessor):
    """Temperature and nucleus sampling in which each row consumes random numbers of its own, one per token.

    The token is the first whose cumulative probability exceeds the row's uniform number. Probabilities are summed in
    float64 and in the order of the vocabulary, so that noise of 1e-7 in a logit moves the outcome with as little
    probability. All scores but the token's become -inf: the argmax of greedy decoding then picks it.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens)
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token -> 0 for the drawn token, -inf for the others."""
        step = input_ids.shape[1] - self.prompt_width
        probabilities = (scores.double() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        cumulative = probabilities.cumsum(dim=-1)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        token = (cumulative <= threshold).sum(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020).

    Args:
        probabilities: (B, V).
        top_p: In (0, 1].

    Returns:
        (B, V), not renormalised; the most probable token is always kept.
    """
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter_(1, index, ordered.masked_fill(before >= top_p, 0.0))


def row_uniforms(seed: int, id: str, count: int) -> Tensor:
    """Return `count` uniform numbers in [0, 1) as float64, a function of (seed, id) alone, equal on every machine."""
    digest = hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=8).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=random).double()


def _pad_left(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B, T) int64, T = the longest prompt."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a text: the tokenizer's, its chat template's, those of generation_config.json."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    turn_end = tokenizer.backend_tokenizer.token_to_id(chat_end_token(tokenizer))  # what template=chat trains
    return frozenset(token for token in (*listed, tokenizer.eos_token_id, turn_end) if token is not None)
