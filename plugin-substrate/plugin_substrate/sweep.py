"""Finds what a killed supervisor left behind where no process id namespace could be made, and kills it.

Best effort: a descendant is known by a mark in the environment it was started with, or by its worker's session. One
that gave up both is missed, and so is one of another user, or one whose environment this host may not read.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

#: The variable that marks a supervisor and all below it: ``<host's pid>.<host's start>.<random>``.
MARK_VARIABLE = "CJM_SUPERVISOR"

_PROC = Path("/proc")
_STAT_STATE, _STAT_SESSION, _STAT_START = 0, 3, 19  # fields of /proc/PID/stat after the command


def new_mark() -> str:
    """Return a mark for a supervisor of this process."""
    return f"{os.getpid()}.{_start_of(os.getpid())}.{secrets.token_hex(8)}"


def sweep_supervisor(mark: str, sessions: Collection[int]) -> int:
    """Kill what a dead supervisor of this host left behind, ``sessions`` being its workers' pids; returns how many.

    A session keeps its number for as long as anyone is in it, and only processes without new privileges are meant, as
    all below a supervisor are: nobody else is taken for one of them.
    """
    return _kill_all(lambda pid: _mark_of(pid) == mark or _session_of(pid) in sessions)


def sweep_dead_hosts() -> int:
    """Kill what is marked by a host that no longer lives; returns how many. Its supervisors end by themselves."""
    return _kill_all(lambda pid: _host_is_dead(_mark_of(pid)))


def _kill_all(left_behind: Callable[[int], bool]) -> int:
    """Kill until nothing new is found; each is looked at again once its number cannot pass to another process."""
    killed: set[tuple[int, str]] = set()
    while True:
        found = [pid for pid in _pids() if (pid, _start_of(pid)) not in killed and left_behind(pid)]
        for pid in found:
            killed.add((pid, _start_of(pid)))
            with suppress(ProcessLookupError, PermissionError):
                descriptor = os.pidfd_open(pid)
                try:
                    if left_behind(pid) and _may_be_ours(pid):
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                finally:
                    os.close(descriptor)
        if not found:
            return len(killed)


def _pids() -> Iterator[int]:
    own = os.getpid()
    return (int(entry.name) for entry in _PROC.glob("[0-9]*") if int(entry.name) != own)


def _mark_of(pid: int) -> str:
    """Return the mark in the environment a process was started with, empty when there is none or it is not ours."""
    wanted = f"{MARK_VARIABLE}=".encode()
    with suppress(OSError):
        for variable in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            if variable.startswith(wanted):
                return variable[len(wanted) :].decode(errors="replace")
    return ""


def _host_is_dead(mark: str) -> bool:
    pid, _, rest = mark.partition(".")
    start = rest.partition(".")[0]
    return pid.isdecimal() and start.isdecimal() and _start_of(int(pid)) != start


def _may_be_ours(pid: int) -> bool:
    """Whether a process has no new privileges, and lives in the namespace where its mark's numbers mean what they say.

    Below us there may be containers with hosts of their own: to us their marks would all seem to be of dead ones.
    """
    with suppress(OSError):
        lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        numbers = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
        return len(numbers) == 1 and "NoNewPrivs:\t1" in lines
    return False


def _session_of(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[_STAT_SESSION]) if fields else 0


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; empty when it is gone or a zombie."""
    fields = _stat(pid)
    return fields[_STAT_START] if fields and fields[_STAT_STATE] not in "ZX" else ""


def _stat(pid: int) -> list[str]:
    with suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []
