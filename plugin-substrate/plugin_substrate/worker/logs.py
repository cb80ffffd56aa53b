"""What plugin code prints becomes log lines tied to the call that printed them."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable

from plugin_substrate.interface import current_call

MAX_LINE_BYTES = 8192
#: How what plugin code logs through `logging` reads as a line.
LOG_FORMAT = "[%(levelname)s] %(name)s: %(message)s"

Emit = Callable[[str, str], object]  # call id (empty outside of a call), line


class LogStream(io.RawIOBase):
    """A binary stream whose complete lines go to ``emit``, kept apart by the call of the writing thread.

    Only what goes through Python's streams is tied to a call. What C code writes to descriptor 1 or 2 reaches the host
    through the log pipe, without one.
    """

    def __init__(self, emit: Emit, descriptor: int) -> None:
        self._emit = emit
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._partial: dict[str, bytes] = {}

    def writable(self) -> bool:
        """Say yes: that is all this stream is for."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the log pipe, for subprocesses and C code."""
        return self._descriptor

    def write(self, data: bytes, /) -> int:  # type: ignore[override] # any buffer, as RawIOBase asks
        """Take bytes, emit the complete lines and keep the rest for later."""
        call = current_call.get()
        call_id = call.context.call_id if call else ""
        raw = bytes(data)
        with self._lock:
            *lines, rest = (self._partial.pop(call_id, b"") + raw).split(b"\n")
            while len(rest) > MAX_LINE_BYTES:
                lines.append(rest[:MAX_LINE_BYTES])
                rest = rest[MAX_LINE_BYTES:]
            if rest:
                self._partial[call_id] = rest
        for line in lines:
            self._emit_line(call_id, line)
        return len(raw)

    def emit_to(self, emit: Emit) -> None:
        """Forget open lines and send what is written from now on elsewhere; for a process where nobody else writes."""
        self._lock = threading.Lock()
        self._partial = {}
        self._emit = emit

    def write_directly(self) -> None:
        """Forget calls and write to the descriptor; for a forked process, where a lock may be held for ever."""
        self.emit_to(lambda _, line: os.write(self._descriptor, f"{line}\n".encode(errors="replace")))

    def end_call(self, call_id: str) -> None:
        """Emit the line that a finished call left open."""
        if call_id not in self._partial:
            return
        with self._lock:
            rest = self._partial.pop(call_id, b"")
        if rest:
            self._emit_line(call_id, rest)

    def _emit_line(self, call_id: str, line: bytes) -> None:
        self._emit(call_id, line[:MAX_LINE_BYTES].decode(errors="replace"))


def capture_output(emit: Emit) -> tuple[LogStream, LogStream]:
    """Put log streams in the place of ``sys.stdout`` and ``sys.stderr`` and return them."""
    streams = LogStream(emit, 1), LogStream(emit, 2)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[type-var]
        for stream in streams
    )
    return streams


def log_to_output() -> None:
    """Have what is logged through `logging` become log lines too."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
