"""The round-trip score: how much an induced instruction explains its response, by a model that follows instructions.

log P(response | instruction) - log P(response), per token of the response, under one forward model. P(response) is
that of the same template with an empty instruction, so that the difference is the instruction's alone. A pair whose
instruction has nothing to do with its response scores about 0, whatever the length or the fluency of the response.
B = rows of a batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config.settings import RoundTripSettings
from safer_instruct.generation.models import load_causal_lm, load_tokenizer, model_fingerprint
from safer_instruct.induction.stages import Item, Score
from safer_instruct.text.encoding import EncodedRow, Encoder
from safer_instruct.text.prompts import render_prompt, response_lead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_AT_A_TIME = 4096


class RoundTrip:
    """Scores pairs; the model is loaded when the first is asked for."""

    def __init__(self, settings: RoundTripSettings, device: torch.device) -> None:
        name = Path(settings.model.name_or_path).name
        self.name = f"{name}@{Path(settings.model.archive).name}" if settings.model.archive else name
        identity = f"{model_fingerprint(settings.model)}/{settings.template}/{settings.max_length}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._settings = settings
        self._device = device
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def score(self, items: Sequence[Item]) -> Iterator[tuple[tuple[str, int], Score | None]]:
        """See stages.Scorer; None for a pair that does not fit the context as a whole."""
        for start in range(0, len(items), ROWS_AT_A_TIME):
            yield from self._score(items[start : start + ROWS_AT_A_TIME])

    def _score(self, items: Sequence[Item]) -> Iterator[tuple[tuple[str, int], Score | None]]:
        model, tokenizer = self._loaded or self._load()
        settings = self._settings
        room = min(settings.max_length, model.config.max_position_embeddings)
        encoder = Encoder(tokenizer, max_length=room, max_prompt_length=room - 1)
        lead = response_lead(settings.template)
        rows: list[EncodedRow] = []
        places: list[tuple[int, int] | None] = []  # rows of (with, without) the instruction; None: not scored
        alone: dict[str, int] = {}  # one row for all candidates of a response
        for _, instruction, response in items:
            prompts = [render_prompt(settings.template, text, tokenizer=tokenizer) for text in (instruction, "")]
            encoded = encoder.encode(prompts, [[lead + response]] * 2)
            whole = [row for row in encoded if not isinstance(row, str) and not row.responses_cut[0]]
            if len(whole) < 2 or whole[0].prompt_cut:
                places.append(None)
                continue
            if response not in alone:
                alone[response] = len(rows)
                rows.append(whole[1])
            places.append((len(rows), alone[response]))
            rows.append(whole[0])
        logps = self._logps(model, rows)
        for (key, _, _), place in zip(items, places, strict=True):
            if place is None:
                yield key, None
                continue
            given, without = place
            length = len(rows[given].responses[0])
            nats = logps[given] / length - logps[without] / len(rows[without].responses[0])
            yield key, Score(nats, len(rows[given].prompt) + length)

    @torch.no_grad()
    def _logps(self, model: PreTrainedModel, rows: Sequence[EncodedRow]) -> list[float]:
        """Log-probability of each row's response behind its prompt, EOS included, in nats; longest rows first."""
        lengths = [len(row.prompt) + len(row.responses[0]) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -lengths[i])
        logps = [0.0] * len(rows)
        start = 0
        while start < len(order):
            size = max(1, self._settings.max_batch_tokens // lengths[order[start]])
            batch = order[start : start + size]
            for i, value in zip(batch, response_logps(model, [rows[i] for i in batch]), strict=True):
                logps[i] = value
            start += size
        return logps

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(self._settings.model)
        model = load_causal_lm(self._settings.model).eval()
        model.to(self._device)
        self._loaded = model, tokenizer
        return self._loaded


def response_logps(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> list[float]:
    """Log-probabilities (B,) of the rows' first responses, summed in float64.

    Rows are padded on the right, where a causal model does not look; only the positions that predict a response get
    logits, row by row, so that no (B, T, V) tensor of log-probabilities is made.
    """
    tokens = [row.prompt + row.responses[0] for row in rows]
    width = max(len(one) for one in tokens)
    ids = torch.tensor([one + [0] * (width - len(one)) for one in tokens], device=model.device)
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in tokens], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
    sums = []
    for row, one, scores in zip(rows, tokens, logits, strict=True):
        first, last = len(row.prompt), len(one)
        predicted = scores[first - 1 : last - 1].float().log_softmax(-1)
        target = torch.tensor(one[first:last], device=model.device)
        sums.append(float(predicted.gather(-1, target[:, None]).double().sum()))
    return sums
