"""Every kind of folder that this project writes, ways to damage its files, and what is then read of it.

Nothing that is damaged may be used: a reader says so (UserError), or what it returns is what it was.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import torch

from config.run_keys import FREE_KEYS
from config.settings import DatasetSettings, ModelSettings
from preference_datasets import build_stores
from safer_instruct.dataset.files import SCHEMA, write_dataset
from safer_instruct.generation.models import load_causal_lm
from safer_instruct.report.evaluations import find_finished, read_evaluations
from safer_instruct.report.training_runs import read_training_run
from safer_instruct.text.readers import read_rows
from tests.conftest import byte_level_tokenizer
from tests.evaluations import run_evaluate
from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, tiny_settings, tiny_trainer
from trainers.data.cutters import PaddedCutter
from trainers.distributed.launch import launch
from trainers.reference import reference_logps, weights_key
from trainers.run.metrics_log import MetricsLog
from trainers.run.resume import is_finished
from trainers.run.run_dir import RunDir
from trainers.run.saved import repair_links


class Subject(NamedTuple):
    """A folder, another one of its kind (that of another run), and a reader of either or of a copy."""

    folder: Path
    other: Path
    read: Callable[[Path], Any]
    files: str = "**/*"  # of those that may be damaged


def cases(subject: Subject) -> list[tuple[str, str]]:
    """Every file that the subject's reader looks at, with every damage."""
    found = [path for path in subject.folder.glob(subject.files) if path.is_file() and path.suffix != ".lock"]
    names = sorted(path.relative_to(subject.folder).as_posix() for path in found)
    return [(name, damage) for name in names for damage in DAMAGES]


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "flip": lambda path, other, chance: _flip(path, chance),
    "truncate": lambda path, other, chance: os.truncate(path, chance.randrange(max(1, path.stat().st_size))),
    "empty": lambda path, other, chance: path.write_bytes(b""),
    "missing": lambda path, other, chance: path.unlink(),
    "swapped": lambda path, other, chance: other.is_file() and shutil.copyfile(other, path),
}


def damaged(subject: Subject, case: tuple[str, str], place: Path, chance: random.Random) -> Path:
    """Put a damaged copy of the subject into `place`, and return it."""
    name, damage = case
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(subject.folder, place, symlinks=True)
    DAMAGES[damage](place / name, subject.other / name, chance)
    return place


def _train(root: Path, name: str, **changes: Any) -> Path:
    settings = tiny_settings(**changes)

    def worker(layout: Any) -> None:
        with RunDir.open(root / name, config=asdict(settings), manifest={}) as run:
            tiny_trainer(root, layout, run, settings).train()

    launch(worker, settings)
    return root / name


def resumed(root: Path, run_path: Path, **changes: Any) -> list[bytes]:
    """What a run goes on from: weights, optimizer, progress."""
    settings = tiny_settings(**changes)
    kept = []

    def worker(layout: Any) -> None:
        with RunDir.open(run_path, config=asdict(settings), manifest={}) as run:
            repair_links(run, settings.checkpoint)
            is_finished(run, 22, data="")
            trainer = tiny_trainer(root, layout, run, settings)
            with MetricsLog(run, settings, {}, trainer.progress.log):
                pass
            state = [*trainer.policy.parameters(), *(v for s in trainer.optimizer.state.values() for v in s.values())]
            kept.extend(tensor.detach().numpy().tobytes() for tensor in state)
            kept.append(json.dumps(asdict(trainer.progress)).encode())

    launch(worker, settings)
    return kept


def runs(root: Path) -> dict[str, Subject]:
    """A run that is resumed, one whose weights are loaded, and the log of one that is compared."""
    run, other = _train(root, "run"), _train(root, "other", lr=2e-3)
    tiny_model().save_pretrained(root / "base")

    def load(path: Path) -> list[bytes]:
        model = load_causal_lm(ModelSettings(name_or_path=str(root / "base"), archive=str(path)))
        return [tensor.detach().numpy().tobytes() for tensor in model.parameters()]

    return {
        "resumed run": Subject(run, other, lambda path: resumed(root, path), "checkpoints/step-22/**/*"),
        "logs of a resumed run": Subject(run, other, lambda path: resumed(root, path), "*.[jy]*"),
        "archive": Subject(run, other, load, "checkpoints/step-22/model/*"),
        "compared run": Subject(run, other, _compared, "[cm]*.[jy]*"),
    }


