"""The host-side handle of one worker: frames out, frames in, and a typed error for every way it can end."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plugin_substrate.connection import WorkerConnection
from plugin_substrate.deaths import WorkerExit, death_of, forced_end_of
from plugin_substrate.errors import (
    PluginConfinementError,
    PluginError,
    PluginLoadError,
    PluginTransientError,
    ProtocolError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.headers import counts_of, hello_of, line_of, progress_of, spent_of, text_of, usage_of
from plugin_substrate.interface import CallContext
from plugin_substrate.kernel_kills import oom_kills
from plugin_substrate.lifecycle import WorkerProcess
from plugin_substrate.log_pipe import LOG_TAIL_LINES, LogPipe
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.pending_stream import PendingStream
from plugin_substrate.worker.failures import restore_error
from plugin_substrate.worker.frames import Frame
from plugin_substrate.worker.isolation import missing_layers
from plugin_substrate.worker.messages import Message, encode_message
from plugin_substrate.worker.parked import Segment
from plugin_substrate.worker.values import pack_value, unpack_value

#: So many questions may wait for a plugin's answer.
MAX_QUESTIONS = 100

_EXIT_REPORT_SECONDS = 10.0  # hundreds of processes of a fork bomb die before the report that they did
_LAST_WORDS_SECONDS = 0.5
_QUICK_JSON_BYTES = 64 << 10
_QUICK_BYTES = 4 << 20  # of which nearly all is taken as it is, or copied once


class RemotePluginProxy:
    """One worker, taken over just forked; of no use after `alive` turned false.

    ``on_line`` hears each line it writes, with the id of its call or none. Where tenants share the worker, the error
    of a call that it took along quotes no line but the call's own. Belongs to the running event loop; only
    `send_call` may be used from other threads.
    """

    def __init__(
        self,
        process: WorkerProcess,
        on_line: Callable[[str, str], object] = lambda *_: None,
        *,
        shared: bool = False,
        layers: tuple[str, ...] = (),
    ) -> None:
        """``layers`` are those of the template that it is a copy of: what a copy says, foreign code may have said."""
        self._process = process
        self._on_line = on_line
        self._shared = shared
        self._oom_kills = oom_kills()
        self._killed_here = False
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._log = LogPipe(process.log_descriptor, self._on_pipe_line)
        self._calls: dict[str, PendingCall] = {}
        self._asks: dict[str, PendingCall] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._broken: ProtocolError | None = None
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[PluginError] = self._loop.create_future()
        self._on_loading: Callable[[float, str], object] = lambda *_: None
        self.phase = "load"  #: where its load is, as far as it has said
        self.layers = layers
        self.python_version = ""
        self._connection = WorkerConnection(
            process.connection, on_frame=self._handle, on_error=self._break_off, on_end=self._on_end_of_connection
        )
        # A descendant of it may hold its end of the socket open: keep an eye on the process too.
        self._last_words: asyncio.TimerHandle | None = None
        process.when_ended(self._hear_last_words)

    @property
    def pid(self) -> int:
        """The worker's process id, for display only."""
        return self._process.pid

    @property
    def process(self) -> WorkerProcess:
        """The process, for its supervisor to copy."""
        return self._process

    @property
    def alive(self) -> bool:
        """Whether a frame can still reach the plugin, as far as anyone can know."""
        return not self._connection.closed and not self._process.ended

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of the worker, of all calls and of none."""
        return tuple(self._lines)

    @property
    def calls(self) -> Mapping[str, PendingCall]:
        """The calls in the worker, by call id."""
        return self._calls

    # -- what the host asks

    async def load(
        self,
        module: str,
        class_name: str,
        config: Mapping[str, Any],
        threads: int,
        *,
        on_progress: Callable[[float, str], object] = lambda *_: None,
    ) -> None:
        """Have the plugin imported, created and initialised, or raise `PluginLoadError` or `WorkerDiedError`.

        ``on_progress`` hears what the plugin reports meanwhile, each report that differs from the one before.
        """
        request = {"type": "load", "module": module, "class": class_name, "threads": threads}
        await self._until_ready(request, pack_value(dict(config), "config"), on_progress)

    async def preload(self, module: str, *, on_progress: Callable[[float, str], object] = lambda *_: None) -> None:
        """Have a template import a module; raises and reports as `load` does."""
        await self._until_ready({"type": "preload", "module": module}, [], on_progress)

    async def _until_ready(
        self, request: dict[str, Any], segments: list[bytes], on_progress: Callable[[float, str], object]
    ) -> None:
        self._on_loading = _when_changed(on_progress)
        self._send(request, segments)
        ends: set[asyncio.Future[Any]] = {self._ready, self._gone}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._ready.done():
            self._ready.result()
            return
        raise self._gone.result()

    async def require(self, layers: Sequence[str]) -> None:
        """Wait until the worker has said what confines it; a `PluginConfinementError` when a layer is missing."""
        if not layers:
            return
        ends: set[asyncio.Future[Any]] = {self._greeted, self._gone}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._greeted.done():
            raise self._gone.result()
        missing = missing_layers(layers, self.layers)
        if missing:
            raise PluginConfinementError(
                f"required but not in force here: {', '.join(missing)}; in force: {', '.join(self.layers)}; "
                "cjm-ctl doctor tells why",
                missing_layers=missing,
                layers=self.layers,
            )

    def send_call(self, call: PendingCall, message: Message) -> None:
        """Write a call's message. From here on nobody but the worker can say whether it took effect."""
        call_id = call.context.call_id
        if isinstance(call, PendingStream):
            call.opened(
                grant=lambda amount: self._send({"type": "credit", "id": call_id, "bytes": amount}),
                refuse=self._break_off,
            )
        alone = not self._calls
        self._calls[call_id] = call
        self._connection.write(message, alone=alone)

    async def ask(
        self,
        verb: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_progress: Callable[[float, str], object] | None = None,
    ) -> Any:
        """Ask something of the plugin that is no call, see `worker.verbs`, and return its answer.

        Who stops waiting leaves the question with the plugin. One that has left too many unanswered is asked no more: a
        `PluginTransientError`.
        """
        question = PendingCall(CallContext(call_id=f"{verb}-{uuid.uuid4().hex}"), on_progress=on_progress)
        segments = pack_value(dict(arguments or {}), verb)
        if not self.alive:
            raise WorkerDiedError(f"the worker ended before {verb} was sent", outcome_known=True)
        if len(self._asks) >= MAX_QUESTIONS:
            raise PluginTransientError(
                f"{verb} was not asked: {len(self._asks)} questions before it are unanswered; reload_plugin() ends that"
            )
        self._asks[question.context.call_id] = question
        self._send({"type": "ask", "id": question.context.call_id, "verb": verb}, segments)
        return await question.outcome()

    def request_cancel(self, call_id: str) -> None:
        """Ask the plugin to end one call."""
        self._send({"type": "cancel", "id": call_id})

    async def unload(self, grace_seconds: float) -> None:
        """Let the plugin clean up and leave; kill it when it has not within the grace. Returns when it is dead."""
        if self.alive:
            self._send({"type": "unload"})
            await asyncio.wait({self._gone}, timeout=grace_seconds)
        await self.kill()

    async def kill(self) -> None:
        """Kill the worker and wait until it is dead; calls in it fail as `WorkerDiedError`."""
        self._killed_here = True
        self._process.kill()
        await asyncio.wait({self._gone})

    def when_gone(self, callback: Callable[[], object]) -> None:
        """Call back once the worker is dead and everyone who waited for it has been told."""
        self._gone.add_done_callback(lambda _: callback())

    # -- what the worker says

    def _hear_last_words(self) -> None:
        if not self._connection.closed:
            self._last_words = self._loop.call_later(_LAST_WORDS_SECONDS, self._connection.close)

    def _on_end_of_connection(self) -> None:
        """Find out how the worker ended, then tell everyone who waits."""
        if self._last_words is not None:
            self._last_words.cancel()
        self._process.kill()  # it may have closed its socket and still run
        self._burial = self._loop.create_task(self._bury())

    def _break_off(self, error: Exception) -> None:
        self._broken = (
            error if isinstance(error, ProtocolError) else ProtocolError(f"a frame cannot be read: {error!r}")
        )
        self._process.kill()
        self._connection.close()

    async def _bury(self) -> None:
        if self._reading:
            await asyncio.wait(self._reading)
        await asyncio.wait({self._process.exit}, timeout=_EXIT_REPORT_SECONDS)
        self._process.close()
        self._log.close()
        ended = self._process.exit.result() if self._process.exit.done() else WorkerExit(None)
        ended = replace(ended, by_kernel=not self._killed_here and oom_kills() > self._oom_kills)
        self._gone.set_result(death_of(ended, self._broken, self._lines))
        waiting = [*self._calls.values(), *self._asks.values()]
        self._calls, self._asks = {}, {}
        for call in waiting:
            lines = call.logs if self._shared else self._lines
            death = death_of(ended, self._broken, lines)  # each waiter raises an error of its own
            call.fail(forced_end_of(call.context.call_id, death) if call.forced else death)

    def _handle(self, frame: Frame) -> None:
        header = frame.header
        match header.get("type"):
            case "result" | "error" as kind:
                self._on_end(kind, frame)
            case "hello":
                self._on_hello(header)
            case "ready" | "load_failed" if not self.python_version:
                raise ProtocolError("an answer before the hello")
            case "ready":
                _set(self._ready, None)
            case "load_failed":
                self._on_load_failed(header)
            case "log":
                self._on_log(header)
            case "phase":
                self.phase = line_of(header, "phase")
            case "loading":
                self._on_loading(progress_of(header), line_of(header, "message"))
            case "chunks":
                self._on_chunks(frame)
            case "progress" | "usage" as kind:
                self._on_report(kind, header)
            case "unloaded":
                pass  # its end follows
            case unknown:
                raise ProtocolError(f"unknown frame {unknown!r:.80}")

    def _on_hello(self, header: dict[str, Any]) -> None:
        if self.python_version:
            raise ProtocolError("a second hello")
        layers, self.python_version = hello_of(header)
        self.layers = self.layers or layers
        self._greeted.set_result(None)

    def _on_load_failed(self, header: dict[str, Any]) -> None:
        cause = restore_error(header.get("error"))
        error = PluginLoadError(str(cause), phase=line_of(header, "phase"), log_tail=tuple(self._lines)[-20:])
        error.__cause__ = cause
        _set(self._ready, error)

    def _on_log(self, header: dict[str, Any]) -> None:
        line = line_of(header, "line")
        call = self._find(header)
        self._keep(call, line)

    def _on_pipe_line(self, line: str) -> None:
        """A line without a call belongs to the only call there is, or to none."""
        self._keep(next(iter(self._calls.values())) if len(self._calls) == 1 else None, line)

    def _keep(self, call: PendingCall | None, line: str) -> None:
        self._lines.append(line)
        self._on_line(call.context.call_id if call else "", line)
        if call is not None:
            call.log(line)

    def _find(self, header: dict[str, Any]) -> PendingCall | None:
        call_id = text_of(header, "id")
        return self._calls.get(call_id) or self._asks.get(call_id)

    def _on_report(self, kind: str, header: dict[str, Any]) -> None:
        call = self._find(header)
        if call is None:
            return  # a thread that outlived its call
        if kind == "progress":
            call.progress(progress_of(header), line_of(header, "message"))
        else:
            call.replace_usage(usage_of(header))

    def _on_end(self, kind: str, frame: Frame) -> None:
        call = self._find(frame.header)
        if call is None or call.answered:
            raise ProtocolError("an answer to a call that is not running")
        call.answered = True
        call.spent = spent_of(frame.header)
        if kind == "error":
            error = restore_error(frame.header.get("error"))
            # The work was done and only its result is lost: the caller must not take it for undone.
            lost = isinstance(error, WireValueError) and error.path.startswith(("result", "chunk"))
            error.outcome_known = not lost
            self._end(call).fail(error)
        elif _takes_long(frame.segments):
            task = self._loop.create_task(self._read_apart(call, frame))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
        else:
            try:
                value = unpack_value(frame.segments, "result")
            except WireValueError as error:
                error.outcome_known = False
                self._end(call).fail(error)
            else:
                self._end(call).finish(value)

    def _on_chunks(self, frame: Frame) -> None:
        call = self._calls.get(text_of(frame.header, "id"))
        if not isinstance(call, PendingStream) or call.answered:
            raise ProtocolError("chunks of a stream that is not running")
        call.receive(counts_of(frame.header, len(frame.segments)), frame.segments)

    async def _read_apart(self, call: PendingCall, frame: Frame) -> None:
        """Read a large result in another thread, where it does not hold up the event loop."""
        try:
            value = await asyncio.to_thread(unpack_value, frame.segments, "result")
        except WireValueError as error:
            error.outcome_known = False
            self._end(call).fail(error)
        except Exception as error:  # noqa: BLE001 - as in `buffer_updated`
            self._break_off(error)
        else:
            self._end(call).finish(value)

    def _end(self, call: PendingCall) -> PendingCall:
        self._calls.pop(call.context.call_id, None)
        self._asks.pop(call.context.call_id, None)
        return call

    def _send(self, header: dict[str, Any], segments: list[bytes] | None = None) -> None:
        self._connection.write(encode_message(header, segments or []))


def _takes_long(segments: Sequence[Segment]) -> bool:
    """Whether reading a value would hold up the event loop."""
    if len(segments) == 1:
        return len(segments[0]) > _QUICK_JSON_BYTES
    return sum(map(len, segments)) > _QUICK_BYTES or sum(map(len, segments[:1])) > _QUICK_JSON_BYTES


def _when_changed(callback: Callable[[float, str], object]) -> Callable[[float, str], None]:
    last: list[tuple[float, str]] = []

    def tell(progress: float, message: str) -> None:
        if last != [(progress, message)]:
            last[:] = [(progress, message)]
            callback(progress, message)

    return tell


def _set(future: asyncio.Future[None], outcome: Exception | None) -> None:
    if future.done():
        raise ProtocolError("a second answer to the load request")
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
        future.exception()
