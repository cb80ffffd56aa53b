"""Checkpoints in PostgreSQL, and the quick way to read whole chains: binary COPY."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.events.chain import Link
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session

Make = Callable[[Checkpoint | None, Sequence[Head], Sequence[Head], datetime], Checkpoint]

_COLUMNS = "tenant_id, number, taken_at, streams, root, previous, key_id, signature"

_HEADS = (
    "SELECT s.stream, s.last_seq, s.last_hash, s.last_seq IS DISTINCT FROM c.last_seq AS changed, "
    "clock_timestamp() AS now "
    "FROM event_streams AS s LEFT JOIN LATERAL (SELECT h.last_seq FROM event_checkpoint_heads AS h "
    "WHERE h.tenant_id = s.tenant_id AND h.stream = s.stream ORDER BY h.number DESC LIMIT 1) AS c ON true "
    "WHERE s.tenant_id = %s AND s.last_seq > 0"
)

# What the checkpoint `number` added to each stream: from the head before it, not included, to its own.
_COVERED = (
    "SELECT e.stream, e.seq, e.prev_hash, e.hash, e.kind, e.actor, e.occurred_at, e.payload FROM events AS e "
    "JOIN event_checkpoint_heads AS h ON h.tenant_id = e.tenant_id AND h.stream = e.stream "
    "AND e.seq <= h.last_seq AND e.seq > COALESCE((SELECT max(p.last_seq) FROM event_checkpoint_heads AS p "
    "WHERE p.tenant_id = h.tenant_id AND p.stream = h.stream AND p.number < h.number), 0) "
    'WHERE e.tenant_id = %(tenant)s AND h.number = %(number)s ORDER BY e.stream COLLATE "C", e.seq'
)
_WHOLE = (
    "SELECT e.stream, e.seq, e.prev_hash, e.hash, e.kind, e.actor, e.occurred_at, e.payload FROM events AS e "
    'WHERE e.tenant_id = %(tenant)s ORDER BY e.stream COLLATE "C", e.seq'
)
# What no checkpoint up to `after` covers.
_NEWER = (
    "SELECT e.stream, e.seq, e.prev_hash, e.hash, e.kind, e.actor, e.occurred_at, e.payload FROM events AS e "
    "LEFT JOIN LATERAL (SELECT h.last_seq FROM event_checkpoint_heads AS h WHERE h.tenant_id = e.tenant_id "
    "AND h.stream = e.stream AND h.number <= %(after)s ORDER BY h.number DESC LIMIT 1) AS c ON true "
    "WHERE e.tenant_id = %(tenant)s AND (%(stream)s::text IS NULL OR e.stream = %(stream)s) "
    'AND e.seq > COALESCE(c.last_seq, 0) ORDER BY e.stream COLLATE "C", e.seq'
)

_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_FIELDS = 8
_SHORT = struct.Struct(">h")
_INT = struct.Struct(">i")
_END = -1
_MICROS_TO_2000 = 946_684_800_000_000  # where PostgreSQL's binary time stamps start, after 1970


class PostgresCheckpoints:
    """Checkpoints, and the events they cover."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def tenants(self) -> Sequence[UUID]:
        """Every tenant there is."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute("SELECT id FROM tenants ORDER BY id")
            return [row["id"] for row in await cursor.fetchall()]

    async def take(self, tenant_id: UUID, make: Make) -> Checkpoint | None:
        """Store what `make` makes of the newest checkpoint, all heads, those that changed, and the time.

        One process at a time does this for a tenant. None when nothing has changed since the newest checkpoint.
        """
        async with self._gateway.transaction(tenant_id) as connection:
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('checkpoint/' || %s, 0))", [str(tenant_id)]
            )
            newest = await self._newest(connection, tenant_id)
            cursor = await connection.execute(_HEADS, [tenant_id])
            rows = await cursor.fetchall()
            heads = [Head(row["stream"], row["last_seq"], row["last_hash"]) for row in rows]
            changed = [head for head, row in zip(heads, rows, strict=True) if row["changed"]]
            if not changed:
                return None
            checkpoint = make(newest, heads, changed, rows[0]["now"])
            await self._insert(connection, checkpoint)
            return checkpoint

    async def read(self, tenant_id: UUID, *, after: int = 0, limit: int = 100) -> Sequence[Checkpoint]:
        """Checkpoints in order, from number `after` + 1."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT {_COLUMNS} FROM event_checkpoints WHERE tenant_id = %s AND number > %s "  # noqa: S608  # literal
                "ORDER BY number LIMIT %s".encode(),
                [tenant_id, after, limit],
            )
            rows = await cursor.fetchall()
            return [Checkpoint(**row, heads=await self._changed(connection, tenant_id, row["number"])) for row in rows]

    async def newest(self, tenant_id: UUID) -> Checkpoint | None:
        """The newest checkpoint, without its heads."""
        async with self._gateway.transaction(tenant_id) as connection:
            return await self._newest(connection, tenant_id)

    async def heads(self, tenant_id: UUID, *, number: int) -> Sequence[Head]:
        """Every head as the checkpoint `number` covers it."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT DISTINCT ON (stream) stream, last_seq, last_hash FROM event_checkpoint_heads "
                "WHERE tenant_id = %s AND number <= %s ORDER BY stream, number DESC",
                [tenant_id, number],
            )
            return [Head(row["stream"], row["last_seq"], row["last_hash"]) for row in await cursor.fetchall()]

    def covered(self, tenant_id: UUID, number: int) -> Iterator[Link]:
        """The events that checkpoint `number` covers and the one before it does not, by stream and sequence."""
        return self._links(tenant_id, _COVERED, {"tenant": tenant_id, "number": number})

    def links(self, tenant_id: UUID, *, stream: str | None = None, after: int = 0) -> Iterator[Link]:
        """Every event, of one stream or of all, that checkpoint `after` does not cover, by stream and sequence."""
        query = _NEWER if after or stream else _WHOLE
        return self._links(tenant_id, query, {"tenant": tenant_id, "stream": stream, "after": after})

    def _links(self, tenant_id: UUID, query: str, parameters: Mapping[str, Any]) -> Iterator[Link]:
        with self._gateway.reading(tenant_id) as connection:
            statement = f"COPY ({query}) TO STDOUT (FORMAT binary)".encode()
            with connection.cursor().copy(statement, parameters) as copy:
                for block in copy:
                    yield from parse_rows(block)

    async def _newest(self, connection: Session, tenant_id: UUID) -> Checkpoint | None:
        cursor = await connection.execute(
            f"SELECT {_COLUMNS} FROM event_checkpoints WHERE tenant_id = %s ORDER BY number DESC LIMIT 1".encode(),  # noqa: S608  # literal
            [tenant_id],
        )
        row = await cursor.fetchone()
        return Checkpoint(**row, heads=()) if row is not None else None

    async def _changed(self, connection: Session, tenant_id: UUID, number: int) -> tuple[Head, ...]:
        cursor = await connection.execute(
            "SELECT stream, last_seq, last_hash FROM event_checkpoint_heads WHERE tenant_id = %s AND number = %s "
            'ORDER BY stream COLLATE "C"',
            [tenant_id, number],
        )
        return tuple(Head(row["stream"], row["last_seq"], row["last_hash"]) for row in await cursor.fetchall())

    async def _insert(self, connection: Session, checkpoint: Checkpoint) -> None:
        values = [getattr(checkpoint, name) for name in _COLUMNS.split(", ")]
        await connection.execute(
            f"INSERT INTO event_checkpoints ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)".encode(),  # noqa: S608  # literal
            values,
        )
        heads = checkpoint.heads
        await connection.execute(
            "INSERT INTO event_checkpoint_heads (tenant_id, number, stream, last_seq, last_hash) "
            "SELECT %s, %s, * FROM unnest(%s::text[], %s::bigint[], %s::bytea[])",
            [
                checkpoint.tenant_id,
                checkpoint.number,
                [head.stream for head in heads],
                [head.seq for head in heads],
                [head.hash for head in heads],
            ],
        )


def parse_rows(block: bytes | bytearray | memoryview) -> Iterator[Link]:
    """The events of a piece of binary COPY, which holds whole rows: the server sends each in one message.

    Raises:
        ValueError: it is not what the query asked for.
    """
    data = bytes(block)
    at = len(_COPY_HEADER) if data.startswith(_COPY_HEADER) else 0
    while at < len(data):
        (count,) = _SHORT.unpack_from(data, at)
        at += 2
        if count == _END:
            return
        if count != _FIELDS:
            raise ValueError(f"a row has {count} fields, not {_FIELDS}")
        fields = []
        for _ in range(_FIELDS):
            start = at + 4
            at = start + _INT.unpack_from(data, at)[0]
            fields.append(data[start:at])
        stream, seq, prev_hash, claimed, kind, actor, time, payload = fields
        micros = int.from_bytes(time, "big", signed=True) + _MICROS_TO_2000
        yield stream.decode(), int.from_bytes(seq, "big", signed=True), prev_hash, claimed, kind, actor, micros, payload
