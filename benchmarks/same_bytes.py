"""Is a seeded run the same to the last byte each time, with torch's default number of threads?

    python -m benchmarks.same_bytes                                   # every loss, packed and padded, five times each
    python -m benchmarks.same_bytes --processes 2                     # sharded over two processes

It prints a line per case with the number of different final models of its runs, which must be 1. The pairs are the
quick start's benign ones, of different lengths; a run takes three steps of the tiny model.
`benchmarks/kill_and_resume.py` does the same for runs that are killed and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch

from benchmarks.losses_table import EXTRA, SHARED
from config.schema import compose_config
from config.settings import LOSSES
from quickstart.world import World, replay_rows, write_jsonl
from train import work
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout

NUM_PAIRS, STEPS = 48, 3


def digest_of(layout: Layout, run: Path, pairs: Path, cache: Path, arguments: Sequence[str]) -> str:
    """Train, and return the hash of the final weights."""
    config = compose_config(
        "config", [*SHARED, f"run_dir={run}", f"n_examples={16 * STEPS}", f"datasets.si.path={pairs}", *arguments]
    )
    config.local_dirs = [str(cache)]
    with (run.parent / f"{run.name}-{layout.rank}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        work(layout, config=config, manifest={})
    return hashlib.sha256((run / "LATEST" / "model" / "model.safetensors").read_bytes()).hexdigest()


def losses() -> list[str]:
    """Return the losses that train on pairs; `reverse` is left out, as it is `sft` on other text."""
    return [name for name in LOSSES if name != "reverse"]


def run_cases(layout: Layout, *, folder: Path, loss: str, times: int, trainer: Sequence[str]) -> None:
    """Run a loss `times` times, packed and padded, in the processes of one launch; rank 0 writes the results."""
    unequal = 0
    for packing in ("true", "false"):
        arguments = [f"loss={loss}", f"packing={packing}", *EXTRA.get(loss, []), *trainer]
        found = set()
        for number in range(times):
            one = folder / f"{loss}-{packing}-{number}"
            words = [*arguments, f"exp_name={one.name}"]
            found.add(digest_of(layout, one, folder / "pairs.jsonl", folder / f"cache-{number}", words))
        unequal += len(found) > 1
        if layout.is_main:
            kind = "packed" if packing == "true" else "padded"
            print(f"{loss:20}{kind:8}{times} runs, {len(found)} different", flush=True)
    if layout.is_main:
        (folder / "unequal").write_text(str(unequal))


def run() -> int:
    """Run every case as often as requested; return exit status 1 if one ended in different models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--losses", nargs="+", default=losses())
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    sharded = ["trainer=FSDPTrainer", f"trainer.num_processes={options.processes}", "device=cpu"]
    trainer = sharded if options.processes > 1 else []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.processes} process(es)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "pairs.jsonl", replay_rows(World(), 0, num_rows=NUM_PAIRS))
        unequal = 0
        for loss in options.losses:
            cases = partial(run_cases, folder=folder, loss=loss, times=options.times, trainer=trainer)
            launch(cases, compose_config("config", [*SHARED, "loss=dpo", *trainer]))
            unequal += int((folder / "unequal").read_text())
    print(f"{unequal} of {2 * len(options.losses)} cases differ")
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(run())
