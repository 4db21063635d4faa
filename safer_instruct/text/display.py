"""Format numbers and untrusted text for web pages, plots and Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from config.console import visible as visible


def short_name(name: str, limit: int = 22) -> str:
    """Shorten a name in the middle if it is too long for an axis, and escape its invisible characters."""
    name = visible(name)
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2]}...{name[-(limit - limit // 2 - 3) :]}"


def percent(value: float | None) -> str:
    """Write `0.9432` as `94.3`, None as `-`."""
    return "-" if value is None else f"{100 * value:.1f}"


def without_password(text: str) -> str:
    """Mask the user, password and query of URLs in a text: http://***@host/v1?***."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "***@", text)
    return re.sub(r"(://[^?\s'\"]{1,300}\?)[^\s'\"]+", r"\1***", text)


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: Sequence[int] = (0,),
    markup: Sequence[int] = (),
) -> str:
    """Render a Markdown table.

    The columns `left` are left-aligned; the others hold numbers. The columns `markup` hold our own markup; all others
    are escaped.
    """
    rule = "|".join(":---" if i in left else "---:" for i in range(len(header)))
    lines = ["| " + " | ".join(map(escape_markdown, header)) + " |", f"|{rule}|"]
    for row in rows:
        cells = [
            str(cell).replace("|", "\\|") if i in markup else escape_markdown(str(cell)) for i, cell in enumerate(row)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_code(text: str) -> str:
    """Show a text as code, on one line; backticks in the text cannot end it early."""
    return "`" + visible(text).replace("\n", " ").replace("`", "'") + "`"


def escape_markdown(text: str) -> str:
    """Escape a label or a name from a file so that it cannot break a table or become markup."""
    text = visible(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*|" else char for char in text)
