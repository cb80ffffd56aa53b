"""Approval tickets, votes, comments and approval scopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.hitl.ticket import ApprovalScope, ApprovalTicket, Comment, Vote
from plm_engine_core.control_plane.storage.commands import ask_json, input_json, vote_json
from plm_engine_core.control_plane.storage.ports import AskCommand, Delivery, InputCommand, VoteCommand
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, jsonb
from plm_engine_core.control_plane.storage.rows import comment_row, scope_row, ticket_row, vote_row
from plm_engine_core.control_plane.vocabulary import TicketState

_TICKETS = (
    b"SELECT t.*, s.output AS input FROM approval_tickets AS t LEFT JOIN run_steps AS s "
    b"ON t.capability = 'provide_input' AND s.tenant_id = t.tenant_id AND s.run_id = t.run_id "
    b"AND s.step_index = t.step_index AND s.attempt = t.attempt "
)
"""Tickets, each ask with the input that was given: it is the output of the step that asked."""


class PostgresApprovals:
    """Tickets in PostgreSQL."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def get(self, tenant_id: UUID, ticket_id: UUID) -> ApprovalTicket:
        """One ticket."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                _TICKETS + b"WHERE t.tenant_id = %s AND t.id = %s", [tenant_id, ticket_id]
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
                _TICKETS + b"WHERE t.tenant_id = %(tenant)s "
                b"AND (%(at)s::timestamptz IS NULL OR (t.created_at, t.id) > (%(at)s, %(ticket)s::uuid)) "
                b"AND (%(state)s::text IS NULL OR t.state = %(state)s) "
                b"ORDER BY t.created_at, t.id LIMIT %(limit)s",
                {"tenant": tenant_id, "at": at, "ticket": ticket_id, "state": state and state.value, "limit": limit},
            )
            return [ticket_row(row) for row in await cursor.fetchall()]

    async def votes(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Vote]:
        """The first one first."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM approval_votes WHERE tenant_id = %s AND ticket_id = %s ORDER BY voted_at, voter",
                [tenant_id, ticket_id],
            )
            return [vote_row(row) for row in await cursor.fetchall()]

    async def decide(self, command: VoteCommand) -> Mapping[str, Any]:
        """Count one vote, and enqueue the parked run in the same commit."""
        return await self._decided(command.tenant_id, "engine_decide_ticket_v3", vote_json(command), root="vote")

    async def ask(self, command: AskCommand) -> Mapping[str, Any]:
        """Book an ask, once."""
        booking = jsonb(ask_json(command), root="ask")
        async with self._gateway.transaction(command.tenant_id) as connection:
            cursor = await connection.execute("SELECT engine_ask_v1(%s) AS answer", [booking])
            row = await cursor.fetchone()
            return row["answer"] if row is not None else {}

    async def provide_input(self, command: InputCommand) -> Mapping[str, Any]:
        """Take an input, and enqueue the parked run in the same commit."""
        return await self._decided(command.tenant_id, "engine_provide_input_v1", input_json(command), root="input")

    async def _decided(
        self, tenant_id: UUID, function: str, command: Mapping[str, Any], *, root: str
    ) -> Mapping[str, Any]:
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT {function}(%s) AS answer".encode(),  # a literal
                [jsonb(command, root=root)],
            )
            row = await cursor.fetchone()
            answer: Mapping[str, Any] = row["answer"] if row is not None else {}
            if answer["deliver"]:
                await self._delivery.enqueue(connection, tenant_id, UUID(answer["run_id"]))
            return answer

    async def comments(self, tenant_id: UUID, ticket_id: UUID) -> Sequence[Comment]:
        """The first one first."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM approval_comments WHERE tenant_id = %s AND ticket_id = %s ORDER BY created_at, id",
                [tenant_id, ticket_id],
            )
            return [comment_row(row) for row in await cursor.fetchall()]

    async def comment(
        self, tenant_id: UUID, ticket_id: UUID, comment_id: UUID, *, body: str, author: UUID, actor: str
    ) -> Comment:
        """Add a comment, with its event."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM engine_comment_ticket_v2(%s, %s, %s, %s, %s, %s)",
                [tenant_id, ticket_id, comment_id, author, actor, body],
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("approval ticket", ticket_id)
            return comment_row(row)

    async def scopes(
        self, tenant_id: UUID, *, limit: int, after: tuple[datetime, UUID] | None
    ) -> Sequence[ApprovalScope]:
        """Oldest first."""
        at, scope_id = after or (None, None)
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM approval_scopes WHERE tenant_id = %(tenant)s "
                "AND (%(at)s::timestamptz IS NULL OR (created_at, id) > (%(at)s, %(scope)s::uuid)) "
                "ORDER BY created_at, id LIMIT %(limit)s",
                {"tenant": tenant_id, "at": at, "scope": scope_id, "limit": limit},
            )
            return [scope_row(row) for row in await cursor.fetchall()]

    async def revoke_scope(self, tenant_id: UUID, scope_id: UUID, *, by: UUID, actor: str) -> ApprovalScope:
        """End an approval scope, with its event."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM engine_revoke_approval_scope_v2(%s, %s, %s, %s)", [tenant_id, scope_id, by, actor]
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("approval scope", scope_id)
            return scope_row(row)
