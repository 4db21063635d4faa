"""Spell entries of dictionaries with free names (`models`, `datasets`, `optimizer_args`, ...) for Hydra.

The user writes `models.base.path=x`, `models.base=x` or `models={base:x}`, but Hydra adds to a typed dictionary only
with `++models={base:{path:x}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict

from config.rules import nearest, typed

# Names from other trainers, which difflib would not find.
OTHER_NAMES = {
    "learning_rate": "lr", "num_train_epochs": "n_epochs", "num_epochs": "n_epochs", "epochs": "n_epochs",
    "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size", "scheduler": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler", "optim": "optimizer", "beta": "loss.beta", "output_dir": "run_dir",
    "model_name_or_path": "model.name_or_path", "max_seq_length": "max_length",
    "gradient_checkpointing": "activation_checkpointing",
}  # fmt: skip
# How to read the files of known prompt sets, for `prompts=NAME`.
PRESETS: dict[str, dict[Any, Any]] = {
    "prompts": {
        "published": {"kind": "unsafe", "source_column": "label"},  # its sources are in the column `label`
        # Safe prompts that look unsafe, and similar unsafe ones. Older files tell them apart only in `type`.
        "xstest": {
            "columns": {"instruction": "prompt", "kind": "label", "label": "type"},
            "kinds": {"safe": "near"},
        },
        "harmbench": {
            "kind": "unsafe",
            "columns": {"id": "BehaviorID", "instruction": "Behavior", "label": "SemanticCategory"},
        },
        "strongreject": {
            "kind": "unsafe", "columns": {"instruction": "forbidden_prompt", "label": "category", "source": "-"},
        },
        "advbench": {"kind": "unsafe", "columns": {"instruction": "goal"}},
        "donotanswer": {"kind": "unsafe", "columns": {"instruction": "question", "label": "types_of_harm"}},
        "truthfulqa": {"kind": "benign", "columns": {"instruction": "Question", "label": "Category"}},
        # Only the first of two turns is asked; `reference` is unused, since it holds whole answers, not required words.
        "mtbench": {
            "kind": "benign",
            "columns": {"id": "question_id", "instruction": "turns", "label": "category", "reference": "-"},
        },
        "alpacaeval": {"kind": "benign", "source_column": "dataset"},
    }
}  # fmt: skip
# Dictionaries in groups whose dataclass depends on the command (`loss=mixture`), so that no annotation shows them.
CHOSEN = ("loss.parts", "expert.model.chat_template_kwargs", "second_expert.model.chat_template_kwargs")
TYPES: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"
}  # fmt: skip
type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # of a dataclass, for every word of a command


class FreeKey(NamedTuple):
    """A key that leads through a dictionary with free names."""

    root: str  # the key of the dictionary
    names: list[str]  # what follows it
    entry: Any  # type of its values

    @property
    def is_dictionary(self) -> bool:
        """Whether the key is such a dictionary itself: `datasets.si.columns`."""
        hints = type_hints(self.entry) if is_dataclass(self.entry) and len(self.names) == 2 else {}
        return get_origin(hints.get(self.names[-1])) is dict if hints else False

    @property
    def is_inner(self) -> bool:
        """Whether the key leads into a dictionary inside the entry: `datasets.si.columns.instruction`."""
        hints = type_hints(self.entry) if is_dataclass(self.entry) and len(self.names) > 2 else {}
        return get_origin(hints.get(self.names[-2])) is dict if hints else False


def listed_datasets(config: DictConfig, words: Iterable[str]) -> DictConfig:
    """Drop a preset's settings for datasets that the command's `datasets=[...]` leaves out, which have no schema."""
    if any(word.startswith("datasets=") for word in words):
        for name in [one for one in config.datasets if OmegaConf.is_missing(config.datasets[one], "schema")]:
            with open_dict(config):
                del config.datasets[name]
    return config


def free_key(kind: Any, key: str) -> FreeKey | None:
    """Split a key of the settings dataclass `kind`; None if it leads through no dictionary with free names."""
    for root in CHOSEN:
        if key == root or key.startswith(f"{root}."):
            return FreeKey(root, key.removeprefix(root).split(".")[1:], Any)
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        kind = type_hints(kind).get(part) if is_dataclass(kind) else None
        if get_origin(kind) is dict:
            return FreeKey(".".join(parts[:depth]), parts[depth:], get_args(kind)[1])
    return None


def spell(override: Override, free: FreeKey) -> str | None:
    """Return the override in Hydra's spelling; None if it names no entry, which is an error."""
    value, names = override.value(), free.names
    if is_dataclass(free.entry) and len(names) > 1:
        depth = 2 if free.is_inner else 1
        names = [".".join(names[:-depth]), *names[-depth:]]  # a name may hold dots: v1.5
    elif is_dataclass(free.entry) and names:
        value = _entry(value)
    elif is_dataclass(free.entry) and isinstance(value, dict):
        value = {name: _entry(one) for name, one in value.items()}
    elif not names and isinstance(value, str) and value in PRESETS.get(free.root, {}):
        value = {value: PRESETS[free.root][value]}
    for name in reversed(names):
        value = {name: value}
    return f"++{free.root}={_render(value)}" if isinstance(value, dict) else None


def _entry(value: Any) -> dict[Any, Any]:
    """Return the settings of a named entry; a value that is not a dictionary is its path."""
    return value if isinstance(value, dict) else {"path": value}


def _render(value: Any) -> str:
    """Return a value as the text of an override, with quoted strings."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_render(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_render, value)) + "]"
    return quoted(value) if isinstance(value, str) else typed(value)


def quoted(text: str) -> str:
    """Return a text as Hydra takes it, whatever it holds."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def expected(key: str, owner: Any, given: dict[Any, Any]) -> str:
    """Say what the value of a key must be, such as `must be a number`, from the annotations of its dataclass."""
    hint: Any = get_type_hints(owner).get(key.rpartition(".")[2]) if is_dataclass(owner) else None
    if is_dataclass(hint):
        return f"is a group of keys; set one of them: {', '.join(f'{key}.{field.name}' for field in fields(hint))}"
    if get_origin(hint) is list:
        return f"must be a list: {key}=[...]"
    if get_origin(hint) is dict:
        guess = nearest(str(given.get(key)), PRESETS.get(key, {}))
        leaf = ".path" if is_dataclass(get_args(hint)[1]) else ""
        meant = f"; did you mean {key}={guess}?" if guess else ""
        return f"every entry needs a name: {key}.NAME{leaf}=...{meant}"
    kinds = get_args(hint) or [hint]
    if not set(kinds) <= TYPES.keys():
        return "does not fit; see config/settings.py for what it may be"
    return f"must be {' or '.join(TYPES[kind] for kind in kinds)}"
