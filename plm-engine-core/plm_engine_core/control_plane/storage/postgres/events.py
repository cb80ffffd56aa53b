"""Event streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from plm_engine_core.control_plane.errors import Conflict, FeedPruned, InvalidRequest
from plm_engine_core.control_plane.events.event import Event
from plm_engine_core.control_plane.events.feed import BEGINNING, FeedCursor, FeedPage, HeldBack
from plm_engine_core.control_plane.events.standing import Standing, ticket_standing
from plm_engine_core.control_plane.events.verify import StreamHead, Stub
from plm_engine_core.control_plane.storage.postgres.gateway import LONGEST_WALK_SECONDS, Gateway, Session
from plm_engine_core.control_plane.storage.rows import budget_standing, event_row, run_standing, ticket_row

_COLUMNS = "tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload"

# Bookings are seen before they are on disk, see `group_commit`. What a reader is told must outlast a crash, or what
# comes in its place would look forged: so the reader's commit waits for the disk too. Asked once, after its snapshot.
_OUTLASTING = (
    "(SELECT CASE WHEN pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() "
    "THEN pg_logical_emit_message(true, 'plm', '') END) AS outlasting"
)

# Below the horizon every transaction has ended. A visible event at or above `next` was written on another server.
_HORIZON = (
    "SELECT pg_snapshot_xmin(s.now)::text AS horizon, pg_snapshot_xmax(s.now)::text AS next, "
    "EXISTS (SELECT FROM events AS e WHERE e.tenant_id = %s AND e.feed_position >= pg_snapshot_xmax(s.now)) AS foreign "
    "FROM (SELECT pg_current_snapshot() AS now) AS s"
)
_FEED = (
    f"SELECT {_COLUMNS}, feed_position::text AS feed_position, {_OUTLASTING} FROM events "  # noqa: S608  # literal
    "WHERE tenant_id = %(tenant)s AND feed_position >= %(after)s::xid8 AND feed_position < %(horizon)s::xid8 "
    'AND (feed_position > %(after)s::xid8 OR (stream COLLATE "C", seq) > (%(stream)s COLLATE "C", %(seq)s)) '
    'ORDER BY events.feed_position, stream COLLATE "C", seq LIMIT %(limit)s'
)
_EVERYTHING = f"SELECT {_COLUMNS} FROM events WHERE tenant_id = %s ORDER BY stream, seq"  # noqa: S608  # literal
_BATCH = 5000
_COUNTED = 1000  # of the events that are held back
_HELD_BACK = (
    "SELECT count(*) AS events, min(h.occurred_at) AS since FROM (SELECT occurred_at FROM events "
    "WHERE tenant_id = %s AND feed_position >= %s::xid8 ORDER BY feed_position LIMIT %s) AS h"
)
# Prunings that the reader does not know of, of events after its cursor; stubs stay for ever, so no others are read.
_PRUNED = """
SELECT COALESCE((SELECT n.pruned_in::text::bigint FROM event_stubs AS n WHERE n.tenant_id = %(tenant)s
                 ORDER BY n.pruned_in DESC LIMIT 1), 0) AS newest, count(*) AS missed
FROM (
    SELECT s.stream, s.last_seq, COALESCE(s.last_position, (SELECT e.last_position FROM event_streams AS e
        WHERE e.tenant_id = s.tenant_id AND e.stream = s.stream)) AS place
    FROM event_stubs AS s WHERE s.tenant_id = %(tenant)s AND s.pruned_in > %(known)s::xid8
) AS p
WHERE p.place > %(after)s::xid8
   OR (p.place = %(after)s::xid8 AND (p.stream COLLATE "C", p.last_seq) > (%(stream)s COLLATE "C", %(seq)s))
