"""What plugin code prints becomes log lines tied to the call that printed them."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from plugin_substrate.interface import current_call

if TYPE_CHECKING:
    from types import ModuleType

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
    """Have what is logged through `logging` become log lines too: at once, or when somebody imports it.

    To import it takes as long as all that confines a worker, and there are plugins that never log.
    """
    if "logging" in sys.modules:
        _configure(sys.modules["logging"])
    elif not any(isinstance(finder, _LoggingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LoggingFinder())


def _configure(logging: ModuleType) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)


class _LoggingFinder:
    """Finds `logging` where it is, and has it configured as soon as it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders return for it; nothing for any other module."""
        if fullname != "logging":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoggingLoader(spec.loader)  # type: ignore[assignment] # it is one without saying so
        return spec


class _LoggingLoader:
    """Loads it as its own loader does, and then gives that one its place back."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to its own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it to its own loader, and configure what it has made."""
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _configure(module)
