"""Leases of named resources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.limits.leases import SURELY_OVER_SECONDS, ResourceLease, lease_lost
from plm_engine_core.control_plane.storage.ports import Connection
from plm_engine_core.control_plane.storage.postgres.callers import fetched
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, translated
from plm_engine_core.control_plane.storage.rows import lease_told, resource_lease_row
from plm_engine_core.control_plane.vocabulary import EventKind

_ACQUIRE = """
INSERT INTO resource_leases AS l (tenant_id, name, owner, fencing_token, expires_at)
VALUES (%(tenant)s, %(name)s, %(owner)s, 1, clock_timestamp() + make_interval(secs => %(seconds)s))
ON CONFLICT (tenant_id, name) DO UPDATE SET owner = EXCLUDED.owner, fencing_token = l.fencing_token + 1,
    taken_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
WHERE l.expires_at IS NULL OR l.expires_at <= clock_timestamp()
    OR l.expires_at > clock_timestamp() + make_interval(secs => %(surely_over)s)
RETURNING *
"""
_NAMED = "WHERE tenant_id = %(tenant)s AND name = %(name)s AND fencing_token = %(token)s "


class PostgresResourceLeases:
    """Leases of named resources in PostgreSQL, by the database's clock only."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def acquire(
        self, tenant_id: UUID, name: str, *, owner: str, seconds: float, actor: str
    ) -> ResourceLease | None:
        """Take the lease of a name that nobody holds."""
        values = {"tenant": tenant_id, "name": name, "owner": owner, "seconds": seconds}
        values["surely_over"] = SURELY_OVER_SECONDS
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(_ACQUIRE, values)
            if (row := await cursor.fetchone()) is None:
                return None
            lease = resource_lease_row(row)
            await self._gateway.append(
                connection, tenant_id, TENANT_STREAM, EventKind.LEASE_TAKEN, actor, lease_told(lease)
            )
            return lease

    async def renew(self, lease: ResourceLease, *, seconds: float) -> ResourceLease:
        """Let a lease last from now on, while nobody took its name and it was not released."""
        change = "UPDATE resource_leases SET expires_at = clock_timestamp() + make_interval(secs => %(seconds)s) "
        async with self._gateway.transaction(lease.tenant_id) as connection:
            row = await _one(connection, f"{change}{_NAMED}AND expires_at IS NOT NULL RETURNING *", lease, seconds)
            if row is None:
                raise lease_lost(lease)
            return resource_lease_row(row)

    async def release(self, lease: ResourceLease, *, actor: str) -> None:
        """End a lease; doing so again changes nothing."""
        change = "UPDATE resource_leases SET expires_at = NULL "
        async with self._gateway.transaction(lease.tenant_id) as connection:
            if await _one(connection, f"{change}{_NAMED}AND expires_at IS NOT NULL RETURNING *", lease) is not None:
                await self._gateway.append(
                    connection, lease.tenant_id, TENANT_STREAM, EventKind.LEASE_RELEASED, actor, lease_told(lease)
                )
            elif await _one(connection, f"SELECT * FROM resource_leases {_NAMED}", lease) is None:  # noqa: S608  # literals
                raise lease_lost(lease)

    async def require(self, lease: ResourceLease, *, connection: Connection | None = None) -> None:
        """Refuse a holder that is none any more; in a caller's transaction nobody can take the name before its end."""
        held = f"SELECT * FROM resource_leases {_NAMED}AND expires_at > clock_timestamp() FOR SHARE"  # noqa: S608  # literals
        if connection is None:
            async with self._gateway.transaction(lease.tenant_id) as session:
                row = await _one(session, held, lease)
        else:
            with translated():
                await fetched(connection, b"SELECT engine_enter_v1(%s)", [lease.tenant_id])
                row = await fetched(connection, held.encode(), _values(lease))
        if row is None:
            raise lease_lost(lease)

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLease]:
        """The leases that are held now, by name."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM resource_leases WHERE tenant_id = %s AND expires_at > clock_timestamp() "
                'ORDER BY name COLLATE "C" LIMIT %s',
                [tenant_id, limit],
            )
            return [resource_lease_row(row) for row in await cursor.fetchall()]


async def _one(
    connection: Session, query: str, lease: ResourceLease, seconds: float | None = None
) -> Mapping[str, Any] | None:
    cursor = await connection.execute(query.encode(), {**_values(lease), "seconds": seconds})
    return await cursor.fetchone()


def _values(lease: ResourceLease) -> dict[str, Any]:
    return {"tenant": lease.tenant_id, "name": lease.name, "token": lease.fencing_token}
