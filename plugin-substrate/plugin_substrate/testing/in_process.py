"""Calls a plugin in the test's own process, through the encoding, the errors and the log lines of a real worker."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from plugin_substrate.config_check import effective_config
from plugin_substrate.errors import PluginCancelledError, PluginLoadError, as_plugin_error
from plugin_substrate.interface import DATA_DIR_VARIABLE, ActiveCall, CallContext, PluginInterface
from plugin_substrate.metadata import CallResult
from plugin_substrate.worker.failures import describe_error, restore_error
from plugin_substrate.worker.frames import FrameDecoder, encode_frame
from plugin_substrate.worker.logs import LOG_FORMAT, LogStream
from plugin_substrate.worker.values import pack_value, unpack_value

PluginT = TypeVar("PluginT", bound=PluginInterface)


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
    return session.result(value, time.monotonic() - started)


def stream_in_process(
    plugin: PluginInterface,
    *args: Any,
    take: int | None = None,
    call: CallContext | None = None,
    data_dir: Path | None = None,
    on_chunk: Callable[[Any], object] | None = None,
    on_progress: Callable[[float, str], object] | None = None,
    on_log: Callable[[str], object] | None = None,
    cancel_when: Callable[[float, str], bool] | None = None,
    **kwargs: Any,
) -> InProcessResult:
    """Call ``plugin.execute_stream`` as a host would; the result's value is the list of chunks.

    With ``take`` the stream is ended after so many chunks, as by a reader that wants no more: the plugin's generator is
    closed. A cancelled stream ends before its next chunk. ``on_chunk`` hears each chunk, also of a stream that fails;
    all else is as in `run_in_process`.
    """
    session = _Session(plugin, call, on_progress=on_progress, on_log=on_log, cancel_when=cancel_when)
    started = time.monotonic()
    chunks: list[Any] = []
    with session.entered(data_dir):
        arguments = through_a_frame({"args": list(args), "kwargs": kwargs}, "")
        stream = iter(plugin.execute_stream(*arguments["args"], **arguments["kwargs"]))
        try:
            for chunk in itertools.islice(stream, take):
                session.check_cancel()
                chunks.append(through_a_frame(chunk, f"chunk[{len(chunks)}]"))
                if on_chunk is not None:
                    on_chunk(chunks[-1])
        finally:
            getattr(stream, "close", lambda: None)()
    return session.result(chunks, time.monotonic() - started)


def load_in_process(
    plugin_class: type[PluginT], config: Mapping[str, Any] | None = None, *, data_dir: Path | None = None
) -> PluginT:
    """Create and initialise a plugin as loading it does, and return it.

    ``config`` is completed with the defaults of the class's schema and checked against it: a `PluginConfigError` names
    all that is wrong with it. What fails in the plugin is a `PluginLoadError` with its phase.
    """
    phase = "create"
    with _data_dir(data_dir):
        try:
            plugin = plugin_class()
            phase = "schema"
            schema = plugin.get_config_schema()
        except Exception as error:
            raise _load_error(plugin_class, phase, error) from error
        whole = effective_config(plugin_class.__name__, schema, config or {})
        try:
            plugin.initialize(through_a_frame(whole, "config"))
        except Exception as error:
            raise _load_error(plugin_class, "initialize", error) from error
    return plugin


def _load_error(plugin_class: type, phase: str, error: Exception) -> PluginLoadError:
    typed = restore_error(describe_error(error))
    name = plugin_class.__name__
    return PluginLoadError(f"plugin {name!r} failed in phase {phase!r}: {typed}", plugin_name=name, phase=phase)


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
        self._usage: dict[str, float] = {}
        self._logs: list[str] = []
        self._progress: list[tuple[float, str]] = []
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

    def check_cancel(self) -> None:
        """Raise when the call is cancelled, whether or not the plugin looks."""
        if self._call.cancelled:
            raise PluginCancelledError

    def result(self, value: Any, seconds: float) -> InProcessResult:
        """Return the value with all that was reported on the way to it."""
        return InProcessResult(
            value=value,
            usage=self._usage,
            logs=tuple(self._logs),
            duration_seconds=seconds,
            progress=tuple(self._progress),
        )

    def _report(self, progress: float, message: str) -> None:
        self._progress.append((progress, message))
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
        self._usage = usage

    def _log(self, line: str) -> None:
        self._logs.append(line)
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
