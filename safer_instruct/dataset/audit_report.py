"""Write the findings of an audit as Markdown, as a page and as figures: counts, hashes and lengths, never text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.files import write_text
from safer_instruct.dataset.audit import FINDINGS
from safer_instruct.dataset.pages import render_audit_page
from safer_instruct.dataset.tables import found_table, interval, review_tables, shortcut_table, word_table
from safer_instruct.measures.shortcuts import Auc
from safer_instruct.report.dataset_plots import plot_parts
from safer_instruct.report.plots import Plot
from safer_instruct.text.display import escape_markdown
from safer_instruct.text.row_log import MIN_ANSWERED


def render_audit(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [found_table(report).markdown]
    rows = max(1, report["rows"])
    chosen, test = report["chosen"], report["test_set"]
    most = ", ".join(
        f"{one['rows']} rows ({100 * one['rows'] / rows:.1f}%) one text of {one['characters']} characters"
        for one in chosen["most_frequent"][:3]
        if one["rows"] > 1
    )
    sentences = [f"Safe responses: {chosen['distinct']} distinct" + (f"; {most}" if most else "") + "."]
    sentences.append(
        f"Instructions: {report['instructions']['distinct']} distinct, "
        f"{report['instructions']['with_several_rows']} with more than one row."
    )
    if test["instructions"]:
        sentences.append(
            f"Test set: {test['found_in_dataset']} of its {test['instructions']} instructions are in the data."
        )
    parts.append("\n".join([*sentences, answered_sentence(report["total"])]))
    tables = [shortcut_table(report), word_table(report), *review_tables(report.get("reviews"))]
    told = [f"{table.title}:\n\n{table.markdown}\n\n{escape_markdown(table.caption)}".strip() for table in tables]
    parts += [told[0], *filter(None, [_shortcut_sentence(report["shortcuts"])]), *told[1:]]
    if "cleaned" in report:
        drops = ", ".join(f"{reason} {n}" for reason, n in report["cleaned"]["dropped"].items()) or "nothing"
        parts.append(f"Written without them: {report['cleaned']['rows']} rows (dropped: {drops}).")
    return "\n\n".join(parts)


def answered_sentence(total: Mapping[str, int]) -> str:
    """State how many prompts should be answered, in bold with advice if there are almost none."""
    rows, answered = max(1, total["rows"]), total["answered"]
    told = f"Prompts that should be answered (the chosen response does not decline): {answered} of {total['rows']}"
    told += f" ({answered / rows:.1%})."
    if answered >= MIN_ANSWERED * rows:
        return told
    return (
        f"**{told} A model trained on this dataset alone learns to decline harmless prompts, too: mix in pairs whose "
        "chosen response answers (stage=replay, stage=contrast).**"
    )


def _shortcut_sentence(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a warning in bold that names the shallow features that separate chosen from rejected; "" if none does."""
    overall = {name.replace("_", " "): of[""] for name, of in found.items()}
    told = [f"{name} (AUC {interval(one)})" for name, one in overall.items() if Auc(**one).is_shortcut]
    if not told:
        return ""
    return (
        f"**Chosen and rejected are told apart by {', by '.join(told)} alone, so a model can learn this shortcut "
        "instead of what is harmful: mix in pairs with an answer chosen and a refusal rejected (stage=replay, "
        "stage=contrast), and vary the safe responses.**"
    )


def write_audit(report: Mapping[str, Any], output: Path) -> None:
    """Write audit.json, audit.md, audit.html and the figures, each atomically."""
    figures = audit_figures(report)
    page = f"# Audit of {escape_markdown(report['path'])}\n\n{render_audit(report)}\n"
    for name, plot in figures.items():
        write_text(output / name, plot.svg)
        page += f"\n![{plot.title}]({name})\n"
    if "audit_chosen.svg" not in figures:
        (output / "audit_chosen.svg").unlink(missing_ok=True)  # left by an earlier audit that found repeated responses
    write_text(output / "audit.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(output / "audit.md", page)
    write_text(output / "audit.html", render_audit_page(report, list(figures.values())))


def audit_figures(report: Mapping[str, Any]) -> dict[str, Plot]:
    """Draw the rows of each label, and the safe responses that occur more than once, if any."""
    bars = {}
    for label, counts in report["by_label"].items():
        found = min(counts["rows"], sum(counts[name] for name in FINDINGS))
        bars[label] = [counts["rows"] - found, found]
    parts = [("nothing found", "#01665E"), ("something found", "#DFC27D")]
    figures = {"audit_labels.svg": _figure("Rows of each label", bars, parts)}
    most = {
        f"{one['characters']} characters (no. {number})": [one["rows"], report["rows"] - one["rows"]]
        for number, one in enumerate(report["chosen"]["most_frequent"], start=1)
        if one["rows"] > 1
    }
    if most:
        parts = [("rows with this response", "#8C510A"), ("other rows", "#D3D6DB")]
        figures["audit_chosen.svg"] = _figure("The most frequent safe responses", most, parts)
    return figures


def _figure(title: str, bars: Mapping[str, list[int]], parts: list[tuple[str, str]]) -> Plot:
    described = "; ".join(f"{name}: {sizes[0]} of {sum(sizes)}" for name, sizes in bars.items())
    return Plot(title, f"{title}: {parts[0][0]}. {described}.", plot_parts(bars, parts))
