"""Finds the processes that plugins left behind."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from plugin_substrate.worker.text import clean_line

_PROC = Path("/proc")
_SHOWN_CHARACTERS = 200
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class ProcessMark:
    """One process for as long as the machine runs: a number alone may pass to another."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether any thread of it still runs; a dead process that nobody has reaped is not alive."""
        with self._descriptor() as descriptor:
            if descriptor is None:
                return False
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return not poll.poll(0)

    def kill(self) -> None:
        """Kill it, and not another process that has its number meanwhile."""
        with self._descriptor() as descriptor, suppress(ProcessLookupError):
            if descriptor is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    @contextmanager
    def _descriptor(self) -> Iterator[int | None]:
        """Give a pidfd of the process, None when there is no such process any more."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            stat = _stat(self.pid)
            yield descriptor if stat is not None and stat.started == self.started else None
        finally:
            os.close(descriptor)

    def wait(self, seconds: float) -> bool:
        """Wait until it is dead, and say whether it is."""
        deadline = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

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


def seen_from_here(inner: int, below: int) -> int:
    """Return the number here of the process below ``below`` that calls itself ``inner`` in its own namespace."""
    for process in descendants(below):
        status = (_PROC / str(process.pid) / "status").read_text(encoding="utf-8", errors="replace")
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
        if int(numbers[-1]) == inner:
            return process.pid
    raise ProcessLookupError(f"nothing below {below} calls itself {inner}")


@dataclass(frozen=True)
class _Stat:
    pid: int
    parent: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    _, parent, *rest = text.rpartition(")")[2].split()
    return _Stat(pid, int(parent), int(rest[17]))
