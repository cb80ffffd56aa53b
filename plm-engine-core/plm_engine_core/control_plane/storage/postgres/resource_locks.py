"""Locks of resources; `resource_locks_v1.sql` takes them, and says who holds one."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from plm_engine_core.control_plane.limits.locks import ResourceLock
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway
from plm_engine_core.control_plane.storage.rows import resource_lock_row

_HELD = """
SELECT l.*, s.resource FROM (
    SELECT r.*, engine_lock_holder_v1(r) AS held FROM resource_locks AS r WHERE r.tenant_id = %(tenant)s OFFSET 0) AS l
JOIN run_steps AS s ON s.tenant_id = l.tenant_id AND s.run_id = l.run_id AND s.step_index = l.step_index
    AND s.attempt = l.attempt
WHERE l.held <> 'expired' ORDER BY l.taken_at, l.grant_id LIMIT %(limit)s
"""


class PostgresResourceLocks:
    """Locks of resources in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLock]:
        """The locks that are held now, the longest held first."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(_HELD, {"tenant": tenant_id, "limit": limit})
            return [resource_lock_row(row) for row in await cursor.fetchall()]

    async def sweep(self, tenant_id: UUID, *, limit: int) -> int:
        """Remove records of locks whose call is over, in a transaction of its own."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute("SELECT engine_sweep_locks_v1(%s, %s) AS removed", [tenant_id, limit])
            row = await cursor.fetchone()
            assert row is not None  # noqa: S101  # a function answers
            removed: int = row["removed"]
            return removed
