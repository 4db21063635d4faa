"""The text of `--help`: a program's groups with their choices, and its most important keys; nothing is composed.

The description of a key is the comment of its field in the source of the settings, as in the reference.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from config import paths
from config.rules import MISSING, typed

WIDTH = 120
KEYS: dict[str, tuple[str, ...]] = {  # program -> its most important keys; --help=all lists all keys
    "train.py": (
        "exp_name", "model.name_or_path", "model.archive", "datasets.NAME.path", "batch_size", "lr", "n_epochs",
        "max_length", "eval_every", "dry_run",
    ),
    "induce.py": (
        "output", "stage", "corpus.path", "corpus.response_column", "model.name_or_path", "model.archive",
        "generation.max_new_tokens", "exclude", "shard.count", "dry_run",
    ),
    "evaluate.py": (
        "output", "models.NAME.path", "prompts.NAME.path", "prompts.NAME.kind", "generation.max_new_tokens",
        "helpfulness.baseline", "rewards.path", "compare", "shard.count", "dry_run",
    ),
}  # fmt: skip


def short_help(program: str, kind: type, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `--help` for a program, its settings `kind`, and its config groups with their choices."""
    entries = {f"{group}=": " | ".join(options) for group, options in groups.items()}
    keys = dict(_key(kind, key) for key in KEYS[program])
    return "\n".join(
        [
            str(kind.__doc__).strip(),
            f"\nUsage: {paths.program(Path(program).stem)} KEY=VALUE ... [-m for sweeps: KEY=A,B,C]\n\nGroups:",
            *_columns(entries),
            "\nThe most important keys, with their defaults:",
            *_columns(keys),
            "\n--help=all: every key. --cfg job: the settings of a command. Meaning and values of each key: "
            "docs/configuration.md",
        ]
    )


def _key(kind: Any, key: str) -> tuple[str, str]:
    """Return (the key with its default, its comment) of a dotted key; a part NAME stands for a mapping's key."""
    *parents, name = key.split(".")
    for part in parents:
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind)[part]
    (field,) = (field for field in fields(kind) if field.name == name)
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    return f"{key}={'...' if value == MISSING else typed(value)}", comments(kind)[name]


def _columns(entries: Mapping[str, str]) -> list[str]:
    """Return two columns: the name of each entry, and its text wrapped beside it."""
    width = max(map(len, entries)) + 4
    return [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:<{width - 2}}", subsequent_indent=" " * width)
        for name, text in entries.items()
    ]


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass, inherited ones included; "" if there is none."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        body = ast.parse("\n".join(lines)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement in body.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                own = _comment(lines, statement)
                found[statement.target.id] = own or found.get(statement.target.id, "")
    return found


def _comment(lines: list[str], statement: ast.AnnAssign) -> str:
    """Return the comment after a statement, or else the comment lines above it."""
    assert statement.end_lineno
    behind = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode().strip()
    if behind.startswith("#"):
        return behind.lstrip("# ")
    above: list[str] = []
    for line in reversed(lines[: statement.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)
