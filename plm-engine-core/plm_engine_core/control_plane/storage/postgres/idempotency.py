"""Idempotency records, as time takes them."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.storage.postgres.gateway import Gateway
from plm_engine_core.control_plane.sweeping import ExpiredBatch


class PostgresIdempotency:
    """The expiry of idempotency records in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def expire(self, tenant_id: UUID, *, keep_seconds: float, limit: int) -> ExpiredBatch:
        """Remove one batch of the records of runs that ended long enough ago, in a transaction of its own."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT engine_expire_records_v1(%s, %s, %s) AS answer", [tenant_id, keep_seconds, limit]
            )
            row = await cursor.fetchone()
            assert row is not None  # noqa: S101  # a function answers
            return ExpiredBatch(**row["answer"])
