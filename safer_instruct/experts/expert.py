"""The expert: it filters induced pairs, writes the safe responses, and judges the outputs of models.

One protocol, two kinds: rules (`RulesExpert`), and a language model behind a TextGenerator (`LLMExpert`), which runs on
this machine (`LocalGenerator`) or on a server (`server.OpenAIGenerator`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from config.paths import find_path
from config.settings import LocalExpertSettings, OpenAIExpertSettings, RulesExpertSettings
from safer_instruct.experts.prompts import (
    FILTER_SCHEMA,
    JUDGE_SCHEMA,
    PROMPT_HASHES,
    PROMPTS_FINGERPRINT,
    parse_filter,
    parse_judge,
    parse_respond,
    render_filter,
    render_judge,
    render_respond,
    repair_filter,
    repair_judge,
)
from safer_instruct.experts.rules import Rules
from safer_instruct.experts.verdicts import Judgement, Verdict
from safer_instruct.generation.completions import Generation, Request, TextGenerator
from safer_instruct.text.examples import Example
from safer_instruct.text.prompts import Prompt, render_prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from safer_instruct.generation.hf import HFGenerator
    from safer_instruct.generation.pacing import Budget

ExpertSettings = RulesExpertSettings | LocalExpertSettings | OpenAIExpertSettings


@dataclass(frozen=True, slots=True)
class SafeResponse:
    """An expert's safe response to one instruction.

    Attributes:
        text: The response; None if the expert abstained.
        reason: Why it abstained, from a small closed vocabulary; "" if it did not.
        tokens: Tokens that the expert used for it.
        cost: What they cost by the expert's prices.
    """

    text: str | None
    reason: str = ""
    tokens: int = 0
    cost: float = 0.0


class Expert(Protocol):
    """What the stages and the evaluation ask of an expert.

    `screen` and `respond` yield each answer as soon as it is there, in any order, so that it can be written down
    before the next one is paid for. An answer that cannot be read is an abstention: `Verdict(False, "abstain_...")`,
    `SafeResponse(None, "abstain_...")`, `Judgement("abstain")`.
    """

    name: str
    fingerprint: str
    prompt_hashes: Mapping[str, str]  # role (filter, respond, judge) -> hash of what a model is told in it

    def check(self) -> None:
        """Raise a UserError if the expert cannot work (no key, no server, no file). Loads no model."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """Yield (id, verdict) for each pair of an induced `instruction` and its unsafe response `rejected`."""

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """Yield (id, safe response) for each `instruction`."""

    def judge(self, items: Sequence[tuple[str, str, str]]) -> list[Judgement]:
        """Judge (id, instruction, output) triples, whose ids are unique; the judgements are in their order."""


class RulesExpert:
    """`expert=rules`: patterns and templates from a YAML file."""

    def __init__(self, rules: Rules, *, name: str = "rules") -> None:
        self.name = name
        self.fingerprint = rules.fingerprint
        self.prompt_hashes: Mapping[str, str] = {}
        self._rules = rules

    def check(self) -> None:
        """Nothing can be missing: the rules have been read."""

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """See Expert."""
        for pair in pairs:
            yield pair.id, self._rules.screen(pair.instruction or "", pair.rejected or "")

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """See Expert; an instruction that the rules know no answer to is an abstention."""
        for example in examples:
            text = self._rules.respond(example.instruction or "")
            yield example.id, SafeResponse(text, "" if text is not None else "abstain_no_rule")

    def judge(self, items: Sequence[tuple[str, str, str]]) -> list[Judgement]:
        """See Expert."""
        return [self._rules.judge(instruction, output) for _, instruction, output in items]


class LLMExpert:
    """An expert that asks a language model, and reads its answers strictly; one that cannot be read is asked again."""

    def __init__(self, generator: TextGenerator) -> None:
        self.name = generator.name
        self.fingerprint = hashlib.blake2b(
            f"{generator.fingerprint}/{PROMPTS_FINGERPRINT}".encode(), digest_size=8
        ).hexdigest()
        self.prompt_hashes: Mapping[str, str] = PROMPT_HASHES
        self.generator = generator

    def check(self) -> None:
        """See Expert."""
        self.generator.check()

    def screen(self, pairs: Sequence[Example]) -> Iterator[tuple[str, Verdict]]:
        """See Expert."""
        requests = [
            Request(pair.id, render_filter(pair.instruction or "", pair.rejected or ""), FILTER_SCHEMA, repair_filter)
            for pair in pairs
        ]
        for generation in self._ask(requests):
            tokens = _tokens(generation)
            verdict = parse_filter(generation.text, tokens=tokens) if not generation.error else None
            verdict = verdict or Verdict(False, _abstention(generation), tokens=tokens)
            yield generation.id, replace(verdict, cost=generation.cost)

    def respond(self, examples: Sequence[Example]) -> Iterator[tuple[str, SafeResponse]]:
        """See Expert; a response that the limit on new tokens cut off is an abstention."""
        requests = [Request(example.id, render_respond(example.instruction or "")) for example in examples]
        for generation in self._ask(requests):
            text = None if generation.truncated or generation.error else parse_respond(generation.text)
            reason = _abstention(generation) if text is None else ""
            yield generation.id, SafeResponse(text, reason, _tokens(generation), generation.cost)

    def judge(self, items: Sequence[tuple[str, str, str]]) -> list[Judgement]:
        """See Expert."""
        requests = [
            Request(id, render_judge(instruction, output), JUDGE_SCHEMA, repair_judge)
            for id, instruction, output in items
        ]
        if len({request.id for request in requests}) != len(items):
            raise ValueError("the ids of the items to judge must be unique")
        judgements = {}
        for generation in self._ask(requests):
            tokens = _tokens(generation)
            read = parse_judge(generation.text, tokens=tokens) if not generation.error else None
            judgements[generation.id] = read or Judgement("abstain", tokens=tokens)
        return [judgements[id] for id, _, _ in items]

    def _ask(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield the answers. A generator on this machine asks no second time by itself: that is done here."""
        unreadable: dict[str, tuple[Request, Generation]] = {}
        by_id = {request.id: request for request in requests}
        for generation in self.generator.generate(requests):
            request = by_id[generation.id]
            if request.repair is None or generation.repaired or generation.error or not request.repair(generation.text):
                yield generation
            else:
                unreadable[generation.id] = request, generation
        again = [_repair_request(request, first) for request, first in unreadable.values()]
        for second in self.generator.generate(again) if again else ():
            first = unreadable[second.id][1]
            if second.error:  # its longer prompt has no room, perhaps: the first answer stays what it is
                second = replace(second, text=first.text, truncated=first.truncated, error="")
            yield replace(
                second,
                prompt_tokens=first.prompt_tokens + second.prompt_tokens,
                new_tokens=first.new_tokens + second.new_tokens,
                repaired=True,
            )


