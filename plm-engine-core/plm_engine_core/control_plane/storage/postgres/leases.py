"""Leases: who moves a run forward, and how it is given back."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import FencingLost
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.runs.run import Heartbeat, Lease
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, jsonb
from plm_engine_core.control_plane.storage.postgres.rows import run_row
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, EventKind, RunState

_FINISH_KINDS = {
    RunState.QUEUED: EventKind.RUN_RESUMED,
    RunState.HALTED: EventKind.RUN_PARKED,
    RunState.SUCCEEDED: EventKind.RUN_SUCCEEDED,
    RunState.FAILED: EventKind.RUN_FAILED,
    RunState.CANCELLED: EventKind.RUN_CANCELLED,
}

# Published rule of `runs.quality_level`. Bronze: every call is settled, so the ledger is complete. Silver: besides, the
# run had effects and each was verified. Gold: besides, a human approved each of them.
SET_QUALITY = """
UPDATE runs SET updated_at = clock_timestamp(), quality_level = (
    CASE WHEN facts.unsettled > 0 THEN 'pending'
         WHEN facts.writes = 0 OR facts.verified < facts.writes THEN 'bronze'
         WHEN facts.approved < facts.writes THEN 'silver'
         ELSE 'gold' END)::quality_level
FROM (
    SELECT count(*) FILTER (WHERE s.state IN ('granted', 'running', 'outcome_unknown')) AS unsettled,
           count(*) FILTER (WHERE s.state = 'succeeded' AND s.decision ->> 'mode' <> 'read') AS writes,
           count(*) FILTER (WHERE s.state = 'succeeded' AND s.decision ->> 'mode' <> 'read'
                              AND s.evidence = 'verified') AS verified,
           count(*) FILTER (WHERE s.state = 'succeeded' AND s.decision ->> 'mode' <> 'read'
                              AND s.ticket_id IS NOT NULL) AS approved
    FROM run_steps AS s WHERE s.tenant_id = %(tenant)s AND s.run_id = %(run)s
) AS facts
WHERE runs.tenant_id = %(tenant)s AND runs.id = %(run)s AND runs.quality_level = 'pending'
"""


class PostgresLeases:
    """Leases in PostgreSQL, by the database's clock only."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def take(self, tenant_id: UUID, run_id: UUID, *, owner: str, seconds: float) -> Lease | None:
        """Take the lease; the fencing token grows with every holder."""
        async with self._gateway.transaction(tenant_id) as connection:
            await expire_tickets(self._gateway, connection, tenant_id, run_id)
            cursor = await connection.execute(
                "UPDATE run_states SET state = 'running', lease_owner = %(owner)s, reason = NULL, message = NULL, "
                "lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s), "
                "fencing_token = fencing_token + 1, updated_at = clock_timestamp() "
                "WHERE tenant_id = %(tenant)s AND run_id = %(run)s AND (state = 'queued' "
                "OR (state = 'running' AND lease_expires_at <= clock_timestamp())) RETURNING *",
                {"tenant": tenant_id, "run": run_id, "owner": owner, "seconds": seconds},
            )
            row = await cursor.fetchone()
            if row is None:
                return None
            run = run_row(row)
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(run_id),
                EventKind.RUN_TAKEN,
                f"worker:{owner}",
                {"fencing_token": run.fencing_token},
            )
            return Lease(run=run, fencing_token=run.fencing_token)

    async def renew(self, tenant_id: UUID, run_id: UUID, *, fencing_token: int, seconds: float) -> Heartbeat:
        """Renew while nobody else took the run."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "UPDATE run_states SET lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s) "
                "WHERE tenant_id = %(tenant)s AND run_id = %(run)s AND fencing_token = %(token)s AND state = 'running' "
                "RETURNING cancel_requested_at IS NOT NULL AS cancel, "
                "engine_standing_halt_v1(tenant_id, run_id) AS halt",
                {"tenant": tenant_id, "run": run_id, "token": fencing_token, "seconds": seconds},
            )
            row = await cursor.fetchone()
            if row is None:
                return Heartbeat(held=False)
            return Heartbeat(held=True, cancel_requested=row["cancel"], halt=row["halt"])

    async def finish(
        self,
        tenant_id: UUID,
        run_id: UUID,
        *,
        fencing_token: int,
        state: RunState,
        actor: str,
        reason: str | None = None,
        message: str | None = None,
        result: Any = None,
    ) -> None:
        """Give the lease back with the run in `state`."""
        terminal = state in TERMINAL_RUN_STATES
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "UPDATE run_states SET state = %(state)s, reason = %(reason)s, message = %(message)s, "
                "result = %(result)s, lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp(), "
                "finished_at = CASE WHEN %(terminal)s THEN clock_timestamp() END "
                "WHERE tenant_id = %(tenant)s AND run_id = %(run)s AND fencing_token = %(token)s AND state = 'running'",
                {
                    "state": state.value,
                    "reason": reason,
                    "message": message,
                    "result": jsonb(result) if result is not None else None,
                    "terminal": terminal,
                    "tenant": tenant_id,
                    "run": run_id,
                    "token": fencing_token,
                },
            )
            if not cursor.rowcount:
                raise FencingLost(f"run {run_id} is no longer held with fencing token {fencing_token}")
            if terminal:
                await connection.execute(SET_QUALITY, {"tenant": tenant_id, "run": run_id})
            payload = {"state": state.value, "reason": reason, "message": message, "result": result}
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(run_id),
                _FINISH_KINDS[state],
                actor,
                {key: value for key, value in payload.items() if value is not None},
            )
            if state is RunState.QUEUED:
                await self._delivery.enqueue(connection, tenant_id, run_id)


async def expire_tickets(gateway: Gateway, connection: Session, tenant_id: UUID, run_id: UUID) -> None:
    """Close tickets past their deadline; the run continues and its call is denied."""
    await connection.execute(
        "SELECT 1 FROM run_states WHERE tenant_id = %s AND run_id = %s FOR UPDATE", [tenant_id, run_id]
    )
    cursor = await connection.execute(
        "UPDATE approval_tickets SET state = 'expired' WHERE tenant_id = %s AND run_id = %s AND state = 'pending' "
        "AND deadline <= clock_timestamp() RETURNING id, step_index, attempt",
        [tenant_id, run_id],
    )
    for row in await cursor.fetchall():
        await connection.execute(
            "UPDATE run_states SET state = 'queued', updated_at = clock_timestamp() "
            "WHERE tenant_id = %s AND run_id = %s AND state = 'awaiting_approval'",
            [tenant_id, run_id],
        )
        await gateway.append(
            connection,
            tenant_id,
            run_stream(run_id),
            EventKind.APPROVAL_EXPIRED,
            "system:recovery",
            {"ticket_id": str(row["id"]), "step": row["step_index"], "attempt": row["attempt"]},
        )
