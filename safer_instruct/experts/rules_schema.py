"""The schema of the rules file for `expert=rules`; a single check lists every fault."""

from __future__ import annotations

import difflib
import re
import string
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import regex
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip
from pydantic_core import ErrorDetails, PydanticCustomError

from config.errors import UserError
from config.reading import load_yaml

# pydantic's error type -> what the file should hold there.
EXPECTED = {
    "list_type": "must be a list of texts",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_type": "must be a text",
    "int_type": "must be an int",
    "bool_type": "must be a bool",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}
FAULTS, FAULT_ABOVE = "faults", "fault_above"  # our own errors: of a field (one per line), of the mapping around it


def _report(*faults: str) -> None:
    """Raise the faults of a field, if there are any, as one pydantic error."""
    if told := [fault for fault in faults if fault]:
        raise PydanticCustomError(FAULTS, "{faults}", {"faults": "\n".join(told)})


def _each(fault_of: Callable[[str, ValidationInfo], str], place: str = "[{number}]: ") -> AfterValidator:
    """Check every text of a list and report all faults; a plain pydantic validator would stop at the first."""

    def validate(texts: list[str], info: ValidationInfo) -> list[str]:
        found = [(number, fault) for number, text in enumerate(texts) if (fault := fault_of(text, info))]
        _report(*(place.format(number=number) + fault for number, fault in found))
        return texts

    return AfterValidator(validate)


def _pattern_fault(pattern: str, _: ValidationInfo) -> str:
    try:
        with warnings.catch_warnings():  # FutureWarnings about syntax would name a line of this file
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
            regex.compile(pattern)  # the module that runs the searches
    except (re.error, regex.error) as error:
        return f"not a regular expression: {error}"
    return ""


def _name_fault(name: str, info: ValidationInfo) -> str:
    lexicons: Sequence[str] = (info.context or {})["lexicons"]
    return "" if name in lexicons else f"no lexicon {name!r}; {_hint(name, lexicons, 'lexicons')}"


def _template_fault(template: str, info: ValidationInfo) -> str:
    """Return what is wrong with a response template, whose slots must be key slots of the category."""
    key = info.data.get("key")
    return _slot_fault(template, key, "is no key slot of the category")


def _slot_fault(template: str, known: Sequence[str] | None, complaint: str) -> str:
    """Return what is wrong with a template whose slots must be `known`; with None, their names are not checked."""
    try:
        slots = template_slots(template)
    except ValueError as error:
        return f"not a template: {error}"
    if any(spec or conversion for _, _, spec, conversion in string.Formatter().parse(template)):
        return "a slot has no format: write {slot}, without : or !"  # a format width could be 10^9
    strange = [] if known is None else [slot for slot in slots if slot not in known]
    listed = ", ".join(known or ()) or "none"
    return "; ".join(f"slot {{{slot}}} {complaint} (they are {listed})" for slot in strange)


def template_slots(template: str) -> list[str]:
    """Return the slots of a template in order; raises ValueError for an unclosed brace."""
    return [slot for _, slot, _, _ in string.Formatter().parse(template) if slot is not None]


