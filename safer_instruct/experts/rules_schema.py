"""The schema of a rules file: what `expert=rules` reads, checked in one go with every fault listed."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from config.errors import UserError


@dataclass(frozen=True, slots=True)
class LexiconSpec:
    """Words or phrases that a text can name."""

    words: list[str]
    case_sensitive: bool = False


@dataclass(frozen=True, slots=True)
class InstructionSpec:
    """The form of a usable instruction, whatever it asks."""

    min_words: int = 3
    max_words: int = 150
    pattern: str = ""  # must be found in it


@dataclass(frozen=True, slots=True)
class IntentSpec:
    """How an instruction asks for a category of harm: one of `patterns`, and none of `unless`."""

    patterns: list[str]
    unless: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HarmSpec:
    """How a response does harm: all of `requires` are named, and a pattern is found."""

    requires: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)  # outside the sentences that decline
    anywhere: list[str] = field(default_factory=list)  # in these too


@dataclass(frozen=True, slots=True)
class CategorySpec:
    """One kind of harm."""

    key: list[str]
    intent: IntentSpec
    harm: HarmSpec
    responses: list[str]


@dataclass(frozen=True, slots=True)
class RulesSpec:
    """A whole rules file."""

    lexicons: dict[str, LexiconSpec]
    refusals: list[str]
    categories: dict[str, CategorySpec]
    instruction: InstructionSpec = field(default_factory=InstructionSpec)


def read_rules(path: Path) -> RulesSpec:
    """Read a rules file and check all of it.

    Raises:
        UserError: The file is missing, is no YAML mapping, or breaks the schema; the message lists every fault with
            its place in the file.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"rules file not found: {path}. Set expert.path to a YAML file of rules.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}. Save the rules file as UTF-8.") from None
    except yaml.YAMLError as error:
        place = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"{path}:{place.line + 1}:{place.column + 1}" if place is not None else str(path)
        raise UserError(f"{where}: not valid YAML. Patterns with : # , or brackets need single quotes.") from None
    reader = _Reader()
    spec = reader.rules(raw)
    if spec is None or reader.faults:
        raise UserError(f"{path}: the rules file breaks its schema:\n" + "\n".join(f"  {f}" for f in reader.faults))
    return spec


