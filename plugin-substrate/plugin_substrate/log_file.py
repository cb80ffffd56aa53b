"""The log file of one instance: every start, and every line of its workers with its time and its call.

A plugin's text never stands at the start of a line and never holds a line's end, so it cannot forge a header, a time
or the line of another call. Size is bounded: a full file becomes ``<name>.log.1``, and the one before it goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

from plugin_substrate.worker.text import clean_line

MAX_LOG_BYTES = 4 << 20
NO_LOGS = "No logs found."

_MAX_CALL_ID = 100
_TAIL_BYTES = 1 << 20

_logger = logging.getLogger(__name__)


class LogFile:
    """Writes one log file from one event loop; each line is in the file before the loop goes on to other work.

    A file that cannot be written costs its lines, never a call; the host's own log says so once.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._descriptor = -1
        self._size = 0
        self._pending: list[str] = []
        self._failed = False

    def start(self, plugin_name: str, plugin_version: str) -> None:
        """Write the header of a new worker."""
        self._append(f"\n--- Starting {plugin_name} {plugin_version} at {_now()} ---\n")

    def line(self, call_id: str, line: str) -> None:
        """Write what a worker said, in a call or in none."""
        call = clean_line(call_id, _MAX_CALL_ID).replace(" ", "_") or "-"
        self._append(f"{_now()} {call} | {clean_line(line)}\n")

    def close(self) -> None:
        """Write what is left and give up the file; a later line opens it again."""
        self._flush()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, text: str) -> None:
        if not self._pending:  # one write for all lines that arrive in one turn of the loop
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(text)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        data = "".join(pending).encode(errors="backslashreplace")
        try:
            if self._descriptor < 0:
                self._open()
            if self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            self._size += os.write(self._descriptor, _last_whole_lines(data, self._max_bytes))
        except OSError as error:
            if not self._failed:
                self._failed = True
                _logger.warning("the log %s cannot be written, its lines are lost: %s", self._path, error)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)
        os.fchmod(self._descriptor, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        self._path.replace(_backup(self._path))
        self._open()


def _last_whole_lines(data: bytes, limit: int) -> bytes:
    """Return what fits of the end: a line that is cut would begin with what a plugin wrote."""
    return data if len(data) <= limit else data[data.index(b"\n", len(data) - limit) + 1 :]


def read_tail(path: Path, lines: int) -> str:
    """Return the last lines of a log, of its predecessor too when it is short; `NO_LOGS` when there is none."""
    if lines < 1:
        raise ValueError(f"lines must be at least 1, not {lines}")
    tail: deque[str] = deque(maxlen=lines)
    for file in (_backup(path), path):
        tail.extend(_last_lines(file))
    return "\n".join(tail) if tail else NO_LOGS


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = text.split("\n")[:-1]
    return lines[1:] if start else lines


def _backup(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
