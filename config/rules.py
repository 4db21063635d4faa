"""Rules for single values. Settings hold them in their annotations, and `check_values` applies all of them.

    warmup_ratio: Annotated[float, interval("[0, 1)")] | None = None

A rule maps a value to a complaint, or to "" if the value is right. A text in an annotation describes a mandatory value
in the message that asks for it. Rules look at folders, but never load anything.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from config.names import DTYPES, KINDS, MADE_BY, TEMPLATES
from config.paths import find_path, may_be_on_hub

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")

Rule = Callable[[Any], str]


class Fault(NamedTuple):
    """One mistake in a command."""

    key: str  # the setting at fault
    message: str  # complete: the rule, the value, what to write instead
    others: tuple[str, ...] = ()  # other settings that the rule compares it with

    def __str__(self) -> str:
        return self.message


def typed(value: Any) -> str:
    """Return a value as written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def misfit(key: str, value: Any, complaint: str, *others: str) -> Fault:
    """Return the fault of a wrong value: `key=value: complaint`."""
    return Fault(key, f"{key}={typed(value)}: {complaint}", others)


def check_values(settings: Any, prefix: str = "") -> list[Fault]:
    """Return a fault for each value of a settings dataclass, nested ones included, that is not set or breaks a rule."""
    hints = get_type_hints(type(settings), include_extras=True)
    return [fault for name, value in vars(settings).items() for fault in _check(prefix + name, value, hints[name])]


def _check(key: str, value: Any, hint: Any) -> list[Fault]:
    if is_dataclass(value):
        return check_values(value, key + ".")
    if isinstance(value, dict):
        entry_hint = get_args(hint)[1] if get_origin(hint) is dict else Any
        if _holds_containers(value.values(), entry_hint):
            return [misfit(key, value, "must hold single values")]
        return [fault for name, entry in value.items() for fault in _check(f"{key}.{name}", entry, entry_hint)]
    if isinstance(value, list):
        if _holds_containers(value, hint):
            return [misfit(key, value, "must hold single values")]
        return [fault for entry in value for fault in _check(key, entry, hint)]
    notes = _notes(hint)
    if isinstance(value, str) and value == MISSING:
        words = next((note for note in notes if isinstance(note, str)), "a value")
        return [Fault(key, f"{key} is not set: write {key}=..., {words}")]
    if value is None:
        return []
    complaints = [note(value) for note in notes if not isinstance(note, str)]
    return [misfit(key, value, complaint) for complaint in complaints if complaint]


def _holds_containers(entries: Iterable[Any], hint: Any) -> bool:
    # OmegaConf accepts a list or a dictionary as an entry of either.
    return hint is not Any and any(isinstance(entry, list | dict) for entry in entries)


def _notes(hint: Any) -> list[Any]:
    """Return the rules and texts of an annotation, also those inside `| None` and `list[...]`."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return [*notes, *_notes(kind)]
    return [note for part in get_args(hint) for note in _notes(part)]


def is_below(key: str, roots: Iterable[str]) -> bool:
    """Tell whether `key` is one of `roots` or inside one: model.name_or_path is inside model."""
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the entry of `names` that `name` was probably meant to be; None if none is similar."""
    choices = sorted(names)
    found = [choice for choice in choices if choice.lower() == name.lower()]
    found = found or difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    if not found:  # `beta` for `loss.beta`, `path` for `datasets.si.path`
        leaves = {choice.split(".")[-1]: choice for choice in reversed(choices)}
        found = [leaves[leaf] for leaf in difflib.get_close_matches(name.split(".")[-1], leaves, n=1, cutoff=0.75)]
    return found[0] if found else None


