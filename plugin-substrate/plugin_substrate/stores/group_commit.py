"""The host's end of the process that writes jobs, see `job_writer`: what is sent, and when it is on disk."""

from __future__ import annotations

import asyncio
import marshal
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from plugin_substrate.errors import StoreError
from plugin_substrate.stores import job_writer
from plugin_substrate.stores.job_writer import FAILED, LENGTH

Statement = tuple[str, tuple[Any, ...]]

_READ_BYTES = 1 << 16


class GroupCommit:
    """Writes in order, many to a commit. A write's future ends when its commit is on disk, or with a `StoreError`.

    When one fails, so does everything after it: what is written builds on what was written before. Belongs to the
    running event loop, which it never blocks.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(job_writer.__file__)), str(path)],
                stdin=theirs.fileno(),
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C is for the host: it still has to tell how its jobs end
            )
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._on_answer)
        self._unsent = bytearray()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._written = 0
        self._answer = bytearray()
        self._failure: StoreError | None = None
        self._idle = asyncio.Event()

    def write(self, statements: list[Statement]) -> asyncio.Future[None]:
        """Have statements carried out together, in the next commit."""
        done: asyncio.Future[None] = self._loop.create_future()
        if self._failure is not None:
            _fail(done, self._failure)
            return done
        message = marshal.dumps(statements)
        if not self._unsent:
            self._loop.call_soon(self._send)  # with all that is written in this turn of the loop
        self._unsent += LENGTH.pack(len(message)) + message
        self._waiting.append(done)
        self._idle.clear()
        return done

    async def close(self) -> None:
        """Wait until everything is on disk, or cannot be, and end the process."""
        while self._waiting:  # who hears that something is kept may write again
            await self._idle.wait()
        self._stop()
        await asyncio.to_thread(self._process.wait)

    def _send(self) -> None:
        if self._failure is not None:
            return
        try:
            sent = self._channel.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(str(error))
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._channel, self._send)
        else:
            self._loop.remove_writer(self._channel)

    def _on_answer(self) -> None:
        try:
            data = self._channel.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(str(error))
            return
        if not data:
            self._fail(self._answer[LENGTH.size :].decode(errors="replace") or "its writer has ended")
            return
        self._answer += data
        while len(self._answer) >= LENGTH.size:
            (written,) = LENGTH.unpack_from(self._answer)
            if written == FAILED:
                return  # the reason follows, and the end
            del self._answer[: LENGTH.size]
            self._on_written(written)

    def _on_written(self, written: int) -> None:
        while self._written < written:
            self._written += 1
            done = self._waiting.popleft()
            if not done.done():
                done.set_result(None)
        if not self._waiting:
            self._idle.set()

    def _fail(self, reason: str) -> None:
        self._failure = StoreError(
            f"{self._path} cannot be written: {reason}; what was not confirmed is not kept", path=str(self._path)
        )
        self._stop()
        while self._waiting:
            _fail(self._waiting.popleft(), self._failure)
        self._idle.set()

    def _stop(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
            self._channel.close()


def _fail(done: asyncio.Future[None], failure: StoreError) -> None:
    if not done.done():
        done.set_exception(failure)
        done.exception()  # read once here: who does not wait for it must not cause a warning
