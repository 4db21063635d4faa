"""Sample answers during training, for both benign prompts (to be answered) and unsafe ones (to be declined)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from config.settings import GenerationSettings
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.text.refusals import declines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ROWS = 4096  # how many held-out rows to search for prompts of both kinds
BENIGN, UNSAFE = "benign", "unsafe"

Row = tuple[str, list[int], list[int]]  # id, tokens of the prompt, tokens of the chosen response


def draw_rows(rows: Sequence[Row], number: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, str]]:
    """Return the first rows of each kind, in order: half of `number` each, or more of one kind if the other runs out.

    A prompt is benign if its chosen response does not decline.
    """

    def kind_of(row: Row) -> str:
        return UNSAFE if declines(str(tokenizer.decode(row[2], skip_special_tokens=True))) else BENIGN

    kinds = [(row, kind_of(row)) for row in rows]
    available = {kind: sum(of_row == kind for _, of_row in kinds) for kind in (BENIGN, UNSAFE)}
    half = number // 2
    left = {BENIGN: max(half, number - available[UNSAFE]), UNSAFE: number - min(half, available[BENIGN])}
    drawn = []
    for row, kind in kinds:
        if left[kind] > 0:
            left[kind] -= 1
            drawn.append((row, kind))
    return drawn


def build_sampler(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int,
    max_length: int,
    max_new_tokens: int | None,
    seed: int,
    tells_refusals: bool,
) -> Callable[[PreTrainedModel], list[dict[str, Any]]]:
    """Return a function that samples answers from a model; each sample holds its prompt.

    An answer has at most `max_new_tokens`, or if None the tokens that `max_length` leaves after the longest prompt.
    With `tells_refusals`, each sample also holds the `kind` of its prompt and whether the answer `refused`.
    """
    drawn = draw_rows(rows, number, tokenizer)
    prompts = {id: prompt for (id, prompt, _), _ in drawn}
    kinds = {id: kind for (id, _, _), kind in drawn}
    longest = max(map(len, prompts.values()))
    settings = GenerationSettings(max_new_tokens=max_new_tokens or max_length - longest, temperature=1.0, seed=seed)

    def sample(model: PreTrainedModel) -> list[dict[str, Any]]:
        generator = HFGenerator(model, tokenizer, settings, max_length=longest + settings.max_new_tokens)
        outputs = {one.id: one.text for one in generator.generate_from_tokens(prompts)}
        rows = []
        for id, tokens in prompts.items():
            told = {"kind": kinds[id], "refused": declines(outputs[id])} if tells_refusals else {}
            prompt = tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append({"id": id, "prompt": prompt, "output": outputs[id], **told})
        return rows

    return sample
