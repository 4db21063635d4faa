"""`engine=ray`: the workers of a Ray cluster do the shards that the tasks of a job array would do.

Nothing is kept in Ray: a shard's ledgers are its result, written by its worker and read by whoever comes next. A worker
that dies releases its ledgers, and Ray gives the shard to another one, which goes on behind the last whole line. So
a job array, or one process after the other, can go on with what Ray began, and the reverse.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from config.errors import UserError
from config.settings import EngineSettings

STATUS_SECONDS = 10.0  # between two lines that say how far all are, at least: to read long ledgers takes a while
STATUS_SHARE = 0.05  # of the time may go into them
DEATHS = 20  # of the workers of one shard: nodes are taken away, but what kills every worker is a fault
Work = Callable[[int], None]


def run_on_ray(work: Work, count: int, settings: EngineSettings, status: Callable[[], str]) -> None:
    """Do `work(index)` for each of `count` shards on the workers of a cluster, as many at a time as it has room for.

    Each shard has a process of its own, so that what a model held on a GPU is free when it ends. The working directory
    and the repository have to be where they are here, on every machine of the cluster.

    `work` must be picklable, and safe to begin again; `status` says in one line how far all shards are.

    Raises:
        UserError: No ray, no cluster, or a shard that failed by its own fault: the first one, when no shard runs any
            more; the others have been done.
    """
    ray = _require_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, settings)
    options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_calls": 1, "max_retries": DEATHS}
    shard = ray.remote(**options)(_in_place)
    try:
        pending = [shard.remote(work, index, os.getcwd()) for index in range(count)]
        failures: list[str] = []
        pause = STATUS_SECONDS
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=pause)
            failures += filter(None, (_result(ray, one) for one in done))
            started = time.monotonic()
            print(f"{count - len(pending)} of {count} shards ended; {status()}", file=sys.stderr, flush=True)
            pause = max(STATUS_SECONDS, (time.monotonic() - started) / STATUS_SHARE)
    finally:
        if is_ours:
            ray.shutdown()
    if failures:
        raise UserError(f"{len(failures)} of {count} shards failed, the first: {failures[0]}")


def _result(ray: Any, shard: Any) -> str:
    """Return what is wrong with a shard that has ended; "" if nothing is."""
    try:
        return str(ray.get(shard))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        return f"its workers died {DEATHS + 1} times ({str(error).splitlines()[0]})"


def _in_place(work: Work, index: int, folder: str) -> str:
    """Do one shard in the driver's working directory; return the message of a UserError, which is nobody else's."""
    os.chdir(folder)
    try:
        work(index)
    except UserError as error:  # returned: Ray begins again what dies, and not what the user has to mend
        return str(error)
    return ""


def _connect(ray: Any, settings: EngineSettings) -> None:
    """Join the cluster at `engine.address`, or start one of this machine."""
    is_new = settings.address is None and not os.environ.get("RAY_ADDRESS")
    own = {"include_dashboard": False} if is_new else {}
    try:  # workers look for modules where this process does: Ray tells them its sys.path
        ray.init(address=settings.address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"engine.address={settings.address}: no Ray cluster there ({str(error).splitlines()[0]}); start one "
            "(`ray start --head`), or leave engine.address out to start one on this machine"
        ) from error


def _require_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "engine=ray needs the package ray: pip install 'safer-instruct[ray]', or leave engine=ray out and start "
            "the shards by a job array (docs/scale.md)"
        ) from error
    return ray
