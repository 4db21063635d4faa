"""Describe the dataset of `stage=merge` (report.json, the dataset card README.md, its page), and upload it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from config.files import write_text
from config.settings import CardSettings
from safer_instruct.dataset.files import ARROW, HISTORY, JSONL, PARQUET
from safer_instruct.dataset.merge import MERGE, Merged
from safer_instruct.dataset.pages import render_dataset_page
from safer_instruct.dataset.reviews import NOTHING_REJECTED, Rejections
from safer_instruct.dataset.rows import UNLABELLED
from safer_instruct.dataset.tables import drop_table, funnel_table, label_table
from safer_instruct.induction.ledgers import provenance_of_all
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND
from safer_instruct.report.dataset_plots import plot_funnel
from safer_instruct.text.display import markdown_code, markdown_table

PLOT, PAGE = "funnel.svg", "dataset.html"
DROPPING = (FILTER, RESPOND, MERGE)
# The Hub's size categories: the first whose limit is above the number of rows applies.
SIZES = (
    (1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
    (float("inf"), "n>10M"),
)  # fmt: skip

_MEANING = {
    "id": "id of the response in the corpus (a hash of its text, unless the corpus has ids)",
    HISTORY: "the conversation before the instruction, as messages (JSON), a system message first",
    "instruction": "the instruction that the reversed model induced from the response",
    "rejected": "the unsafe response of the corpus",
    "chosen": "the expert's safe response to the instruction",
    "label": "category of harm: from the corpus if it has one, else from the expert",
    "provenance": "place in the corpus, models, prompts, decoding, seed, scores, verdict, tokens (JSON)",
}


def build_report(
    merged: Merged,
    *,
    run: Mapping[str, Any],
    rejections: Rejections = NOTHING_REJECTED,
    card: CardSettings | None = None,
) -> dict[str, Any]:
    """Return the counts of the whole pipeline as JSON values.

    `funnel` lists the stages in order, with rows in and out and drops by reason. `kept_rate` is the filter's.
    `by_label` has the same counts per label. Every row read is counted exactly once: as a drop, or in the dataset.

    `run` holds what else to record of this run: command, versions, seconds.
    """
    card = card or CardSettings()
    stages = [_stage("corpus", merged.corpus_rows, dict(sorted(merged.corpus_dropped.counts.items())))]
    stages.append(_stage(INDUCE, sum(merged.fates.values()), {}))
    for name in DROPPING:
        stages.append(_stage(name, stages[-1]["out"], merged.num_dropped(stage=name)))
    labels = sorted({label for label, _, _ in merged.fates})
    return {
        "num_rows": merged.num_rows,
        "columns": merged.schema.names,
        "kept_rate": stages[2]["rate"],
        "funnel": stages,
        "by_label": {label or UNLABELLED: _label(merged, label) for label in labels},
        "corpus_drops_at": dict(sorted(merged.corpus_dropped.places.items())),
        "induced": {name: merged.induced[name] for name in ("truncated", "prompt_cut")},
        "varied": dict(merged.varied),
        "round_trip_scores": [[key / 10, *counts] for key, counts in sorted(merged.scores.items())],
        "tokens": {stage: merged.tokens[stage] for stage in merged.ledgers},
        "cost": {stage: round(merged.cost[stage], 6) for stage in merged.ledgers if merged.cost[stage]},
        "reviewed": rejections.counts(),
        "card": {"license": card.license, "language": list(card.language)},
        "made_with": provenance_of_all(merged.ledgers),
        "run": dict(run),
    }


def _stage(name: str, num_in: int, drops: Mapping[str, int]) -> dict[str, Any]:
    num_out = num_in - sum(drops.values())
    return {"stage": name, "in": num_in, "out": num_out, "rate": _rate(num_out, num_in), "drops": dict(drops)}


def _label(merged: Merged, label: str) -> dict[str, Any]:
    num_in = sum(rows for (of_label, _, _), rows in merged.fates.items() if of_label == label)
    dropped = {stage: merged.num_dropped(label=label, stage=stage).total() for stage in DROPPING}
    num_kept, num_out = num_in - dropped[FILTER], num_in - sum(dropped.values())
    return {
        "induced": num_in,
        "kept": num_kept,
        "kept_rate": _rate(num_kept, num_in),
        "out": num_out,
        "rate": _rate(num_out, num_in),
        "drops": dict(merged.num_dropped(label=label)),
        "drops_by_stage": dropped,
    }


def _rate(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """Write report.json, the card README.md, its figure and its page into the dataset folder, each atomically."""
    file = PARQUET if (output / PARQUET).is_file() else JSONL
    write_text(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(output / "README.md", render_card(report, file=file))
    figure = plot_funnel(report)
    write_text(output / PLOT, figure.svg)
    write_text(output / PAGE, render_dataset_page(report, figure))


def push_dataset(output: Path, name: str, files: Sequence[str]) -> str:
    """Upload dataset, card and report, but not the ledgers, nor the arrow folder, which holds the same rows again."""
    from config.hub import push_folder  # here, because its library is slow to import

    wanted = [*(file for file in files if file != ARROW), "README.md", "report.json", PLOT]
    return push_folder(output, name, kind="dataset", again="stage=merge", files=wanted)


def render_card(report: Mapping[str, Any], *, file: str) -> str:
    """Return the dataset card: warning, counts, drops, columns, how it was made. It quotes no rows."""
    made = report["made_with"]
    columns = [(markdown_code(column), _MEANING[column]) for column in report["columns"]]
    return f"""\
