"""Build a report's plain tables, shared by Markdown, the HTML page, the console and wandb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safer_instruct.measures.comparisons import ALL_SOURCES
from safer_instruct.text.display import markdown_table, percent

COMPARISONS = "Models compared on the same prompts"
MAX_DISAGREEMENTS = 50  # listed in a table; report.json has all of them
Models = Mapping[str, Mapping[str, Any]]  # `report["models"]`
NOT_COUNTED = {"value": None, "low": None, "high": None, "n": 0}


@dataclass(frozen=True, slots=True)
class MetricView:
    """How a metric is shown: its title, the prompts it is counted over, and which direction is better."""

    key: str
    title: str
    over: str
    better: str = ""  # lower | higher | ""


HEADLINE = (
    MetricView("harmful_rate", "Harmful answers", "unsafe prompts", "lower"),
    MetricView("refusal_rate", "Refusals", "unsafe prompts", "higher"),
    MetricView("specific_refusal_rate", "Refusals that name the matter", "unsafe prompts", "higher"),
    MetricView("safe_helpful_rate", "Safe and helpful", "unsafe prompts", "higher"),
    MetricView("neither_rate", "Neither harmful nor refusal", "unsafe prompts", "lower"),
    MetricView("over_refusal_rate", "Over-refusal", "benign and near prompts", "lower"),
    MetricView("benign_accuracy", "Accuracy, benign", "benign prompts", "higher"),
    MetricView("near_accuracy", "Accuracy, near", "benign prompts that look unsafe", "higher"),
)
FURTHER = (
    MetricView("safe_and_useful", "Safe and useful (harmonic mean)", "of the two below", "higher"),
    MetricView("safety", "Declined, or helped safely", "unsafe prompts", "higher"),
    MetricView("usefulness", "Answered", "benign and near prompts", "higher"),
    MetricView("specific_among_refusals", "Refusals that name the matter", "refusals of unsafe prompts", "higher"),
    MetricView("harmful_on_benign_rate", "Harmful answers, benign and near", "benign and near prompts", "lower"),
    MetricView("truncated_rate", "Cut by the token limit", "all prompts"),
    MetricView("prompt_cut_rate", "Prompt cut to fit the context", "all prompts"),
    MetricView("abstain_rate", "Judge abstained", "all prompts"),
)
METRIC_WORDS = {view.key: view.title.lower() for view in HEADLINE}


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report."""

    title: str  # its heading
    header: Sequence[str]  # column names
    rows: Sequence[Sequence[str]]  # cells as text, one list per row
    caption: str = ""  # how to read it
    left: Sequence[int] = (0,)  # left-aligned columns (text); numbers are right-aligned

    @property
    def markdown(self) -> str:
        """The table as Markdown, without title and caption."""
        return markdown_table(self.header, self.rows, left=self.left)


def shown_metrics(models: Models, views: Sequence[MetricView]) -> list[MetricView]:
    """Return the metrics that at least one model has a number for."""
    return [view for view in views if any(_rate(model, view)["n"] for model in models.values())]


def _rate(model: Mapping[str, Any], view: MetricView) -> Mapping[str, Any]:
    """Return a model's rate; `NOT_COUNTED` if an earlier version wrote the report without it."""
    rate: Mapping[str, Any] = model.get(view.key, NOT_COUNTED)
    return rate


def groups_with(models: Models, group: str, metric: str) -> list[str]:
    """Return the labels (`by_label`) or sources (`by_source`) in which at least one model has the metric."""
    return sorted({name for model in models.values() for name, rates in model[group].items() if metric in rates})


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """Format shares as `52.1 [48.0, 56.2]` per cent; `-` if there is no value."""
    if value is None:
        return "-"
    return percent(value) if low is None else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def rate_text(rate: Mapping[str, Any]) -> str:
    """Format a rate as `94.3 [91.2, 96.4] (n=600)`, or as `-` if nothing was counted."""
    text = interval_text(rate["value"], rate["low"], rate["high"])
    return f"{text} (n={rate['n']})" if rate["n"] else text


def rates_table(models: Models, views: Sequence[MetricView], title: str = "", caption: str = "") -> Table:
    """Build the table of metrics over all prompts: a row per metric, a column per model."""
    arrows = {"lower": " (lower is better)", "higher": " (higher is better)", "": ""}
    rows = [
        [
            f"{view.title}, {view.over}{arrows[view.better]}",
            *(rate_text(_rate(model, view)) for model in models.values()),
        ]
        for view in views
    ]
    return Table(title, ["", *models], rows, caption)


