"""The round-trip score: how well an induced instruction explains its response, under a model that follows instructions.

score = (log P(response | instruction) - log P(response)) / tokens of the response, under one forward model. P(response)
uses the same template and earlier turns with an empty instruction, so that only the instruction makes the difference. A
pair whose instruction is unrelated to its response scores about 0, however long or fluent the response is.
B = rows of a batch, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from config.errors import UserError
from config.settings import RoundTripSettings
from safer_instruct.generation.backends import model_name
from safer_instruct.generation.decoding import context_of
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from safer_instruct.generation.trained_as import model_as_trained
from safer_instruct.generation.weights import model_fingerprint
from safer_instruct.induction.stages import Item, Score
from safer_instruct.text.encoding import EncodedRow, Encoder
from safer_instruct.text.examples import Example, short_hash
from safer_instruct.text.prompts import Prompt, Turn, Unusable, answer_turn, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_A_TIME = 4096

# Model -> a function from a micro-batch to the log-probabilities of its responses, (B,) float64 in nats.
LogpsOf = Callable[["PreTrainedModel"], Callable[[Mapping[str, Tensor]], Tensor]]


class RoundTrip:
    """Scores pairs; the model is loaded when the first score is needed.

    The entrypoint passes in the kernel `logps_of`, which is the one that trainers/ uses.
    """

    def __init__(self, settings: RoundTripSettings, device: torch.device, logps_of: LogpsOf) -> None:
        self.name = model_name(settings.model)
        self._tokenizer = load_tokenizer(settings.model)
        typed = settings.template, settings.system
        self._asked = model_as_trained(
            settings.model, self._tokenizer, *typed, key="roundtrip", model_key="roundtrip.model"
        )
        identity = f"{model_fingerprint(settings.model)}/{self._asked.identity}/{settings.max_length}"
        self.fingerprint = short_hash(identity)
        self._settings = settings
        self._device = device
        self._logps_of = logps_of
        self._loaded: _Loaded | None = None

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse conversations that the template has no place for, before anything runs.

        Raises:
            UserError: There is one; the message names the first.
        """
        # One example of each kind is enough; conversations that a chat template rejects are left without a score.
        for example in {(bool(one.system), bool(one.history)): one for one in reversed(examples)}.values():
            try:
                self._prompt(example)
            except Unusable as error:
                if error.reason.startswith("no_place"):
                    way_out = "; or leave it out with roundtrip.system=''" if "system" in error.reason else ""
                    raise UserError(
                        f"corpus.path: {example.provenance['source']}: roundtrip.{error}{way_out}"
                    ) from error

    def score(self, items: Sequence[Item]) -> Iterator[tuple[tuple[str, int], Score | None]]:
        """Yield (key, score) for each pair; the score is None if the whole pair does not fit into the context."""
        for start in range(0, len(items), ROWS_AT_A_TIME):
            yield from self._score(items[start : start + ROWS_AT_A_TIME])

    def _score(self, items: Sequence[Item]) -> Iterator[tuple[tuple[str, int], Score | None]]:
        self._loaded = loaded = self._loaded or self._load()
        rows: list[EncodedRow] = []
        places: list[tuple[int, int] | None] = []  # rows (with, without) the instruction; None: not scored
        alone: dict[tuple[Any, ...], int] = {}  # row without the instruction, shared by all candidates of a response
        for _, pair in items:
            given, without = (self._encode(loaded, one) for one in (pair, replace(pair, instruction="")))
            if given is None or without is None or given.prompt_cut:
                places.append(None)
                continue
            response = (*pair.before, pair.rejected)
            if response not in alone:
                alone[response] = len(rows)
                rows.append(without)
            places.append((len(rows), alone[response]))
            rows.append(given)
        logps = self._logps(loaded, rows)
        for (key, _), place in zip(items, places, strict=True):
            if place is None:
                yield key, None
                continue
            per_token = [logps[row] / len(rows[row].responses[0]) for row in place]
            given = rows[place[0]]
            yield key, Score(per_token[0] - per_token[1], len(given.prompt) + len(given.responses[0]))

    def _prompt(self, pair: Example) -> Prompt:
        template, system = self._asked
        return render_prompt(
            template, pair.instruction or "", tokenizer=self._tokenizer, history=pair.history,
            system=pair.system if system is None else system,
        )  # fmt: skip

    def _encode(self, loaded: _Loaded, pair: Example) -> EncodedRow | None:
        """Encode a response after its instruction; None if the response would not be in the row as a whole."""
        try:
            prompt, turn = self._prompt(pair), loaded.turn
        except Unusable:
            return None
        texts = [turn.lead + (pair.rejected or "") + turn.close]
        (row,) = loaded.encoder.encode([prompt], [texts], end_token=turn.end_token)
        return None if isinstance(row, str) or row.responses_cut[0] else row

    @torch.no_grad()
    def _logps(self, loaded: _Loaded, rows: Sequence[EncodedRow]) -> list[float]:
        """Return each response's log-probability given its prompt, including its end token, in nats."""
        lengths = [len(row.prompt) + len(row.responses[0]) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -lengths[i])  # longest first: little padding
        logps = [0.0] * len(rows)
        start = 0
        while start < len(order):
            size = max(1, self._settings.max_batch_tokens // lengths[order[start]])
            batch = order[start : start + size]
            values = loaded.logps(_to_batch([rows[i] for i in batch], self._device)).tolist()
            for i, value in zip(batch, values, strict=True):
                logps[i] = value
            start += size
        return logps

    def _load(self) -> _Loaded:
        settings, tokenizer = self._settings, self._tokenizer
        model = load_causal_lm(settings.model).eval()
        model.to(self._device)
        room = min(settings.max_length, context_of(model))
        encoder = Encoder(tokenizer, max_length=room, max_prompt_length=room - 1)
        return _Loaded(encoder, answer_turn(self._asked.template, tokenizer), self._logps_of(model))


class _Loaded(NamedTuple):
    encoder: Encoder
    turn: Turn
    logps: Callable[[Mapping[str, Tensor]], Tensor]


def _to_batch(rows: Sequence[EncodedRow], device: torch.device) -> dict[str, Tensor]:
    """Right-pad rows into a micro-batch of (B, T) tensors: token ids, attention mask and response mask."""
    tokens = [row.prompt + row.responses[0] for row in rows]
    width = max(map(len, tokens))
    columns = torch.arange(width, device=device)
    starts, ends = (
        torch.tensor(places, device=device)[:, None]
        for places in ([len(row.prompt) for row in rows], [len(one) for one in tokens])
    )
    return {
        "input_ids": torch.tensor([one + [0] * (width - len(one)) for one in tokens], device=device),
        "attention_mask": columns < ends,
        "response_mask": (columns >= starts) & (columns < ends),
    }
