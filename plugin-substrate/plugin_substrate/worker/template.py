"""A template: a process that imports a plugin's module once, and then is copied into each worker of it.

It is confined as its workers are, before it imports anything, and has a socket, a log and a folder as a worker has, but
no secret and no call. It stays single-threaded: a copy has only the thread that made it.

Frames from the host: ``preload``. To the host: ``hello``, any number of ``loading`` and ``log``, and then ``ready`` or
``load_failed``. A datagram of the supervisor's asks for a copy and brings the door behind which that one is given what
is its own (see `templates`).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import threading
from typing import Any, NoReturn

from plugin_substrate.errors import PluginConfigError, ProtocolError
from plugin_substrate.interface import current_call
from plugin_substrate.worker import confine
from plugin_substrate.worker.conversation import Conversation
from plugin_substrate.worker.failures import describe_error
from plugin_substrate.worker.frames import Frame
from plugin_substrate.worker.interpreter import enter_environment
from plugin_substrate.worker.logs import capture_output, log_to_output
from plugin_substrate.worker.runtime import WorkerRuntime, die

_MAX_HANDED_BYTES = 1 << 16


class Template:
    """Serves one host and one supervisor until either is gone."""

    def __init__(
        self, connection: socket.socket, channel: socket.socket, plan: confine.Plan, layers: tuple[str, ...]
    ) -> None:
        self._conversation = Conversation(connection)
        self._channel = channel
        self._plan = plan
        self._layers = layers
        self._supervisor = os.getppid()
        self._output = capture_output(self._conversation.send_log)

    def serve(self) -> NoReturn:
        """Run until the end of the process, or in a copy as the worker that it has become."""
        self._conversation.greet(self._layers)
        poll = select.poll()
        poll.register(self._conversation.connection, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        try:
            while True:
                ready = {descriptor for descriptor, _ in poll.poll()}
                if self._channel.fileno() in ready:
                    self._copy()
                if self._conversation.connection.fileno() in ready:
                    self._hear()
        except BaseException:  # noqa: BLE001 - foreign code may have broken anything
            die()

    def _hear(self) -> None:
        inbox = self._conversation.inbox
        count = inbox.receive()
        if not count:
            os._exit(0)
        for frame in inbox.frames(count):
            if frame.header["type"] != "preload":
                raise ProtocolError(f"unknown frame {frame.header['type']!r}")
            self._preload(frame)

    def _preload(self, frame: Frame) -> None:
        entered = current_call.set(self._conversation.loading())
        try:
            enter_environment()
            log_to_output()
            importlib.import_module(frame.header["module"])
            _refuse_threads()
        except BaseException as error:  # noqa: BLE001 - SystemExit in plugin code is a failed load too
            answer: dict[str, Any] = {"type": "load_failed", "phase": "preload", "error": describe_error(error)}
        else:
            answer = {"type": "ready"}
        finally:
            current_call.reset(entered)
        gc.collect()
        gc.freeze()  # what is here now is shared by all copies
        for stream in self._output:
            stream.end_call("")
        self._conversation.send(answer)

    def _copy(self) -> None:
        """Fork; in the child become a worker. What goes wrong here ends the template, and the host makes another."""
        asked, doors, _, _ = socket.recv_fds(self._channel, 16, 1)
        if not asked:
            os._exit(0)
        wait_for, parted = os.pipe()
        between = os.fork()
        if between == 0:
            os.close(parted)
            _fork_and_end()
            self._become_worker(socket.socket(fileno=doors[0]), wait_for)
        os.close(wait_for)
        os.close(doors[0])
        _, status = os.waitpid(between, 0)
        os.close(parted)
        if status:
            raise ProtocolError(f"the process in between ended with {status}")

    def _become_worker(self, door: socket.socket, wait_for: int) -> NoReturn:
        try:
            os.read(wait_for, 1)  # ends when the template has seen the end of the one in between: we are adopted
            os.close(wait_for)
            self._channel.close()
            self._conversation.connection.close()
            confine.confine_forked_worker(self._plan, self._supervisor)
            connection = _take_over(door)
            WorkerRuntime(connection, self._layers, self._output).serve()
        except BaseException:  # noqa: BLE001 - nothing may climb into the template's stack
            die()


def _fork_and_end() -> None:
    """Fork; only the child returns."""
    try:
        child = os.fork()
    except BaseException:  # noqa: BLE001 - it must not climb into the template's stack
        os._exit(1)
    if child:
        os._exit(0)


def _take_over(door: socket.socket) -> socket.socket:
    """Take this worker's own socket, log, environment and folder; what stays open besides is what modules opened."""
    with door:
        raw, descriptors, _, _ = socket.recv_fds(door, _MAX_HANDED_BYTES, 2)
    mine = json.loads(raw)
    connection, log = descriptors
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(mine["env"])
    os.chdir(mine["cwd"])
    return socket.socket(fileno=connection)


def _refuse_threads() -> None:
    """See that nothing runs that a copy would not have, and would wait for."""
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        raise PluginConfigError(
            f"importing it started threads ({', '.join(others)[:200]}), which a copy of its template would not have; "
            "start them in initialize(), or write `preload: false` under the manifest's `overrides`"
        )
