"""Leases of named resources in memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.limits.leases import SURELY_OVER_SECONDS, ResourceLease, lease_lost
from plm_engine_core.control_plane.storage.memory.books import Books, Row, refuse_connection
from plm_engine_core.control_plane.storage.memory.values import storable_text
from plm_engine_core.control_plane.storage.ports import Connection
from plm_engine_core.control_plane.storage.rows import lease_told, resource_lease_row
from plm_engine_core.control_plane.vocabulary import EventKind

_SURELY_OVER = timedelta(seconds=SURELY_OVER_SECONDS)


class MemoryResourceLeases:
    """Leases of named resources in memory, by the clock of the books."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def acquire(
        self, tenant_id: UUID, name: str, *, owner: str, seconds: float, actor: str
    ) -> ResourceLease | None:
        """Take the lease of a name that nobody holds."""
        async with self._books.turn() as books:
            books.require_tenant(tenant_id)
            row, now = books.resource_leases.get(tenant_id, name), books.now()
            if row is not None and row["expires_at"] is not None and now < row["expires_at"] <= now + _SURELY_OVER:
                return None
            token = row["fencing_token"] + 1 if row is not None else 1
            taken: dict[str, Any] = {"tenant_id": tenant_id, "name": storable_text(name), "owner": storable_text(owner)}
            taken |= {"fencing_token": token, "taken_at": now, "expires_at": now + timedelta(seconds=seconds)}
            lease = resource_lease_row(books.resource_leases.put(tenant_id, name, taken))
            books.append(tenant_id, TENANT_STREAM, EventKind.LEASE_TAKEN, actor, lease_told(lease))
            return lease

    async def renew(self, lease: ResourceLease, *, seconds: float) -> ResourceLease:
        """Let a lease last from now on, while nobody took its name and it was not released."""
        async with self._books.turn() as books:
            row = _row(books, lease)
            if row["expires_at"] is None:
                raise lease_lost(lease)
            expires_at = books.now() + timedelta(seconds=seconds)
            return resource_lease_row(books.resource_leases.change(lease.tenant_id, lease.name, expires_at=expires_at))

    async def release(self, lease: ResourceLease, *, actor: str) -> None:
        """End a lease; doing so again changes nothing."""
        async with self._books.turn() as books:
            if _row(books, lease)["expires_at"] is None:
                return
            books.resource_leases.change(lease.tenant_id, lease.name, expires_at=None)
            books.append(lease.tenant_id, TENANT_STREAM, EventKind.LEASE_RELEASED, actor, lease_told(lease))

    async def require(self, lease: ResourceLease, *, connection: Connection | None = None) -> None:
        """Refuse a holder that is none any more."""
        refuse_connection(connection)
        async with self._books.turn() as books:
            expires_at = _row(books, lease)["expires_at"]
            if expires_at is None or expires_at <= books.now():
                raise lease_lost(lease)

    async def list(self, tenant_id: UUID, *, limit: int) -> Sequence[ResourceLease]:
        """The leases that are held now, by name."""
        async with self._books.turn() as books:
            held = [row for row in books.resource_leases.rows(tenant_id) if row["expires_at"] is not None]
            held = [row for row in held if row["expires_at"] > books.now()]
            return [resource_lease_row(row) for row in sorted(held, key=lambda row: row["name"])[:limit]]


def _row(books: Books, lease: ResourceLease) -> Row:
    """The row of a lease that nobody took since."""
    row = books.resource_leases.get(lease.tenant_id, lease.name)
    if row is None or row["fencing_token"] != lease.fencing_token:
        raise lease_lost(lease)
    return row
