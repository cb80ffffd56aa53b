"""The log of a database server, as one has it that has run for a while."""

from __future__ import annotations

import psycopg


def recycle_the_log(admin: str, segments: int) -> None:
    """Bring the server's log to where it is on a server that has run for a while, for `segments` of 16 MB to come.

    A new segment of it is filled with zeros and flushed inside the commit that needs it, on a server that was made a
    minute ago. Once there were checkpoints, old segments are renamed instead.
    """
    with psycopg.connect(admin, autocommit=True) as connection:
        for _ in range(segments):
            connection.execute("SELECT pg_logical_emit_message(false, 'bench', repeat('x', 14 << 20)), pg_switch_wal()")
        connection.execute("CHECKPOINT")
