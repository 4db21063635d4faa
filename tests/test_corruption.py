"""Files that were flipped, cut, emptied, lost or mixed up are never used silently, and never end in a traceback."""

import random
import shutil
from contextlib import suppress

import pytest

from config.errors import UserError
from tests.corruption import caches, cases, damaged, outputs, runs

NUM_DAMAGES = 16  # of each kind of folder, drawn with a seed; benchmarks/corruption.py has them all
KINDS = {
    "resumed run": runs, "logs of a resumed run": runs, "archive": runs, "compared run": runs, "token store": caches,
    "reference cache": caches, "jsonl dataset": outputs, "parquet dataset": outputs, "evaluation": outputs,
}  # fmt: skip


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    made = {make: make(tmp_path_factory.mktemp(make.__name__)) for make in (runs, caches, outputs)}
    return {kind: subject for found in made.values() for kind, subject in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_damaged_is_used(subjects, tmp_path, kind):
    subject, chance = subjects[kind], random.Random(kind)
    expected = subject.read(shutil.copytree(subject.folder, tmp_path / "copy", symlinks=True))
    possible = cases(subject)
    for case in chance.sample(possible, min(NUM_DAMAGES, len(possible))):
        folder = damaged(subject, case, tmp_path / "copy", chance)
        with suppress(*(() if "cache" in kind or "store" in kind else (UserError,))):  # those are built again
            assert subject.read(folder) == expected, case


def test_a_checkpoint_of_another_run_is_refused(subjects, tmp_path):
    """As a whole under this run's name: every file of it is right."""
    run = subjects["resumed run"]
    for number, (source, name) in enumerate([(run.other, "step-22"), (run.folder, "step-8")]):
        copy = shutil.copytree(run.folder, tmp_path / str(number), symlinks=True)
        shutil.rmtree(copy / "checkpoints" / "step-22")
        shutil.copytree(source / "checkpoints" / name, copy / "checkpoints" / "step-22")
        for kind in ("resumed run", "archive"):
            with pytest.raises(
                UserError, match=r"step-22.*was made for 'run \w+, step-\d+', not for 'run \w+, step-22'"
            ):
                subjects[kind].read(copy)


def test_another_entry_under_an_entrys_name_is_built_again(subjects, tmp_path, capsys):
    for kind in ("token store", "reference cache"):
        subject = subjects[kind]
        expected, others = subject.read(subject.folder), shutil.copytree(subject.other, tmp_path / kind)
        assert subject.read(others) == expected
        assert "is damaged (it was made for " in capsys.readouterr().err
