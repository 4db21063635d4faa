"""Every way to name models and prompt sets of evaluate.py, brought into the one form that Hydra can merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from config.errors import UserError
from config.overrides import nearest
from config.settings import EvaluatedModelSettings, PromptSetSettings

NAMED: dict[str, type[Any]] = {"models": EvaluatedModelSettings, "prompts": PromptSetSettings}
# `prompts=NAME` with a name and nothing else. The published test set names its sources in the column `label`.
PRESETS: dict[str, dict[str, Any]] = {"published": {"kind": "unsafe", "source_column": "label"}}


def expand_named(arguments: Sequence[str]) -> list[str]:
    """Brings every way to name models and prompt sets into the one form that Hydra adds to a typed dictionary.

    `models.base.path=FOLDER`, `models.base=FOLDER` and `models={base:FOLDER}` all become
    `models={base:{path:'FOLDER'}}`, and `prompts=published` names a set whose columns are known; other arguments stay
    as they are, and so does what cannot be parsed.

    Raises:
        UserError: Keys that do not exist and values of a wrong type, all of them.
    """
    expanded: list[str] = []
    errors: list[str] = []
    for text in arguments:
        if not re.match(r"\+{0,2}(models|prompts)[.=]", text):
            expanded.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
            value = override.value()
            # Each point of a sweep is a dictionary of its own.
            values = value.list if isinstance(value, ChoiceSweep) else [value]
            root, *path = override.key_or_group.split(".")
            points = [_check_entries(root, _to_entries(root, path, value), errors) for value in values]
            expanded.append(f"{root}={','.join(map(_render, points))}")
        except HydraException:
            expanded.append(text)  # reported with the other overrides
    if errors:
        raise UserError("\n".join(errors))
    return expanded


def _to_entries(root: str, path: Sequence[str], value: Any) -> dict[str, dict[str, Any]]:
    """Name -> settings, from the rest of an override's key (`base.path`, `base` or nothing) and its value."""
    if len(path) > 1:
        return {".".join(path[:-1]): {path[-1]: value}}
    if root == "prompts" and not path and str(value) in PRESETS:
        return {str(value): dict(PRESETS[str(value)])}
    entries = {path[0]: value} if path else value if isinstance(value, dict) else {"": value}
    return {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in entries.items()}


def _check_entries(root: str, entries: dict[str, dict[str, Any]], errors: list[str]) -> dict[str, dict[str, Any]]:
    kind = NAMED[root]
    known = [field.name for field in fields(kind)]
    for name, entry in entries.items():
        if not name:
            given = entry.get("path")
            guess = nearest(str(given), PRESETS) if root == "prompts" else None
            meant = f"; did you mean {root}={guess}?" if guess else ""
            errors.append(f"{root}={given}: every entry needs a name: {root}.NAME.path=...{meant}")
        for key, value in entry.items():
            plain = value.text if isinstance(value, QuotedString) else value
            if key not in known:
                guess = nearest(key, known)
                meant = f"; did you mean {root}.{name}.{guess}?" if guess else "."
                errors.append(f"there is no key {root}.{name}.{key}{meant} Keys: {', '.join(known)}")
                continue
            try:
                OmegaConf.merge(OmegaConf.structured(kind), {key: plain})
            except ValidationError as error:
                errors.append(f"{root}.{name}.{key}={plain}: {str(error).splitlines()[0]}")
    return entries


def _render(value: Any) -> str:
    """A parsed value as the text of an override, strings quoted."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_render(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    if isinstance(value, QuotedString):
        return value.with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
