"""The process that writes one file of jobs: it commits whatever has arrived since its last commit, all at once.

A process of its own, because a thread would wait for the interpreter after every row while the event loop is busy. It
is started by path and imports the standard library only. Standard input is a socket; each message is eight bytes of
length and a marshalled list of ``(statement, values)``. The answer to a commit is eight bytes: how many messages are on
disk now; an error is the text that follows eight bytes of ones, and the end. It ends with its host, after committing
what had arrived: until then it holds the lock that it inherited, so that no other host sees half of it.
"""

from __future__ import annotations

import marshal
import os
import socket
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
FAILED = (1 << 64) - 1

#: Not statements: a result that becomes a file of its own, and one that goes.
PUT_FILE = "put file"
REMOVE_FILE = "remove file"

_BUSY_SECONDS = 10.0
_READ_BYTES = 1 << 20


def connect(path: Path) -> sqlite3.Connection:
    """Open the file with every commit synced; transactions are begun by hand."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def write_until_the_end(path: Path, channel: socket.socket) -> None:
    """Commit what arrives until the other side is gone."""
    connection = connect(path)
    written = 0
    for messages in _arrivals(channel):
        connection.execute("BEGIN IMMEDIATE")
        for message in messages:
            for statement, values in marshal.loads(message):  # noqa: S302 - of our own host, over an inherited socket
                _carry_out(connection, statement, values)
        connection.execute("COMMIT")
        written += len(messages)
        channel.sendall(LENGTH.pack(written))


def _carry_out(connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> None:
    if statement == PUT_FILE:
        _put_file(Path(values[0]), values[1])
    elif statement == REMOVE_FILE:
        Path(values[0]).unlink(missing_ok=True)
    else:
        connection.execute(statement, values)


def _put_file(path: Path, data: bytes) -> None:
    """Write a file so that it is whole, and on disk, before the commit that refers to it."""
    temporary = path.with_name(f".{path.name}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _arrivals(channel: socket.socket) -> Iterator[list[bytes]]:
    """Yield the whole messages that have arrived, as soon as there is one; half a message at the end is none."""
    pending = bytearray()
    while data := channel.recv(_READ_BYTES):
        pending += data
        messages, at = [], 0
        while len(pending) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(pending, at)
            if len(pending) - at - LENGTH.size < length:
                break
            messages.append(bytes(pending[at + LENGTH.size : at + LENGTH.size + length]))
            at += LENGTH.size + length
        del pending[:at]
        if messages:
            yield messages


def main() -> None:
    """Serve standard input."""
    with socket.socket(fileno=0) as channel:
        try:
            write_until_the_end(Path(sys.argv[1]), channel)
        except (BrokenPipeError, ConnectionResetError):
            return  # the host is gone; what it had sent is committed
        except Exception as error:  # noqa: BLE001 - whatever it is, the host must hear of it
            channel.sendall(LENGTH.pack(FAILED) + str(error).encode()[:1000])


if __name__ == "__main__":
    main()
