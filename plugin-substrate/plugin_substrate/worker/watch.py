"""Bounds that the kernel does not keep for a tree of processes without a cgroup: sampled, and the tree then killed.

What is over its bound for less than the time between two samples is not noticed. Memory is looked at the more often,
the less room is left: at the speed at which memory can be filled, it must not be missed by much.
"""

from __future__ import annotations

import os

from plugin_substrate.records import record
from plugin_substrate.worker.isolation import IsolationProfile

_FILLED_PER_SECOND = 4 << 30  # bytes that a few threads can touch for the first time
_SHORTEST, _LONGEST, _LONGEST_OF_TREE = 0.01, 0.5, 0.1  # seconds between samples
_MOST_THREADS = 1024  # of one process: the system has only so many numbers for all
_UNREAPED = 1000  # ended processes that nobody has waited for yet; they take nothing but numbers
_PAGE = os.sysconf("SC_PAGE_SIZE")


@record()
class Excess:
    """What a worker and its processes had too much of."""

    resource: str  #: ``memory`` in bytes, ``processes``, or ``threads`` of one of them
    needed: int
    available: int


@record()
class Sample:
    """One look at a tree: what is over its bound, and after how many seconds to look again."""

    excess: Excess | None
    next_seconds: float


def look_at(pid: int, profile: IsolationProfile) -> Sample:
    """Sample the tree below a worker; what ends meanwhile counts for nothing."""
    most = profile.processes + _UNREAPED
    pids = [pid] if not profile.processes else _tree(pid, most + 2)
    loads = [load for load in map(_load_of, pids) if load.resident]  # the dead have none
    resident, living = sum(load.resident for load in loads), max(0, len(loads) - 1)
    threads = max((load.threads for load in loads), default=0)
    excess = None
    if living > profile.processes or len(pids) - 1 > most:  # first: too many of them take too much memory as well
        excess = Excess("processes", max(living, len(pids) - 1 - _UNREAPED), profile.processes)
    elif resident > profile.memory_bytes:
        excess = Excess("memory", resident, profile.memory_bytes)
    elif threads > _MOST_THREADS:
        excess = Excess("threads", threads, _MOST_THREADS)
    longest = _LONGEST_OF_TREE if profile.processes else _LONGEST
    room = (profile.memory_bytes - resident) / _FILLED_PER_SECOND
    return Sample(excess, min(max(room, _SHORTEST), longest))


def _tree(pid: int, most: int) -> list[int]:
    """Return a process and those below it, at most so many."""
    found: list[int] = []
    waiting = [pid]
    while waiting and len(found) < most:
        current = waiting.pop()
        found.append(current)
        try:
            for task in os.listdir(f"/proc/{current}/task"):
                waiting += map(int, _read(f"/proc/{current}/task/{task}/children").split())
        except OSError:
            continue
    return found


@record()
class _Load:
    threads: int
    resident: int  # bytes


def _load_of(pid: int) -> _Load:
    """Return what a process holds; nothing of one that is gone. Its name is its own choice, brackets included."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()  # from the third field of proc(5) on
        return _Load(int(fields[17]), int(fields[21]) * _PAGE)
    except (OSError, IndexError):
        return _Load(0, 0)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
