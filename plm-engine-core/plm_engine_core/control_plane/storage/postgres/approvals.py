"""Approval tickets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.hitl.ticket import ApprovalTicket
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway
from plm_engine_core.control_plane.storage.postgres.rows import ticket_row
from plm_engine_core.control_plane.vocabulary import TicketState


class PostgresApprovals:
    """Tickets in PostgreSQL."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def get(self, tenant_id: UUID, ticket_id: UUID) -> ApprovalTicket:
        """One ticket."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM approval_tickets WHERE tenant_id = %s AND id = %s", [tenant_id, ticket_id]
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("approval ticket", ticket_id)
            return ticket_row(row)

    async def list(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None, state: TicketState | None
    ) -> Sequence[ApprovalTicket]:
        """Oldest first."""
        at, ticket_id = after or (None, None)
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM approval_tickets WHERE tenant_id = %(tenant)s "
                "AND (%(at)s::timestamptz IS NULL OR (created_at, id) > (%(at)s, %(ticket)s::uuid)) "
                "AND (%(state)s::text IS NULL OR state = %(state)s) ORDER BY created_at, id LIMIT %(limit)s",
                {"tenant": tenant_id, "at": at, "ticket": ticket_id, "state": state and state.value, "limit": limit},
            )
            return [ticket_row(row) for row in await cursor.fetchall()]

    async def decide(
        self, tenant_id: UUID, ticket_id: UUID, state: TicketState, *, decided_by: UUID, comment: str, actor: str
    ) -> Mapping[str, Any]:
        """Decide once, and enqueue the parked run in the same commit."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT engine_decide_ticket_v1(%s, %s, %s, %s, %s, %s) AS answer",
                [tenant_id, ticket_id, state.value, decided_by, comment, actor],
            )
            row = await cursor.fetchone()
            answer: Mapping[str, Any] = row["answer"] if row is not None else {}
            if answer["status"] == "decided" or answer["reason"] == "approval_expired":
                await self._delivery.enqueue(connection, tenant_id, UUID(answer["run_id"]))
            return answer
