"""What the fields of the settings mean: the comments in their source, read for `--help` and the reference."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import is_dataclass


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass, inherited ones included; "" where there is none."""
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
    """Return the comment behind a statement, or else the lines of comment above it."""
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
