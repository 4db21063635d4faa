"""A Slurm of one node for tests and `benchmarks/slurm_stops.py`: its own ports, files and key, nothing under /etc.

Needs root, and Debian's `slurm-wlm` and `munge` (slurmctld, slurmd, munged).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATIENCE_SECONDS = 3000.0  # for anything that is awaited: no measure of speed, only the end of what hangs
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=1,bf_interval=2
SlurmdParameters=config_overrides
# A requeued job waits for the first one's credential to end: two minutes by default.
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=7200
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.getuid() == 0 else "a Slurm daemon needs root"


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


class Cluster:
    """The clients of a running Slurm."""

    def __init__(self, environment: Mapping[str, str], patience_seconds: float) -> None:
        self.environment, self.patience_seconds = dict(environment), patience_seconds

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Return what a client prints; its errors are raised with what it said."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environment, **variables}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, **variables: str) -> str:
        """Submit from `cwd`, with more variables of the environment; return the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job, or of one task of an array (`12_3`)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for_end(self, *jobs: str) -> list[str]:
        """Wait until the jobs are over, requeues included; return their states."""
        what = f"the end of jobs {', '.join(jobs)}"
        wait_until(lambda: all(self.state(job) in ENDED for job in jobs), what, self.patience_seconds)
        return [self.state(job) for job in jobs]


@contextmanager
def slurm(
    folder: Path, *, cpus: int = 4, kill_wait: int = 60, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[Cluster]:
    """Run a Slurm whose node says that it has `cpus` processors; what is left of its jobs ends with it.

    Args:
        folder: For its files; empty.
        cpus: May be more than there are.
        kill_wait: Seconds between SIGTERM and SIGKILL.
        patience_seconds: How long `Cluster.wait_for_end` waits.
    """
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=host, folder=folder, ctld_port=_free_port(), slurmd_port=_free_port(), cpus=cpus, kill_wait=kill_wait
        )
    )
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
    with ExitStack() as daemons:

        def start(*command: str) -> None:
            with (folder / f"{command[0]}.out").open("w") as log:
                daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            daemons.callback(_end, daemon)

        start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_until((folder / "munge.socket").exists, "munged")
        start("slurmctld", "-D")
        start("slurmd", "-D")
        cluster = Cluster(environment, patience_seconds)
        wait_until(lambda: _is_up(cluster), f"the node; see the files in {folder}")
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], env=environment, check=False)
            subprocess.run(["scancel", "--user=root"], env=environment, check=False)
            wait_until(lambda: not cluster.run("squeue", "--noheader"), "the end of all jobs")


def _is_up(cluster: Cluster) -> bool:
    try:
        return cluster.run("sinfo", "--noheader", "--format=%T").strip() in ("idle", "mixed", "allocated")
    except RuntimeError:
        return False


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
