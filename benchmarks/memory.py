"""Resident memory of a process, from the kernel.

`ru_maxrss` is wrong when one process measures another, because a child starts with the peak of the parent that it was
forked from.
"""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


def resident_mib(what: str) -> float:
    """Return VmRSS (now) or VmHWM (the peak since the start, or since `forget_peak`) of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")