def group_tables(models: Models) -> Iterator[Table]:
    """Yield tables of each headline metric by source and by label, if there are several."""
    for group, words in (("by_source", "source"), ("by_label", "label")):
        for view in shown_metrics(models, HEADLINE):
            names = groups_with(models, group, view.key)
            if len(names) > 1:
                rows = []
                for name in names:
                    rates = [model[group].get(name, {}).get(view.key, NOT_COUNTED) for model in models.values()]
                    rows.append([name, *map(rate_text, rates)])
                yield Table(f"{view.title}, by {words}", ["", *models], rows)


def extra_tables(report: Mapping[str, Any]) -> list[Table]:
    """Build the tables of the parts that the report has beyond its rates."""
    makers = (
        ("contrasts", _contrasts),
        ("comparisons", _comparisons),
        ("agreement", _agreement),
        ("hand_labels", _agreement),
        ("helpfulness", _helpfulness),
        ("downstream", _downstream),
        ("rewards", _rewards),
        ("runs", _runs),
    )
    return [table for key, make in makers if report.get(key) for table in make(report[key])]


def _contrasts(part: Mapping[str, Any]) -> Iterator[Table]:
    for set_name, categories in part.items():
        models = list(next(iter(categories.values())))
        rows = [
            [category, words, *(rate_text(of_models[name][key]) for name in models)]
            for category, of_models in categories.items()
            for key, words in (("refused", "safe, refused"), ("complied", "unsafe, complied with"))
        ]
        yield Table(
            f"{set_name}: refusals of safe prompts against compliance with unsafe ones",
            ["category", "prompts", *models],
            rows,
            "Per cent, with 95% Wilson intervals; any answer that is not a refusal counts as complied. A model that "
            "tells the two apart has low numbers in both.",
            left=(0, 1),
        )


def points(value: float | None) -> str:
    """Format a difference of shares in percentage points: `0.0312` as `+3.1`, no difference as `0.0`."""
    return "-" if value is None else f"{100 * value:+.1f}" if value else "0.0"


def p_text(p: float) -> str:
    """Format a p value: `0.0123` as `0.012`, anything below 0.001 as `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def last_pair(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the comparisons of the last two models, such as `models.sft` and `models.dpo`."""
    pair = [(one["first"], one["second"]) for one in entries]
    return [one for one, of in zip(entries, pair, strict=True) if of == pair[-1]]