def _repair_request(request: Request, first: Generation) -> Request:
    """The same material, and behind it the unreadable answer with what was wrong: one turn, as templates have it."""
    assert request.repair is not None
    complaint = request.repair(first.text)
    tail = f"{request.prompt.tail}\n\n{first.text.strip()}\n\n{complaint}"
    return Request(request.id, request.prompt._replace(tail=tail), request.schema)


def _tokens(generation: Generation) -> int:
    return generation.prompt_tokens + generation.new_tokens


def _abstention(generation: Generation) -> str:
    """Why there is no answer: one of a few words, for the counts."""
    if generation.error:
        return f"abstain_{generation.error}"
    if generation.truncated:
        return "abstain_truncated"
    return "abstain_unreadable" if generation.text.strip() else "abstain_empty"


class LocalGenerator:
    """`expert=local`: a causal LM on this machine, loaded when the first text is asked for."""

    def __init__(self, settings: LocalExpertSettings, device: torch.device) -> None:
        from safer_instruct.generation.models import model_fingerprint

        self.name = f"local:{Path(settings.model.name_or_path).name}"
        decoding = {key: value for key, value in asdict(settings.generation).items() if key != "max_batch_tokens"}
        identity = f"{model_fingerprint(settings.model)}/{settings.template}/{decoding}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._settings = settings
        self._device = device
        self._loaded: tuple[HFGenerator, PreTrainedTokenizerBase] | None = None

    def check(self) -> None:
        """Load the tokenizer, which is quick: a missing folder or chat template is said before the weights load."""
        from safer_instruct.generation.models import load_tokenizer

        render_prompt(self._settings.template, "", tokenizer=load_tokenizer(self._settings.model))

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request; each prompt is one user turn of the template."""
        generator, tokenizer = self._loaded or self._load()
        template = self._settings.template
        rendered = [Request(one.id, in_template(template, one.prompt, tokenizer)) for one in requests]
        return generator.generate(rendered)

    def _load(self) -> tuple[HFGenerator, PreTrainedTokenizerBase]:
        from safer_instruct.generation.hf import HFGenerator
        from safer_instruct.generation.models import load_causal_lm, load_tokenizer

        tokenizer = load_tokenizer(self._settings.model)
        model = load_causal_lm(self._settings.model)
        model.to(self._device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        generator = HFGenerator(
            model,
            tokenizer,
            self._settings.generation,
            name=self.name,
            fingerprint=self.fingerprint,
        )
        for prompt in (render_filter("", ""), render_judge("", ""), render_respond("")):
            generator.require_room(in_template(self._settings.template, prompt, tokenizer))
        self._loaded = generator, tokenizer
        return self._loaded


def in_template(template: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Put a whole prompt into a template as its instruction; what may be cut stays the prompt's own body."""
    outer = render_prompt(template, prompt.text, tokenizer=tokenizer)
    if outer.body != prompt.text:  # a template that splits its instruction: a dialogue in the material under `hh`
        return outer
    return Prompt(outer.head + prompt.head, prompt.body, prompt.tail + outer.tail)


def build_expert(settings: ExpertSettings, device: torch.device, budget: Budget | None = None) -> Expert:
    """Build the expert that `expert=` chose; no weights are loaded yet.

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
    if isinstance(settings, LocalExpertSettings):
        return LLMExpert(LocalGenerator(settings, device))
    from safer_instruct.generation.server import expert_server

    return LLMExpert(expert_server(settings, budget))
