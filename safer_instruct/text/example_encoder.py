"""From examples to rows of tokens: how each is rendered for a loss, and what a template or a limit leaves out.

A conversation is rendered once per answer, with everything said before it; the tokens are then joined into one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from config.errors import UserError
from config.settings import DatasetSettings
from safer_instruct.text.chat import Turn
from safer_instruct.text.encoding import EncodedRow, Encoder
from safer_instruct.text.examples import Example
from safer_instruct.text.prompts import Prompt, Unusable, answer_turn, render_prompt, render_reversed, reversed_target
from safer_instruct.text.row_log import RowLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Targets(NamedTuple):
    """How the rows of all datasets of a run are encoded; see `preference_datasets.build_stores`."""

    loss: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    all_answers: bool


class ExampleEncoder:
    """Renders and encodes the examples of a dataset."""

    def __init__(self, settings: DatasetSettings, targets: Targets, log: RowLog) -> None:
        """Check the template.

        Raises:
            UserError: It fails, or it has no place for the system prompt in the settings.
        """
        loss, tokenizer, encoder, self._all_answers = targets
        self._settings, self._loss, self._tokenizer, self._encoder = settings, loss, tokenizer, encoder
        self._log = log
        # The prompt of a later answer is the whole conversation before it, so only max_length limits it.
        self._later = Encoder(tokenizer, max_length=encoder.max_length, max_prompt_length=encoder.max_length - 1)
        # A reversed model does not chat: it has the published prompt, and EOS ends its output.
        try:
            self._turn = Turn() if loss == "reverse" else answer_turn(settings.template, tokenizer)
        except UserError as error:  # its message begins with template=..., the name of the setting
            raise UserError(f"datasets.{log.name}.{error}") from error
        if settings.system and loss != "reverse":  # if it has no place, fail early instead of dropping every row
            render_prompt(settings.template, "", tokenizer=tokenizer, system=settings.system)

    def encode(self, examples: Sequence[Example]) -> Iterator[tuple[Example, str, list[EncodedRow]]]:
        """Yield (example, target, rows) for each usable example: one row, or more if it has several answers."""
        kept, texts = [], []
        for example in examples:
            try:
                texts.append(self._texts(example))
                kept.append(example)
            except Unusable as unusable:
                self._log.drop_example(unusable.reason, example, str(unusable))
        firsts = self._encode_texts(self._encoder, [answers[0] for answers in texts])
        later = iter(self._encode_texts(self._later, [text for answers in texts for text in answers[1:]]))
        for example, answers, first in zip(kept, texts, firsts, strict=True):
            others = [next(later) for _ in answers[1:]]
            if isinstance(first, str):
                self._log.drop_example(first, example)
                continue
            fitting = [row for row in others if not isinstance(row, str) and not row.prompt_cut]
            self._log.counts["answers_left_out"] += len(others) - len(fitting)
            yield example, answers[-1][1][0], list(join_answers([first, *fitting])) if others else [first]

    def _encode_texts(
        self, encoder: Encoder, texts: Sequence[tuple[Prompt, tuple[str, ...]]]
    ) -> list[EncodedRow | str]:
        prompts, responses = zip(*texts, strict=True) if texts else ((), ())
        return encoder.encode(prompts, responses, end_token=self._turn.end_token)

    def _texts(self, example: Example) -> list[tuple[Prompt, tuple[str, ...]]]:
        """Render each training prompt and what follows it: the single target, or chosen and rejected.

        Raises:
            Unusable: The template has no place for the conversation.
        """
        if self._loss == "reverse":
            turns = each_answer(example)
            if example.history and not self._all_answers:
                self._log.note("first_turn_only", example)
                turns = [replace(turns[0], history=())]  # a later turn may mean nothing without the turns before it
            return [
                (render_reversed(str(turn.chosen), turn.history), (reversed_target(str(turn.instruction), turn.input),))
                for turn in turns
            ]
        return [self._rendered(one) for one in (each_answer(example) if self._all_answers else [example])]

    def _rendered(self, example: Example) -> tuple[Prompt, tuple[str, ...]]:
        system = example.system if self._settings.system is None else self._settings.system
        prompt = render_prompt(
            self._settings.template, str(example.instruction), example.input, self._tokenizer, system=system,
            history=example.history,
        )  # fmt: skip
        both = [example.chosen] if self._loss == "likelihood" else [example.chosen, example.rejected]
        responses = [text for text in both if text is not None]  # a single answer is either chosen or rejected
        return prompt, tuple(self._turn.lead + response + self._turn.close for response in responses)


def each_answer(example: Example) -> list[Example]:
    """Return an example for each assistant message, in order; the last one is the example itself.

    If the user sends two messages in a row, both stay in the prompt of the next answer.
    """
    answers = [
        replace(example, instruction=asked.content, input="", chosen=answer.content, history=example.history[:number])
        for number, (asked, answer) in enumerate(zip(example.history, example.history[1:], strict=False))
        if (asked.role, answer.role) == ("user", "assistant")
    ]
    return [*answers, example]


def join_answers(rows: Sequence[EncodedRow]) -> Iterator[EncodedRow]:
    """Join the answers of a conversation into one row wherever a prompt begins with the row of the answer before it.

    Each answer still follows exactly the tokens of its own prompt, so the joined row trains the same as one row per
    answer, while processing the conversation only once. A template that renders earlier answers differently from the
    last one (without their thoughts, or without an end token) leaves one row per answer.

    Args:
        rows: Rows with one response each, in the order of the conversation.

    Yields:
        Rows whose response holds `~t` for each token t between two answers, which is context and not a target.
    """
    joined: EncodedRow | None = None
    tokens: list[int] = []  # of `joined`
    for row in rows:
        (response,) = row.responses
        if joined is not None and row.prompt[: len(tokens)] == tokens:
            given = [~token for token in row.prompt[len(tokens) :]]
            joined = replace(
                joined,
                responses=([*joined.responses[0], *given, *response],),
                responses_cut=row.responses_cut,
                straddled=joined.straddled + row.straddled,
            )
        else:
            if joined is not None:
                yield joined
            joined = row
        tokens = [*row.prompt, *response]
    if joined is not None:
        yield joined
