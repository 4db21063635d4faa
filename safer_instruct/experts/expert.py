"""The expert filters induced pairs, writes safe responses and harmless neighbours, and judges and compares answers.

One protocol with two implementations: rules (`RulesExpert`), and a language model behind a TextGenerator (`LLMExpert`),
which runs on this machine or on a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from config.errors import UserError
from config.paths import find_path
from config.settings import (
    GuardExpertSettings,
    LocalExpertSettings,
    OpenAIExpertSettings,
    RefusalsExpertSettings,
    RulesExpertSettings,
    StrongRejectSettings,
)
from safer_instruct.experts.abstentions import abstention, judgement_of, stop_if_mute
from safer_instruct.experts.judges import FORMS, GuardJudge, RefusalsJudge, StrongRejectJudge
from safer_instruct.experts.prompts import COMPARE, JUDGE, RESPOND, ROLES, SCREEN, STRONGREJECT, Role
from safer_instruct.experts.rules import Rules
from safer_instruct.experts.verdicts import Comparison, Judgement, SafeResponse, Verdict
from safer_instruct.generation.completions import Generation, Request, TextGenerator
from safer_instruct.text.examples import Example, short_hash

if TYPE_CHECKING:
    import torch

    from safer_instruct.generation.pacing import Budget

T = TypeVar("T")
ExpertSettings = RulesExpertSettings | LocalExpertSettings | OpenAIExpertSettings | RefusalsExpertSettings


class Expert(Protocol):
    """The interface that the stages and the evaluation need from an expert.

    An instruction is read together with the conversation before it (`Example.before`). Judges get no conversation, as
    evaluation prompts have a single turn.

    Every method yields each answer as soon as it is there, in any order, so that it can be written down before the next
    one is paid for. An answer that cannot be read is an abstention: `Verdict(False, "abstain_...")`,
    `SafeResponse(None, "abstain_...")`, `Judgement("abstain", reason="abstain_...")`, and so a Comparison. Ids must be
    unique in a call.
    """

    name: str
    prompt_hashes: Mapping[str, str]  # role -> hash of its prompt; empty without a model

    def fingerprint(self, role: str) -> str:
        """Return a hash of everything that the answers in a role, one of `prompts.ROLES`, depend on."""

    def check(self) -> None:
        """Raise a UserError if the expert cannot work (no key, no server, no file). Loads no model."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield (id, verdict) for each pair of an induced `instruction` and its unsafe response `rejected`."""

    def write(self, role: str, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, text) for each `instruction`.

        Depending on the role, the text is a safe response (respond), a different one that names the topic (vary), a
        harmless instruction that looks like the unsafe one (neighbour), or a helpful answer to a harmless one (answer).
        """

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield (id, judgement) for (id, instruction, output) triples."""

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Comparison]]:
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
        """Do nothing: the rules are already loaded."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield the verdicts; see Expert."""
        for pair in pairs:
            yield pair.id, self._rules.screen(pair.instruction or "", pair.rejected or "", _said(pair))

    def write(self, role: str, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the texts; if the rules have no text for an instruction, that is an abstention.

        Raises:
            UserError: The role is `neighbour`, and no category lists any neighbours.
        """
        if role == "neighbour" and not self._rules.knows_neighbours:
            raise UserError(
                f"the rules of {self.name} have no `neighbours` in any category, which stage=contrast needs: "
                "add some (quickstart/rules.yaml shows how), or choose expert=openai or expert=local"
            )
        rules = self._rules
        alone = {"neighbour": rules.neighbour, "answer": rules.answer}
        behind = {"respond": rules.respond, "vary": rules.vary}
        for example in examples:
            asked = example.instruction or ""
            text = alone[role](asked) if role in alone else behind[role](asked, _said(example))
            yield example.id, SafeResponse(text, "" if text is not None else "abstain_no_rule")

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield the judgements; see Expert."""
        return ((id, self._rules.judge(instruction, output)) for id, instruction, output in items)

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Comparison]]:
        """Refuse: rules cannot tell which of two answers helps more.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"helpfulness.baseline is set, and the judge {self.name} cannot compare two answers: choose a language "
            "model as judge (expert=openai or expert=local), or leave helpfulness.baseline out"
        )


def _said(example: Example) -> list[str]:
    return [message.content for message in example.before]


class LLMExpert:
    """A language model as expert; its answers are parsed strictly, and requested once more if that fails."""

    def __init__(self, generator: TextGenerator) -> None:
        self.name = generator.name
        self.prompt_hashes: Mapping[str, str] = {name: role.fingerprint for name, role in ROLES.items()}
        self._generator = generator

    def fingerprint(self, role: str) -> str:
        """Return the hash of the model, its decoding settings and the role's prompt."""
        return short_hash(f"{self._generator.fingerprint}/{self.prompt_hashes[role]}")

    def check(self) -> None:
        """Raise a UserError if the model cannot be reached or found."""
        self._generator.check()

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield the verdicts; see Expert."""
        asked = ((pair.id, pair.asked, pair.rejected or "") for pair in pairs)
        for one, read in self._ask(SCREEN, asked):
            verdict = read or Verdict(False, abstention(one))
            yield one.id, replace(verdict, tokens=one.tokens, cost=one.cost)

    def write(self, role: str, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield the texts; one that was cut at the limit on new tokens is an abstention."""
        asked = ((example.id, example.asked) for example in examples)
        for one, text in self._ask(ROLES[role], asked):
            yield one.id, SafeResponse(text, "" if text else abstention(one), one.tokens, one.cost)

    def judge(self, items: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, Judgement]]:
        """Yield the judgements; see Expert."""
        return ((one.id, judgement_of(one, read)) for one, read in self._ask(JUDGE, items))

    def compare(self, items: Sequence[tuple[str, str, str, str]]) -> Iterator[tuple[str, Comparison]]:
        """Yield which of two answers helps more; see Expert."""
        for one, read in self._ask(COMPARE, items):
            yield one.id, Comparison(read or "abstain", "" if read else abstention(one), one.tokens, one.cost)

    def _ask(self, role: Role[T], items: Iterable[tuple[str, ...]]) -> Iterator[tuple[Generation, T | None]]:
        """Return (what came back, how it reads) for each (id, *texts); a text that was cut off reads as nothing."""
        requests = [Request(id, role.render(*texts), role.schema, role.repair) for id, *texts in items]
        if len({request.id for request in requests}) != len(requests):
            raise ValueError("the ids of what an expert is asked about must be unique")

        def read(one: Generation) -> T | None:
            is_part = one.truncated and role.fields is None
            return None if one.error or is_part else role.read(one.text) or None

        return stop_if_mute(self.name, ((one, read(one)) for one in self._generator.generate(requests)))


