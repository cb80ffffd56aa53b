"""Calls a plugin in the test's own process, through the encoding, the errors and the log lines of a real worker."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.errors import as_plugin_error
from plugin_substrate.interface import DATA_DIR_VARIABLE, ActiveCall, CallContext, PluginInterface
from plugin_substrate.metadata import CallResult
from plugin_substrate.worker.failures import describe_error, restore_error
from plugin_substrate.worker.frames import FrameDecoder, encode_frame
from plugin_substrate.worker.logs import LOG_FORMAT, LogStream
from plugin_substrate.worker.values import pack_value, unpack_value


@dataclass(frozen=True, kw_only=True)
class InProcessResult(CallResult):
    """A `CallResult` and every progress report, in order."""

    progress: tuple[tuple[float, str], ...] = ()


def run_in_process(
    plugin: PluginInterface,
    *args: Any,
    call: CallContext | None = None,
    data_dir: Path | None = None,
    on_progress: Callable[[float, str], object] | None = None,
    on_log: Callable[[str], object] | None = None,
    cancel_when: Callable[[float, str], bool] | None = None,
    **kwargs: Any,
) -> InProcessResult:
    """Call ``plugin.execute`` as a host would: arguments, result and errors go through real frames, both ways.

    What a host would raise is raised: a bare ValueError of the plugin arrives as `PluginInputError`, a value without an
    encoding as `WireValueError`. With ``data_dir`` the plugin sees it as its own folder during the call. The first
    progress report that ``cancel_when`` is true for cancels the call, before the plugin goes on. What the plugin prints
    and logs are the result's log lines; ``on_log`` hears them also when the call fails.
    """
    session = _Session(plugin, call, on_progress=on_progress, on_log=on_log, cancel_when=cancel_when)
    started = time.monotonic()
    with session.entered(data_dir):
        arguments = through_a_frame({"args": list(args), "kwargs": kwargs}, "")
        value = through_a_frame(plugin.execute(*arguments["args"], **arguments["kwargs"]), "result")
    return InProcessResult(
        value=value,
        usage=session.usage,
        logs=tuple(session.logs),
        duration_seconds=time.monotonic() - started,
        progress=tuple(session.progress),
    )


def through_a_frame(value: Any, path: str) -> Any:
    """Return ``value`` as the other side of a real frame sees it; a `WireValueError` names what cannot cross."""
    (frame,) = FrameDecoder().feed(b"".join(encode_frame({}, pack_value(value, path))))
    return unpack_value(frame.segments)


class _Session:
    """What a worker keeps about a running call, and the surroundings it gives to it."""

    def __init__(
        self,
        plugin: PluginInterface,
        call: CallContext | None,
        *,
        on_progress: Callable[[float, str], object] | None,
        on_log: Callable[[str], object] | None,
        cancel_when: Callable[[float, str], bool] | None,
    ) -> None:
        self.usage: dict[str, float] = {}
        self.logs: list[str] = []
        self.progress: list[tuple[float, str]] = []
        self._plugin = plugin
        self._on_progress = on_progress
        self._on_log = on_log
        self._cancel_when = cancel_when
        self._call = ActiveCall(
            call or CallContext(call_id="in-process"), on_progress=self._report, on_usage=self._replace_usage
        )

    @contextlib.contextmanager
    def entered(self, data_dir: Path | None) -> Iterator[None]:
        """Be inside the call; what plugin code raises leaves as the error that a host would see."""
        with _data_dir(data_dir), _captured(self._log, self._call.context.call_id):
            try:
                with self._call.entered():
                    yield
            except Exception as error:
                raise restore_error(describe_error(as_plugin_error(error))) from error

    def _report(self, progress: float, message: str) -> None:
        self.progress.append((progress, message))
        if self._on_progress is not None:
            self._on_progress(progress, message)
        if self._cancel_when is not None and not self._call.cancelled and self._cancel_when(progress, message):
            canceller = threading.Thread(target=self._cancel, name="cancel")
            canceller.start()
            canceller.join()

    def _cancel(self) -> None:
        """As in a worker: the flag first, then the plugin's own ``cancel``, in a thread that is inside the call."""
        self._call.request_cancel()
        with self._call.entered():
            self._plugin.cancel()

    def _replace_usage(self, usage: dict[str, float]) -> None:
        self.usage = usage

    def _log(self, line: str) -> None:
        self.logs.append(line)
        if self._on_log is not None:
            self._on_log(line)


@contextlib.contextmanager
def _captured(emit: Callable[[str], object], call_id: str) -> Iterator[None]:
    """Turn what is printed and logged into lines, as `plugin_substrate.worker.logs` does in a worker."""
    output, errors = (LogStream(lambda _, line: emit(line), descriptor) for descriptor in (1, 2))
    handler = logging.StreamHandler(_text(errors))
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(_text(output)), contextlib.redirect_stderr(_text(errors)):
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        for stream in (output, errors):
            stream.end_call(call_id)


def _text(stream: LogStream) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[arg-type]


@contextlib.contextmanager
def _data_dir(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    before = os.environ.get(DATA_DIR_VARIABLE)
    os.environ[DATA_DIR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[DATA_DIR_VARIABLE]
        else:
            os.environ[DATA_DIR_VARIABLE] = before