def _hint(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"{what}: {', '.join(known)}"


Text = Annotated[StrictStr, Field(min_length=1)]
Optional = BeforeValidator(lambda given: [] if given is None else given)  # allows a key without a value
Required = Field(min_length=1)
Patterns, Names = _each(_pattern_fault), _each(_name_fault, place="")  # a name needs no number to be found


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LexiconSpec(_Spec):
    """Words or phrases that a text can name."""

    words: Annotated[list[Text], Required]
    case_sensitive: StrictBool = False


class InstructionSpec(_Spec):
    """The form of a usable instruction, whatever it asks for."""

    min_words: StrictInt = 3
    max_words: StrictInt = 150
    pattern: StrictStr = ""  # must be found in it

    @field_validator("max_words")
    @classmethod
    def _in_order(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_words", 0)
        if not 0 <= least <= most:
            raise PydanticCustomError(FAULT_ABOVE, f"min_words={least} must be between 0 and max_words={most}")
        return most

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str, info: ValidationInfo) -> str:
        _report(_pattern_fault(pattern, info))
        return pattern


class IntentSpec(_Spec):
    """How an instruction asks for a category of harm: one of `patterns`, and none of `unless`."""

    patterns: Annotated[list[Text], Required, Patterns]
    unless: Annotated[list[Text], Optional, Patterns] = []


class HarmSpec(_Spec):
    """How a response does harm: it names all of `requires`, and a pattern is found."""

    requires: Annotated[list[Text], Optional, Names] = []
    patterns: Annotated[list[Text], Optional, Patterns] = []  # searched outside of declining sentences
    anywhere: Annotated[list[Text], Optional, Patterns] = []  # searched in the whole text

    @field_validator("anywhere")
    @classmethod
    def _has_a_pattern(cls, anywhere: list[str], info: ValidationInfo) -> list[str]:
        if not anywhere and info.data.get("patterns") == []:
            raise PydanticCustomError(FAULT_ABOVE, "give at least one of patterns, anywhere")
        return anywhere


class NeighbourSpec(_Spec):
    """A harmless instruction on the topic of an unsafe one, and its answer; both are templates.

    `framed`: the instruction is only a deed ("thank {name}"), and is put into the frame of the unsafe one ("How do I
    ...?"), so that they differ in what they ask for, not in how.
    """

    instruction: Text
    answer: Text
    framed: StrictBool = False

    @field_validator("answer")
    @classmethod
    def _slots_are_asked(cls, answer: str, info: ValidationInfo) -> str:
        instruction = info.data.get("instruction")
        if instruction is None or _slot_fault(instruction, None, ""):
            return answer  # reported for the instruction
        _report(_slot_fault(answer, template_slots(instruction), "is not in the instruction"))
        return answer


class CategorySpec(_Spec):
    """One kind of harm."""

    key: Annotated[list[Text], Required, Names]
    intent: IntentSpec
    harm: HarmSpec
    responses: Annotated[list[Text], Required, _each(_template_fault)]
    neighbours: Annotated[list[NeighbourSpec], Optional] = []

    @field_validator("neighbours")
    @classmethod
    def _slots_are_known(cls, neighbours: list[NeighbourSpec], info: ValidationInfo) -> list[NeighbourSpec]:
        faults = [(number, _template_fault(one.instruction, info)) for number, one in enumerate(neighbours)]
        _report(*(f"[{number}].instruction: {fault}" for number, fault in faults if fault))
        return neighbours


def _frame_fault(frame: str, _: ValidationInfo) -> str:
    if fault := _slot_fault(frame, ("do", "Do"), "is no slot of a frame"):
        return fault
    return "" if len(template_slots(frame)) == 1 else "a frame has one slot, {do} or {Do}"


class RulesSpec(_Spec):
    """A whole rules file."""

    lexicons: Annotated[dict[str, LexiconSpec], Required]
    refusals: Annotated[list[Text], Required, Patterns]
    categories: Annotated[dict[str, CategorySpec], Required]
    instruction: InstructionSpec = InstructionSpec()
    frames: Annotated[list[Text], Optional, _each(_frame_fault)] = []

    @model_validator(mode="after")
    def _framed_neighbours_have_frames(self) -> RulesSpec:
        for name, category in self.categories.items():
            if not self.frames and any(one.framed for one in category.neighbours):
                raise PydanticCustomError(FAULTS, f"categories.{name} has framed neighbours, and `frames` lists none")
        return self


def read_rules(path: Path) -> RulesSpec:
    """Read a rules file and check all of it.

    Raises:
        UserError: The file is missing, is not a YAML mapping, or breaks the schema; the message lists every fault with
            its place in the file.
    """
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"rules file not found: {path}. Set expert.path to a YAML file of rules.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}. Save the rules file as UTF-8.") from None
    except yaml.YAMLError as error:
        place = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"{path}:{place.line + 1}:{place.column + 1}" if place is not None else str(path)
        raise UserError(f"{where}: not valid YAML. Patterns with : # , or brackets need single quotes.") from None
    lexicons = raw.get("lexicons") if isinstance(raw, dict) else None
    try:
        return RulesSpec.model_validate(raw, context={"lexicons": list(lexicons) if isinstance(lexicons, dict) else []})
    except ValidationError as error:
        faults = [f"  {line}" for fault in error.errors() for line in _describe(fault)]
        raise UserError(f"{path}: the rules file breaks its schema:\n" + "\n".join(faults)) from None


def _describe(fault: ErrorDetails) -> list[str]:
    """Return the messages for a pydantic error: place, rule, and value or nearest name."""
    kind, place, given = fault["type"], fault["loc"], fault["input"]
    if kind == FAULTS:
        return [_place(place) + (line if line.startswith("[") else f": {line}") for line in fault["msg"].split("\n")]
    if kind == FAULT_ABOVE:
        return [f"{_place(place[:-1])}: {fault['msg']}"]
    if kind == "extra_forbidden":
        hint = _hint(str(place[-1]), list(_annotation(place[:-1]).model_fields), "known keys")
        return [f"{_place(place[:-1])}: unknown key {place[-1]!r}; {hint}"]
    if kind == "missing":
        kind, given = "list_type" if get_origin(_annotation(place)) is list else "dict_type", None
    got = "nothing" if given is None else type(given).__name__
    return [f"{_place(place)}: {EXPECTED.get(kind, fault['msg'])}, got {got}"]


def _annotation(place: tuple[int | str, ...]) -> Any:
    """Return the type expected at a place of the file."""
    kind: Any = RulesSpec
    for part in place:
        kind = get_args(kind)[-1] if get_origin(kind) in (dict, list) else kind.model_fields[part].annotation
    return kind


def _place(place: tuple[int | str, ...]) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return dotted.lstrip(".") or "(top level)"
