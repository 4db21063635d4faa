"""Generate texts from prompts with a transformers causal LM in this process.

A row's text does not depend on the other rows in its batch: decoding is greedy, or samples with random numbers that
depend only on (seed, row id). So shards, restarts and batch sizes change nothing (except for ties, which floating-point
noise may break either way). B = rows of a batch, T = prompt positions, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from config.settings import GenerationSettings
from safer_instruct.generation.completions import Generation, Request, row_seed, without_thought
from safer_instruct.generation.decoding import TextDecoder, context_of, end_tokens, say_what_is_not_read
from safer_instruct.generation.window import Window
from safer_instruct.text.prompts import Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Newer versions of transformers call it `cache`, and warn about the old name at every call.
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
ROUND_TOKENS = 16  # new tokens after which finished rows leave the batch (2.4 x the tokens/s if only a few are long)
# Entries of generation_config.json that count from the start of a `generate` call; they allow only a single round.
COUNTING_ENTRIES = (
    "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "min_length", "min_new_tokens",
)  # fmt: skip
# The only entries used: which tokens a model may write, and when. Repetition penalties, guidance and the like would
# turn the weights into a different policy from the one that was trained.
READ_ENTRIES = ("suppress_tokens", "bad_words_ids", *COUNTING_ENTRIES)


class HFGenerator:
    """Batched generation with a transformers causal LM.

    Requests are sorted by length, longest first, and batched under a budget of padded positions
    (`settings.max_batch_tokens`). Prompts are padded on the left, and finished rows leave the batch. From the model's
    generation_config.json only the end tokens and READ_ENTRIES are used; our own settings control sampling.
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

        The tokenizer must have a pad token. `max_length` defaults to the model's `max_position_embeddings`.

        Raises:
            UserError: The limit on new tokens leaves no room for a prompt.
        """
        self.name = name
        self.fingerprint = fingerprint
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        context = max_length or context_of(model)
        self.window = Window(tokenizer, context=context, max_new_tokens=settings.max_new_tokens, name=name)
        self.end_tokens = end_tokens(model, tokenizer)
        configured = model.generation_config.to_dict()
        self._read = GenerationConfig(**{name: configured[name] for name in READ_ENTRIES if configured.get(name)})
        say_what_is_not_read(model.generation_config, READ_ENTRIES)
        counts = any(configured.get(name) for name in COUNTING_ENTRIES)
        self._round_tokens = settings.max_new_tokens if counts else ROUND_TOKENS
        self._text = TextDecoder(tokenizer, settings.thought_tags)

    def check(self) -> None:
        """Do nothing: the model is already loaded."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield the generations batch by batch, longest prompts first.

        A row with an unusable prompt gets the reason from `prompt_token_ids`, such as "prompt_too_long", as its error.
        """
        encoded: dict[str, list[int]] = {}
        cut: dict[str, bool] = {}
        by_id = {request.id: request for request in requests}
        for request in by_id.values():
            try:
                encoded[request.id], cut[request.id] = self.window.encode(request.prompt)
            except Unusable as unusable:
                yield Generation(request.id, "", error=unusable.reason)
        for generation in self.generate_from_tokens(encoded):
            generation = replace(generation, prompt_cut=cut[generation.id])
            yield without_thought(generation, self.settings.thought_tags, by_id[generation.id].prompt)

    @torch.no_grad()
    def generate_from_tokens(self, prompts: Mapping[str, list[int]]) -> Iterator[Generation]:
        """Yield the generations for prompts given as token ids: id -> at most `max_prompt_tokens` tokens.

        For prompts from a token store, as decoding and re-encoding may not give the same tokens.
        """
        ids = list(prompts)
        for rows in self._batches([len(prompts[id]) for id in ids]):
            yield from self._generate_batch([ids[i] for i in rows], [prompts[ids[i]] for i in rows])

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches of row numbers, longest rows first, so that rows x (longest prompt + new tokens) <= budget."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        start = 0
        while start < len(order):
            width = lengths[order[start]] + self.settings.max_new_tokens
            num_rows = max(1, self.settings.max_batch_tokens // width)
            yield order[start : start + num_rows]
            start += num_rows

    def _generate_batch(self, ids: Sequence[str], prompts: Sequence[list[int]]) -> Iterator[Generation]:
        was_training, configured = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = self._read  # transformers takes the unset options of a call from here
        try:
            new_tokens = self._decode(ids, prompts)
        finally:
            self.model.generation_config = configured
            self.model.train(was_training)
        for id, prompt, tokens in zip(ids, prompts, new_tokens, strict=True):
            ended = tokens[-1] in self.end_tokens
            yield Generation(
                id=id,
                text=self._text(tokens[:-1] if ended else tokens),
                truncated=not ended,
                prompt_tokens=len(prompt),
                new_tokens=len(tokens),
            )

    def _decode(self, ids: Sequence[str], prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return the new tokens of each row, including its end token if it generated one.

        Works in rounds of a few tokens; after each round, finished rows leave the batch and the cache.
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
                **{CACHE: cache},
                generation_config=self._generation_config(min(room, self._round_tokens)),
                logits_processor=self._processors(uniforms, alive, width),
            )
            input_ids, cache = output.sequences, output[CACHE]
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
        # transformers fills in whatever is None here from `_read`.
        return GenerationConfig(
            do_sample=False,  # _RowSampler samples, and leaves a single token for greedy decoding
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,  # these are the values that transformers takes for "unset"
            max_new_tokens=num_tokens,
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def _uniforms(self, ids: Sequence[str]) -> Tensor | None:
        """Return each row's random numbers, (B, max_new_tokens), which depend on (seed, id) only; None if greedy."""
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
    """Temperature and nucleus sampling in which each row uses its own random numbers, one per token.

    The sampled token is the first whose cumulative probability exceeds the row's uniform number. Probabilities are
    summed in float64 and in vocabulary order, so that noise of 1e-7 in a logit changes the outcome with a probability
    of the same order. All other scores become -inf, so that greedy decoding picks the sampled token.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens)
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn the scores (B, V) of the next token into 0 for the drawn token, -inf for the others."""
        step = input_ids.shape[1] - self.prompt_width
        probabilities = (scores.double() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        cumulative = probabilities.cumsum(dim=-1)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        token = (cumulative <= threshold).sum(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of the most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020).

    (B, V) -> (B, V), not renormalised; the most probable token is always kept.
    """
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter_(1, index, ordered.masked_fill(before >= top_p, 0.0))


def row_uniforms(seed: int, id: str, count: int) -> Tensor:
    """Return `count` uniform float64 numbers in [0, 1) that depend on (seed, id) only, not on the machine."""
    random = torch.Generator().manual_seed(row_seed(seed, id))
    return torch.rand(count, generator=random).double()


def _pad_left(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B, T) int64, T = the longest prompt."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)
