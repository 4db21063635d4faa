"""The expert: it filters induced pairs, writes safe responses and harmless neighbours, judges and compares answers.

One protocol, two kinds: rules (`RulesExpert`), and a language model behind a TextGenerator (`LLMExpert`), which runs on
this machine or on a server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from config.errors import UserError
from config.judges import GuardExpertSettings, RefusalsExpertSettings, StrongRejectSettings
from config.paths import find_path
from config.settings import LocalExpertSettings, OpenAIExpertSettings, RulesExpertSettings
from safer_instruct.experts.judges import FORMS, GuardJudge, RefusalsJudge, StrongRejectJudge
from safer_instruct.experts.prompts import (
    ANSWER,
    COMPARE,
    JUDGE,
    NEIGHBOUR,
    RESPOND,
    ROLES,
    SCREEN,
    STRONGREJECT,
    VARY,
    Role,
)
from safer_instruct.experts.rules import Rules
from safer_instruct.experts.verdicts import Judgement, SafeResponse, Verdict, Winner
from safer_instruct.generation.completions import Generation, Request, TextGenerator
from safer_instruct.text.examples import Example

if TYPE_CHECKING:
    import torch

    from safer_instruct.generation.pacing import Budget

T = TypeVar("T")
ExpertSettings = RulesExpertSettings | LocalExpertSettings | OpenAIExpertSettings | RefusalsExpertSettings


class Expert(Protocol):
    """What the stages and the evaluation ask of an expert.

    Every method yields each answer as soon as it is there, in any order, so that it can be written down before the next
    one is paid for. An answer that cannot be read is an abstention: `Verdict(False, "abstain_...")`,
    `SafeResponse(None, "abstain_...")`, `Judgement("abstain")`, "abstain". Ids must be unique in a call.
    """

    name: str
    prompt_hashes: Mapping[str, str]  # role -> hash of what a model is told in it; empty without a model

    def fingerprint(self, role: str) -> str:
        """Return what the answers in a role depend on: one of `prompts.ROLES`."""

    def check(self) -> None:
        """Raise a UserError if the expert cannot work (no key, no server, no file). Loads no model."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield (id, verdict) for each pair of an induced `instruction` and its unsafe response `rejected`."""

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, safe response) for each `instruction`."""

    def vary(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, another safe response that names the matter) for each `instruction`."""

    def neighbour(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, harmless instruction that looks like it) for each unsafe `instruction`."""

    def answer(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, helpful answer) for each harmless `instruction`."""

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield (id, judgement) for (id, instruction, output) triples."""

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """Yield (id, which helps more) for (id, instruction, first answer, second answer)."""


class RulesExpert:
    """`expert=rules`: patterns and templates from a YAML file."""

    def __init__(self, rules: Rules, *, name: str = "rules") -> None:
        self.name = name
        self.prompt_hashes: Mapping[str, str] = {}
        self._rules = rules

    def fingerprint(self, role: str) -> str:
        """Return the hash of the rules, which are the same in every role."""
        return self._rules.fingerprint

    def check(self) -> None:
        """Do nothing: the rules have been read."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield the verdicts; see Expert."""
        for pair in pairs:
            yield pair.id, self._rules.screen(pair.instruction or "", pair.rejected or "")

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the responses; an instruction that the rules know no answer to is an abstention."""
        return _written(examples, self._rules.respond)

    def vary(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield responses of another template; see Expert."""
        return _written(examples, self._rules.vary)

    def neighbour(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the neighbours that the categories list; see Expert.

        Raises:
            UserError: No category lists any.
        """
        if not self._rules.knows_neighbours:
            raise UserError(
                f"the rules of {self.name} have no `neighbours` in any category, and stage=contrast takes them from "
                "there: add some (quickstart/rules.yaml shows how), or choose expert=openai or expert=local"
            )
        return _written(examples, self._rules.neighbour)

    def answer(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the answers of the neighbours; see Expert."""
        return _written(examples, self._rules.answer)

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield the judgements; see Expert."""
        return ((id, self._rules.judge(instruction, output)) for id, instruction, output in items)

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """Refuse: rules cannot tell which of two answers helps more.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"helpfulness.baseline is set, and the judge {self.name} cannot compare two answers: choose a language "
            "model as judge (expert=openai or expert=local), or leave helpfulness.baseline out"
        )


def _written(examples: Sequence[Example], write: Callable[[str], str | None]) -> Iterator[tuple[str, SafeResponse]]:
    for example in examples:
        text = write(example.instruction or "")
        yield example.id, SafeResponse(text, "" if text is not None else "abstain_no_rule")