def _compared(path: Path) -> Any:
    (folder,) = find_finished([str(path)])[0].values()
    run = read_training_run("run", folder)
    return dict(run.metrics), {key: value for key, value in run.settings.items() if key.split(".")[0] not in FREE_KEYS}


def caches(root: Path) -> dict[str, Subject]:
    """A token store and a reference cache."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    for name, word in (("data", "one"), ("more", "two")):
        rows = [{"instruction": f"{word} {i}", "chosen": "yes", "rejected": "no" * i} for i in range(1, 30)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stores(path: Path, data: str = "data") -> list[Any]:
        settings = DatasetSettings(str(root / f"{data}.jsonl"), "si", eval_fraction=0.3)
        built = build_stores(
            {"si": settings}, loss="preference", tokenizer=tokenizer, max_length=256, max_prompt_length=192,
            cache_dir=path,
        )  # fmt: skip
        parts = (built.train, built.eval)
        return [(s.content, s.ids(i), [t.tolist() for t in s.row(i)]) for s in parts for i in range(len(s))]

    def logps(path: Path, seed: int = 0) -> list[float]:
        kept = []
        store, model = random_store(root, num_rows=6, segments=3), tiny_model(seed=seed)

        def worker(layout: Any) -> None:
            values = reference_logps(
                model, store, torch.arange(6), layout=layout, cache_dir=path, weights=weights_key(model),
                cutter=PaddedCutter(0, 999),
            )  # fmt: skip
            kept.extend(values.flatten().tolist())

        launch(worker, tiny_settings())
        return kept

    for read, more in ((stores, "more"), (logps, 1)):
        read(root / read.__name__)
        read(root / f"{read.__name__}-other", more)
        (mine,), (others,) = ([*(root / name).glob("*/*/")] for name in (read.__name__, f"{read.__name__}-other"))
        others.rename(others.with_name(mine.name))  # under the name of the first: what a mix-up would leave
    found = {
        name: Subject(root / name, root / f"{name}-other", read)
        for name, read in (("stores", stores), ("logps", logps))
    }
    return {"token store": found["stores"], "reference cache": found["logps"]}


def _pairs(word: str) -> list[pyarrow.RecordBatch]:
    columns = [[f"{word} {name} {i}" for i in range(9)] for name in SCHEMA.names[:-1]]
    return [pyarrow.record_batch([*columns, ["{}"] * 9], schema=SCHEMA)]


def _evaluated(root: Path, name: str, text: str) -> Path:
    rows = [{"id": f"u{i}", "instruction": f"ask {i}", "label": "a", "kind": "unsafe", "m": text} for i in range(6)]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_evaluate(f"prompts.p.path={root}/{name}.jsonl", "responses=csv", "expert=rules", f"output={root}/{name}")
    return root / name


def outputs(root: Path) -> dict[str, Subject]:
    """A dataset of induce.py in each format, and an evaluation."""
    for format in ("jsonl", "parquet"):
        for word in ("my", "no"):
            write_dataset(root / f"{word}-{format}", format, _pairs(word))
    mine, others = _evaluated(root, "mine", "Sure."), _evaluated(root, "others", "Well.")
    rows = {
        f: Subject(root / f"my-{f}", root / f"no-{f}", lambda path: list(map(_row, read_rows(path))))
        for f in ("jsonl", "parquet")
    }
    return {
        "jsonl dataset": rows["jsonl"],
        "parquet dataset": rows["parquet"],
        "evaluation": Subject(mine, others, lambda path: read_evaluations({"e": path}), "[rs]*.json*"),
    }


def _row(row: tuple[str, Any]) -> Any:
    return row[1]  # without its place: copies lie elsewhere
