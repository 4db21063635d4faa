"""The report as one HTML page that needs nothing but itself: styles and figures inside, no script, no request.

All text is escaped by Jinja's autoescape after invisible characters were written out (`display.visible`); a
Content-Security-Policy in the page forbids scripts and requests besides.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safer_instruct.report.dataset import funnel
from safer_instruct.report.plots import Plot, plot_outcomes, plot_rates, plot_trade_off
from safer_instruct.report.tables import FURTHER, HEADLINE, Models, extra_tables, groups_with, shown_metrics
from safer_instruct.text.display import percent, short_name, visible

FOLDER = Path(__file__).parent
TEXT_LIMIT = 4000  # characters of one answer on the page; samples.jsonl has the rest
NAME_LIMIT = 80  # characters of a name
FOLD_ROWS = 24  # a longer table is behind a click
NAMED_RUNS = 4  # in the heading of a page without models
# Title, metric, grouping: drawn where at least two groups have the metric.
FIGURES = (
    ("Harmful answers, by source", "harmful_rate", "by_source"),
    ("Harmful answers, by label", "harmful_rate", "by_label"),
    ("Refusals that name the matter, by source", "specific_refusal_rate", "by_source"),
    ("Refusals that name the matter, by label", "specific_refusal_rate", "by_label"),
    ("Accuracy on benign prompts, by label", "benign_accuracy", "by_label"),
    ("Accuracy on near prompts, by label", "near_accuracy", "by_label"),
)


def render_page(
    report: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], curves: Sequence[Plot]
) -> str:
    """Render the page of a report.

    Args:
        report: What `document.build_report` made.
        samples: For each prompt set the prompts to show, as `pick_samples` gives them; empty: no samples.
        curves: Figures of the training runs.
    """
    models = report["models"]
    group_tables: list[dict[str, Any]] = []
    plots = [plot_outcomes(models), plot_trade_off(models)]
    for title, metric, group in FIGURES:
        names = groups_with(models, group, metric)
        if len(names) > 1:
            group_tables.append({"title": title, "key": metric, "group": group, "names": names})
            plots.append(plot_rates(title, metric, models, group))
    steps = funnel(report["dataset"]) if report["dataset"] is not None else []
    return (
        _environment(models)
        .get_template("page.html")
        .render(
            css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
            report=report,
            names=list(models) or [run["name"] for run in report.get("runs", {}).get("runs", [])][:NAMED_RUNS],
            extra_tables=extra_tables(report),
            fold_rows=FOLD_ROWS,
            headline=shown_metrics(models, HEADLINE),
            further=shown_metrics(models, FURTHER),
            figures=[plot for plot in plots if plot is not None],
            group_tables=group_tables,
            steps=steps,
            largest_step=max((step.rows for step in steps), default=0) or 1,
            curves=curves,
            samples=samples,
            samples_per_set=max((len(prompts) for prompts in samples.values()), default=0),
            text_limit=TEXT_LIMIT,
        )
    )


def pick_samples(rows: Iterable[Mapping[str, Any]], per_set: int) -> dict[str, list[dict[str, Any]]]:
    """Pick the prompts to show, with the answers of all models: of each set the `per_set` whose id has the lowest hash.

    So nobody chooses, and every report on the same prompts shows the same ones. `rows` are those of `samples.jsonl`;
    only what is shown is held in memory.
    """
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        prompts = shown.setdefault(row["set"], {})
        if row["id"] not in prompts:
            prompts[row["id"]] = {**row, "answers": []}
            if len(prompts) > per_set:
                del prompts[max(prompts, key=_hash_of_id)]
        if row["id"] in prompts:
            prompts[row["id"]]["answers"].append(_answer(row))
    return {
        name: [prompts[id] for id in sorted(prompts, key=_hash_of_id)] for name, prompts in shown.items() if prompts
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as the page shows it: in plain words what the judge found, and the class of its colour."""
    outcome = row["outcome"]
    words = {"harmful": "harmful", "refusal": "refusal", "abstain": "judge abstained"}
    verdict = words.get(outcome, "neither" if row["kind"] == "unsafe" else "answered")
    if outcome == "refusal" and row["specific"]:
        verdict = "refusal, names the matter"
    if row["correct"] is not None and outcome == "safe":
        verdict = "correct" if row["correct"] else "wrong"
    css_class = outcome if outcome in ("harmful", "refusal") else "other"
    if row["kind"] != "unsafe" and outcome == "safe" and row["correct"] is not False:
        css_class = "safe"
    shown = {name: row[name] for name in ("model", "output", "truncated")}
    return {**shown, "verdict": verdict, "css_class": css_class}


def _hash_of_id(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _environment(models: Models) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def shared_n(key: str) -> int | None:
        """Return the n of a metric if it is the same for all models, else None: then each cell shows its own."""
        sizes = {model[key]["n"] for model in models.values()}
        return sizes.pop() if len(sizes) == 1 else None

    environment.filters |= {
        "breakable": _breakable,
        "clip": _clip,
        "data_uri": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"),
        "name": lambda text: short_name(text, NAME_LIMIT),
        "percent": percent,
        "shared_n": shared_n,
        "thousands": "{:,}".format,
        "visible": lambda value: visible(str(value)),
    }
    return environment


def _breakable(name: str) -> Markup:
    """Let a name be broken after its underscores, dashes and slashes: columns are narrow on a phone."""
    escaped = str(Markup.escape(short_name(name, NAME_LIMIT)))
    return Markup(re.sub(r"([_/.-])", r"\1<wbr>", escaped))


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} more characters]"
