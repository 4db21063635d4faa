"""Does a run that Slurm stops, in each of its ways and at random moments, save its last step and end bit-equal?

    python -m benchmarks.slurm_stops --repetitions 10      # root, and Debian's slurm-wlm and munge

`scripts/slurm/train.sbatch` with two tasks on a Slurm of one node that this program starts: DPO of the quick start's
model on random words, wandb offline. First runs that nothing stops; then, for each repetition, one that is requeued by
scontrol, one that gets SIGUSR1, one whose time limit comes, and one that is cancelled and submitted again, all four at
once, each at a random moment of its first steps. Of each: was the step under way saved, was the job queued again by
itself, are weights and metrics those of a run that nothing stopped, to the last bit? It waits for states, however long
they take; with fewer epochs a time limit, which Slurm looks at twice a minute, may come after the run's end.
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

Final = tuple[bytes, list[dict[str, object]]]  # weights, and metrics but for the clock's
KINDS = ("requeue", "usr1", "limit", "scancel")
TRAIN = [
    "loss=dpo", "model=tiny", "datasets.si.path=pairs.jsonl", "datasets.si.eval_fraction=0.2", "batch_size=8",
    "eval_batch_size=8", "eval_every=4800", "lr=1e-4", "optimizer=AdamW", "minimum_log_interval_secs=0",
    "checkpoint.every_examples=4800", "checkpoint.keep_last=2", "device=cpu",
]  # fmt: skip


class Stops:
    """Jobs in one folder, which share the token store and the reference cache."""

    def __init__(self, cluster: Cluster, folder: Path, epochs: dict[str, int]) -> None:
        """Write the data, and lay the programs where the jobs are submitted; `epochs`: of each kind of stop."""
        self.cluster, self.folder, self.epochs = cluster, folder, epochs
        for name in ("train.py", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        write_pairs(folder / "pairs.jsonl", 120)

    def submit(self, kind: str, name: str) -> str:
        """Submit the command of a run that is, or would be, stopped in one way."""
        options = ["--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
        variables = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        words = [*options, "scripts/slurm/train.sbatch", *TRAIN, f"n_epochs={self.epochs[kind]}", f"exp_name={name}"]
        return self.cluster.sbatch(*words, cwd=self.folder, **variables)

    def rows(self, name: str) -> int:
        """Return how many rows of metrics a run has written."""
        file = self.folder / "runs" / name / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def final(self, name: str) -> Final:
        """Return the weights of a finished run, and its metrics but for the clock's."""
        run = self.folder / "runs" / name
        return (run / "LATEST" / "model" / "model.safetensors").read_bytes(), without_times(metrics(run))

    def stop(self, kind: str, job: str) -> None:
        """Stop a running job in one of Slurm's ways."""
        if kind == "limit":  # SIGUSR1 comes two minutes before it, or up to a minute earlier
            hours, minutes, _ = map(int, self.cluster.job(job)["RunTime"].split(":"))
            self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
        commands = {"requeue": ["scontrol", "requeue"], "usr1": ["scancel", "--signal=USR1"], "scancel": ["scancel"]}
        if kind in commands:
            self.cluster.run(*commands[kind], job)

    def lift_limit(self, job: str) -> None:
        """Give a job that met its time limit as much time as it needs, when it is queued again."""
        while not int(self.cluster.job(job)["Restarts"]):
            if self.cluster.state(job) in ENDED:
                return
            time.sleep(0.2)
        self.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")

    def repeat(self, number: int, straight: dict[str, Final]) -> list[dict[str, object]]:
        """Stop a run of each kind once; return what became of it beside the undisturbed run of its kind."""
        draw = random.Random(number)
        names = {kind: f"{kind}-{number}" for kind in KINDS}
        jobs = {kind: self.submit(kind, name) for kind, name in names.items()}
        at = {kind: draw.randrange(5, len(straight[kind][1]) // 3) for kind in KINDS}
        waiting = set(KINDS)
        while waiting:
            # A job that fails before its moment is not waited for: its row tells.
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
