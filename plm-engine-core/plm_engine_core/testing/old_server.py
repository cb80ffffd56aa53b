"""A PostgreSQL that is too old, where none is installed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_server(version: str) -> Iterator[str]:
    """A server that greets like PostgreSQL `version` and answers no statement: the address to reach it."""
    greeting = b"R" + (8).to_bytes(4) + bytes(4)  # AuthenticationOk
    parameter = b"server_version\0" + version.encode() + b"\0"
    greeting += b"S" + (4 + len(parameter)).to_bytes(4) + parameter
    greeting += b"Z" + (5).to_bytes(4) + b"I"  # ReadyForQuery
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(greeting)
                    if connection.recv(1) not in (b"X", b""):  # Terminate, or the end of the stream
                        raise RuntimeError("something else than the end followed the greeting")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"postgresql://plm@127.0.0.1:{listener.getsockname()[1]}/plm?sslmode=disable&gssencmode=disable"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)
