"""The host-side handle of one worker: frames out, frames in, and a typed error for every way it can end."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from plugin_substrate.deaths import death_of, forced_end_of
from plugin_substrate.errors import (
    PluginConfinementError,
    PluginLoadError,
    ProtocolError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.headers import hello_of, line_of, progress_of, spent_of, text_of, usage_of
from plugin_substrate.interface import CallContext
from plugin_substrate.lifecycle import WorkerProcess
from plugin_substrate.log_pipe import LOG_TAIL_LINES, LogPipe
from plugin_substrate.pending_call import PendingCall
from plugin_substrate.worker.failures import restore_error
from plugin_substrate.worker.frames import Frame, FrameDecoder, encode_frame
from plugin_substrate.worker.isolation import missing_layers
from plugin_substrate.worker.values import pack_value, unpack_value

_EXIT_REPORT_SECONDS = 2.0
_LAST_WORDS_SECONDS = 0.5
_QUICK_BYTES = 64 << 10
_TURN_SECONDS = 0.001


class RemotePluginProxy(asyncio.BufferedProtocol):
    """One worker's connection. Created by `connect`; of no use after `alive` turned false."""

    def __init__(self, process: WorkerProcess, on_line: Callable[[str, str], object], *, shared: bool = False) -> None:
        self._process = process
        self._on_line = on_line
        self._shared = shared
        self._decoder = FrameDecoder()
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._log = LogPipe(process.log_descriptor, self._on_pipe_line)
        self._calls: dict[str, PendingCall] = {}
        self._asks: dict[str, PendingCall] = {}
        self._transport: asyncio.Transport | None = None
        self._reading: set[asyncio.Task[None]] = set()
        self._broken: ProtocolError | None = None
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[WorkerDiedError] = self._loop.create_future()
        self.layers: tuple[str, ...] = ()
        self.python_version = ""

    @classmethod
    async def connect(
        cls,
        process: WorkerProcess,
        on_line: Callable[[str, str], object] = lambda *_: None,
        *,
        shared: bool = False,
    ) -> RemotePluginProxy:
        """Take over a forked worker. ``on_line`` hears each line it writes, with the id of its call or none.

        Where tenants share the worker, the error of a call that it took along quotes no line but the call's own.
        """
        proxy = cls(process, on_line, shared=shared)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: proxy, sock=process.connection)
        except BaseException:
            process.kill()
            process.close()
            proxy._log.close()
            raise
        return proxy

    @property
    def pid(self) -> int:
        """The worker's process id, for display only."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether a frame can still reach the plugin, as far as anyone can know."""
        connected = self._transport is not None and not self._transport.is_closing()
        return connected and not self._process.ended

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of the worker, of all calls and of none."""
        return tuple(self._lines)

    @property
    def calls(self) -> Mapping[str, PendingCall]:
        """The calls in the worker, by call id."""
        return self._calls

    # -- what the host asks

    async def load(self, module: str, class_name: str, config: Mapping[str, Any], threads: int) -> None:
        """Have the plugin imported, created and initialised, or raise `PluginLoadError` or `WorkerDiedError`."""
        segments = pack_value(dict(config), "config")
        self._send({"type": "load", "module": module, "class": class_name, "threads": threads}, segments)
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

    def encode_call(self, context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes]:
        """Return a call's frame, ready to send; a value that cannot cross is a `WireValueError` before anything is."""
        segments = pack_value({"args": list(args), "kwargs": kwargs}, "")
        try:
            return encode_frame({"type": "call", "context": asdict(context)}, segments)
        except ProtocolError as error:
            raise WireValueError(f"the arguments are too large: {error}", path="args") from error

    def send_call(self, call: PendingCall, frame: list[bytes]) -> None:
        """Write a call's frame. From here on nobody but the worker can say whether it took effect."""
        self._calls[call.context.call_id] = call
        self._write(frame)

    async def ask(
        self,
        verb: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_progress: Callable[[float, str], object] | None = None,
    ) -> Any:
        """Ask something of the plugin that is no call, see `worker.verbs`, and return its answer."""
        question = PendingCall(CallContext(call_id=f"{verb}-{uuid.uuid4().hex}"), on_progress=on_progress)
        segments = pack_value(dict(arguments or {}), verb)
        if not self.alive:
            raise WorkerDiedError(f"the worker ended before {verb} was sent", outcome_known=True)
        self._asks[question.context.call_id] = question
        self._send({"type": "ask", "id": question.context.call_id, "verb": verb}, segments)
        return await question.value

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
        self._process.kill()
        await asyncio.wait({self._gone})

    def when_gone(self, callback: Callable[[], object]) -> None:
        """Call back once the worker is dead and everyone who waited for it has been told."""
        self._gone.add_done_callback(lambda _: callback())

    # -- what the worker says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and an eye on the process: a descendant of it may hold its end of the socket open."""
        # Not checked by isinstance: other event loops (uvloop) bring transports that do not derive from asyncio's.
        connected = self._transport = cast("asyncio.Transport", transport)
        self._process.when_ended(lambda: self._loop.call_later(_LAST_WORDS_SECONDS, connected.abort))

    def get_buffer(self, _: int) -> memoryview:
        """Return where to put what arrives."""
        return self._decoder.room()

    def buffer_updated(self, count: int) -> None:
        """Handle what arrived; a worker that breaks the protocol is killed."""
        started = self._loop.time()
        try:
            for frame in self._decoder.received(count):
                self._handle(frame)
        except Exception as error:  # noqa: BLE001 - whatever a frame can cause must end its sender, never the host
            self._break_off(error)
        if self._loop.time() - started > _TURN_SECONDS:
            self._let_others_run()

    def _let_others_run(self) -> None:
        """Read no more until the event loop has been round: uvloop would read on as long as a flood lasts."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        """Find out how the worker ended, then tell everyone who waits."""
        self._process.kill()  # it may have closed its socket and still run
        self._burial = self._loop.create_task(self._bury())

    def _break_off(self, error: Exception) -> None:
        self._broken = (
            error if isinstance(error, ProtocolError) else ProtocolError(f"a frame cannot be read: {error!r}")
        )
        self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    async def _bury(self) -> None:
        if self._reading:
            await asyncio.wait(self._reading)
        await asyncio.wait({self._process.returncode}, timeout=_EXIT_REPORT_SECONDS)
        self._process.close()
        self._log.close()
        returncode = self._process.returncode.result() if self._process.returncode.done() else None
        self._gone.set_result(death_of(returncode, self._broken, self._lines))
        waiting = [*self._calls.values(), *self._asks.values()]
        self._calls, self._asks = {}, {}
        for call in waiting:
            lines = call.logs if self._shared else self._lines
            death = death_of(returncode, self._broken, lines)  # each waiter raises an error of its own
            call.fail(forced_end_of(call.context.call_id, death) if call.forced else death)

    def _handle(self, frame: Frame) -> None:
        header = frame.header
        match header.get("type"):
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
            case "progress" | "usage" as kind:
                self._on_report(kind, header)
            case "result" | "error" as kind:
                self._on_end(kind, frame)
            case "unloaded":
                pass  # its end follows
            case unknown:
                raise ProtocolError(f"unknown frame {unknown!r:.80}")

    def _on_hello(self, header: dict[str, Any]) -> None:
        if self.python_version:
            raise ProtocolError("a second hello")
        self.layers, self.python_version = hello_of(header)
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
            error.outcome_known = not (isinstance(error, WireValueError) and error.path.startswith("result"))
            self._end(call).fail(error)
        elif frame.segments and len(frame.segments[0]) > _QUICK_BYTES:
            task = self._loop.create_task(self._read_apart(call, frame))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
        else:
            value = unpack_value(frame.segments)
            self._end(call).finish(value)

    async def _read_apart(self, call: PendingCall, frame: Frame) -> None:
        """Read a large result in another thread, where it does not hold up the event loop."""
        try:
            value = await asyncio.to_thread(unpack_value, frame.segments)
        except Exception as error:  # noqa: BLE001 - as in `buffer_updated`
            self._break_off(error)
        else:
            self._end(call).finish(value)

    def _end(self, call: PendingCall) -> PendingCall:
        self._calls.pop(call.context.call_id, None)
        self._asks.pop(call.context.call_id, None)
        return call

    def _send(self, header: dict[str, Any], segments: list[bytes] | None = None) -> None:
        self._write(encode_frame(header, segments or []))

    def _write(self, frame: list[bytes]) -> None:
        if self._transport is not None:
            for piece in frame:
                self._transport.write(memoryview(piece))  # of which asyncio copies less than of bytes


def _set(future: asyncio.Future[None], outcome: Exception | None) -> None:
    if future.done():
        raise ProtocolError("a second answer to the load request")
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
        future.exception()
