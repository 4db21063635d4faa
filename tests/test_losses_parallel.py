"""Every loss in two processes and in one; a running mean over a restart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.settings import TrainerSettings
from tests.test_invariance import LOSSES
from tests.test_parallel import losses, start, start_all, weights
from tests.tiny_runs import tiny_settings

pytestmark = pytest.mark.timeout(1800)  # the first test waits for the runs of all


def settings_of(name: str, accumulation: int, processes: int, **changes):
    """46 rows in batches of 5: the last one of the epoch has 1 row, fewer than processes."""
    settings = tiny_settings(
        loss=LOSSES[name], batch_size=5, eval_batch_size=5, optimizer="AdamW", lr=1e-3, eval_every=30,
        gradient_accumulation_steps=accumulation,
        trainer=TrainerSettings(
            name="BasicTrainer" if processes == 1 else "FSDPTrainer", num_processes=processes if processes > 1 else None
        ),
    )  # fmt: skip
    return replace(settings, **changes)


# These look at a whole global batch, or keep a mean: of one micro-batch in each process, and of several.
WHOLE = ("aot", "aot unpaired", "bco_pair", "kto", "mixture")
RUNS = [(name, 1) for name in LOSSES] + [(name, 3) for name in WHOLE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """<loss> <accumulation> of <processes>."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        examples = {True: None, False: 11}  # the others: three batches, of which the last has 1 row
        of_them = {
            f"{name} {parts} of {processes}": settings_of(name, parts, processes, n_examples=examples[name in WHOLE])
            for name, parts in RUNS
        }
        start_all(settings_of("ld", 1, processes), [(folder, *run) for run in of_them.items()])
    return folder


@pytest.mark.parametrize(("name", "accumulation"), RUNS)
def test_two_processes_are_one(runs, name, accumulation):
    one, two = (runs / f"{name} {accumulation} of {processes}" for processes in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-6, abs=1e-5)
    assert (weights(two) - weights(one)).abs().mean() < 1e-6


def test_the_running_mean_is_part_of_a_checkpoint(tmp_path):
    """A run that begins again from its middle ends as one that did not, and its mean has seen as many rewards."""

    def progress(run):
        return json.loads((run / "LATEST" / "state" / "progress.json").read_text())["objective"]

    settings = settings_of("bco_pair", 1, 1, n_epochs=2)
    start(tmp_path, "whole", settings)
    start(tmp_path, "cut", settings)
    run = tmp_path / "cut"
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
    for folder in steps[1:]:
        folder.rename(tmp_path / folder.name)
    (run / "LATEST").unlink()
    (run / "LATEST").symlink_to(steps[0].relative_to(run))
    start(tmp_path, "cut", settings)
    assert progress(tmp_path / "whole") == progress(run)
    assert progress(run)["rewards"] == 2 * 2 * 46
    assert torch.equal(weights(run), weights(tmp_path / "whole"))
