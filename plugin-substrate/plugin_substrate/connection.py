"""The host's end of a worker's socket: any thread may write to it, the event loop that owns it reads and closes it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice, takewhile

from plugin_substrate.worker.frames import Frame
from plugin_substrate.worker.messages import Inbox, Message

_MAX_PIECES = 512  # the system takes 1024 at once


class WorkerConnection:
    """One stream socket. Reading takes one portion a round, so that no flood keeps the event loop to itself."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        on_frame: Callable[[Frame], object],
        on_error: Callable[[Exception], object],
        on_end: Callable[[], object],
    ) -> None:
        """Take over a connected socket; after ``on_end`` nothing else is called."""
        self._loop = asyncio.get_running_loop()
        self._owner = threading.get_ident()
        self._socket = connection
        self._on_frame = on_frame
        self._on_error = on_error
        self._on_end = on_end
        self._inbox = Inbox(connection)
        self._writing = threading.Lock()
        self._waiting: deque[_Outgoing] = deque()
        self._closed = False
        self._gathering = False
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._closed

    def write(self, message: Message, *, alone: bool = False) -> None:
        """Write a message, what does not fit now a little later; nothing when the connection is closed.

        The frames of concurrent writers never mix. A failure shows as the end of the connection. What the loop itself
        writes goes out at once the first time in a round, and then together at its end: each system call wakes the
        worker. With ``alone`` nothing is likely to be written after it in this round, and nothing is prepared for that.
        """
        with self._writing:
            if self._closed:
                return
            if self._waiting or self._gathering:
                self._waiting.append(_Outgoing(message))
                return
            done = self._write_whole(message) or self._push()
            if done and alone:
                return
        if threading.get_ident() == self._owner:
            self._gathering = done
            self._loop.call_soon(self._end_round if done else self._await_room)
        elif not done:
            self._loop.call_soon_threadsafe(self._await_room)

    def close(self) -> None:
        """End the connection, and have ``on_end`` called in the next round of the loop. For the owner's thread."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
            self._waiting.clear()
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._inbox.close()
        self._loop.call_soon(self._on_end)

    def _write_whole(self, message: Message) -> bool:
        """Write a message of one piece, as nearly all are; False when (some of) it waits now."""
        sent = 0
        if len(message.pieces) == 1 and not message.descriptors:
            try:
                sent = self._socket.send(message.pieces[0])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:  # as in `_push`
                return True
            if sent == len(message.pieces[0]):
                return True
        outgoing = _Outgoing(message)
        outgoing.take(sent)
        self._waiting.append(outgoing)
        return False

    def _push(self) -> bool:
        """Write until nothing waits; False when the socket has no room."""
        while self._waiting:
            try:
                self._send_some()
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:  # the worker is gone: the reader will hear of it
                self._waiting.clear()
        return True

    def _send_some(self) -> None:
        """Send what fits of the messages at the front; one with descriptors goes alone, so that they arrive with it."""
        first = self._waiting[0]
        if first.descriptors:
            sent = socket.send_fds(self._socket, first.pieces[:_MAX_PIECES], first.descriptors)
            first.close_descriptors()
        elif len(self._waiting) == 1:
            sent = self._socket.sendmsg(first.pieces[:_MAX_PIECES])
        else:
            plain = takewhile(lambda outgoing: not outgoing.descriptors, self._waiting)
            pieces = (piece for outgoing in plain for piece in outgoing.pieces)
            sent = self._socket.sendmsg(list(islice(pieces, _MAX_PIECES)))
        while self._waiting and (sent := self._waiting[0].take(sent)) >= 0:
            self._waiting.popleft()

    def _end_round(self) -> None:
        with self._writing:
            self._gathering = False
            if self._closed or self._push():
                return
        self._await_room()

    def _await_room(self) -> None:
        with self._writing:
            if not self._closed and self._waiting:
                self._loop.add_writer(self._socket, self._write_on)

    def _write_on(self) -> None:
        with self._writing:
            if not self._closed and self._push():
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            count = self._inbox.receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        except Exception as error:  # noqa: BLE001 - as below
            self._on_error(error)
            return
        if count == 0:
            self.close()
            return
        try:
            for frame in self._inbox.frames(count):
                self._on_frame(frame)
        except Exception as error:  # noqa: BLE001 - whatever a frame can cause must end its sender, never the host
            self._on_error(error)


class _Outgoing:
    """A message of which a part may be written already."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self.pieces = [memoryview(piece) for piece in message.pieces if piece]

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that still have to go with the first byte."""
        return self._message.descriptors

    def close_descriptors(self) -> None:
        """Give up the descriptors, as they were sent."""
        self._message.close()

    def take(self, sent: int) -> int:
        """Take off what was sent; returns what is left of that for the next message, -1 when this one is not done."""
        while self.pieces and sent >= len(self.pieces[0]):
            sent -= len(self.pieces.pop(0))
        if not self.pieces:
            return sent
        self.pieces[0] = self.pieces[0][sent:]
        return -1
