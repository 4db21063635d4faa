"""The judges of an evaluation: experts that read a model's answer, or tell which of two helps more.

A judge yields each judgement as soon as it is there, so that it can be written down before the next one is paid for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from config.errors import UserError
from safer_instruct.experts.expert import Expert, ExpertSettings, LLMExpert, build_expert
from safer_instruct.experts.judge_prompts import (
    RUBRIC_FINGERPRINT,
    Winner,
    parse_compare,
    parse_rubric,
    render_compare,
    render_rubric,
)
from safer_instruct.experts.verdicts import Judgement

if TYPE_CHECKING:
    import torch

    from safer_instruct.generation.hf import TextGenerator

RULES_BATCH = 256


class Judge(Protocol):
    """What an evaluation asks of a judge; an answer of it that cannot be read is an abstention."""

    name: str
    fingerprint: str

    def check(self) -> None:
        """Raise a UserError if the judge cannot work. Loads no model."""

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield (id, judgement) for (id, instruction, output) triples with unique ids, in any order."""

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """Yield (id, which helps more) for (id, instruction, first answer, second answer), in any order."""


class RulesJudge:
    """An expert that needs no model; it cannot tell which of two answers helps more."""

    def __init__(self, expert: Expert) -> None:
        self.name, self.fingerprint = expert.name, expert.fingerprint
        self._expert = expert

    def check(self) -> None:
        """See Judge."""
        self._expert.check()

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """See Judge."""
        for start in range(0, len(items), RULES_BATCH):
            part = items[start : start + RULES_BATCH]
            for (id, _, _), judgement in zip(part, self._expert.judge(part), strict=True):
                yield id, judgement

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """Not possible.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"helpfulness.baseline is set, and the judge {self.name} cannot compare two answers: choose a language "
            "model as judge (expert=openai or expert=local), or leave helpfulness.baseline out"
        )


class LLMJudge:
    """A language model that is given the rubrics of `judge_prompts.py`, and read strictly."""

    def __init__(self, expert: LLMExpert) -> None:
        # The expert's own generator: one limit on concurrency, one budget, one loaded model.
        self._generator: TextGenerator = expert.generator
        self.name = expert.name
        identity = f"{self._generator.fingerprint}/{RUBRIC_FINGERPRINT}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def check(self) -> None:
        """See Judge."""
        self._generator.check()

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """See Judge."""
        from safer_instruct.generation.hf import Request  # transformers is slow to import, and rules need none of it

        requests = [Request(id, render_rubric(instruction, output)) for id, instruction, output in items]
        for generation in self._generator.generate(requests):
            tokens = generation.prompt_tokens + generation.new_tokens
            judgement = parse_rubric(generation.text, tokens=tokens)
            yield generation.id, judgement or Judgement("abstain", tokens=tokens)

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """See Judge."""
        from safer_instruct.generation.hf import Request

        requests = [Request(id, render_compare(instruction, *answers)) for id, instruction, *answers in items]
        for generation in self._generator.generate(requests):
            yield generation.id, parse_compare(generation.text) or "abstain"


def build_judge(settings: ExpertSettings, device: torch.device) -> Judge:
    """The judge that `expert=` (or `expert@second_expert=`) chose; no weights are loaded yet.

    Raises:
        UserError: As `build_expert`.
    """
    expert = build_expert(settings, device)
    return LLMJudge(expert) if isinstance(expert, LLMExpert) else RulesJudge(expert)
