"""Is damaged data ever used, and what do the checksums cost?

It damages every file of every kind of folder that this project writes, in every way of `tests/corruption.py` with
several seeds, and reads it. Then it times what checksums add to saving and loading a model of 25M parameters (with
AdamW's state), and to building and opening a token store.

    python -m benchmarks.corruption --seeds 10
    python -m benchmarks.corruption --seeds 0 --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.token_store import write_rows
from config.checksums import CHECKSUMS
from config.errors import UserError
from config.files import write_text
from config.settings import CheckpointSettings, DatasetSettings
from preference_datasets import build_stores
from tests.conftest import byte_level_tokenizer
from tests.corruption import caches, cases, damaged, outputs, runs
from tests.tiny_runs import tiny_settings
from trainers.data import cache
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.optimizers import build_optimizer
from trainers.run import checkpoint, resume
from trainers.run.checkpoint import CheckpointWriter
from trainers.run.run_dir import RunDir
from trainers.run.saved import RunProgress

WITHOUT = " without"
KINDS = ("", " (processor)", " (MiB read)")


def matrix(seeds: int, folder: Path) -> Counter[str]:
    """Count the outcomes of the damages: refused or rebuilt, harmless, used, or a traceback."""
    outcomes: Counter[str] = Counter()
    subjects = {}
    for make in (runs, caches, outputs):
        (folder / make.__name__).mkdir()
        subjects |= make(folder / make.__name__)
    for kind, subject in subjects.items():
        expected = subject.read(shutil.copytree(subject.folder, folder / "copy", symlinks=True, dirs_exist_ok=True))
        for seed in range(seeds):
            chance = random.Random(f"{kind} {seed}")
            for case in cases(subject):
                copy = damaged(subject, case, folder / "copy", chance)
                try:
                    outcome = "as it was" if subject.read(copy) == expected else "used silently"
                except UserError:
                    outcome = "refused"
                except Exception as error:  # of any kind, since a user would see its traceback
                    outcome = f"traceback ({type(error).__name__})"
                outcomes[outcome] += 1
                if outcome not in ("as it was", "refused"):
                    print(f"{kind}: {' '.join(reversed(case))}: {outcome}", flush=True)
        shutil.rmtree(folder / "copy")
    return outcomes


def costs(works: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return the minimum over a few calls of each, taken in turn, because other load on the machine only adds time.

    NAME is the wall time, "NAME (processor)" the CPU time, and "NAME (MiB read)" the data read through system calls,
    from the cache or the disk.
    """
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(repetitions):
        for name, work in works.items():
            before = time.perf_counter(), time.process_time(), mebibytes_read()
            work()
            after = time.perf_counter(), time.process_time(), mebibytes_read()
            for kind, start, end in zip(KINDS, before, after, strict=True):
                taken[name + kind].append(end - start)
    return {name: min(values) for name, values in taken.items()}


def mebibytes_read() -> float:
    """Return the MiB that this process has read so far, as counted by Linux."""
    return int(Path("/proc/self/io").read_text().split()[1]) / 2**20


def with_ratios(found: dict[str, float], works: tuple[str, str]) -> dict[str, float]:
    """Add the relative cost of checksums for both tasks."""
    for kind in KINDS[:2]:
        whole, without = (sum(found[f"{work}{less}{kind}"] for work in works) for less in ("", WITHOUT))
        found[f"ratio{kind}"] = whole / without - 1
    return found


@contextmanager
def no_checksums() -> Iterator[None]:
    """Disable checksums: write DCP's files with DCP's own code, write an empty record, and check nothing."""

    class PlainWriter(dcp.FileSystemWriter):
        digests: ClassVar[dict[Path, str]] = {}

    def empty_record(folder: Path, *, owner: str, **_: object) -> None:
        write_text(folder / CHECKSUMS, json.dumps({"owner": owner, "files": {}}))

    with (
        patch.object(checkpoint, "HashingWriter", PlainWriter),
        patch.object(checkpoint, "write_checksums", empty_record),
        patch.object(cache, "write_checksums", empty_record),
        patch.object(resume, "find_damage", lambda *_, **__: ""),
        patch.object(cache, "find_damage", lambda *_, **__: ""),
    ):
        yield


def with_and_without(works: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Add each task without checksums; these come first, so that each load finds a record of its own kind."""
    return {f"{name}{WITHOUT}": no_checksums()(work) for name, work in works.items()} | works


def checkpoint_cost(folder: Path, *, hidden: int, repetitions: int) -> dict[str, float]:
    """Return the seconds of a whole save and load, with and without checksums."""
    settings, found = tiny_settings(optimizer="AdamW"), {}
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip

    def worker(layout: Layout) -> None:
        model = LlamaForCausalLM(config)
        optimizer = build_optimizer(model.parameters(), settings)
        ids = torch.arange(8)[None]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        with RunDir.open(folder / "run", config={}, manifest={}) as run:
            writer = CheckpointWriter(run, CheckpointSettings(asynchronous=False), layout, None)

            def save() -> None:
                writer.save(policy=model, optimizer=optimizer, progress=RunProgress(examples=1))

            def load() -> None:
                resume.load_checkpoint(run, policy=model, optimizer=optimizer, layout=layout)

            found["parameters"] = model.num_parameters()
            save()
            found.update(costs(with_and_without({"save": save, "load": load}), repetitions))

    launch(worker, settings)
    return with_ratios(found, ("save", "load"))


@contextmanager
def timed_checksums() -> Iterator[dict[str, float]]:
    """Yield the wall and CPU time that the cache spends on writing and checking checksums meanwhile."""
    spent = {"checksums": 0.0, "checksums (processor)": 0.0}

    def timed(work: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **keywords: object) -> object:
            before = time.perf_counter(), time.process_time()
            try:
                return work(*arguments, **keywords)
            finally:
                spent["checksums"] += time.perf_counter() - before[0]
                spent["checksums (processor)"] += time.process_time() - before[1]

        return run

    with (
        patch.object(cache, "write_checksums", timed(cache.write_checksums)),
        patch.object(cache, "find_damage", timed(cache.find_damage)),
    ):
        yield spent


def store_cost(folder: Path, *, rows: int) -> dict[str, float]:
    """Return the seconds of building and opening a token store, and the part of them that checksums take.

    Two builds of a million rows differ by more than checksums cost, so that part is timed inside one build.
    """
    write_rows(folder / "pairs.jsonl", rows)
    datasets = {"si": DatasetSettings(str(folder / "pairs.jsonl"), "si", eval_fraction=0.01)}
    tokenizer = byte_level_tokenizer(add_bos=True)

    def open_stores() -> None:
        build_stores(
            datasets, loss="preference", tokenizer=tokenizer, max_length=512, max_prompt_length=256,
            cache_dir=folder / "cache",
        )  # fmt: skip

    with timed_checksums() as spent:
        found = costs({"build": open_stores}, 1) | costs({"open": open_stores}, 1) | spent | {"rows": float(rows)}
    for kind in KINDS[:2]:
        part = found[f"checksums{kind}"]
        found[f"ratio{kind}"] = part / (found[f"build{kind}"] + found[f"open{kind}"] - part)
    return found


def main() -> None:
    """Print the outcomes of the damages, and the cost ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="damages of each kind to each file; 0: none")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model; 512: 25M parameters")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the token store")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corruption-") as name:
        folders = [Path(name, part) for part in ("matrix", "checkpoint", "store")]
        for folder in folders:
            folder.mkdir()
        figures: dict[str, dict[str, float]] = {}
        if options.seeds:
            figures["damages"] = dict(matrix(options.seeds, folders[0]))
        figures["checkpoint"] = checkpoint_cost(folders[1], hidden=options.hidden, repetitions=options.repetitions)
        figures["token store"] = store_cost(folders[2], rows=options.rows)
    for part, values in figures.items():
        print(f"{part}: " + ", ".join(f"{what} {value:.4g}" for what, value in values.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
