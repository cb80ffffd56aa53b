"""Checkpoints in PostgreSQL, and the quick way to read whole chains: binary COPY."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.abc import PQGen
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

from plm_engine_core.control_plane.events.archive import Piece
from plm_engine_core.control_plane.events.chain import Link
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head
from plm_engine_core.control_plane.events.pruning import PrunedBatch
from plm_engine_core.control_plane.storage.postgres.calls import answered, checked
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

# In the order in which `parse_rows` reads them.
_LINK = "e.seq, e.occurred_at, e.hash, e.prev_hash, e.stream, e.kind, e.actor, e.payload"

# What the checkpoint `number` added to each stream: from the head before it, not included, to its own.
_COVERED = (
    f"SELECT {_LINK} FROM events AS e "  # noqa: S608  # literal
    "JOIN event_checkpoint_heads AS h ON h.tenant_id = e.tenant_id AND h.stream = e.stream "
    "AND e.seq <= h.last_seq AND e.seq > COALESCE((SELECT max(p.last_seq) FROM event_checkpoint_heads AS p "
    "WHERE p.tenant_id = h.tenant_id AND p.stream = h.stream AND p.number < h.number), 0) "
    'WHERE e.tenant_id = %(tenant)s AND h.number = %(number)s ORDER BY e.stream COLLATE "C", e.seq'
)
_WHOLE = (
    f"SELECT {_LINK} FROM events AS e "  # noqa: S608  # literal
    'WHERE e.tenant_id = %(tenant)s ORDER BY e.stream COLLATE "C", e.seq'
)
# What no checkpoint up to `after` covers.
_NEWER = (
    f"SELECT {_LINK} FROM events AS e "  # noqa: S608  # literal
    "LEFT JOIN LATERAL (SELECT h.last_seq FROM event_checkpoint_heads AS h WHERE h.tenant_id = e.tenant_id "
    "AND h.stream = e.stream AND h.number <= %(after)s ORDER BY h.number DESC LIMIT 1) AS c ON true "
    "WHERE e.tenant_id = %(tenant)s AND (%(streams)s::text[] IS NULL OR e.stream = ANY(%(streams)s)) "
    'AND e.seq > COALESCE(c.last_seq, 0) ORDER BY e.stream COLLATE "C", e.seq'
)

_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_COPY_TRAILER = b"\xff\xff"
_ROW = struct.Struct(">hiqiqi")  # up to the length of the hash; each field comes after its length
_LENGTHS = (8, 8, 8)  # number of fields, then the lengths of the first two
_INT = struct.Struct(">i")
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

    async def archived(self, tenant_id: UUID) -> int:
        """The newest checkpoint that a recorded piece holds; 0 before the first."""
        return await self._newest_number(tenant_id, "event_exports")

    async def record_piece(self, tenant_id: UUID, piece: Piece) -> None:
        """Record a stored piece of the archive."""
        async with self._gateway.transaction(tenant_id) as connection:
            await connection.execute(
                "INSERT INTO event_exports (tenant_id, number, after, uri, size_bytes, sha256) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [tenant_id, piece.number, piece.after, piece.uri, piece.size_bytes, piece.sha256],
            )

    async def pruned(self, tenant_id: UUID) -> int:
        """The newest checkpoint of which events were pruned; 0 where none were."""
        return await self._newest_number(tenant_id, "event_stubs")

    async def prune(self, tenant_id: UUID, *, actor: str, limit: int) -> PrunedBatch:
        """Prune one batch of what the tenant's retention no longer asks for, in a transaction of its own."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT engine_prune_events_v3(%s, %s, %s) AS answer", [tenant_id, actor, limit]
            )
            row: Any = await cursor.fetchone()
            answer = row["answer"]
            return PrunedBatch(**{name: answer[name] for name in ("checkpoint", "streams", "events", "more")})

    async def _newest_number(self, tenant_id: UUID, table: str) -> int:
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT COALESCE(max(number), 0) AS number FROM {table} WHERE tenant_id = %s".encode(),  # noqa: S608  # one of two literals
                [tenant_id],
            )
            row: Any = await cursor.fetchone()
            return int(row["number"])

    def covered(self, tenant_id: UUID, number: int) -> Iterator[Link]:
        """The events that checkpoint `number` covers and the one before it does not, by stream and sequence."""
        return self._links(tenant_id, _COVERED, {"tenant": tenant_id, "number": number})

    def links(self, tenant_id: UUID, *, streams: Collection[str] | None = None, after: int = 0) -> Iterator[Link]:
        """Every event, of these streams or of all, that checkpoint `after` does not cover, by stream and sequence."""
        query = _NEWER if after or streams is not None else _WHOLE
        names = sorted(streams) if streams is not None else None
        return self._links(tenant_id, query, {"tenant": tenant_id, "streams": names, "after": after})

    def _links(self, tenant_id: UUID, query: str, parameters: Mapping[str, Any]) -> Iterator[Link]:
        with self._gateway.reading(tenant_id) as connection:
            statement = f"COPY ({query}) TO STDOUT (FORMAT binary)".encode()
            with connection.cursor().copy(statement, parameters):
                yield from parse_rows(_blocks(connection))

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


def _blocks(connection: psycopg.Connection[Any]) -> Iterator[memoryview]:
    """What a running COPY sends, block by block. The driver's own iteration sets out to wait anew for each of them."""
    pgconn = connection.pgconn
    while True:
        size, block = pgconn.get_copy_data(1)
        if size < 0:
            break
        if size:
            yield block
        else:
            connection.wait(_arrived(pgconn))
    checked(connection.wait(answered(pgconn)))


def _arrived(pgconn: PGconn) -> PQGen[None]:
    while not (yield Wait.R):
        pass
    pgconn.consume_input()


def parse_rows(blocks: Iterable[bytes | bytearray | memoryview]) -> Iterator[Link]:
    """The events of a binary COPY of `_LINK`, whose blocks hold whole rows: the server sends each in one message.

    Raises:
        ValueError: it is not what the query asked for.
    """
    row, integer, size = _ROW.unpack_from, _INT.unpack_from, _ROW.size
    last_stream, name = b"", ""
    for block in blocks:
        data = bytes(block)
        at = len(_COPY_HEADER) if data.startswith(_COPY_HEADER) else 0
        while at < len(data) and not data.startswith(_COPY_TRAILER, at):
            fields, seq_length, seq, time_length, time, length = row(data, at)
            if (fields, seq_length, time_length) != _LENGTHS:
                raise ValueError("a row has other fields than were asked for")
            start = at + size
            end = start + length
            claimed = data[start:end]
            start = end + 4
            end = start + integer(data, end)[0]
            prev_hash = data[start:end]
            start = end + 4
            end = start + integer(data, end)[0]
            stream = data[start:end]
            if stream != last_stream:
                last_stream, name = stream, stream.decode()
            actor = end + 4 + integer(data, end)[0]
            payload = actor + 4 + integer(data, actor)[0]
            at = payload + 4 + integer(data, payload)[0]
            yield name, seq, prev_hash, claimed, data[end:payload], time + _MICROS_TO_2000, data[payload:at]
