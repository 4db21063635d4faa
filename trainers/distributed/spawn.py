"""The processes of one node, started and watched by `python train.py trainer=FSDPTrainer`.

They are spawned, not forked, because CUDA and thread pools do not survive a fork. The parent does no work. It forwards
stop requests. If a process dies, it kills the others and reports the cause: the error of the first process that died,
because the others only lost their peer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from config.errors import SaidElsewhere, UserError, machine_faults
from trainers.distributed.preemption import PREEMPTED_STATUS, SIGNALS, Preempted, StopRequest

GRACE_SECONDS = 2.0  # time for the other processes to report their own errors
USER_ERROR_STATUS = 2


@dataclass(frozen=True)
class Place:
    """One process of a job."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of its node


@dataclass
class _Child:
    place: Place
    process: Any  # multiprocessing's SpawnProcess
    report: Connection


def start_processes(work: Callable[[Place, StopRequest], None], num_processes: int) -> None:
    """Run `work(place, stop)` (pickled) in processes on this node; return when all have succeeded.

    Raises:
        Preempted: the processes stopped on request.
        UserError: the error of the process that failed first.
        SystemExit: a process crashed; its traceback was printed. Status 1, or 128 + the signal that killed it.
    """
    context = multiprocessing.get_context("spawn")
    stop_flag = context.RawValue("b", 0)  # no lock: a killed process would never release it
    children: list[_Child] = []
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:  # otherwise each process would use all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    stop = StopRequest()
    try:
        with stop.on_signals():
            for rank in range(num_processes):
                place = Place(rank=rank, world_size=num_processes, local_rank=rank)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, place, stop_flag, theirs), name=f"rank {rank}")
                process.start()
                theirs.close()
                children.append(_Child(place, process, ours))
            _watch(children, stop, stop_flag)
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        for child in children:
            child.process.kill()
        for child in children:
            child.process.join()


def _watch(children: list[_Child], stop: StopRequest, stop_flag: Any) -> None:
    """Return when all processes have succeeded; raise as `start_processes` does."""
    running = {child.process.sentinel: child for child in children}
    preempted: list[str] = []
    while running:
        ended = _ended(running)
        if stop:
            stop_flag.value = 1
        preempted += [_report(child)[1] for child in ended if child.process.exitcode == PREEMPTED_STATUS]
        failed = [child for child in ended if child.process.exitcode not in (0, PREEMPTED_STATUS)]
        if failed:
            deadline = time.monotonic() + GRACE_SECONDS
            while running and time.monotonic() < deadline:
                ended += _ended(running)
            _raise_cause(failed + [child for child in ended if child not in failed], len(children))
    if preempted:
        raise Preempted("".join(preempted))


def _ended(running: dict[int, _Child]) -> list[_Child]:
    """Remove and return the processes that end within 0.1 s; calls in a loop give the order in which they end."""
    ended = [running.pop(sentinel) for sentinel in wait(list(running), timeout=0.1) if isinstance(sentinel, int)]
    for child in ended:
        child.process.join()  # a sentinel becomes ready just before the exit code is available
    return ended


def _raise_cause(ended: list[_Child], num_processes: int) -> None:
    """Raise the error of the first process that reported one itself; `ended` is in the order in which they ended."""
    reports = [(child, *_report(child)) for child in ended]
    told = [report for report in reports if report[1] != "said elsewhere"] or reports
    child, kind, text = told[0]
    if kind == "user error":
        raise UserError(text)
    rank, status = child.place.rank, child.process.exitcode
    if kind == "crash":
        print(f"{text}\nrank {rank} of {num_processes} failed first (above); the others were stopped", file=sys.stderr)
    elif status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory? see the kernel's log, dmesg)" if -status == signal.SIGKILL else ""
        print(
            f"rank {rank} of {num_processes} (process {child.process.pid}) was killed by {name}{hint}; the others were "
            "stopped. Rerun the same command to resume from the newest checkpoint.",
            file=sys.stderr,
        )
    else:
        print(f"rank {rank} of {num_processes} ended with status {status}; the others were stopped", file=sys.stderr)
    sys.exit(128 - status if status is not None and status < 0 else status)


def _report(child: _Child) -> tuple[str, str]:
    try:
        return child.report.recv()
    except EOFError:  # it was killed, or exited by os._exit
        return "none", ""


def _child(work: Callable[[Place, StopRequest], None], place: Place, stop_flag: Any, report: Connection) -> None:
    """Do the work in this child process, and report to the parent how it ended."""
    for number in SIGNALS:  # a spawned child inherits no handlers; these apply until the work sets its own
        signal.signal(number, lambda number, frame: os._exit(PREEMPTED_STATUS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes: the parent handles it
    tqdm.set_lock(threading.RLock())  # tqdm's default is a system semaphore, which leaks if the process is killed
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with_parent, args=(parent.sentinel,), daemon=True).start()
    kind, text, status = "", "", 0
    try:
        with machine_faults():
            work(place, StopRequest(lambda: bool(stop_flag.value)))
        return
    except Preempted as stopped:
        kind, text, status = "preempted", str(stopped), PREEMPTED_STATUS
    except SaidElsewhere:
        kind, status = "said elsewhere", USER_ERROR_STATUS
    except UserError as error:
        kind, text, status = "user error", str(error), USER_ERROR_STATUS
    except BaseException:
        kind, text, status = "crash", traceback.format_exc().rstrip(), 1
    report.send((kind, text))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a normal exit would hang on threads that wait for a dead peer


def _end_with_parent(sentinel: int) -> None:
    """Exit when the parent ends: if it is killed with SIGKILL, it cannot end its children itself."""
    wait([sentinel])
    os._exit(128 + signal.SIGKILL)