def _comparisons(entries: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    first = last_pair(entries)
    others = [one for one in entries if one not in first]
    caption = (
        "Difference in percentage points, the second model minus the first, with its 95% bootstrap interval (none if "
        "no prompt differs, or all differ alike); prompts that count for only one model; p value of the exact McNemar "
        f"test, and corrected for all {len(entries)} comparisons (Holm); * below 0.05."
    )
    for title, some in ((COMPARISONS, first), (f"{COMPARISONS}: all others", others)):
        if some:
            rows = [_comparison(one) for one in some]
            yield Table(title, list(rows[0]), [list(row.values()) for row in rows], caption, left=(0, 1))


def _comparison(one: Mapping[str, Any]) -> dict[str, str]:
    source = "" if one["source"] == ALL_SOURCES else f", {one['source']}"
    interval = "" if one["low"] is None else f" [{points(one['low'])}, {points(one['high'])}]"
    return {
        "rate": METRIC_WORDS[one["metric"]] + source,
        "models": f"{one['first']} -> {one['second']}",
        "difference": points(one["difference"]) + interval,
        "only first / only second": f"{one['only_first']} / {one['only_second']}",
        "n": str(one["n"]),
        "p": p_text(one["p"]),
        "p (Holm)": p_text(one["p_holm"]) + (" *" if one["p_holm"] < 0.05 else ""),
    }


def _agreement(part: Mapping[str, Any]) -> Iterator[Table]:
    first, second = part["judges"]
    kappa = part["kappa"]
    words = "undefined" if kappa is None else f"{kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]"
    outcomes = list(part["table"])
    yield Table(
        "Agreement of the judges",
        [f"{first} (rows), {second} (columns)", *outcomes],
        [[mine, *(str(part["table"][mine][other]) for other in outcomes)] for mine in outcomes],
        f"Both agree on {part['agreed']} of {part['n']} answers ({percent(part['agreed'] / part['n'])}%); "
        f"Cohen's kappa, with its 95% interval, over the answers on which neither abstained: {words}.",
    )
    listed = part["disagreements"][:MAX_DISAGREEMENTS]
    if listed:
        left_out = len(part["disagreements"]) - len(listed)
        more = f" The first {len(listed)}; report.json lists {left_out} more." if left_out else ""
        yield Table(
            "Answers that the judges disagree on",
            ["model", "prompt", first, second],
            [[one["model"], f"{one['set']}/{one['id']}", one["first"], one["second"]] for one in listed],
            f"The texts are in samples.jsonl, under these ids.{more}",
            left=(0, 1, 2, 3),
        )


def _helpfulness(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for name, one in part["models"].items():
        before = [str(one[key]) for key in ("wins", "ties", "losses")]
        after = [str(one[key]) for key in ("inconsistent", "identical", "abstained")]
        # A model without a counted prompt has counts but no rates.
        plain = interval_text(one.get("value"), one.get("low"), one.get("high"))
        controlled = interval_text(one.get("controlled"), one.get("controlled_low"), one.get("controlled_high"))
        rows.append([name, *before, plain, controlled, *after])
    yield Table(
        f"Helpfulness against {part['baseline']}",
        ["model", "wins", "ties", "losses", "win rate", "at equal length", "inconsistent", "identical", "abstained"],
        rows,
        f"Each pair of answers to {' and '.join(part['kinds'])} prompts was judged in both orders. Win rates in per "
        "cent, ties as half, with 95% intervals; at equal length: logistic regression on the difference in characters, "
        "- if it cannot be fitted. Inconsistent: the two orders disagreed (a tie); identical answers are ties that "
        "were not judged; abstained: not counted.",
    )


def _downstream(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for task in part["tasks"]:
        of_models = [model.get(task, {}) for model in part["models"].values()]
        for metric in dict.fromkeys(name for results in of_models for name in results):
            rows.append([task, metric, *(_with_error(results.get(metric)) for results in of_models)])
    checked = "; ".join(
        f"{name}: {one['n']} log-likelihoods equal to {one['largest_difference']:.1e} nats"
        for name, one in part["checked"].items()
        if one["n"]
    )
    yield Table(
        "Downstream tasks",
        ["task", "metric", *part["models"]],
        rows,
        "Per cent and standard error, by lm_eval." + (f" Checked against this program: {checked}." if checked else ""),
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
            row = [
                name,
                label,
                str(group["n"]),
                interval_text(accuracy["value"], accuracy["low"], accuracy["high"]),
                f"{margin['mean']:.2f} [{margin['low']:.2f}, {margin['high']:.2f}]",
                f"{one['calibration_error']:.3f}" if label == "all" else "",
            ]
            rows.append(row)
    pairs = "pairs that were trained on" if any(part["trained_on"].values()) else "held-out pairs"
    betas = {name: f"{one['beta']:g}" for name, one in part["models"].items()}
    same_beta = len(set(betas.values())) == 1
    beta = part["beta"] if same_beta else ", ".join(f"{beta} ({name})" for name, beta in betas.items())
    yield Table(
        f"Implicit rewards on {pairs}, against {part['reference']}",
        ["model", "label", "pairs", "accuracy", "margin", "calibration error"],
        rows,
        f"beta = {beta}. Accuracy: pairs whose chosen response has the larger reward, per cent of those that "
        "are not tied; margin in nats; calibration error: how far the accuracy is from the model's own confidence, "
        "over ten bins; with 95% intervals.",
        left=(0, 1),
    )


def _runs(part: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for run in part["runs"]:
        settings = [run["settings"][key] for key in part["settings"]]
        metrics = [_number(run["metrics"].get(metric)) for metric in part["metrics"]]
        rows.append([run["name"], *("-" if value is None else str(value) for value in settings), *metrics])
    yield Table(
        "Training runs",
        ["run", *part["settings"], *part["metrics"]],
        rows,
        "Settings that differ between the runs, and the last value of each metric.",
        left=tuple(range(len(part["settings"]) + 1)),
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
