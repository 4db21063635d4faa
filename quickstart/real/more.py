"""Further experiments on a finished `make real`: one command each, which can be stopped and resumed like it.

    python quickstart/real/more.py ratios runs/real    # harmless to unsafe pairs, 1:4, 1:1, 2:1, and `si` alone
    python quickstart/real/more.py tasks runs/real     # general knowledge before and after, by lm_eval
    python quickstart/real/more.py reversed runs/real  # the reversed model on 200 further held-out responses

ratios: SFT and DPO with each share of harmless pairs (replay and contrast as 3 : 7); two reports, whose figures of
safety against over-refusal lead from ratio to ratio. tasks: run `pip install "lm_eval[hf]"` first. reversed: the
figures of OUTPUT/reversed.json with narrower intervals, in OUTPUT/held_out, on responses of the default inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console
from config.errors import UserError
from config.files import write_text
from quickstart.real.inputs import Given, write_more_held_out
from quickstart.real.results import ratio_figure, ratio_table, reversed_table
from quickstart.real.run import SHARES, Command, Real, Settings
from quickstart.stages import Stages

# Harmless to unsafe pairs -> shares of the training data. The SFT at 1:1 is that of `make real`, and is not repeated.
RATIOS = {"1:4": {"replay": 0.06, "contrast": 0.14}, "1:1": SHARES["sft"], "2:1": {"replay": 0.2, "contrast": 7 / 15}}
STAGES = ("sft", "dpo")
NUM_HELD_OUT = 200
TASKS = "quickstart/real/tasks"


def main() -> int:
    """Run one of the three; return the exit status of the first stage that fails, or 2 after a user's mistake."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ratios", "tasks", "reversed"))
    parser.add_argument("output", type=Path, help="folder of a finished `make real`")
    options = parser.parse_args()
    output = options.output.resolve()
    os.chdir(REPOSITORY)
    try:
        real = read_finished(output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, command in {"ratios": ratios, "tasks": tasks, "reversed": reversed_tuning}[options.what](real):
        status = real.stages.run(name, command)
        if status != 0:
            return status
    if options.what == "reversed":
        print(f"\n{reversed_table(json.loads((output / 'held_out' / 'reversed.json').read_text(encoding='utf-8')))}")
    if options.what == "ratios":
        figure = output / "ratios" / "ratios.svg"
        write_text(figure, ratio_figure(output))
        print(f"\n{ratio_table(output)}\n\n{figure}: after DPO")
    return 0


def read_finished(output: Path) -> Real:
    """Return the finished `make real` of a folder, with its settings.

    Raises:
        UserError: There is none, or it has not finished.
    """
    if not (output / "results.json").is_file():
        raise UserError(f"{output} holds no results.json: run `make real` to its end first")
    stamp = json.loads((output / "real.json").read_text(encoding="utf-8"))
    real = Real(output, Settings(**stamp | {"given": Given(**stamp["given"])}))
    real.stages = Stages(output / "more.jsonl", again="the same command")  # kept apart from the seconds of `make real`
    return real


def ratios(real: Real) -> Iterator[Command]:
    """Yield SFT and DPO at each ratio, then the evaluations of both, together with the runs on `si` alone."""
    examples = {"sft": real.size.sft, "dpo": real.size.dpo}
    for ratio, shares in RATIOS.items():
        archive: list[str] = []
        for stage in STAGES:
            run = ratio_run(stage, ratio)
            settings = [*real.mixture(shares), f"n_examples={examples[stage]}", *archive]
            if run != stage:
                yield f"{stage} at {ratio}", real.train(run, f"real_{stage}", *settings)
            archive = [f"model.archive={real.output}/{run}"]
    for stage in STAGES:
        runs = {"only_unsafe": f"si_{stage}"} | {
            f"r{ratio.replace(':', '_')}": ratio_run(stage, ratio) for ratio in RATIOS
        }
        models = {name: f"{real.output}/{run}" for name, run in runs.items()}
        yield f"evaluate {stage} at each ratio", [*real.answers(models), f"output={real.output}/ratios/report_{stage}"]


def ratio_run(stage: str, ratio: str) -> str:
    """Return the run directory of a stage at a ratio, relative to the output folder."""
    return stage if RATIOS[ratio] == SHARES[stage] else f"ratios/{stage}_{ratio.replace(':', '_')}"


def tasks(real: Real) -> Iterator[Command]:
    """Yield the lm_eval evaluation of the starting model and the trained ones."""
    models = {"base": real.settings.model} | {
        name: f"{real.output}/{name}" for name in ("sft", "dpo", "si_sft", "si_dpo")
    }
    yield (
        "tasks",
        [
            *("evaluate.py", *(f"models.{name}.path={path}" for name, path in models.items())),
            *("downstream.tasks=[real_general]", f"downstream.include_path={TASKS}", "wandb.mode=disabled"),
            f"output={real.output}/tasks",
        ],
    )


def reversed_tuning(real: Real) -> Iterator[Command]:
    """Yield induction, scores and measurements of the reversed and the untrained model on newly drawn responses.

    The responses are in a folder laid out as in `make real`, with a link to its reversed model.
    """
    folder = real.output / "held_out"
    if not (folder / "reverse").is_symlink():  # made last, so that a stop before it starts over
        write_more_held_out(folder / "inputs", NUM_HELD_OUT, real.settings.seed)
        shutil.copy(real.inputs / "reverse.jsonl", folder / "inputs")
        (folder / "reverse").symlink_to(real.output / "reverse")
    for name, command in real.held_out(folder):
        yield f"{name}, of {NUM_HELD_OUT}", command


if __name__ == "__main__":
    sys.exit(main())