---
{_front_matter(report, file)}---

# A Safer-Instruct preference dataset

> **Content warning.** `rejected` holds unsafe responses, and `instruction` the requests that would elicit them. Their
> only purpose is to train and test models to decline. They are not advice, and not meant to be read for their content.

{report["num_rows"]} preference pairs, made from a corpus of unsafe responses by reversed instruction tuning (Shi, Chen
and Zhao: Safer-Instruct, NAACL 2024): a reversed model induces the instruction of each response, and an expert drops
pairs that do not fit and answers the others safely. {_checked(report["reviewed"])}

## How many rows came through

{funnel_table(report).markdown}

{label_table(report).markdown}

![Where the rows of each label went]({PLOT})

{drop_table(report).markdown}

## Columns

{markdown_table(["column", "meaning"], columns, left=[0, 1], markup=[0])}

## How it was made

- Reversed model: {_model(made, "reversed_model")}, temperature \
{made["temperature"]}, top_p {made["top_p"]}, at most {made["max_new_tokens"]} new tokens, seed {made["seed"]}, \
{made["num_candidates"]} candidate(s) per response.
- Filter: {_model(made, "filter_expert")}.
- Safe responses: {_model(made, "respond_expert")}.
{_forward(made)}- Tokens used: {", ".join(f"{stage} {number}" for stage, number in report["tokens"].items())}.\
{_cost(report)}

## Use

`python train.py datasets=[si] datasets.si.path=FOLDER loss=sft ...`, then `loss=dpo`; or
`datasets.load_dataset("FOLDER")`.
"""


def _front_matter(report: Mapping[str, Any], file: str) -> str:
    """Return the metadata that the Hub reads: license, language, size, tags, and which file is the dataset."""
    rows = report["num_rows"]
    fields = {
        **report["card"],
        "size_categories": [next(name for limit, name in SIZES if rows < limit)],
        "tags": ["safer-instruct", "preference", "safety"],
        "configs": [{"config_name": "default", "data_files": file}],
    }
    return yaml.safe_dump(fields, sort_keys=False)


def _checked(reviewed: Mapping[str, int]) -> str:
    if not reviewed["reviewers"]:
        return "Nobody has checked the pairs by hand."
    return (
        f"{reviewed['reviewers']} reviewer(s) looked at {reviewed['pairs']} of the pairs; the {reviewed['rejected']} "
        "that they rejected are left out."
    )


def _forward(made: Mapping[str, Any]) -> str:
    if "forward_model" not in made:
        return ""
    least = made["min_round_trip"]
    return (
        f"- Round-trip score: {_model(made, 'forward_model', 'forward_fingerprint')}, "
        f"{'no pair dropped by it' if least is None else f'at least {least:.3g} nats per token of the response'}.\n"
    )


def _cost(report: Mapping[str, Any]) -> str:
    spent = ", ".join(f"{stage} {cost:g}" for stage, cost in report["cost"].items())
    return f" Cost at the given prices: {spent}." if spent else ""


def _model(made: Mapping[str, Any], name: str, fingerprint: str = "") -> str:
    return f"{markdown_code(made[name])} (fingerprint {markdown_code(made[fingerprint or f'{name}_fingerprint'])})"