"""
_MISPLACED = """
SELECT p.stream, min(p.seq) AS seq
FROM (
    SELECT e.stream, e.seq, e.feed_position AS place,
           lag(e.feed_position) OVER (PARTITION BY e.stream ORDER BY e.seq) AS before
    FROM events AS e {covered}
    WHERE e.tenant_id = %(tenant)s AND (%(stream)s::text IS NULL OR e.stream = %(stream)s) {newer}
) AS p JOIN event_streams AS s ON s.tenant_id = %(tenant)s AND s.stream = p.stream
WHERE p.place < p.before OR p.place > s.last_position OR (p.seq = s.last_seq AND p.place <> s.last_position)
GROUP BY p.stream
"""
_MISPLACED_ANYWHERE = _MISPLACED.format(covered="", newer="")
_MISPLACED_SINCE = _MISPLACED.format(
    covered="LEFT JOIN LATERAL (SELECT h.last_seq FROM event_checkpoint_heads AS h WHERE h.tenant_id = e.tenant_id "
    "AND h.stream = e.stream AND h.number <= %(after)s ORDER BY h.number DESC LIMIT 1) AS c ON true",
    newer="AND e.seq > COALESCE(c.last_seq, 0)",
)
_BLOCKING = (
    "SELECT pid FROM pg_locks WHERE locktype = 'transactionid' AND granted AND mode = 'ExclusiveLock' "
    "AND transactionid::text::bigint = %s"
)
_HEADS = (
    "SELECT s.stream, s.last_seq, s.last_hash, COALESCE((SELECT max(e.seq) FROM events AS e "
    "WHERE e.tenant_id = s.tenant_id AND e.stream = s.stream), p.last_seq, 0) AS stored_seq, "
    "p.last_seq AS stub_seq, p.last_hash AS stub_hash, p.number AS stub_number, "
    "EXISTS (SELECT FROM event_checkpoint_heads AS h WHERE h.tenant_id = s.tenant_id AND h.stream = s.stream "
    "AND h.number = p.number AND h.last_seq = p.last_seq AND h.last_hash = p.last_hash) AS covered "
    "FROM event_streams AS s LEFT JOIN LATERAL (SELECT b.last_seq, b.last_hash, b.number FROM event_stubs AS b "
    "WHERE b.tenant_id = s.tenant_id AND b.stream = s.stream ORDER BY b.last_seq DESC LIMIT 1) AS p ON true "
    "WHERE s.tenant_id = %s ORDER BY s.stream"
)
_XIDS = 2**32  # a lock names the lower half of a transaction's id


class PostgresEvents:
    """Events in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def read(self, tenant_id: UUID, stream: str, *, after: int = 0, limit: int = 500) -> Sequence[Event]:
        """Events of one stream in order, from sequence `after` + 1."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT {_COLUMNS}, {_OUTLASTING} FROM events WHERE tenant_id = %s AND stream = %s AND seq > %s "  # noqa: S608  # literal
                "ORDER BY seq LIMIT %s".encode(),
                [tenant_id, stream, after, limit],
            )
            return [_event(row) for row in await cursor.fetchall()]

    async def feed(self, tenant_id: UUID, *, after: FeedCursor = BEGINNING, limit: int = 500) -> FeedPage:
        """Events of all streams after a cursor, as far as nothing can come before them any more."""
        after = after.of(tenant_id)
        async with self._gateway.transaction(tenant_id) as connection:
            horizon = await _horizon(connection, tenant_id, after)
            cursor = await connection.execute(
                _FEED.encode(),
                {
                    "tenant": tenant_id,
                    "after": str(after.position),
                    "stream": after.stream,
                    "seq": after.seq,
                    "horizon": horizon,
                    "limit": limit,
                },
            )
            rows = await cursor.fetchall()
            newest = await _pruned(connection, tenant_id, after)  # looked at last, so that no pruning slips in between
            held_back = await _held_back(connection, tenant_id, horizon) if len(rows) < limit else None
            for row in rows:
                after = FeedCursor(int(row.pop("feed_position")), row["stream"], row["seq"], tenant=str(tenant_id))
            cursor_after = replace(after, pruned=newest)
            return FeedPage(events=[_event(row) for row in rows], cursor=cursor_after, held_back=held_back)

    async def misplaced(self, tenant_id: UUID, *, stream: str | None = None, after: int = 0) -> Mapping[str, int]:
        """By stream, the first event whose place in the feed is not where its stream has it."""
        async with self._gateway.transaction(tenant_id, longest=LONGEST_WALK_SECONDS) as connection:
            query = _MISPLACED_SINCE if after else _MISPLACED_ANYWHERE
            values = {"tenant": tenant_id, "stream": stream, "after": after}
            cursor = await connection.execute(query.encode(), values)
            return {row["stream"]: row["seq"] for row in await cursor.fetchall()}

    async def fold(self, tenant_id: UUID, apply: Callable[[Event], None]) -> Standing:
        """Hand every event to `apply`, in the order of its stream, and answer what the tables said at that instant."""
        return await asyncio.to_thread(self._fold, tenant_id, apply)

    def _fold(self, tenant_id: UUID, apply: Callable[[Event], None]) -> Standing:
        with self._gateway.reading(tenant_id) as connection:

            def rows(table: str) -> list[dict[str, Any]]:
                with connection.cursor(row_factory=dict_row) as cursor:
                    query = f"SELECT * FROM {table} WHERE tenant_id = %s"  # noqa: S608  # one of four literals
                    return cursor.execute(query.encode(), [tenant_id]).fetchall()

            with connection.cursor(name="every_event", row_factory=dict_row) as events:
                events.itersize = _BATCH
                for row in events.execute(_EVERYTHING.encode(), [tenant_id]):
                    apply(event_row(row))
            return Standing(
                runs={row["run_id"]: run_standing(row) for row in rows("run_states")},
                tickets={row["id"]: ticket_standing(ticket_row(row)) for row in rows("approval_tickets")},
                budgets=dict(map(budget_standing, rows("budgets"))),
                pruned=frozenset(row["stream"] for row in rows("event_stubs")),
            )

    async def heads(self, tenant_id: UUID) -> Sequence[StreamHead]:
        """Every stream of the tenant with its head."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(_HEADS, [tenant_id])
            return [_head(row) for row in await cursor.fetchall()]