class LLMExpert:
    """An expert that asks a language model and reads its answers strictly; what cannot be read is asked for again."""

    def __init__(self, generator: TextGenerator) -> None:
        self.name = generator.name
        self.prompt_hashes: Mapping[str, str] = {name: role.fingerprint for name, role in ROLES.items()}
        self._generator = generator

    def fingerprint(self, role: str) -> str:
        """Return the hash of the model, its decoding and the prompt of one role."""
        identity = f"{self._generator.fingerprint}/{self.prompt_hashes[role]}"
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def check(self) -> None:
        """Raise a UserError if the model cannot be reached or found."""
        self._generator.check()

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield the verdicts; see Expert."""
        asked = ((pair.id, pair.asked, pair.rejected or "") for pair in pairs)
        for generation, read in self._ask(SCREEN, asked):
            verdict = read or Verdict(False, _abstention(generation))
            yield generation.id, replace(verdict, tokens=_tokens(generation), cost=generation.cost)

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the responses; one that the limit on new tokens cut off is an abstention."""
        return self._write(RESPOND, examples)

    def vary(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the other responses; see Expert."""
        return self._write(VARY, examples)

    def neighbour(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the neighbours; see Expert."""
        return self._write(NEIGHBOUR, examples)

    def answer(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the answers; see Expert."""
        return self._write(ANSWER, examples)

    def _write(self, role: Role[str], examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        for generation, read in self._ask(role, ((example.id, example.asked) for example in examples)):
            text = None if generation.truncated else read or None
            reason = _abstention(generation) if text is None else ""
            yield generation.id, SafeResponse(text, reason, _tokens(generation), generation.cost)

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield the judgements; see Expert."""
        answers = self._ask(JUDGE, items)
        return ((one.id, replace(read or Judgement("abstain"), tokens=_tokens(one))) for one, read in answers)

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Winner]]:
        """Yield which of two answers helps more; see Expert."""
        return ((generation.id, read or "abstain") for generation, read in self._ask(COMPARE, items))

    def _ask(self, role: Role[T], items: Iterable[tuple[str, ...]]) -> Iterator[tuple[Generation, T | None]]:
        """Return (what came back, how it reads) for each (id, *texts)."""
        requests = [Request(id, role.render(*texts), role.schema, role.repair) for id, *texts in items]
        if len({request.id for request in requests}) != len(requests):
            raise ValueError("the ids of what an expert is asked about must be unique")
        generations = self._generator.generate(requests)
        return ((one, None if one.error else role.read(one.text)) for one in generations)


def _tokens(generation: Generation) -> int:
    return generation.prompt_tokens + generation.new_tokens


def _abstention(generation: Generation) -> str:
    """Return why there is no answer: one of a few words, for the counts."""
    if generation.error:
        return f"abstain_{generation.error}"
    if generation.truncated:
        return "abstain_truncated"
    return "abstain_unreadable" if generation.text.strip() else "abstain_empty"


def build_expert(settings: ExpertSettings, device: torch.device, budget: Budget | None = None) -> Expert:
    """Build the expert that `expert=` (or `expert@second_expert=`) chose; no weights are loaded yet.

    Args:
        settings: One of the expert groups' settings.
        device: Where a local model runs.
        budget: What a paid expert may spend; None: what its settings say, nothing of it spent yet.

    Raises:
        UserError: The rules file or the model folder is missing or broken.
    """
    if isinstance(settings, RulesExpertSettings):
        path = find_path(settings.path)
        return RulesExpert(Rules.from_yaml(path), name=f"rules:{path.stem}")
    if isinstance(settings, RefusalsExpertSettings):
        return RefusalsJudge()
    # Imported here: rules need neither a client nor torch, a client needs no torch.
    if isinstance(settings, OpenAIExpertSettings):
        from safer_instruct.generation.server import expert_server

        return LLMExpert(expert_server(settings, budget))
    from safer_instruct.generation.backends import NO_TEMPLATE, TemplatedModel

    if isinstance(settings, GuardExpertSettings):
        question = None
        if settings.prompt_file is not None:
            question = find_path(settings.prompt_file).read_text(encoding="utf-8")
        template = NO_TEMPLATE if FORMS[settings.form].prompt is not None or question is not None else "chat"
        guard = TemplatedModel(settings.model, settings.generation, device, template=template, prompts=[])
        return GuardJudge(guard, settings.form, question)
    if isinstance(settings, StrongRejectSettings):
        asked = [STRONGREJECT.render("", "")]
        judge = TemplatedModel(settings.model, settings.generation, device, template=settings.template, prompts=asked)
        return StrongRejectJudge(judge, settings.threshold)
    rubrics = [SCREEN.render("", ""), RESPOND.render(""), JUDGE.render("", "")]
    return LLMExpert(
        TemplatedModel(settings.model, settings.generation, device, template=settings.template, prompts=rubrics)
    )
