"""A process and its descendants, as ``/proc`` shows them: for figures only, never for signals."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_MOST_PROCESSES = 4096


class TreeUsage(NamedTuple):
    """What a process and its descendants hold, and what those that live have used."""

    pids: tuple[int, ...]
    resident_bytes: int
    cpu_seconds: float


class CpuClock:
    """Turns growing CPU seconds into percentages: the mean since it was asked before, 0 the first time."""

    def __init__(self) -> None:
        self._before: tuple[int, float, float] | None = None

    def percent(self, pid: int, cpu_seconds: float) -> float:
        """Return the percentage of one processor; what descendants that ended meanwhile had used is lost."""
        before, now = self._before, time.monotonic()
        self._before = (pid, cpu_seconds, now)
        if before is None or before[0] != pid or now <= before[2]:
            return 0.0
        return max(0.0, 100 * (cpu_seconds - before[1]) / (now - before[2]))


def tree_usage(pid: int) -> TreeUsage:
    """Read the tree below a process. Who ends while it is read is left out, and so is who left for another parent."""
    pids: list[int] = []
    resident, cpu = 0, 0.0
    waiting = [pid]
    while waiting and len(pids) < _MOST_PROCESSES:
        current = waiting.pop()
        try:
            memory = (PROC / str(current) / "statm").read_text(encoding="ascii").split()
            fields = (PROC / str(current) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            waiting += _children(current)
        except (FileNotFoundError, ProcessLookupError):
            continue
        pids.append(current)
        resident += int(memory[1]) * _PAGE
        cpu += sum(int(ticks) for ticks in fields.split()[11:13]) / _TICKS
    return TreeUsage(tuple(pids), resident, cpu)


def memory_available_mb() -> float | None:
    """Return what the machine can still give without swapping, in MB; None where the kernel does not tell."""
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in (PROC / str(pid) / "task").iterdir():
        found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found
