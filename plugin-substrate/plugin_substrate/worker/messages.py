"""Frames and the descriptors that travel with them, on either side of the socket between host and worker."""

from __future__ import annotations

import array
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from plugin_substrate.errors import ProtocolError
from plugin_substrate.worker.frames import MAX_FRAME_BYTES, Frame, FrameDecoder, encode_frame
from plugin_substrate.worker.parked import MAX_PARKED, close_all, is_parking_called_for, park, unpark

_ITEM_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_PARKED * _ITEM_BYTES)
# As plain numbers: operators of enumerations cost more than the system call.
_FLAGS = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_TRUNCATED = int(socket.MSG_CTRUNC)


class Message:
    """An encoded frame: the pieces to write, in order, and the descriptors to send with the first. Owns them."""

    def __init__(self, pieces: list[bytes], descriptors: list[int]) -> None:
        self.pieces = pieces
        self.descriptors = descriptors

    def close(self) -> None:
        """Close the descriptors, sent or not."""
        descriptors, self.descriptors = self.descriptors, []
        close_all(descriptors)

    def __del__(self) -> None:
        if self.descriptors:
            self.close()


def encode_message(header: dict[str, Any], segments: Sequence[bytes] = ()) -> Message:
    """Encode a frame, parking its large segments; one over the limits is a `ProtocolError`."""
    if not is_parking_called_for(segments):
        return Message(encode_frame(header, segments), [])
    staying, parked, descriptors = park(segments)
    try:
        _check_size(parked)
        return Message(encode_frame({**header, "parked": parked} if parked else header, staying), descriptors)
    except BaseException:
        close_all(descriptors)
        raise


def _check_size(parked: list[list[int]]) -> None:
    total = sum(size for _, size in parked)
    if total > MAX_FRAME_BYTES:
        raise ProtocolError(f"binary segments of {total} bytes are over the limit of {MAX_FRAME_BYTES}")


class Inbox:
    """Receives from one socket. A descriptor that no frame announces, or one too many, is a `ProtocolError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = FrameDecoder()
        self._descriptors: list[int] = []

    def receive(self) -> int:
        """Receive once and return how many bytes came, 0 at the end; then take `frames`."""
        with self._decoder.room() as room:
            count, ancillary, flags, _ = self._connection.recvmsg_into([room], _ANCILLARY_BYTES, _FLAGS)
        if ancillary or flags & _TRUNCATED:
            self._keep_descriptors(ancillary, flags)
        return count

    def frames(self, count: int) -> Iterator[Frame]:
        """Yield the frames that the last ``count`` bytes completed."""
        for frame in self._decoder.received(count):
            announced = frame.header.pop("parked", None)
            if announced is None:
                yield frame
            else:
                yield Frame(frame.header, unpark(frame.segments, announced, self._descriptors, MAX_FRAME_BYTES))
        if self._descriptors and not self._decoder.pending:
            raise ProtocolError("a descriptor came with no frame that announces it")

    def close(self) -> None:
        """Close descriptors whose frame never came whole."""
        descriptors, self._descriptors = self._descriptors, []
        close_all(descriptors)

    def _keep_descriptors(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % _ITEM_BYTES])
                self._descriptors.extend(received)
        if flags & _TRUNCATED or len(self._descriptors) > MAX_PARKED:
            self.close()
            raise ProtocolError(f"more descriptors than the {MAX_PARKED} that may come with one frame")
