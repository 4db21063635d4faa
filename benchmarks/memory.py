"""Resident memory of a process, from the kernel.

`ru_maxrss` will not do where one process measures another: a child starts with the peak of the parent it was forked
from.
"""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


def resident_mib(what: str) -> float:
    """VmRSS (now) or VmHWM (the peak since the program began, or since `forget_peak`) of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
