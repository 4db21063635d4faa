"""Write docs/configuration.md from `config/`: every group and key of the command line. It does not import torch.

    python -m scripts.config_reference      # or: make reference

The meaning of a key is the comment of its field, its default is the field's, and its allowed values come from the rules
in its annotation. tests/test_config_reference.py fails if the page is out of date.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

from config import settings
from config.help import comments
from config.rules import MISSING, Rule, typed
from config.settings import LOSSES, EvaluateConfig, InduceConfig, TrainConfig

CONFIG = Path(settings.__file__).parent
PAGE = CONFIG.parent / "docs" / "configuration.md"
PROGRAMS: dict[str, type] = {"train.py": TrainConfig, "induce.py": InduceConfig, "evaluate.py": EvaluateConfig}
# Keys whose type depends on the group's choice: dotted key -> {heading of the choice: settings}.
EXPERTS: dict[str, type] = {
    "expert=rules": settings.RulesExpertSettings,
    "expert=local": settings.LocalExpertSettings,
    "expert=openai": settings.OpenAIExpertSettings,
    "expert=guard": settings.GuardExpertSettings,
    "expert=strongreject": settings.StrongRejectSettings,
    "expert=refusals": settings.RefusalsExpertSettings,
}
CHOSEN: dict[str, dict[str, type]] = {
    "loss": {f"loss={name}": kind for name, kind in LOSSES.items()},
    "expert": EXPERTS,
    "second_expert": EXPERTS,
}
SHARED = {
    "loss": "Keys of several losses",
    "expert": "Keys of several experts",
}  # heading of the rows that choices share
TYPES: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "text", Any: "", type(None): "null"}
INTRODUCTION = """\
# Configuration reference

<!-- Written by `python -m scripts.config_reference` from config/. Do not edit: edit the comments there. -->

Every key of the command line, with its values, default and meaning. Type keys as shown here:
`python train.py lr=1e-6 model.policy_dtype=bfloat16`. `GROUP=NAME` loads a file of `config/GROUP/`, whose keys you can
override. `NAME` stands for a name of your choice. The command, or the group's file, must give a value where the default
is *must be set*.

All errors are reported together, before anything is loaded: unknown keys, values out of range, and keys that do not fit
each other. `--help` prints the groups and defaults, and `--cfg job` the config of a command.
"""


def render_page() -> str:
    """Return the whole page as Markdown."""
    parts = [
        INTRODUCTION,
        "## Groups\n",
        *map(_render_group, sorted(path for path in CONFIG.iterdir() if path.is_dir())),
    ]
    sections: dict[type, str] = {}  # settings -> heading of the section that lists their keys
    for program, kind in PROGRAMS.items():
        parts += [f"## {program}\n", f"{_sentence(kind)}\n", *_sections(kind, "", sections)]
    return "\n".join(parts).rstrip() + "\n"


def _render_group(folder: Path) -> str:
    """Return the table of a group's files, each with the comment at its top; "" for a folder without files."""
    files = sorted(folder.glob("*.yaml"))
    rows = [f"| `{folder.name}={file.stem}` | {_cell(_head_comment(file))} |" for file in files]
    return "\n".join([f"### {folder.name}=NAME\n", "| choice | what it is |", "|---|---|", *rows, ""]) if rows else ""


