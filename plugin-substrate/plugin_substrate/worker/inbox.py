"""What comes in on either end of the socket between host and worker: whole frames, and nothing beside them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from plugin_substrate.errors import ProtocolError
from plugin_substrate.worker.frames import Frame, FrameDecoder

_TRUNCATED = int(socket.MSG_CTRUNC)  # as a plain number: the enumeration's operators cost more than the system call


class Inbox:
    """Receives from one socket. No descriptor is ever taken: one that is sent is closed and a `ProtocolError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = FrameDecoder()

    def receive(self) -> int:
        """Receive once and return how many bytes came, 0 at the end; then take `frames`."""
        with self._decoder.room() as room:
            count, _, flags, _ = self._connection.recvmsg_into([room])
        if flags & _TRUNCATED:
            raise ProtocolError("descriptors were sent, and none may be")
        return count

    def frames(self, count: int) -> Iterator[Frame]:
        """Yield the frames that the last ``count`` bytes completed."""
        return self._decoder.received(count)