def suggest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean NAME?`, or a full stop if no name is similar."""
    guess = nearest(name, names, cutoff)
    return f"; did you mean {guess}?" if guess else "."


def choices(*names: str | bool) -> Rule:
    """Require one of the names."""
    written = [typed(name) for name in names]

    def complain(value: Any) -> str:
        if value in names:
            return ""
        return f"no such choice{suggest(str(value), written, 0.5)} Choices: {', '.join(written)}"

    return complain


def at_least(least: float) -> Rule:
    """Require a finite number of at least `least`."""

    def complain(value: float) -> str:
        finite = ", and finite" if value == math.inf else ""
        return "" if value >= least and not finite else f"must be {least} or more{finite}"

    return complain


def above(bound: float, complaint: str = "must be above {bound}, and finite") -> Rule:
    """Require a finite number above the bound."""
    return lambda value: "" if bound < value < math.inf else complaint.format(bound=bound)


def other_than_zero(note: str) -> Rule:
    """Require a finite number other than 0."""
    return lambda value: "" if value and math.isfinite(value) else f"must be finite and not 0{note}"


def interval(bounds: str, note: str = "") -> Rule:
    """Require a number in an interval such as `[0, 1)`, where a round bracket excludes the bound itself."""
    low, high = map(float, bounds[1:-1].split(","))

    def complain(value: float) -> str:
        is_above = value > low if bounds[0] == "(" else value >= low
        is_below = value < high if bounds[-1] == ")" else value <= high
        return "" if is_above and is_below else f"must lie in {bounds}{note}"

    return complain


def matches(pattern: str, complaint: str) -> Rule:
    """Require a text that a regular expression matches as a whole."""
    return lambda value: "" if re.fullmatch(pattern, value) else complaint


def not_empty(value: str) -> str:
    """Require a text that is not empty: as a path, that of an unset shell variable is the working directory."""
    return "" if value else "is empty; a variable that is not set?"


def existing_path(value: str) -> str:
    """Require a file or folder that exists."""
    if not value or find_path(value).exists():
        return not_empty(value)
    address = "; addresses are not read: download it, or write ORG/NAME for a dataset of the Hugging Face hub"
    return f"there is no such file or folder{address if '://' in value else _neighbours(value)}"


def path_or_none(value: str) -> str:
    """Demand a file or folder that is there; an empty text names none."""
    return value and existing_path(value)


def weights_path(value: str) -> str:
    """Require a path that `model.archive` can start from."""
    complaint = existing_path(value)
    return complaint and f"{complaint}. Give a run, a checkpoint, a model folder, an adapter, or a policy.pt"


def model_path(value: str) -> str:
    """Require a model folder with weights. A value that may be an id on the hub is left to the loader."""
    path = find_path(value)
    if not value or path.is_file():
        return not_empty(value)
    if not path.exists():
        if value in MADE_BY:
            return f"there is no such folder; make it with: {MADE_BY[value]}"
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not value.startswith(".")
        if is_hub_id and not (path.parent != Path(".") and path.parent.is_dir()):
            return ""
        return f"there is no such folder{_neighbours(value)}"
    names = ("LATEST", "model", "adapter", "adapter_config.json")
    if any((path / name).exists() for name in names) or list(path.glob("checkpoints/step-*/*/*config.json")):
        return ""  # a run (without LATEST if it was killed before writing it), a checkpoint or an adapter
    if not (path / "config.json").is_file():
        return "the folder has no config.json, so it holds no model"
    has_weights = any(list(path.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    return "" if has_weights else "the folder has a config.json but no weights (*.safetensors)"


def hub_path(value: str) -> str:
    """Require a file or folder. A value that may be ORG/NAME on the hub is left to the loader."""
    return "" if may_be_on_hub(value) else existing_path(value)


def _neighbours(value: str) -> str:
    """Return `; did you mean ...?`, from the folder that the path points into."""
    path = find_path(value)
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    return f"; did you mean {path.parent / names[0]}?" if names else ""


Count = Annotated[int, at_least(1)]
Share = Annotated[float, interval("(0, 1]")]
Dtype = Annotated[str, choices(*DTYPES)]
Template = Annotated[str, choices(*TEMPLATES)]
PromptKind = Annotated[str, choices(*KINDS)]
BadRow = Annotated[str, choices("drop", "error")]
Device = Annotated[str, matches(r"auto|cpu|cuda(:\d+)?", "must be auto, cpu or cuda (Apple's mps lacks float64)")]
ExistingPath = Annotated[str, existing_path]
PathOrNone = Annotated[str, path_or_none]
Output = Annotated[str, not_empty, "the folder to write"]
Seed = Annotated[int, interval("[0, 9.2e18]")]  # what 64 bits with a sign hold
DataPath = Annotated[str, existing_path, "the file or folder to read"]
HubPath = Annotated[str, hub_path, "the file or folder to read, or a dataset of the hub as ORG/NAME"]
HubName = Annotated[str, matches(r"[\w.-]+/[\w.-]+", "must be USER/NAME, of the Hugging Face hub")]
