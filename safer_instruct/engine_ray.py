"""`engine=ray`: process the shards on the workers of a Ray cluster instead of the tasks of a job array.

Ray stores no results: each worker writes the ledgers of its shard. If a worker dies, it releases its ledgers, and Ray
retries the shard on another worker, which resumes after the last complete line. So a job array or single processes can
resume what Ray began, and the reverse.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from config.errors import UserError
from config.settings import EngineSettings

STATUS_SECONDS = 10.0  # least time between two status lines, because reading long ledgers takes a while
STATUS_SHARE = 0.05  # largest share of the time to spend on status lines
DEATHS = 20  # retries of a shard whose workers die: nodes may be preempted, but no shard may kill every worker
Work = Callable[[int], None]


def run_on_ray(work: Work, count: int, settings: EngineSettings, status: Callable[[], str]) -> None:
    """Run `work(index)` for each of `count` shards on the workers of a cluster, as many at a time as fit.

    Each shard has its own process, so that the GPU memory of its model is freed when it ends. The working directory and
    the repository must have the same paths on every machine of the cluster.

    `work` must be picklable and safe to retry; `status` describes the progress of all shards in one line.

    Raises:
        UserError: Ray is not installed, there is no cluster, or shards failed: raised after all shards have ended, with
            the first failure.
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
    """Return the error of a shard that has ended; "" if it succeeded."""
    try:
        return str(ray.get(shard))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        return f"its workers died {DEATHS + 1} times ({str(error).splitlines()[0]})"


def _in_place(work: Work, index: int, folder: str) -> str:
    """Run one shard in the driver's working directory; return the message of a UserError, "" if there is none."""
    os.chdir(folder)
    try:
        work(index)
    except UserError as error:  # returned, not raised: no retry can mend what the user must mend
        return str(error)
    return ""


def _connect(ray: Any, settings: EngineSettings) -> None:
    """Join the cluster at `engine.address`, or start one on this machine."""
    is_new = settings.address is None and not os.environ.get("RAY_ADDRESS")
    own = {"include_dashboard": False} if is_new else {}
    try:  # workers find the same modules as this process, because Ray sends them its sys.path
        ray.init(address=settings.address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"engine.address={settings.address}: found no Ray cluster ({str(error).splitlines()[0]}); start one "
            "(`ray start --head`), or leave engine.address out to start one on this machine"
        ) from error


def _require_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "engine=ray needs the package ray: pip install 'safer-instruct[ray]', or leave engine=ray out and run "
            "the shards as a job array (docs/scale.md)"
        ) from error
    return ray
