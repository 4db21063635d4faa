"""Does a run that is killed, or asked to stop, and then resumed end bit-equal to an undisturbed one?

    python -m benchmarks.kill_and_resume --kills 20

It runs DPO of the quick start's model on random words, `python train.py trainer=FSDPTrainer` with two CPU processes and
asynchronous checkpoints. The first run is undisturbed. Then, for each kill, a new run gets SIGKILL at a random moment
(one process, or all and their launcher, in turn) and is resumed until it ends. Then the launcher gets SIGTERM during
start-up, the first evaluation, a step and a save. Weights and metrics must equal those of the first run, to the last
bit; a stopped run must exit with status 75 within 30 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "apple",
    "banana",
    "cherry",
    "river",
    "stone",
    "cloud",
    "window",
    "garden",
    "letter",
    "music",
    "paper",
    "silver",
    "yellow",
]
CLOCK = ("examples_per_second", "tokens_per_second", "data_wait_seconds", "memory/peak")
STOPPED = 75


def write_pairs(path: Path, num_rows: int) -> None:
    """Write pairs of random words, with unequal lengths."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {"instruction": f"{text(2, 8)} {row}", "chosen": text(2, 20), "rejected": text(2, 20), "label": "none"}
        for row in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Runs:
    """Runs in one folder, which share the token store and the reference cache."""

    def __init__(self, folder: Path) -> None:
        """Write the data."""
        self.folder = folder
        write_pairs(folder / "pairs.jsonl", 120)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start the command of a run, in a process group of its own."""
        arguments = [
            "loss=dpo", "model=tiny", "datasets.si.path=pairs.jsonl", f"exp_name={name}", "trainer=FSDPTrainer",
            "trainer.num_processes=2", "batch_size=8", "eval_batch_size=8", "n_epochs=3", "eval_every=120", "lr=1e-4",
            "optimizer=AdamW", "checkpoint.every_examples=24", "checkpoint.keep_last=2", "wandb.enabled=false",
            "minimum_log_interval_secs=0", "datasets.si.eval_fraction=0.2",
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # threads as the caller has them
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments], cwd=self.folder, env=environment, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str) -> None:
        """Run the command until it succeeds."""
        status = self.start(name).wait()
        if status:
            raise SystemExit(f"{name} ended with status {status}:\n{(self.folder / f'{name}.log').read_text()}")

    def result(self, name: str) -> tuple[str, list[dict[str, float]]]:
        """Return the hash of the final weights, and the metrics except timings."""
        run = self.folder / "runs" / name
        weights = (run / "LATEST" / "model" / "model.safetensors").read_bytes()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
        return hashlib.sha256(weights).hexdigest(), rows


def ranks_of(launcher: int) -> list[int]:
    """Return the processes that a launcher has started, by rank."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    except FileNotFoundError:
        return []


def kill_once(runs: Runs, name: str, draw: random.Random, seconds: float, everybody: bool) -> str | None:
    """Send SIGKILL at a random moment; return what was hit, or None if the run was already over."""
    process = runs.start(name)
    time.sleep(draw.uniform(0.3, 1.0) * seconds)
    victims = [process.pid, *ranks_of(process.pid)] if everybody else ranks_of(process.pid)[-1:]
    if process.poll() is not None:
        return None
    for victim in victims or [process.pid]:
        os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    status = process.wait()
    metrics = runs.folder / "runs" / name / "metrics.jsonl"
    rows = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    ended = time.monotonic() - began
    return f"{len(victims)} processes, after {rows} rows of metrics; status {status} {ended:.1f} s later"


def stop_once(runs: Runs, name: str, is_moment: Callable[[Path, float], bool]) -> str:
    """Send SIGTERM to the launcher as soon as the given moment has come."""
    process, started = runs.start(name), time.monotonic()
    run = runs.folder / "runs" / name
    while not is_moment(run, time.monotonic() - started) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    status = process.wait()
    seconds = time.monotonic() - began
    if status != STOPPED or seconds > 30:
        log = (runs.folder / f"{name}.log").read_text()
        raise SystemExit(f"{name}: status {status} after {seconds:.1f} s, wanted {STOPPED} within 30 s\n{log}")
    saved = sorted(path.name for path in (run / "checkpoints").glob("*"))
    return f"status {status} after {seconds:.1f} s; {', '.join(saved) or 'nothing saved'}"


MOMENTS: dict[str, Callable[[Path, float], bool]] = {
    "start-up": lambda run, seconds: seconds > 1.0,
    "first evaluation": lambda run, seconds: (run / "metrics.jsonl").exists(),  # opened, nothing measured yet
    "a step": lambda run, seconds: (
        (run / "metrics.jsonl").exists() and b"loss/train" in (run / "metrics.jsonl").read_bytes()
    ),
    "a save": lambda run, seconds: any(run.glob("checkpoints/.*.partial")),
}


def main() -> None:
    """Print a line for each run, and exit with status 1 if one differs from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, equal = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        runs.finish("caches")  # builds the token store and the reference cache for all later runs
        began = time.monotonic()
        runs.finish("straight")
        seconds, straight = time.monotonic() - began, runs.result("straight")
        print(f"straight: {seconds:.1f} s, {straight[0][:16]}", flush=True)

        def check(name: str, what: str) -> None:
            runs.finish(name)
            equal.append(runs.result(name) == straight)
            print(f"{name}: {what}; then {'bit-equal' if equal[-1] else 'ANOTHER RESULT'}", flush=True)

        for number in range(arguments.kills):
            name = f"kill-{number}"
            while (what := kill_once(runs, name, draw, seconds, everybody=number % 2 == 0)) is None:
                shutil.rmtree(runs.folder / "runs" / name)  # it was faster than the first run, so try again
            check(name, what)
        for number, (moment, is_moment) in enumerate(MOMENTS.items()):
            check(f"stop-{number}", f"SIGTERM in {moment}: {stop_once(runs, f'stop-{number}', is_moment)}")
    print(f"{sum(equal)} of {len(equal)} bit-equal")
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
