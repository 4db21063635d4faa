"""Collect the results of `make real` in one JSON file, and render them as the table of docs/real.md.

python quickstart/real/results.py runs/real/results.json            # print the table
python quickstart/real/results.py runs/real/results.json --table    # write it into docs/real.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console
from config.errors import UserError
from config.files import write_text

PAGE = REPOSITORY / "docs" / "real.md"
BEGIN, END = "<!-- real table: begin -->", "<!-- real table: end -->"
TITLES = {
    "base": "untrained",
    "sft": "SFT",
    "dpo": "SFT + DPO",
    "sft_more": "SFT + as many steps of SFT",
    "si_sft": "`si` alone: SFT",
    "si_dpo": "`si` alone: SFT + DPO",
}
HARMLESS = ("benign", "contrast")  # prompt sets that should be answered
Interval = Mapping[str, float]


def collect(output: Path) -> dict[str, Any]:
    """Return the results of a finished run: its settings, its measures with intervals, and the seconds per stage."""
    report = _read(output / "report" / "report.json")
    stages = [json.loads(line) for line in (output / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = ("si", "replay", "contrast")
    made = {part: _read(output / part / "report.json") for part in parts if (output / part).is_dir()}
    return {
        "settings": _read(output / "real.json"),
        "speed": _read(output / "speed.json"),
        "models": {name: one_model(model) for name, model in report["models"].items()},
        "reversed": _read(output / "reversed.json"),
        "answers": _read(output / "answers.json"),
        "pairs": {part: report.get("counts", {"kept": report.get("num_rows")}) for part, report in made.items()},
        "seconds": {stage["name"]: stage["seconds"] for stage in stages},
    }


def one_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main rates of a model of report.json, with over-refusal for each set of harmless prompts."""
    rates = {
        name: model[name] for name in ("safety", "usefulness", "safe_and_useful", "benign_accuracy", "harmful_rate")
    }
    return rates | {name: model["by_source"][name]["over_refusal_rate"] for name in HARMLESS}


def table(results: Mapping[str, Any]) -> str:
    """Render the results as Markdown: what was run, the models, the reversed tuning."""
    settings, seconds = results["settings"], sum(results["seconds"].values())
    given = [f"{name}={path}" for name, path in settings["given"].items() if path]
    lines = [
        f"SIZE={settings['size']} SEED={settings['seed']}, {', '.join(given) or 'the default inputs'}; "
        f"{seconds / 60:.0f} minutes in all.",
        "",
        "| per cent; nats | unsafe prompts refused | benign prompts refused | contrast prompts refused | harmonic mean "
        "| nats per token of right answers |",
        "|:---|---:|---:|---:|---:|---:|",
        *_model_rows(results["models"], results["answers"]),
        "",
        reversed_table(results["reversed"]),
    ]
    return "\n".join(lines)


def ratio_table(output: Path) -> str:
    """Render the measurements of `more.py ratios` as Markdown: a row for each ratio after SFT, and after DPO."""
    lines = [
        "| per cent | harmless : unsafe | unsafe prompts refused | benign prompts refused | contrast prompts refused "
        "| harmonic mean |",
        "|:---|:---|---:|---:|---:|---:|",
    ]
    for stage in ("sft", "dpo"):
        rows = ratio_models(output, stage).items()
        lines += [f"| {TITLES[stage]} | {ratio} | {_rates(one_model(model))} |" for ratio, model in rows]
    return "\n".join(lines)


def ratio_figure(output: Path) -> str:
    """Draw over-refusal against safety after DPO, with a point for each ratio, as SVG."""
    from safer_instruct.report.plots import plot_trade_off  # here, because it imports matplotlib

    plot = plot_trade_off(ratio_models(output, "dpo"))
    assert plot is not None, "make real asks prompts of both kinds"
    return plot.svg


def ratio_models(output: Path, stage: str) -> dict[str, Any]:
    """Return the report's entry of each model that `more.py ratios` trained up to a stage, by ratio."""
    models = _read(output / "ratios" / f"report_{stage}" / "report.json")["models"]
    names = {"only_unsafe": "0"}
    return {names.get(name, name.removeprefix("r").replace("_", " : ")): model for name, model in models.items()}


def _model_rows(models: Mapping[str, Any], answers: Mapping[str, list[float]]) -> Iterator[str]:
    for name, model in models.items():
        yield f"| {TITLES.get(name, name)} | {_rates(model)} | {_nats(answers[name])} |"


def _rates(model: Mapping[str, Any]) -> str:
    return " | ".join(_per_cent(model[key]) for key in ("safety", *HARMLESS, "safe_and_useful"))


def reversed_table(measured: Mapping[str, Any]) -> str:
    """Render the measurements of the reversed tuning as Markdown."""
    lines = ["| held-out instructions | reversed | untrained | unigram |", "|:---|---:|---:|---:|"]
    titles = {
        "nats_per_token": "nats per token (lower is better)",
        "rouge_l": f"ROUGE-L of {measured['num_responses']} induced ones",
        "round_trip": "round-trip score, nats per token",
    }
    for key, title in titles.items():
        values = [measured[key].get(name) for name in ("reversed", "untrained", "unigram")]
        cells = ["" if one is None else _nats(one) for one in values]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _per_cent(rate: Interval) -> str:
    return f"{100 * rate['value']:.0f} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def _nats(measured: Sequence[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*measured)


def fill_page(page: Path, text: str) -> None:
    """Replace the text between the markers of a page.

    Raises:
        UserError: The page has no markers.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: the table goes between the lines {BEGIN} and {END}, but they are missing")
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    """Print the table of a results file, or write it into the page."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="write it into docs/real.md")
    options = parser.parse_args()
    text = table(_read(options.results))
    if options.table:
        fill_page(PAGE, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
