"""Does a run that Slurm stops, in each possible way and at random moments, save its last step and end bit-equal?

    python -m benchmarks.slurm_stops --repetitions 10      # root, and Debian's slurm-wlm and munge

It runs `scripts/slurm/train.sbatch` with two tasks on a one-node Slurm that this program starts: DPO of the quick
start's model on random words, wandb offline. The first runs are undisturbed. Then each repetition runs four jobs in
parallel, each stopped at a random moment of its first steps: requeued by scontrol, sent SIGUSR1, stopped by its time
limit, and cancelled and resubmitted. For each it checks that the current step was saved, the job was requeued
automatically, and weights and metrics equal an undisturbed run to the last bit. It waits for states however long they
take; with fewer epochs a run may end before its time limit, which Slurm checks only twice a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kill_and_resume import ROOT, write_pairs
from tests.commands import metrics, without_times
from tests.slurm_cluster import ENDED, Cluster, slurm

Final = tuple[bytes, list[dict[str, object]]]  # weights, and metrics except timings
KINDS = ("requeue", "usr1", "limit", "scancel")
TRAIN = [
    "loss=dpo", "model=tiny", "datasets.si.path=pairs.jsonl", "datasets.si.eval_fraction=0.2", "batch_size=8",
    "eval_batch_size=8", "eval_every=4800", "lr=1e-4", "optimizer=AdamW", "minimum_log_interval_secs=0",
    "checkpoint.every_examples=4800", "checkpoint.keep_last=2", "device=cpu",
]  # fmt: skip


class Stops:
    """Slurm jobs in one folder, which share the token store and the reference cache."""

    def __init__(self, cluster: Cluster, folder: Path, epochs: dict[str, int]) -> None:
        """Write the data, and put the programs where the jobs are submitted; `epochs`: kind of stop -> its epochs."""
        self.cluster, self.folder, self.epochs = cluster, folder, epochs
        for name in ("train.py", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        write_pairs(folder / "pairs.jsonl", 120)

    def submit(self, kind: str, name: str) -> str:
        """Submit a run that will be stopped in one way, or the undisturbed run to compare it with."""
        options = ["--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
        variables = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        words = [*options, "scripts/slurm/train.sbatch", *TRAIN, f"n_epochs={self.epochs[kind]}", f"exp_name={name}"]
        return self.cluster.sbatch(*words, cwd=self.folder, **variables)

    def rows(self, name: str) -> int:
        """Return how many rows of metrics a run has written."""
        file = self.folder / "runs" / name / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def final(self, name: str) -> Final:
        """Return the weights of a finished run, and its metrics except timings."""
        run = self.folder / "runs" / name
        return (run / "LATEST" / "model" / "model.safetensors").read_bytes(), without_times(metrics(run))

    def stop(self, kind: str, job: str) -> None:
        """Stop a running job in one of Slurm's ways."""
        if kind == "limit":  # Slurm sends SIGUSR1 two minutes before the limit, or up to a minute earlier
            hours, minutes, _ = map(int, self.cluster.job(job)["RunTime"].split(":"))
            self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
        commands = {"requeue": ["scontrol", "requeue"], "usr1": ["scancel", "--signal=USR1"], "scancel": ["scancel"]}
        if kind in commands:
            self.cluster.run(*commands[kind], job)

    def lift_limit(self, job: str) -> None:
        """Give a job that met its time limit as much time as it needs after it is requeued."""
        while not int(self.cluster.job(job)["Restarts"]):
            if self.cluster.state(job) in ENDED:
                return
            time.sleep(0.2)
        self.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")

    def repeat(self, number: int, straight: dict[str, Final]) -> list[dict[str, object]]:
        """Stop a run of each kind once; return how it compares with the undisturbed run of its kind."""
        draw = random.Random(number)
        names = {kind: f"{kind}-{number}" for kind in KINDS}
        jobs = {kind: self.submit(kind, name) for kind, name in names.items()}
        at = {kind: draw.randrange(5, len(straight[kind][1]) // 3) for kind in KINDS}
        waiting = set(KINDS)
        while waiting:
            # Do not wait for a job that fails before its moment; its row shows the failure.
            ended = {kind for kind in waiting if self.cluster.state(jobs[kind]) in ENDED}
            for kind in [kind for kind in waiting - ended if self.rows(names[kind]) >= at[kind]]:
                self.stop(kind, jobs[kind])
                waiting.remove(kind)
            waiting -= ended
            time.sleep(0.2)
        self.lift_limit(jobs["limit"])
        self.cluster.wait_for_end(jobs["scancel"])
        logs = {kind: self.folder / f"slurm-train-{job}.out" for kind, job in jobs.items()}
        jobs["scancel"] = self.submit("scancel", names["scancel"])
        states = dict(zip(jobs, self.cluster.wait_for_end(*jobs.values()), strict=True))
        results = []
        for kind, job in jobs.items():
            said = re.search(r"stopped as asked after (\d+) examples", logs[kind].read_text())
            results.append({
                "kind": kind, "repetition": number, "stopped_at": int(said[1]) if said else None,
                "saved": said is not None, "state": states[kind],
                "queued_again": kind == "scancel" or int(self.cluster.job(job)["Restarts"]) > 0,
                "bit_equal": states[kind] == "COMPLETED" and self.final(names[kind]) == straight[kind],
            })  # fmt: skip
        return results


def main() -> None:
    """Run all repetitions, print a line for each stop, and the counts by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10, help="stops in each way")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each run")
    parser.add_argument("--limit-epochs", type=int, default=15, help="epochs of a run that reaches its time limit")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    temporary = tempfile.TemporaryDirectory
    with (
        temporary() as daemons,
        temporary() as folder,
        slurm(Path(daemons), cpus=16, patience_seconds=math.inf) as cluster,
    ):
        epochs = {kind: options.limit_epochs if kind == "limit" else options.epochs for kind in KINDS}
        stops = Stops(cluster, Path(folder), epochs)
        cluster.wait_for_end(*(stops.submit(kind, f"straight-{kind}") for kind in ("limit", "usr1")))
        of_kind = {kind: "limit" if kind == "limit" else "usr1" for kind in KINDS}
        straight = {kind: stops.final(f"straight-{of_kind[kind]}") for kind in KINDS}
        results = []
        for number in range(options.repetitions):
            results += stops.repeat(number, straight)
            print(*map(json.dumps, results[-len(KINDS) :]), sep="\n", flush=True)
    for kind in KINDS:
        own = [result for result in results if result["kind"] == kind]
        counts = {name: sum(bool(result[name]) for result in own) for name in ("saved", "queued_again", "bit_equal")}
        print(f"{kind}: {len(own)} stops, {counts}")


if __name__ == "__main__":
    main()
