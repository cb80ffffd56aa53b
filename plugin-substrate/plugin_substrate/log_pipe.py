"""The host's end of a log pipe: what a process writes to descriptors 1 and 2 arrives as lines, even its last words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from plugin_substrate.worker.text import MAX_LINE_CHARACTERS, clean_line

LOG_TAIL_LINES = 200

_CAPACITY = 1 << 16
_READ_BYTES = 1 << 12  # lines are dear: a flood of empty ones must not hold up the loop


class LogPipe:
    """Reads a descriptor on the running event loop and owns it from the start. Memory is bounded by one line."""

    def __init__(self, descriptor: int, emit: Callable[[str], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor = descriptor
        self._emit = emit
        self._partial = b""
        try:
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, self._read)
        except BaseException:
            os.close(descriptor)
            raise

    def drain(self) -> None:
        """Read what is there now, up to one pipe's capacity: a writer that goes on cannot hold us here."""
        for _ in range(_CAPACITY // _READ_BYTES):
            if self._descriptor < 0 or not self._read():
                return

    def close(self) -> None:
        """Emit what is left and give up the descriptor."""
        if self._descriptor < 0:
            return
        self.drain()
        self._stop()

    def _read(self) -> bool:
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._stop()
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE_CHARACTERS:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._emit(clean_line(line.decode(errors="replace")))
        return True

    def _stop(self) -> None:
        if self._descriptor < 0:
            return
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._partial:
            self._emit(clean_line(self._partial.decode(errors="replace")))
            self._partial = b""
