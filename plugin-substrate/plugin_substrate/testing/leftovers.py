"""Finds the processes that plugins left behind."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from plugin_substrate.worker.text import clean_line

_PROC = Path("/proc")
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ProcessMark:
    """One process for as long as the machine runs: a number alone may pass to another."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a dead one that nobody has reaped does not."""
        stat = _stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"

    def kill(self) -> None:
        """Kill it, and not another process that has its number meanwhile."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)

    def __str__(self) -> str:
        try:
            command = (_PROC / str(self.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            command = ""
        return clean_line(f"process {self.pid} ({command.strip() or 'no command line'})", _SHOWN_CHARACTERS)


def descendants(pid: int) -> set[ProcessMark]:
    """Return the processes below ``pid`` as they stand, without itself; nothing where the system has no ``/proc``."""
    children: dict[int, list[_Stat]] = {}
    for entry in _PROC.glob("[0-9]*"):
        stat = _stat(int(entry.name))
        if stat is not None:
            children.setdefault(stat.parent, []).append(stat)
    found: set[ProcessMark] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(ProcessMark(stat.pid, stat.started) for stat in below)
        waiting += [stat.pid for stat in below]
    return found


@dataclass(frozen=True)
class _Stat:
    pid: int
    parent: int
    state: str
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent, *rest = text.rpartition(")")[2].split()
    return _Stat(pid, int(parent), state, int(rest[17]))
