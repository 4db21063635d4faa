"""Is anything damaged ever used, and what do the checksums cost?

Damages every file of every kind of folder that this project writes, in every way of `tests/corruption.py`, several
times with other random numbers, and reads it; then times what checking adds to saving and loading a model of 25M
parameters (with AdamW's state), and to building and opening a token store.

    python -m benchmarks.corruption --seeds 10
    python -m benchmarks.corruption --seeds 0 --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.token_store import write_rows
from config.checksums import CHECKSUMS, find_damage, write_checksums
from config.errors import UserError
from config.settings import CheckpointSettings, DatasetSettings
from preference_datasets import build_stores
from tests.conftest import byte_level_tokenizer
from tests.corruption import caches, cases, damaged, outputs, runs
from tests.tiny_runs import tiny_settings
from trainers.data.token_store import TokenStore
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.optimizers import build_optimizer
from trainers.run.checkpoint import CheckpointWriter
from trainers.run.resume import load_checkpoint
from trainers.run.run_dir import RunDir
from trainers.run.saved import RunProgress


def matrix(seeds: int, folder: Path) -> Counter[str]:
    """Count what became of the damages: refused or built again, harmless, used, or a traceback."""
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
                except Exception as error:  # whatever it is, a user would see its traceback
                    outcome = f"traceback ({type(error).__name__})"
                outcomes[outcome] += 1
                if outcome not in ("as it was", "refused"):
                    print(f"{kind}: {' '.join(reversed(case))}: {outcome}", flush=True)
        shutil.rmtree(folder / "copy")
    return outcomes


def seconds(works: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Return the median of a few calls of each, taken in turns, so that a busy machine is busy for all of them.

    Under NAME the time that passed, under "NAME (processor)" that of the processor.
    """
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(repetitions):
        for name, work in works.items():
            start, start_processor = time.perf_counter(), time.process_time()
            work()
            taken[name].append(time.perf_counter() - start)
            taken[f"{name} (processor)"].append(time.process_time() - start_processor)
    return {name: statistics.median(values) for name, values in taken.items()}


def with_ratios(found: dict[str, float], whole: tuple[str, str]) -> dict[str, float]:
    """Add what checksums take of the whole, in time that passed and in time of the processor."""
    for kind in ("", " (processor)"):
        checks = found[f"write checksums{kind}"] + found[f"check{kind}"]
        found[f"ratio{kind}"] = checks / sum(found[f"{name}{kind}"] for name in whole)
    return found


def checkpoint_cost(folder: Path, *, hidden: int, repetitions: int) -> dict[str, float]:
    """Return seconds of a whole save and load, and of the checks in them."""
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
                load_checkpoint(run, policy=model, optimizer=optimizer, layout=layout)

            found["parameters"] = model.num_parameters()
            save()
            step = run.latest.resolve()
            works: dict[str, Callable[[], object]] = {
                "save": save,
                "load": load,
                "write checksums": lambda: write_checksums(step, owner=run.owner(step)),
                "check": lambda: find_damage(step, owner=run.owner(step)),
            }
            found.update(seconds(works, repetitions))

    launch(worker, settings)
    return with_ratios(found, ("save", "load"))


def store_cost(folder: Path, *, rows: int, repetitions: int) -> dict[str, float]:
    """Return seconds of building and opening a token store, and of the checks in them."""
    write_rows(folder / "pairs.jsonl", rows)
    datasets = {"si": DatasetSettings(str(folder / "pairs.jsonl"), "si", eval_fraction=0.01)}
    tokenizer = byte_level_tokenizer(add_bos=True)

    def open_stores() -> None:
        build_stores(
            datasets, loss="preference", tokenizer=tokenizer, max_length=512, max_prompt_length=256,
            cache_dir=folder / "cache",
        )  # fmt: skip

    found = seconds({"build": open_stores}, 1)
    (entry,) = (path.parent for path in (folder / "cache").rglob(CHECKSUMS))
    works: dict[str, Callable[[], object]] = {
        "open": open_stores,
        "write checksums": lambda: write_checksums(entry, owner=entry.name),
        "check": lambda: find_damage(entry, owner=entry.name),
    }
    found |= seconds(works, repetitions) | {"rows": float(len(TokenStore(entry / "train")))}
    return with_ratios(found, ("build", "open"))


def main() -> None:
    """Print what became of the damages, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="times that every file is damaged in every way; 0: none")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model; 512: 25M parameters")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the token store")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corruption-") as name:
        folders = [Path(name, part) for part in ("matrix", "checkpoint", "store")]
        for folder in folders:
            folder.mkdir()
        figures: dict[str, dict[str, float]] = {}
        if options.seeds:
            figures["damages"] = dict(matrix(options.seeds, folders[0]))
        figures["checkpoint"] = checkpoint_cost(folders[1], hidden=options.hidden, repetitions=options.repetitions)
        figures["token store"] = store_cost(folders[2], rows=options.rows, repetitions=options.repetitions)
    for part, values in figures.items():
        print(f"{part}: " + ", ".join(f"{what} {value:.4g}" for what, value in values.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
