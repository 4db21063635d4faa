"""Run the whole method on a laptop with the real entrypoints: one command per stage, printed so that you can copy it.

    python quickstart/demo.py --seed 0
    python quickstart/demo.py --seed 0 --skip-reverse           # ablation: without reversed tuning
    python quickstart/demo.py --seed 0 --corpus my_corpus.jsonl  # your own unsafe responses, with your own rules

Rerun a stopped demo to resume it: finished stages are skipped, and entrypoints resume the stage that was stopped.
This file does not import torch: it only starts the stages, and checks and counts what they wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console
from config.errors import UserError
from quickstart.checks import (
    assert_no_leak,
    figures,
    harmful_responses,
    induction_report,
    render_figures,
    render_induction,
)
from quickstart.stages import Stages, from_anywhere, move_other_aside
from quickstart.world import World, write_demo_data

MODEL, RULES = "quickstart/model", "quickstart/rules.yaml"
FIRST = "first.jsonl"
SOURCES = ("seen", "new_values", "new_phrasing", "near", "benign")


@dataclass(frozen=True)
class Settings:
    """The settings that a demo's folder was made with.

    Attributes:
        seed: Seed of data, batches and sampling.
        skip_reverse: Induce with the base model itself.
        corpus: The user's corpus; None: the world's.
        rules: The expert's rules.
        part: Which meanings the evaluation prompts have: test, or dev (for choosing settings).
    """

    seed: int
    skip_reverse: bool
    corpus: str | None
    rules: str
    part: str


def main() -> int:
    """Run all stages, and return the exit status of the first one that fails."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of data, batches and sampling")
    parser.add_argument("--skip-reverse", action="store_true", help="ablation: induce with the base model itself")
    parser.add_argument("--corpus", help="your own unsafe responses (column `response`) instead of the world's")
    parser.add_argument("--rules", help=f"rules file of the expert; default: {RULES}")
    parser.add_argument("--part", choices=("test", "dev"), default="test", help="dev: for choosing settings")
    parser.add_argument("--output", help="default: runs/quickstart, or runs/quickstart_without_reverse")
    options = parser.parse_args()
    here = Path.cwd()
    os.chdir(REPOSITORY)
    corpus, rules = from_anywhere(here, options.corpus), from_anywhere(here, options.rules) or RULES
    settings = Settings(options.seed, options.skip_reverse, corpus, rules, options.part)
    try:
        first = harmful_responses(settings.corpus, settings.rules) if settings.corpus else []
    except UserError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    default = "runs/quickstart_without_reverse" if options.skip_reverse else "runs/quickstart"
    output = Path(from_anywhere(here, options.output) or default)
    move_other_aside(output, settings, "demo.json")
    started = time.monotonic()
    status = Demo(output, settings, first).run()
    print(
        f"\n{'done' if status == 0 else f'ended with status {status}'} after {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return status


class Demo:
    """The stages of a demo in one output folder.

    Args:
        output: The folder.
        settings: The settings that it was made with.
        first: Responses of the user's corpus to induce before the rest, as a test.
    """

    def __init__(self, output: Path, settings: Settings, first: Sequence[str] = ()) -> None:
        self.output = output
        self.settings = settings
        self.first = first
        self.data = output / "data"
        self.stages = Stages(output / "stages.jsonl", again="make demo")
        self.world = World()

    def run(self) -> int:
        """Run data, reverse, induce, SFT, DPO and evaluate; return the exit status of the last stage that ran."""
        self.make_data()
        for name, command in self.commands():
            status = self.stages.run(name, command)
            if status != 0:
                return status
            if name == "first" and not (self.output / "first" / "si.jsonl").stat().st_size:
                print(
                    f"none of {len(self.first)} responses that the rules call harmful became a pair (the reasons are "
                    f"above, the induced instructions in {self.output}/first/ledger), so there is nothing to train on; "
                    "try other rules or another corpus, with another folder as --output",
                    file=sys.stderr,
                )
                return 1
            if name == "induce" and not self.after_induction():
                return 1
        report = self.output / "report" / "report.md"
        print(f"\n{report.read_text(encoding='utf-8')}\nThe page with plots and samples: {report.with_suffix('.html')}")
        return 0 if self.settings.corpus else self.check_figures(report.with_suffix(".json"))

    def check_figures(self, report: Path) -> int:
        """Print the figures that must hold with any seed; return exit status 1 if one does not."""
        induction = self.output / "induction.json"
        rows = figures(*(json.loads(path.read_text(encoding="utf-8")) for path in (report, induction)))
        print(f"\n{render_figures(rows)}")
        return 0 if all(row.holds for row in rows) else 1

    def make_data(self) -> None:
        """Write the world's data of this seed, which takes a moment."""
        if not (self.data / "complete").exists():
            write_demo_data(self.world, self.settings.seed, self.data, part=self.settings.part)
            (self.data / "complete").touch()
        if self.first:
            rows = "".join(json.dumps({"response": text}) + "\n" for text in self.first)
            (self.output / FIRST).write_text(rows, encoding="utf-8")
        print(f"data of seed {self.settings.seed}: {self.data}", flush=True)

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Yield name and command of each stage, in order."""
        out, seed = self.output, self.settings.seed
        si, replay = f"datasets.si.path={out}/si", f"datasets.replay.path={self.data}/replay.jsonl"
        seeded = f"seed={seed}"
        if not self.settings.skip_reverse:
            data = f"datasets.alpaca.path={self.data}/reverse.jsonl"
            yield "reverse", ["train.py", "experiment=quickstart_reverse", seeded, f"run_dir={out}/reverse", data]
        if self.settings.corpus:
            yield "first", self.induction(str(out / FIRST), "first")
        yield "induce", self.induction(self.settings.corpus or f"{self.data}/corpus.jsonl", "si")
        yield "sft", ["train.py", "experiment=quickstart_sft", seeded, f"run_dir={out}/sft", si, replay]
        dpo = ["train.py", "experiment=quickstart_dpo", seeded, f"run_dir={out}/dpo", si, replay]
        yield "dpo", [*dpo, f"model.archive={out}/sft"]
        yield "evaluate", [
            "evaluate.py", f"models.base.path={MODEL}", f"models.sft.path={out}/sft", f"models.dpo.path={out}/dpo",
            *(f"prompts.{name}.path={self.data}/prompts/{name}.jsonl" for name in SOURCES),
            "expert=rules", f"expert.path={self.settings.rules}", "generation.max_new_tokens=64",
            f"curves.sft={out}/sft", f"curves.dpo={out}/dpo", f"induction_report={out}/si/report.json",
            f"stages_file={self.stages.file}", f"output={out}/report",
        ]  # fmt: skip

    def induction(self, corpus: str, output: str) -> list[str]:
        """Return the command that makes pairs from a corpus, in a folder of this demo."""
        return [
            "induce.py", "model=tiny", f"corpus.path={corpus}", "expert=rules", f"expert.path={self.settings.rules}",
            *([] if self.settings.skip_reverse else [f"model.archive={self.output}/reverse"]),
            "generation.temperature=0.7", "generation.max_new_tokens=48", f"generation.seed={self.settings.seed}",
            # Two templated sentences that differ in one name are near duplicates, and both are wanted here.
            f"output={self.output}/{output}", "duplicates.threshold=null",
            *([] if self.settings.corpus else ["corpus.id_column=id"]),
        ]  # fmt: skip

    def after_induction(self) -> bool:
        """Check for leaks, count the pairs, and tell whether there are enough to train on."""
        si = self.output / "si" / "si.jsonl"
        training = [self.data / "reverse.jsonl", self.data / "replay.jsonl", si]
        num_rows = assert_no_leak(
            self.world, training, sorted((self.data / "prompts").glob("*.jsonl")), self.settings.rules
        )
        print(f"no leak: none of {num_rows} training rows shares its meaning with an evaluation prompt")
        if not self.settings.corpus:
            report = induction_report(self.data / "corpus_truth.jsonl", si, self.settings.rules)
            (self.output / "induction.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            print(render_induction(report), flush=True)
        enough = sum(1 for _ in si.open(encoding="utf-8")) >= 32
        if not enough:
            print("too few pairs survived the filter to train on: the demo ends here", file=sys.stderr)
        return enough


if __name__ == "__main__":
    sys.exit(main())
