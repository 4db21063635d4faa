"""The parts of a report beyond its rates as plain tables, which Markdown, the page and wandb show alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safer_instruct.measures.comparisons import ALL_SOURCES
from safer_instruct.text.display import percent

MAX_DISAGREEMENTS = 50  # listed in a table; report.json has all
METRIC_WORDS = {
    "harmful_rate": "harmful answers",
    "refusal_rate": "refusals",
    "safe_helpful_rate": "safe and helpful",
    "over_refusal_rate": "over-refusal",
    "benign_accuracy": "accuracy, benign",
    "near_accuracy": "accuracy, near",
}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report.

    Attributes:
        key: The part of report.json that it shows.
        title: Its heading.
        header: Words of the columns.
        rows: Cells as text, one list a row.
        caption: How to read it.
        left: Columns of words; numbers stand on the right.
    """

    key: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    left: Sequence[int] = (0,)


def extra_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of all parts that the report has."""
    makers = (
        ("comparisons", _comparisons),
        ("agreement", _agreement),
        ("helpfulness", _helpfulness),
        ("downstream", _downstream),
        ("rewards", _rewards),
        ("runs", _runs),
    )
    return [table for key, make in makers if report.get(key) for table in make(report[key])]


def points(value: float | None) -> str:
    """`0.0312` as `+3.1`: a difference in percentage points."""
    return "-" if value is None else f"{100 * value:+.1f}"


def p_text(p: float) -> str:
    """`0.0123` as `0.012`, anything below 0.001 as `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """`52.1 [48.0, 56.2]` from shares; `-` where there is no value."""
    if value is None:
        return "-"
    return percent(value) if low is None else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def _comparisons(entries: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    rows = [
        [
            METRIC_WORDS[one["metric"]] + ("" if one["source"] == ALL_SOURCES else f", {one['source']}"),
            f"{one['first']} -> {one['second']}",
            points(one["difference"])
            + ("" if one["low"] is None else f" [{points(one['low'])}, {points(one['high'])}]"),
            f"{one['only_first']} / {one['only_second']}",
            str(one["n"]),
            p_text(one["p"]),
            p_text(one["p_holm"]) + (" *" if one["p_holm"] < 0.05 else ""),
        ]
        for one in entries
    ]
    yield Table(
        "comparisons",
        "Models compared on the same prompts",
        ["rate", "models", "difference", "only first / only second", "n", "p", "p (Holm)"],
        rows,
        "Difference in percentage points, the second model minus the first, with its 95% bootstrap interval (none "
        "where no prompt differs, or all do alike); prompts that count for one model alone; exact McNemar test, "
        f"and its p value corrected for the {len(rows)} comparisons of this table (Holm); * below 0.05.",
        left=(0, 1),
    )


def _agreement(part: Mapping[str, Any]) -> Iterator[Table]:
    first, second = part["judges"]
    kappa = part["kappa"]
    words = "undefined" if kappa is None else f"{kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]"
    outcomes = list(part["table"])
    yield Table(
        "agreement",
        "Agreement of the judges",
        [f"{first} (rows), {second} (columns)", *outcomes],
        [[mine, *(str(part["table"][mine][other]) for other in outcomes)] for mine in outcomes],
        f"Both say the same of {part['agreed']} of {part['n']} answers ({percent(part['agreed'] / part['n'])}%); "
        f"Cohen's kappa, with its 95% interval, over the answers that neither abstained on: {words}.",
    )
    listed = part["disagreements"][:MAX_DISAGREEMENTS]
    if listed:
        left_out = len(part["disagreements"]) - len(listed)
        more = f" The first {len(listed)}; report.json lists {left_out} more." if left_out else ""
        yield Table(
            "agreement",
            "Answers that the judges disagree on",
            ["model", "prompt", first, second],
            [[one["model"], f"{one['set']}/{one['id']}", one["first"], one["second"]] for one in listed],
            f"The texts are in samples.jsonl, under these ids.{more}",
            left=(0, 1, 2, 3),
        )


def _helpfulness(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for name, one in part["models"].items():
        head = [name, *(str(one[key]) for key in ("wins", "ties", "losses"))]
        if one["n"]:
            plain = interval_text(one["value"], one["low"], one["high"])
            controlled = interval_text(one["controlled"], one["controlled_low"], one["controlled_high"])
        else:
            plain = controlled = "-"
        rest = [str(one[key]) for key in ("inconsistent", "identical", "abstained")]
        rows.append([*head, plain, controlled, *rest])
    yield Table(
        "helpfulness",
        f"Helpfulness against {part['baseline']}",
        ["model", "wins", "ties", "losses", "win rate", "at equal length", "inconsistent", "identical", "abstained"],
        rows,
        f"Each pair of answers to {' and '.join(part['kinds'])} prompts was judged in both orders. Win rates in per "
        "cent, ties as half, with 95% intervals; at equal length: logistic regression on the difference in characters, "
        "- where it has no answer. Inconsistent: each order preferred another model (a tie); identical answers are "
        "ties that nobody was asked about; abstained: not counted.",
    )


def _downstream(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for task in part["tasks"]:
        metrics = list(dict.fromkeys(name for model in part["models"].values() for name in model.get(task, {})))
        for metric in metrics:
            cells = [_with_error(model.get(task, {}).get(metric)) for model in part["models"].values()]
            rows.append([task, metric, *cells])
    checked = "; ".join(
        f"{name}: {one['n']} log-likelihoods equal to {one['largest_difference']:.1e} nats"
        for name, one in part["checked"].items()
        if one["n"]
    )
    yield Table(
        "downstream",
        "Downstream tasks",
        ["task", "metric", *part["models"]],
        rows,
        "Per cent and standard error, by lm_eval." + (f" Checked with this program: {checked}." if checked else ""),
        left=(0, 1),
    )


def _with_error(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    return percent(result["value"]) + ("" if result["stderr"] is None else f" +- {percent(result['stderr'])}")


def _rewards(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for name, one in part["models"].items():
        for label, group in [("all", one), *one["by_label"].items()]:
            accuracy, margin = group["accuracy"], group["margin"]
            rows.append(
                [
                    name,
                    label,
                    str(group["n"]),
                    interval_text(accuracy["value"], accuracy["low"], accuracy["high"]),
                    f"{margin['mean']:.2f} [{margin['low']:.2f}, {margin['high']:.2f}]",
                    f"{one['calibration_error']:.3f}" if label == "all" else "",
                ]
            )
    yield Table(
        "rewards",
        f"Implicit rewards on held-out pairs, against {part['reference']}",
        ["model", "label", "pairs", "accuracy", "margin", "calibration error"],
        rows,
        f"beta = {part['beta']:g}. Accuracy: pairs whose chosen response has the larger reward, per cent of those that "
        "are not tied; margin in nats; calibration error: how far the accuracy is from the model's own confidence, "
        "over ten bins; 95% intervals.",
        left=(0, 1),
    )


def _runs(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [
            run["name"],
            *("-" if run["settings"][key] is None else str(run["settings"][key]) for key in part["settings"]),
            *(_number(run["metrics"].get(metric)) for metric in part["metrics"]),
        ]
        for run in part["runs"]
    ]
    settings = tuple(range(len(part["settings"]) + 1))
    yield Table(
        "runs",
        "Training runs",
        ["run", *part["settings"], *part["metrics"]],
        rows,
        "Settings that differ between the runs, and the last value of each metric.",
        left=settings,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