def _head_comment(file: Path) -> str:
    """Return the comment that a YAML file begins with, without directives and example commands."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @", "#   ")):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _sections(kind: type, prefix: str, done: dict[type, str], shared: Sequence[str] = ()) -> Iterator[str]:
    """Yield the table of a dataclass's keys, then those of its inner dataclasses, each only once per page.

    Rows in `shared` have their own table, so that only their keys are listed here.
    """
    rows, also, later = [], [], []
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        key = prefix + field.name
        inner = _inner(key, hints[field.name])
        if not inner or key in CHOSEN:
            row = _row(kind, field, key, hints[field.name])
            (also if row in shared else rows).append(f"`{key}`" if row in shared else row)
        for heading, inner_prefix, inner_kind in inner:
            if inner_kind not in done:
                done[inner_kind] = heading
                later.append((key, heading, inner_prefix, inner_kind))
            place = done[inner_kind]
            label = f"`{heading}`" if "=" in heading else f"`{heading}.*`"
            rows.append(f"| {label} | | | see [{place}](#{_anchor(place)}) |")
    if rows:
        yield _table(rows)
    if also:
        heading = SHARED[prefix.rstrip(".")]
        yield f"[{heading}](#{_anchor(heading)}): {', '.join(also)}.\n"
    for key, group in groupby(later, key=itemgetter(0)):
        alike = _alike(key)
        if alike:
            yield f"### {SHARED[key]}\n\n{_table(alike)}"
        for _, heading, inner_prefix, inner_kind in group:
            yield f"### {heading}\n\n{_sentence(inner_kind)}\n"
            yield from _sections(inner_kind, inner_prefix, done, alike)


def _row(kind: type, field: Field[Any], key: str, hint: Any) -> str:
    return f"| `{key}` | {_cell(_type(hint))} | {_default(field)} | {_cell(comments(kind)[field.name])} |"


def _table(rows: Sequence[str]) -> str:
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _alike(key: str) -> list[str]:
    """Return the rows that several choices of a group have, to the letter: for each key the most frequent one."""
    rows: Counter[str] = Counter()
    for kind in CHOSEN[key].values() if key in SHARED else ():
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            if not _inner(f"{key}.{field.name}", hints[field.name]):
                rows[_row(kind, field, f"{key}.{field.name}", hints[field.name])] += 1
    most: dict[str, str] = {}
    for row, number in rows.most_common():
        if number > 1:
            most.setdefault(row.split("`")[1], row)
    return list(most.values())


def _inner(key: str, hint: Any) -> list[tuple[str, str, type]]:
    """Return (heading, prefix, settings) of each dataclass that a key holds, or may hold, depending on the choice."""
    if key in CHOSEN:
        return [(choice.replace("expert", key), f"{key}.", kind) for choice, kind in CHOSEN[key].items()]
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return [(f"{key}.NAME", f"{key}.NAME.", get_args(hint)[1])]
    return [(key, f"{key}.", cast("type", hint))] if is_dataclass(hint) else []


def _type(hint: Any) -> str:
    """Return a type in words, with the requirements of its rules: `int (1 or more)`."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        demand = "; ".join(filter(None, (_demand(note, kind) for note in notes if callable(note))))
        _, choices, names = demand.partition("Choices: ")
        if choices:
            return names.replace(", ", " | ")
        if demand[:1] in ("[", "("):
            return f"{_type(kind)} in {demand}"
        return f"{_type(kind)} ({demand})" if demand else _type(kind)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    return "mapping" if get_origin(hint) is dict else TYPES[hint]


def _demand(rule: Rule, kind: Any) -> str:
    """Return what a rule requires, taken from its complaint about a value that no rule accepts."""
    if "<locals>" not in rule.__qualname__:
        return "a path"  # only the rules that look at the disk are not closures
    complaint = rule(-math.inf if kind in (int, float) else "\0")
    told = re.match(r"(?:must (?:be|lie in) |no such choice\. )([^;]+)", complaint)
    return told[1].removesuffix(", and finite") if told else ""


def _default(field: Field[Any]) -> str:
    """Return a field's default as written on the command line."""
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    if value is NO_DEFAULT or value == MISSING:
        return "*must be set*"
    if is_dataclass(value) or field.name in CHOSEN:
        return "null"
    return _cell(f"`{typed(value)}`")


def _sentence(kind: type) -> str:
    """Return the docstring of settings as one paragraph."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split())


def _cell(text: str) -> str:
    """Escape a text for a table cell: `|` would end the cell, and `<` outside of code would begin a tag."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if number % 2 == 0 else part for number, part in enumerate(parts))


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, as Python-Markdown and GitHub both make it for the characters used here."""
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