def build_expert(settings: ExpertSettings, device: torch.device, budget: Budget | None = None) -> Expert:
    """Build the expert selected by `expert=` (or `expert@second_expert=`); no weights are loaded yet.

    Without a `budget`, a paid expert may spend all that its settings allow.

    Raises:
        UserError: The rules file or the model folder is missing or broken.
    """
    if isinstance(settings, RulesExpertSettings):
        path = find_path(settings.path)
        return RulesExpert(Rules.from_yaml(path), name=f"rules:{path.stem}")
    if isinstance(settings, RefusalsExpertSettings):
        return RefusalsJudge()
    # Imported here, as rules need neither the client nor torch, and the client does not need torch.
    if isinstance(settings, OpenAIExpertSettings):
        from safer_instruct.generation.server import expert_server

        return LLMExpert(expert_server(settings, budget))
    from safer_instruct.generation.backends import NO_TEMPLATE, TemplatedModel
    from safer_instruct.generation.trained_as import AsTrained, model_as_trained

    if isinstance(settings, GuardExpertSettings):
        question = None
        if settings.prompt_file is not None:
            try:
                question = find_path(settings.prompt_file).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"expert.prompt_file={settings.prompt_file}: not UTF-8 at byte {error.start}") from None
        template = NO_TEMPLATE if FORMS[settings.form].prompt is not None or question is not None else "chat"
        guard = TemplatedModel(settings.model, settings.generation, device, AsTrained(template, None), prompts=[])
        return GuardJudge(guard, settings.form, question)
    from safer_instruct.generation.models import load_tokenizer

    tokenizer, keys = load_tokenizer(settings.model), {"key": "expert", "model_key": "expert.model", "default": "chat"}
    asked_as = model_as_trained(settings.model, tokenizer, settings.template, settings.system, **keys)
    if isinstance(settings, StrongRejectSettings):
        asked = [STRONGREJECT.render("", "")]
        judge = TemplatedModel(settings.model, settings.generation, device, asked_as, prompts=asked)
        return StrongRejectJudge(judge, settings.threshold)
    rubrics = [SCREEN.render("", ""), RESPOND.render(""), JUDGE.render("", "")]
    return LLMExpert(TemplatedModel(settings.model, settings.generation, device, asked_as, prompts=rubrics))
