"""Finds what a killed supervisor left behind where no process id namespace could be made, and kills it.

Every supervisor is marked by a number in a resource limit that the kernel has no use for. All below it inherit it,
through forks, new programs, sessions and parents; without privileges nobody can raise it, and the filter of workers
lets nobody lower it. Where there is no filter for the architecture, a plugin that knows of the mark can give it
up, and is missed; and so is everything where this host may not see other processes in /proc.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from plugin_substrate.control_group import end_groups
from plugin_substrate.worker.seccomp import MARK_LIMIT

# A mark is a sign of ours, the host's pid, when the host started and which supervisor of that host it is.
_SIGN, _PID_BITS, _START_BITS, _COUNT_BITS = 0b101101, 22, 14, 20
_PROC = Path("/proc")
_STAT_STATE, _STAT_START = 0, 19  # fields of /proc/PID/stat after the command
_count = itertools.count()


def new_mark() -> int:
    """Return a mark for a supervisor of this process."""
    pid = os.getpid()
    mark = _SIGN << _PID_BITS | pid
    mark = mark << _START_BITS | _bits(int(start_of(pid) or 0), _START_BITS)
    return mark << _COUNT_BITS | _bits(next(_count), _COUNT_BITS)


def put_mark(pid: int, mark: int) -> None:
    """Mark a child of ours, and with it whatever it will fork from now on."""
    resource.prlimit(pid, MARK_LIMIT, (mark, mark))


def sweep_supervisor(mark: int) -> int:
    """Kill what a dead supervisor of this host left behind; returns how many."""
    return _kill_all(lambda pid: _mark_of(pid) == mark)


def sweep_dead_hosts() -> int:
    """Kill what is marked by a host that no longer lives, its supervisors included; returns how many.

    Those in control groups end with these, and are not counted.
    """
    end_groups(_host_is_dead)
    return _kill_all(lambda pid: _host_is_dead(_mark_of(pid)))


def _kill_all(left_behind: Callable[[int], bool]) -> int:
    """Kill until nothing new is found; each is looked at again once its number cannot pass to another process."""
    killed: set[tuple[int, str]] = set()
    while True:
        found = [pid for pid in _pids() if (pid, start_of(pid)) not in killed and left_behind(pid)]
        for pid in found:
            killed.add((pid, start_of(pid)))
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


def _mark_of(pid: int) -> int:
    """Return the mark of a process, 0 when it has none. Everybody may read the limits of everybody."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "limits").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Max file locks"):
                hard = line.split()[-2]
                return int(hard) if hard.isdecimal() and _sign_of(int(hard)) == _SIGN else 0
    return 0


def _sign_of(mark: int) -> int:
    return mark >> (_PID_BITS + _START_BITS + _COUNT_BITS)


def _host_is_dead(mark: int) -> bool:
    if not mark:
        return False
    host, start = _bits(mark >> (_START_BITS + _COUNT_BITS), _PID_BITS), _bits(mark >> _COUNT_BITS, _START_BITS)
    living = start_of(host)
    return not living or _bits(int(living), _START_BITS) != start


def _bits(number: int, count: int) -> int:
    """Return the lowest bits of a number."""
    return number & ((1 << count) - 1)


def _may_be_ours(pid: int) -> bool:
    """Whether a process has no new privileges, and lives in the namespace where its mark's numbers mean what they say.

    Below us there may be containers with hosts of their own: to us their marks would all seem to be of dead ones.
    """
    with suppress(OSError):
        lines = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        numbers = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
        return len(numbers) == 1 and "NoNewPrivs:\t1" in lines
    return False


def start_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; empty when it is gone or a zombie."""
    fields = _stat(pid)
    return fields[_STAT_START] if fields and fields[_STAT_STATE] not in "ZX" else ""


def _stat(pid: int) -> list[str]:
    with suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []
