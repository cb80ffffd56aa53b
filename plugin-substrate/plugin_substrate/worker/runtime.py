"""The plugin worker: one plugin object, a reader thread that always listens, and threads that execute calls.

Frames from the host: ``load``, ``call``, ``ask``, ``credit``, ``cancel``, ``unload``. To the host: ``hello`` (before
any plugin code is imported), any number of ``phase`` and ``loading`` and then ``ready`` or ``load_failed``, for each
call or question any number of ``log``, ``progress``, ``usage`` and ``chunks`` and then one ``result`` or ``error``, and
``unloaded``.
What plugin code prints never enters this stream.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from plugin_substrate.errors import PluginCancelledError, PluginConfigError, ProtocolError, WireValueError
from plugin_substrate.interface import ActiveCall, CallContext, PluginInterface, current_call
from plugin_substrate.worker import verbs
from plugin_substrate.worker.conversation import Conversation
from plugin_substrate.worker.failures import describe_error
from plugin_substrate.worker.frames import Frame
from plugin_substrate.worker.interpreter import enter_environment
from plugin_substrate.worker.logs import LogStream, capture_output, log_to_output
from plugin_substrate.worker.streams import ChunkStream, StreamSender
from plugin_substrate.worker.usage import CallMeter
from plugin_substrate.worker.values import pack_value, unpack_value

Work = Callable[[PluginInterface, Any], Any]


class WorkerRuntime:
    """Serves one socket until its host closes it or asks to unload."""

    def __init__(
        self, connection: socket.socket, layers: tuple[str, ...], output: tuple[LogStream, ...] | None = None
    ) -> None:
        """``output`` are the streams that take what is printed, where a template has put them in place already."""
        self._conversation = Conversation(connection)
        self._send = self._conversation.send
        self._layers = layers
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[str, ActiveCall] = {}
        self._streams: dict[str, ChunkStream] = {}
        self._stream_sender = StreamSender()
        self._plugin: PluginInterface | None = None
        self._log_streams = output or capture_output(self._conversation.send_log)
        for stream in self._log_streams:
            stream.emit_to(self._conversation.send_log)

    def serve(self) -> NoReturn:
        """Run until the end of the process: the main thread executes, a second one reads."""
        os.register_at_fork(after_in_child=self._leave_conversation)
        self._conversation.greet(self._layers)
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._work()

    def _work(self) -> NoReturn:
        """Execute; whatever ends this thread ends the process, as a call without an answer would never end."""
        try:
            while True:
                self._tasks.get()()
        except BaseException:  # noqa: BLE001 - foreign code may have broken anything
            die()

    def _read(self) -> NoReturn:
        """Hear the host; whatever ends this thread ends the process, as nobody could cancel a call any more."""
        inbox = self._conversation.inbox
        try:
            while count := inbox.receive():
                for frame in inbox.frames(count):
                    self._handle(frame)
        except OSError:
            pass  # the host is gone, just as when the stream ends
        except BaseException:  # noqa: BLE001 - foreign code may have broken anything
            die()
        os._exit(0)

    def _handle(self, frame: Frame) -> None:
        match frame.header["type"]:
            case "load":
                self._tasks.put(lambda: self._load(frame))
            case "call":
                self._accept(frame)
            case "ask":
                self._ask(frame)
            case "credit":
                self._grant(frame.header["id"], frame.header["bytes"])
            case "cancel":
                self._cancel(frame.header["id"])
            case "unload":
                self._tasks.put(self._unload)
            case unknown:
                raise ProtocolError(f"unknown frame {unknown!r}")

    # -- the plugin's life

    def _load(self, frame: Frame) -> None:
        request, phase = frame.header, "environment"

        def enter(next_phase: str) -> None:
            nonlocal phase
            phase = next_phase
            self._send({"type": "phase", "phase": phase})  # before it runs: who dies or hangs in it tells no more

        entered = current_call.set(self._conversation.loading())
        try:
            enter_environment()
            log_to_output()
            enter("import")
            module = importlib.import_module(request["module"])
            phase = "class"
            cls = getattr(module, request["class"])
            if not (isinstance(cls, type) and issubclass(cls, PluginInterface)):
                raise PluginConfigError(f"{request['module']}.{request['class']} is not a PluginInterface")  # noqa: TRY301
            enter("create")
            plugin = cls()
            enter("initialize")
            plugin.initialize(unpack_value(frame.segments, "config"))
        except BaseException as error:  # noqa: BLE001 - SystemExit in plugin code is a failed load too
            self._send({"type": "load_failed", "phase": phase, "error": describe_error(error)})
            return
        finally:
            current_call.reset(entered)
        self._plugin = plugin
        for number in range(1, request["threads"]):
            threading.Thread(target=self._work, name=f"executor-{number}", daemon=True).start()
        self._send({"type": "ready"})

    def _unload(self) -> None:
        if self._plugin is not None:
            try:
                self._plugin.cleanup()
            except BaseException:
                logging.getLogger(__name__).exception("cleanup failed")
        self._flush_logs("")
        self._send({"type": "unloaded"})
        os._exit(0)

    # -- calls

    def _accept(self, frame: Frame) -> None:
        call = self._register(CallContext(**frame.header["context"]))
        if frame.header.get("stream"):
            stream = self._streams[call.context.call_id] = ChunkStream(call, self._send, self._stream_sender.notify)
            self._tasks.put(
                lambda: self._execute(call, frame, lambda plugin, arguments: _stream_plugin(plugin, arguments, stream))
            )
        else:
            self._tasks.put(lambda: self._execute(call, frame, _call_plugin))

    def _ask(self, frame: Frame) -> None:
        """Answer a question about the plugin: in a thread of its own, so that calls do not hold it up."""
        verb = frame.header["verb"]
        call = self._register(CallContext(call_id=frame.header["id"]))

        def work() -> None:
            self._execute(call, frame, lambda plugin, arguments: verbs.answer(plugin, verb, arguments))

        if verb in verbs.CHANGING:
            self._tasks.put(work)
        else:
            threading.Thread(target=work, name=f"ask-{verb}", daemon=True).start()

    def _register(self, context: CallContext) -> ActiveCall:
        call = ActiveCall(
            context,
            on_progress=lambda progress, message: self._conversation.send_progress(
                {"type": "progress", "id": call.context.call_id}, progress, message
            ),
            on_usage=lambda usage: self._send({"type": "usage", "id": call.context.call_id, "usage": usage}),
        )
        self._calls[context.call_id] = call  # known before it runs, so that a cancel cannot miss it
        return call

    def _execute(self, call: ActiveCall, frame: Frame, work: Work) -> None:
        call_id, meter = call.context.call_id, CallMeter()
        segments: list[bytes] = []
        entered = current_call.set(call)
        try:
            segments = self._run(call, frame, work)
            answer: dict[str, Any] = {"type": "result"}
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a plugin must not end the worker
            answer = {"type": "error", "error": describe_error(error)}
        finally:
            current_call.reset(entered)
        self._flush_logs(call_id)
        self._calls.pop(call_id, None)
        self._streams.pop(call_id, None)
        self._answer({**answer, "id": call_id, "spent": meter.spent()}, segments)

    def _run(self, call: ActiveCall, frame: Frame, work: Work) -> list[bytes]:
        if call.cancelled:
            raise PluginCancelledError
        if self._plugin is None:
            raise ProtocolError("a call before the plugin was ready")
        return pack_value(work(self._plugin, unpack_value(frame.segments, "")), "result")

    def _answer(self, header: dict[str, Any], segments: list[bytes]) -> None:
        try:
            self._send(header, segments)
        except ProtocolError as error:  # the result is over the frame limit
            lost = WireValueError(f"result: {error}", path="result")
            self._send({"type": "error", "id": header["id"], "error": describe_error(lost)})

    def _grant(self, call_id: str, amount: int) -> None:
        stream = self._streams.get(call_id)
        if stream is not None:
            stream.grant(amount)

    def _cancel(self, call_id: str) -> None:
        call = self._calls.get(call_id)
        if call is None:
            return  # it ended while the request was on its way
        threading.Thread(target=self._cancel_call, args=(call,), name="cancel", daemon=True).start()

    def _cancel_call(self, call: ActiveCall) -> None:
        call.request_cancel()  # first, so that it holds whatever an overridden cancel() does
        with call.entered():
            try:
                if self._plugin is not None:
                    self._plugin.cancel()
            except Exception:
                logging.getLogger(__name__).exception("cancel failed")

    # -- the way out

    def _leave_conversation(self) -> None:
        """Keep a forked process from speaking for the worker: it has no call, and the log pipe alone."""
        self._conversation.connection.close()
        current_call.set(None)
        for stream in self._log_streams:
            stream.write_directly()

    def _flush_logs(self, call_id: str) -> None:
        for stream in self._log_streams:
            stream.end_call(call_id)


def _call_plugin(plugin: PluginInterface, arguments: Any) -> Any:
    return plugin.execute(*arguments["args"], **arguments["kwargs"])


def _stream_plugin(plugin: PluginInterface, arguments: Any, stream: ChunkStream) -> None:
    """Send each chunk; the generator is closed and all its chunks are sent before the call ends, however it ends."""
    chunks = iter(plugin.execute_stream(*arguments["args"], **arguments["kwargs"]))
    try:
        for chunk in chunks:
            if not stream.put(chunk):
                raise PluginCancelledError
    finally:
        try:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
        finally:
            stream.flush()


def die() -> NoReturn:
    """End the process with the traceback of what could not be survived."""
    try:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(1)