def _event(row: dict[str, Any]) -> Event:
    del row["outlasting"]
    return event_row(row)


def _head(row: Mapping[str, Any]) -> StreamHead:
    stub = None
    if row["stub_seq"] is not None:
        stub = Stub(seq=row["stub_seq"], hash=row["stub_hash"], checkpoint=row["stub_number"], covered=row["covered"])
    return StreamHead(
        stream=row["stream"],
        last_seq=row["last_seq"],
        last_hash=row["last_hash"],
        stored_seq=row["stored_seq"],
        stub=stub,
    )


async def _horizon(connection: Session, tenant_id: UUID, after: FeedCursor) -> str:
    cursor = await connection.execute(_HORIZON, [tenant_id])
    row: Any = await cursor.fetchone()
    if row["foreign"]:
        raise Conflict(
            f"events carry transaction ids that this server has not reached ({row['next']}): they were restored from "
            "another server; raise this one's above them with `pg_resetwal --epoch` while it is stopped",
            reason="feed_restored",
        )
    if after.position >= int(row["next"]):
        raise InvalidRequest("this cursor was given by another database; leave it out to begin anew", field="cursor")
    return str(row["horizon"])


async def _pruned(connection: Session, tenant_id: UUID, after: FeedCursor) -> int:
    """The newest pruning; refuses a reader that has not seen what went."""
    values = {"tenant": tenant_id, "known": str(max(after.pruned, 0)), "after": str(after.position)}
    cursor = await connection.execute(_PRUNED, {**values, "stream": after.stream, "seq": after.seq})
    row: Any = await cursor.fetchone()
    newest = int(row["newest"])
    if row["missed"] and after != BEGINNING.of(tenant_id):
        raise FeedPruned(streams=row["missed"], cursor=replace(after, pruned=newest).encode())
    return newest


async def _held_back(connection: Session, tenant_id: UUID, horizon: str) -> HeldBack | None:
    cursor = await connection.execute(_HELD_BACK, [tenant_id, horizon, _COUNTED])
    row: Any = await cursor.fetchone()
    if not row["events"]:
        return None
    cursor = await connection.execute(_BLOCKING, [int(horizon) % _XIDS])
    blocking = await cursor.fetchone()
    return HeldBack(
        events=row["events"], since=row["since"], blocking_pid=blocking["pid"] if blocking is not None else None
    )