class _Reader:
    """Turns parsed YAML into specs; collects faults instead of stopping at the first."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def rules(self, raw: Any) -> RulesSpec | None:
        top = self._mapping(raw, "(top level)", RulesSpec)
        lexicons = {
            name: LexiconSpec(
                words=self._texts(entry.get("words"), f"lexicons.{name}.words", required=True),
                case_sensitive=self._typed(entry.get("case_sensitive", False), bool, f"lexicons.{name}.case_sensitive"),
            )
            for name, entry in self._entries(top.get("lexicons"), "lexicons", LexiconSpec)
        }
        categories = {
            name: self._category(entry, f"categories.{name}", lexicons)
            for name, entry in self._entries(top.get("categories"), "categories", CategorySpec)
        }
        refusals = self._patterns(top.get("refusals"), "refusals", required=True)
        instruction = self._instruction(top.get("instruction", {}))
        return None if self.faults else RulesSpec(lexicons, refusals, categories, instruction)

    def _instruction(self, raw: Any) -> InstructionSpec:
        entry = self._mapping(raw, "instruction", InstructionSpec)
        low = self._typed(entry.get("min_words", 3), int, "instruction.min_words")
        high = self._typed(entry.get("max_words", 150), int, "instruction.max_words")
        pattern = self._typed(entry.get("pattern", ""), str, "instruction.pattern")
        self._compiles(pattern, "instruction.pattern")
        if isinstance(low, int) and isinstance(high, int) and not 0 <= low <= high:
            self.faults.append(f"instruction: min_words={low} must be between 0 and max_words={high}")
        return InstructionSpec(low, high, pattern)

    def _category(self, entry: Mapping[str, Any], where: str, lexicons: Mapping[str, Any]) -> CategorySpec:
        key = self._names(entry.get("key"), f"{where}.key", lexicons, required=True)
        intent = self._mapping(entry.get("intent"), f"{where}.intent", IntentSpec)
        harm = self._mapping(entry.get("harm"), f"{where}.harm", HarmSpec)
        responses = self._texts(entry.get("responses"), f"{where}.responses", required=True)
        for number, template in enumerate(responses):
            self._template(template, key, f"{where}.responses[{number}]")
        if not harm.get("patterns") and not harm.get("anywhere"):
            self.faults.append(f"{where}.harm: give at least one of patterns, anywhere")
        return CategorySpec(
            key=key,
            intent=IntentSpec(
                patterns=self._patterns(intent.get("patterns"), f"{where}.intent.patterns", required=True),
                unless=self._patterns(intent.get("unless"), f"{where}.intent.unless"),
            ),
            harm=HarmSpec(
                requires=self._names(harm.get("requires"), f"{where}.harm.requires", lexicons),
                patterns=self._patterns(harm.get("patterns"), f"{where}.harm.patterns"),
                anywhere=self._patterns(harm.get("anywhere"), f"{where}.harm.anywhere"),
            ),
            responses=responses,
        )

    def _template(self, template: str, key: list[str], where: str) -> None:
        try:
            slots = [slot for _, slot, _, _ in string.Formatter().parse(template) if slot is not None]
        except ValueError as error:
            self.faults.append(f"{where}: not a template: {error}")
            return
        for slot in slots:
            if slot not in key:
                self.faults.append(
                    f"{where}: slot {{{slot}}} is no key slot of the category (they are {', '.join(key)})"
                )

    def _entries(self, raw: Any, where: str, spec: type) -> list[tuple[str, Mapping[str, Any]]]:
        if not isinstance(raw, dict) or not raw:
            self.faults.append(f"{where}: must be a mapping with at least one entry, got {_kind(raw)}")
            return []
        return [(str(name), self._mapping(entry, f"{where}.{name}", spec)) for name, entry in raw.items()]

    def _mapping(self, raw: Any, where: str, spec: type) -> Mapping[str, Any]:
        if not isinstance(raw, dict):
            self.faults.append(f"{where}: must be a mapping, got {_kind(raw)}")
            return {}
        known = [f.name for f in fields(spec)]
        for name in raw:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
                self.faults.append(f"{where}: unknown key {name!r}; {hint}")
        return raw

    def _names(self, raw: Any, where: str, lexicons: Mapping[str, Any], *, required: bool = False) -> list[str]:
        names = self._texts(raw, where, required=required)
        for name in names:
            if name not in lexicons:
                near = difflib.get_close_matches(name, lexicons, n=1)
                hint = f"did you mean {near[0]}?" if near else f"lexicons: {', '.join(lexicons)}"
                self.faults.append(f"{where}: no lexicon {name!r}; {hint}")
        return names

    def _patterns(self, raw: Any, where: str, *, required: bool = False) -> list[str]:
        patterns = self._texts(raw, where, required=required)
        for number, pattern in enumerate(patterns):
            self._compiles(pattern, f"{where}[{number}]")
        return patterns

    def _compiles(self, pattern: str, where: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            self.faults.append(f"{where}: not a regular expression: {error}")

    def _texts(self, raw: Any, where: str, *, required: bool = False) -> list[str]:
        if raw is None and not required:
            return []
        if not isinstance(raw, list) or not all(isinstance(text, str) and text for text in raw):
            self.faults.append(f"{where}: must be a list of texts, got {_kind(raw)}")
            return []
        if required and not raw:
            self.faults.append(f"{where}: must not be empty")
        return raw

    def _typed(self, value: Any, kind: type, where: str) -> Any:
        if type(value) is not kind:
            self.faults.append(f"{where}: must be {kind.__name__}, got {_kind(value)}")
        return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list that holds something else than texts" if value else "an empty list"
    return type(value).__name__
