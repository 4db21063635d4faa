"""How numbers and the text of others are shown, wherever they are shown."""

from __future__ import annotations

import unicodedata

# Unicode: control, format (directions, zero widths), surrogate, private, unassigned, line and paragraph ends.
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def short_name(name: str, limit: int = 22) -> str:
    """The name, cut in the middle where it is too long for an axis, invisible characters written out."""
    name = visible(name)
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2]}...{name[-(limit - limit // 2 - 3) :]}"


def percent(value: float | None) -> str:
    """`0.9432` as `94.3`, None as `-`."""
    return "-" if value is None else f"{100 * value:.1f}"


def visible(text: str) -> str:
    r"""The text with every control, direction and other invisible character written out; newline and tab stay.

    A right-to-left override becomes `\u202e`, or it would reorder what stands around it; a lone surrogate
    is no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in INVISIBLE else _written_out(char) for char in text
    )


def _written_out(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"
