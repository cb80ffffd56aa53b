"""The worker's end of the socket to its host: whole frames out, from any thread, and what each process says first."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any

from plugin_substrate.interface import ActiveCall, CallContext
from plugin_substrate.worker.frames import PROTOCOL_VERSION
from plugin_substrate.worker.messages import Inbox, Message, encode_message

_MAX_PROGRESS_TEXT = 1000
_MAX_PIECES = 512  # the system takes 1024 at once


class Conversation:
    """Speaks to one host. When the host is gone, so is everyone this was for: the process then ends."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.inbox = Inbox(connection)
        self._send_lock = threading.Lock()

    def greet(self, layers: tuple[str, ...]) -> None:
        """Say who this is and what confines it: the first frame, before any code of the plugin is imported."""
        self.send({
            "type": "hello",
            "protocol": PROTOCOL_VERSION,
            "pid": os.getpid(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "layers": list(layers),
        })  # fmt: skip

    def send(self, header: dict[str, Any], segments: list[bytes] | None = None) -> None:
        """Write a frame; one over the limits is a `ProtocolError`."""
        message = encode_message(header, segments or [])
        try:
            with self._send_lock:
                if len(message.pieces) == 1 and not message.descriptors:
                    self.connection.sendall(message.pieces[0])
                else:
                    self._send_pieces(message)
        except OSError:
            os._exit(0)
        message.close()

    def _send_pieces(self, message: Message) -> None:
        """Write the beginning at once, as each system call wakes the host, and then what is missing."""
        beginning = message.pieces[:_MAX_PIECES]
        if message.descriptors:
            sent = socket.send_fds(self.connection, beginning, message.descriptors)
        else:
            sent = self.connection.sendmsg(beginning)
        for piece in message.pieces:
            if sent < len(piece):
                self.connection.sendall(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))

    def send_log(self, call_id: str, line: str) -> None:
        """Write a log line, of a call or of none."""
        self.send({"type": "log", "id": call_id, "line": line})

    def send_progress(self, place: dict[str, str], progress: float, message: str) -> None:
        """Write a progress report; ``place`` is the header that says of what."""
        self.send({**place, "progress": progress, "message": message[:_MAX_PROGRESS_TEXT]})

    def loading(self) -> ActiveCall:
        """Return what stands for a call while there is none, so that a slow start can report its progress."""
        return ActiveCall(
            CallContext(call_id=""),
            on_progress=lambda progress, message: self.send_progress({"type": "loading"}, progress, message),
            on_usage=lambda _: None,
        )
