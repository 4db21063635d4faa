"""Run the whole method on a real pretrained model with the real entrypoints: one command per stage, each printed.

    make real                                                        # default inputs, about an hour on two cores
    make real SIZE=full DATA=alpaca.json CORPUS=unsafe.csv PROMPTS=test_set.csv BENIGN=tasks.jsonl
    python quickstart/real/run.py --size tiny                        # eight rows per stage, as a smoke test

The stages: reversed tuning, induction, filter and safe answers, harmless pairs (stage=replay, stage=contrast), SFT,
DPO; for comparison, `datasets=[si]` alone, and as many further SFT steps as DPO has; then the evaluation of all.
docs/real.md explains the results. Rerun a stopped run to resume it. This file only starts the stages, without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console
from config.errors import UserError
from config.files import write_text
from quickstart.real.estimate import render_estimate
from quickstart.real.inputs import SIZES, Given, write_inputs
from quickstart.real.results import collect, table
from quickstart.stages import Stages, from_anywhere, move_other_aside

MODEL, RULES = "models/smollm2", "quickstart/real/rules.yaml"
GIVEN = ("data", "corpus", "pairs", "prompts", "benign")
SETS = ("unsafe", "benign", "contrast")
LEAST_PAIRS = 8
# Shares of replay and contrast in the training data; the rest is si. DPO has more si: only its pairs choose a refusal.
SHARES = {"sft": {"replay": 0.15, "contrast": 0.35}, "dpo": {"replay": 0.1, "contrast": 0.2}}
Command = tuple[str, list[str]]


@dataclass(frozen=True)
class Settings:
    """The settings that a run's folder was made with.

    Attributes:
        seed: Seed of data, batches and sampling.
        size: One of SIZES.
        model: Folder of the pretrained model.
        template: Its prompt template.
        expert: rules | local (the pretrained model itself): filters, answers and finds harmless neighbours.
        given: The user's files.
    """

    seed: int
    size: str
    model: str
    template: str
    expert: str
    given: Given


def main() -> int:
    """Run all stages; return the exit status of the first one that fails, or 2 after a mistake in the command."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of data, batches and sampling")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="rows of each stage")
    parser.add_argument("--model", help=f"folder of the pretrained model; default: {MODEL}")
    parser.add_argument("--template", default="chat", choices=("chat", "alpaca", "plain"), help="its prompt template")
    parser.add_argument(
        "--expert", choices=("rules", "local"), help="default: rules; local with your own corpus or pairs"
    )
    parser.add_argument("--output", help="default: runs/real")
    for name in GIVEN:
        parser.add_argument(f"--{name}", help="your own file; see quickstart/real/inputs.py")
    options = parser.parse_args()
    here = Path.cwd()
    os.chdir(REPOSITORY)
    given = Given(**{name: from_anywhere(here, getattr(options, name)) for name in GIVEN})
    expert = options.expert or ("local" if given.corpus or given.pairs else "rules")
    model = from_anywhere(here, options.model) or MODEL
    settings = Settings(options.seed, options.size, model, options.template, expert, given)
    output = Path(from_anywhere(here, options.output) or "runs/real")
    try:
        return Real(output, settings).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Real:
    """The stages of a run in one output folder.

    Raises:
        UserError: There is no model.
    """

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output = output
        self.settings = settings
        self.size = SIZES[settings.size]
        self.inputs = output / "inputs"
        self.stages = Stages(output / "stages.jsonl", again="make real")
        self.si = settings.given.pairs or f"{output}/si"
        if not (Path(settings.model) / "config.json").is_file():
            how = f": make it with python scripts/get_smollm2.py {MODEL}" if settings.model == MODEL else ""
            raise UserError(f"{settings.model} holds no model{how}")

    def run(self) -> int:
        """Run the remaining stages, with an estimate of their time first, and print the results."""
        started = time.monotonic()
        move_other_aside(self.output, self.settings, "real.json")
        if not (self.inputs / "complete").exists():
            write_inputs(self.inputs, self.settings.given, self.size, self.settings.seed)
            (self.inputs / "complete").touch()
        speed = self.output / "speed.json"
        plan = [("speed", ["quickstart/real/measure.py", "speed", self.settings.model, str(speed)]), *self.commands()]
        for name, command in plan:
            status = self.stages.run(name, command)
            if status != 0:
                return status
            if name == "induce":
                self.require_pairs()
            if name == "speed":
                done = {record["name"] for record in self.stages.records()}
                print(render_estimate(json.loads(speed.read_text(encoding="utf-8")), self.size, done), flush=True)
        results = collect(self.output)
        write_text(self.output / "results.json", json.dumps(results, indent=2) + "\n")
        report = self.output / "report" / "report.md"
        print(f"\n{report.read_text(encoding='utf-8')}\n{table(results)}\n")
        print(f"{self.output / 'results.json'}: all numbers; {report.with_suffix('.html')}: plots and samples")
        print(f"done after {(time.monotonic() - started) / 60:.0f} minutes", flush=True)
        return 0

    def require_pairs(self) -> None:
        """Stop if the induction made too few pairs for the later stages.

        Raises:
            UserError: Says what may help.
        """
        with Path(self.si, "si.jsonl").open(encoding="utf-8") as file:
            num_pairs = sum(1 for _ in file)
        if num_pairs < LEAST_PAIRS:
            raise UserError(
                f"the induction made {num_pairs} pairs, but at least {LEAST_PAIRS} are needed "
                f"({self.si}/README.md shows what was dropped, and why): give more DATA and CORPUS, a larger SIZE, "
                "or your own PAIRS"
            )

    def commands(self) -> Iterator[Command]:
        """Yield name and command of each stage, in order."""
        yield from self.reversed_tuning()
        if not self.settings.given.pairs:
            yield "induce", self.induce()
        yield from self.harmless_pairs()
        yield from self.training()
        yield "measure answers", ["quickstart/real/measure.py", "answers", str(self.output), self.settings.model]
        yield "evaluate", self.evaluate()

    def reversed_tuning(self) -> Iterator[Command]:
        """Yield reversed tuning, then the induction from held-out responses by the reversed and the untrained model."""
        out = self.output
        yield (
            "reverse",
            self.train(
                "reverse",
                "real_reverse",
                f"datasets.alpaca.path={self.inputs}/reverse.jsonl",
                f"n_examples={self.size.reverse}",
            ),
        )
        yield from self.held_out(out)

    def held_out(self, folder: Path) -> Iterator[Command]:
        """Yield induction from a folder's held-out responses, reversed and untrained, and its measurements."""
        for name, archive in (("reversed", [f"model.archive={self.output}/reverse"]), ("untrained", [])):
            command = [
                *("induce.py", f"corpus.path={folder}/inputs/held_out.jsonl", "corpus.response_column=output"),
                *("corpus.id_column=id", f"output={folder}/held_out_{name}"),
            ]
            model = ["stage=induce", *self._model(), *archive, "generation.max_new_tokens=32"]
            score = f"roundtrip.model.name_or_path={self.settings.model}"
            yield f"induce held-out, {name}", [*command, *model]
            yield (
                f"score held-out, {name}",
                [*command, "stage=score", score, f"roundtrip.template={self.settings.template}"],
            )
        yield "measure reversed", ["quickstart/real/measure.py", "reversed", str(folder), self.settings.model]

    def induce(self) -> list[str]:
        """Return the command that makes the dataset `si` from the corpus."""
        corpus = self.settings.given.corpus or f"{self.inputs}/corpus.jsonl"
        return [
            *("induce.py", *self._model(), f"model.archive={self.output}/reverse", f"corpus.path={corpus}"),
            *(f"corpus.max_rows={self.size.corpus}", *self._expert(), "generation.temperature=0.3"),
            *(f"generation.seed={self.settings.seed}", "generation.max_new_tokens=40", f"output={self.output}/si"),
            # Off, because requests that differ in one word would be near duplicates, but both are wanted here.
            *("duplicates.threshold=null", f"exclude={self.inputs}/prompts/unsafe.jsonl", "exclude_similarity=null"),
        ]

    def harmless_pairs(self) -> Iterator[Command]:
        """Yield the stages that keep the model useful: replay of its own answers, and contrast with unsafe requests."""
        shared = [f"path={self.si}", "exclude_similarity=null"]
        yield (
            "replay",
            [
                *("induce.py", "stage=replay", *shared, f"benign.path={self.inputs}/benign.jsonl", *self._model()),
                *(f"replay.template={self.settings.template}", "generation.max_new_tokens=48"),
                *(f"exclude={self.inputs}/prompts/benign.jsonl", f"output={self.output}/replay"),
            ],
        )
        yield (
            "contrast",
            [
                *("induce.py", "stage=contrast", *shared, f"contrast.num_rows={self.size.contrast}", *self._expert()),
                *(f"exclude={self.inputs}/prompts/contrast.jsonl", f"output={self.output}/contrast"),
            ],
        )

    def training(self) -> Iterator[Command]:
        """Yield SFT and DPO on all three datasets, more SFT for as many steps as DPO, and SFT and DPO on `si` alone."""
        sft, dpo = f"n_examples={self.size.sft}", f"n_examples={self.size.dpo}"
        after_sft = f"model.archive={self.output}/sft"
        yield "sft", self.train("sft", "real_sft", *self.mixture(SHARES["sft"]), sft)
        yield "dpo", self.train("dpo", "real_dpo", *self.mixture(SHARES["dpo"]), dpo, after_sft)
        yield "sft_more", self.train("sft_more", "real_sft", *self.mixture(SHARES["sft"]), dpo, after_sft)
        yield "si_sft", self.train("si_sft", "real_sft", *self._si(), "datasets=[si]", sft)
        after_sft = f"model.archive={self.output}/si_sft"
        yield "si_dpo", self.train("si_dpo", "real_dpo", *self._si(), "datasets=[si]", dpo, after_sft)

    def evaluate(self) -> list[str]:
        """Return the command that evaluates all models and writes the report."""
        out, runs = self.output, ("sft", "dpo", "sft_more", "si_sft", "si_dpo")
        models = {"base": self.settings.model} | {name: f"{out}/{name}" for name in runs}
        return [
            *self.answers(models),
            *(f"curves.{name}={out}/{name}" for name in ("sft", "dpo")),
            *([] if self.settings.given.pairs else [f"induction_report={out}/si/report.json"]),
            *(f"stages_file={self.stages.file}", f"output={out}/report"),
        ]

    def answers(self, models: Mapping[str, str]) -> list[str]:
        """Return the command, without its output, that asks these models (name -> folder) the prompts of all sets."""
        return [
            *("evaluate.py", *(f"models.{name}.path={path}" for name, path in models.items())),
            *(f"models.{name}.template={self.settings.template}" for name in models if name == "base"),
            *(f"prompts.{name}.path={self.inputs}/prompts/{name}.jsonl" for name in SETS),
            *("expert=rules", f"expert.path={RULES}", "generation.max_new_tokens=48", "wandb.mode=disabled"),
        ]

    def train(self, name: str, experiment: str, *more: str) -> list[str]:
        """Return the command of one training run."""
        start = ("train.py", f"experiment={experiment}", f"model.name_or_path={self.settings.model}")
        # n_examples decides, so that every run takes the same number of steps whatever the size of its data.
        return [*start, f"seed={self.settings.seed}", f"run_dir={self.output}/{name}", "n_epochs=null", *more]

    def _si(self) -> list[str]:
        """Return the settings of `si`, which exclude evaluation prompts even if the user made the dataset."""
        template = f"datasets.si.template={self.settings.template}"
        return [f"datasets.si.path={self.si}", template, f"datasets.si.exclude={self.inputs}/prompts/unsafe.jsonl"]

    def mixture(self, shares: Mapping[str, float]) -> list[str]:
        """Return the settings of all three datasets, with the shares of the two harmless ones."""
        words = f"template: {self.settings.template}"
        others = [
            f"datasets.{name}={{path: {self.output}/{name}, {words}, weight: {share}}}"
            for name, share in shares.items()
        ]
        return [*self._si(), "datasets=[si,replay,contrast]", *others]

    def _model(self) -> list[str]:
        return ["model=smollm2", f"model.name_or_path={self.settings.model}"]

    def _expert(self) -> list[str]:
        if self.settings.expert == "rules":
            return ["expert=rules", f"expert.path={RULES}"]
        name = f"expert.model.name_or_path={self.settings.model}"
        return [
            "expert=local",
            name,
            f"expert.template={self.settings.template}",
            "expert.generation.max_new_tokens=64",
        ]


if __name__ == "__main__":
    sys.exit(main())
