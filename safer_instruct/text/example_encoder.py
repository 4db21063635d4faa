"""From examples to rows of tokens: how each is rendered for a loss, and what a template or a limit leaves out.

A conversation is rendered as the answers in it, each with all that was said before; their tokens are one row again.
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
    """What the rows of all datasets of a run are encoded for; see `preference_datasets.build_stores`."""

    loss: str
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    all_answers: bool


class ExampleEncoder:
    """Renders and encodes the examples of a dataset."""

    def __init__(self, settings: DatasetSettings, targets: Targets, log: RowLog) -> None:
        """Look at the template.

        Raises:
            UserError: It fails, or has no place for the system prompt of the settings.
        """
        loss, tokenizer, encoder, self._all_answers = targets
        self._settings, self._loss, self._tokenizer, self._encoder = settings, loss, tokenizer, encoder
        self._log = log
        # The prompt of a later answer is the conversation up to it, for which max_length is the only limit.
        self._later = Encoder(tokenizer, max_length=encoder.max_length, max_prompt_length=encoder.max_length - 1)
        # A reversed model answers no chat: its prompt is the published one, and EOS ends what it writes.
        try:
            self._turn = Turn() if loss == "reverse" else answer_turn(settings.template, tokenizer)
        except UserError as error:  # begins with template=...
            raise UserError(f"datasets.{log.name}.{error}") from error
        if settings.system and loss != "reverse":  # one that has no place is said at once, not counted row by row
            render_prompt(settings.template, "", tokenizer=tokenizer, system=settings.system)

    def encode(self, examples: Sequence[Example]) -> Iterator[tuple[Example, str, list[EncodedRow]]]:
        """Yield (example, its target, its rows) for those that can be used: one row, or more for several answers."""
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
        """Render each prompt that is trained on, and what follows it: the one target, or chosen and rejected.

        Raises:
            Unusable: The template has no place for the conversation.
        """
        if self._loss == "reverse":
            turns = each_answer(example)
            if example.history and not self._all_answers:
                self._log.note("first_turn_only", example)
                turns = [replace(turns[0], history=())]  # a later one may mean nothing without what was said before
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
        responses = [text for text in both if text is not None]  # a single answer is one of the two
        return prompt, tuple(self._turn.lead + response + self._turn.close for response in responses)


def each_answer(example: Example) -> list[Example]:
    """Return an example for each of the assistant's messages, in order; the last one is the example itself.

    What a user says twice in a row, unanswered, stays in the history of the answer behind it.
    """
    answers = [
        replace(example, instruction=asked.content, input="", chosen=answer.content, history=example.history[:number])
        for number, (asked, answer) in enumerate(zip(example.history, example.history[1:], strict=False))
        if (asked.role, answer.role) == ("user", "assistant")
    ]
    return [*answers, example]


def join_answers(rows: Sequence[EncodedRow]) -> Iterator[EncodedRow]:
    """Join the answers of a conversation into one row wherever a prompt goes on from where the answer before it ended.

    Each answer stands behind exactly the tokens that a model would be asked with, so the joined row trains what a row
    for each answer would, and computes the conversation once. A template that writes earlier answers otherwise than
    the last one (without their thoughts, without an end) makes a row for each answer.

    Args:
        rows: Of one response each, in the order of the conversation.

    Yields:
        rows whose response holds `~t` for a token t that is given between two answers, and is no target.
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
