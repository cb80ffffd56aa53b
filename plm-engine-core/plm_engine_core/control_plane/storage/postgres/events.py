"""Event streams."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from plm_engine_core.control_plane.events.event import Event
from plm_engine_core.control_plane.events.verify import StreamHead
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway
from plm_engine_core.control_plane.storage.postgres.rows import event_row

_COLUMNS = "tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload"


class PostgresEvents:
    """Events in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def read(self, tenant_id: UUID, stream: str, *, after: int = 0, limit: int = 500) -> Sequence[Event]:
        """Events of one stream in order, from sequence `after` + 1."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT {_COLUMNS} FROM events WHERE tenant_id = %s AND stream = %s AND seq > %s "  # noqa: S608  # literal
                "ORDER BY seq LIMIT %s".encode(),
                [tenant_id, stream, after, limit],
            )
            return [event_row(row) for row in await cursor.fetchall()]

    async def heads(self, tenant_id: UUID) -> Sequence[StreamHead]:
        """Every stream of the tenant with its head."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT s.stream, s.last_seq, s.last_hash, COALESCE((SELECT max(e.seq) FROM events AS e "
                "WHERE e.tenant_id = s.tenant_id AND e.stream = s.stream), 0) AS stored_seq "
                "FROM event_streams AS s WHERE s.tenant_id = %s ORDER BY s.stream",
                [tenant_id],
            )
            return [StreamHead(**row) for row in await cursor.fetchall()]
