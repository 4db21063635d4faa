"""Read what a report shows besides its own rates: how the dataset was made, and which commands ran before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from config.reading import read_mapping

# The stages of induce.py's report, and what is left after each of them.
FUNNEL_WORDS = {
    "corpus": "usable responses",
    "induce": "instructions induced",
    "filter": "kept by the filter",
    "respond": "answered safely",
    "merge": "in the dataset",
}
MAX_REASONS = 4  # shown per stage; the dataset's own report has all of them


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """One step from the corpus to the dataset: how many rows are left after it, and why the others were dropped."""

    name: str
    rows: int
    note: str = ""


def read_induction_report(path: str) -> dict[str, Any]:
    """Read the report.json that induce.py wrote for the training data.

    Raises:
        UserError: The file is missing, or is not such a report.
    """
    document = read_mapping(find_path(path), "induction_report=FILE names the report.json in a dataset folder")
    try:
        funnel(document)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"induction_report={path}: not the report.json of induce.py (it has no readable funnel)"
        ) from None
    return document


def funnel(report: Mapping[str, Any]) -> list[FunnelStep]:
    """List the steps from the corpus to the dataset, from the report of induce.py."""
    stages = report["funnel"]
    steps = [FunnelStep("responses in the corpus", int(stages[0]["in"]))]
    for stage in stages:
        reasons = sorted(stage["drops"].items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{reason.replace('_', ' ')} {number:,}" for reason, number in reasons[:MAX_REASONS]]
        if len(reasons) > MAX_REASONS:
            shown.append(f"other reasons {sum(number for _, number in reasons[MAX_REASONS:]):,}")
        num_dropped = int(stage["in"]) - int(stage["out"])
        note = f"{num_dropped:,} dropped: {', '.join(shown)}" if shown else ""
        steps.append(FunnelStep(FUNNEL_WORDS.get(stage["stage"], str(stage["stage"])), int(stage["out"]), note))
    return steps


def read_stages(path: str) -> list[dict[str, Any]]:
    """Read the stages that ran before this evaluation: `{"name", "command", "seconds"}` on each line.

    Raises:
        UserError: The file is missing, or a line is not such an object (the message gives its number).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"stages_file={path}: there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"stages_file={path}: the file is not UTF-8 text") from None
    stages = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            stages.append({"name": str(row["name"]), "command": str(row["command"]), "seconds": float(row["seconds"])})
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f'{path}:{number}: a stage must be {{"name": ..., "command": ..., "seconds": N}}') from None
    return stages
