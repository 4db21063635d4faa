"""What all HTML pages share: the styles, the script and the security policy. Each page is one self-contained file.

Invisible characters are written out (`display.visible`), then Jinja's autoescape escapes all text. A
Content-Security-Policy in the page forbids every request, and every script but its own, which it names by hash. That
script reads and writes text nodes and attributes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safer_instruct.report.dataset import FunnelStep
from safer_instruct.report.plots import Plot
from safer_instruct.report.tables import Table
from safer_instruct.text.display import percent, short_name, visible

FOLDER = Path(__file__).parent
NAME_LIMIT = 80  # characters of a name that are shown


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of an answer's small figure: a dot at `value`, a whisker from `low` to `high`, and the number as text.

    Positions are shares of the axis, from 0 to 1; None if there is no such number.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the questions and answers at the top of a page."""

    question: str  # its heading
    value: str  # the number, with its unit
    interval: str  # "95% interval 12.1 to 18.3", "" where there is none
    words: str  # what the number is
    bars: Sequence[Bar] = ()  # the same for every model, or label
    axis: tuple[str, str, str] = ("0", "50", "100%")  # words at the left, middle and right end of the bars' axis


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, behind a click unless it is `shown`."""

    title: str  # its heading
    about: str = ""  # what the click will show: "12 rows"
    tables: Sequence[Table] = ()  # with sortable columns
    plots: Sequence[Plot] = ()  # side by side
    steps: Sequence[FunnelStep] = ()  # steps of a funnel
    words: str = ""  # a sentence below the heading
    shown: bool = False  # whether it is open from the start
    folded: str = ""  # label of a further click that opens the tables; "": no such click


def render(template: str, *, script: str = "page.js", **values: Any) -> str:
    """Render a template of this folder with the shared styles and one script, whose hash the page's policy allows."""
    js = _read(script)
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode("ascii")
    shared = {"css": Markup(_read("page.css")), "js": Markup(js), "js_hash": digest}
    return environment().get_template(template).render(**shared, **values)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Return Jinja with autoescape and the filters of the templates."""
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "breakable": _breakable,
        "clip": _clip,
        "data_uri": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"),
        "name": lambda text: short_name(text, NAME_LIMIT),
        "percent": percent,
        "position": lambda share: f"{100 * min(1.0, max(0.0, share)):.2f}%",
        "thousands": "{:,}".format,
        "visible": lambda value: visible(str(value)),
    }
    return made


def _breakable(name: str) -> Markup:
    """Allow line breaks after `_`, `/`, `.` and `-` in a name: columns are narrow on a phone."""
    escaped = str(Markup.escape(short_name(name, NAME_LIMIT)))
    return Markup(re.sub(r"([_/.-])", r"\1<wbr>", escaped))


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} more characters]"
