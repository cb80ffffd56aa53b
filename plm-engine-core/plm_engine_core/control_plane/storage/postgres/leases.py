"""Leases: who moves a run forward, and how it is given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import FencingLost
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.limits.leases import LONGEST_LEASE_SECONDS, check_seconds
from plm_engine_core.control_plane.runs.run import Heartbeat, Lease, Orphan
from plm_engine_core.control_plane.storage.leasing import FINISH_KINDS, RECOVERY, open_call
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, jsonb
from plm_engine_core.control_plane.storage.rows import run_row
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, EventKind, RunKind, RunState

# Published rule of `runs.quality_level`. Bronze: every call is settled, so the ledger is complete. Silver: besides, the
# run had effects and each was verified. Gold: besides, a human approved each of them, by itself or by an approval scope
# (the event of a grant names the one that let its call through).
_SET_QUALITY = """
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
                              AND (t.consumed_at IS NOT NULL OR c.step IS NOT NULL)) AS approved
    FROM run_steps AS s LEFT JOIN approval_tickets AS t ON t.tenant_id = s.tenant_id AND t.id = s.ticket_id
    LEFT JOIN (
        SELECT (e.payload::jsonb ->> 'step')::integer AS step, (e.payload::jsonb ->> 'attempt')::integer AS attempt
        FROM events AS e WHERE e.tenant_id = %(tenant)s AND e.stream = %(stream)s AND e.kind = 'step_granted'
          AND e.payload LIKE '%%"approval_scope_id"%%'  -- spares most events from being parsed
          AND e.payload::jsonb #>> '{answer,approval_scope_id}' IS NOT NULL
    ) AS c ON c.step = s.step_index AND c.attempt = s.attempt
    WHERE s.tenant_id = %(tenant)s AND s.run_id = %(run)s
) AS facts
WHERE runs.tenant_id = %(tenant)s AND runs.id = %(run)s AND runs.quality_level = 'pending'
"""

# How long a lease was given for is known where it was not renewed since the run last changed; an unknown one is none.
_SET_BACK = """
UPDATE run_states SET updated_at = LEAST(updated_at, clock_timestamp()),
    lease_expires_at = CASE WHEN lease_expires_at IS NOT NULL THEN LEAST(lease_expires_at, clock_timestamp() + LEAST(
        make_interval(secs => %s), CASE WHEN updated_at > clock_timestamp() AND lease_expires_at > updated_at
                                        THEN lease_expires_at - updated_at END)) END
WHERE tenant_id = %s AND run_id = %s AND engine_is_ahead_v1(run_states, %s)
"""


class PostgresLeases:
    """Leases in PostgreSQL, by the database's clock only."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def take(
        self, tenant_id: UUID, run_id: UUID, *, owner: str, seconds: float, kind: RunKind = RunKind.HOSTED
    ) -> Lease | None:
        """Take the lease; the fencing token grows with every holder. A queued run under a halt is parked instead."""
        check_seconds(seconds)
        async with self._gateway.transaction(tenant_id) as connection:
            halt = await _standing_halt(connection, tenant_id, run_id)
            await self._time_out_tickets(connection, tenant_id, run_id)
            if halt is not None and await self._park(connection, tenant_id, run_id, halt, owner):
                return None
            cursor = await connection.execute(
                "UPDATE run_states SET state = 'running', lease_owner = %(owner)s, reason = NULL, message = NULL, "
                "lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s), "
                "fencing_token = fencing_token + 1, updated_at = clock_timestamp() "
                "WHERE tenant_id = %(tenant)s AND run_id = %(run)s AND kind = %(kind)s AND (state = 'queued' "
                "OR (state = 'running' AND lease_expires_at <= clock_timestamp())) RETURNING *",
                {"tenant": tenant_id, "run": run_id, "owner": owner, "seconds": seconds, "kind": kind.value},
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
        check_seconds(seconds)
        async with self._gateway.connection() as connection:
            cursor = await connection.execute(
                "SELECT engine_renew_lease_v1(%s, %s, %s::bigint, %s) AS beat",
                [tenant_id, run_id, fencing_token, seconds],
            )
            row = await cursor.fetchone()
        beat = row["beat"] if row is not None else None
        if beat is None:
            return Heartbeat(held=False)
        return Heartbeat(held=True, cancel_requested=beat["cancel_requested"], halt=beat["halt"])

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
        again_after_seconds: float = 0.0,
    ) -> RunState:
        """Give the lease back; a run is parked as halted only while a halt stands, else it is queued again."""
        async with self._gateway.transaction(tenant_id) as connection:
            if state is RunState.HALTED and await _standing_halt(connection, tenant_id, run_id) is None:
                state, reason, message = RunState.QUEUED, None, None
            terminal = state in TERMINAL_RUN_STATES
            cursor = await connection.execute(
                "UPDATE run_states SET state = %(state)s, reason = %(reason)s, message = %(message)s, "
                "result = %(result)s, lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp(), "
                "finished_at = CASE WHEN %(terminal)s THEN clock_timestamp() END "
                "WHERE tenant_id = %(tenant)s AND run_id = %(run)s AND fencing_token = %(token)s AND state = 'running'",
                {
                    "state": state.value,
                    "reason": reason,
                    "message": message,
                    "result": jsonb(result, root="result") if result is not None else None,
                    "terminal": terminal,
                    "tenant": tenant_id,
                    "run": run_id,
                    "token": fencing_token,
                },
            )
            if not cursor.rowcount:
                raise FencingLost(f"run {run_id} is no longer held with fencing token {fencing_token}")
            if terminal:
                await close_books(connection, tenant_id, run_id)
            payload = {"state": state.value, "reason": reason, "message": message, "result": result}
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(run_id),
                FINISH_KINDS[state],
                actor,
                {key: value for key, value in payload.items() if value is not None},
            )
            if state is RunState.QUEUED and again_after_seconds > 0:
                await self._delivery.enqueue(connection, tenant_id, run_id, after_seconds=again_after_seconds)
            elif state is RunState.QUEUED:
                await self._delivery.enqueue(connection, tenant_id, run_id)
            return state

    async def abandoned(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Runs that nobody drives although somebody should, over all tenants."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute(
                "SELECT tenant_id, run_id FROM engine_abandoned_runs_v4(%s, %s)", [limit, patience_seconds]
            )
            return [(row["tenant_id"], row["run_id"]) for row in await cursor.fetchall()]

    async def orphaned(self, limit: int, *, forsaken_seconds: float) -> Sequence[Orphan]:
        """Runs of kind `external` that their holder left, over all tenants."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute(
                "SELECT tenant_id, run_id, fencing_token, forsaken FROM engine_orphaned_runs_v1(%s, %s)",
                [limit, forsaken_seconds],
            )
            return [Orphan(**row) for row in await cursor.fetchall()]

    async def expired(self, limit: int) -> Sequence[tuple[UUID, UUID]]:
        """Running runs, over all tenants, with a grant that ran out before its call began."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute("SELECT tenant_id, run_id FROM engine_expired_grants_v1(%s)", [limit])
            return [(row["tenant_id"], row["run_id"]) for row in await cursor.fetchall()]

    async def revive(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Enqueue a drive job if the run is still abandoned; taking its lease settles everything else."""
        async with self._gateway.transaction(tenant_id) as connection:
            expired = await self._time_out_tickets(connection, tenant_id, run_id)
            cursor = await connection.execute(
                "UPDATE run_states SET updated_at = clock_timestamp() "
                "WHERE tenant_id = %s AND run_id = %s AND engine_is_abandoned_v4(run_states, %s) "
                "RETURNING state",
                [tenant_id, run_id, patience_seconds],
            )
            row = await cursor.fetchone()
            if row is None and not expired:
                return False
            was = RunState(row["state"]) if row is not None else RunState.QUEUED
            if was in (RunState.HALTED, RunState.AWAITING_APPROVAL):
                await queue_again(connection, tenant_id, run_id, was=was)
                await self._gateway.append(
                    connection, tenant_id, run_stream(run_id), EventKind.RUN_RESUMED, RECOVERY, {"was": was.value}
                )
            await self._delivery.enqueue(connection, tenant_id, run_id)
            return True

    async def ahead(self, limit: int, *, patience_seconds: float) -> Sequence[tuple[UUID, UUID]]:
        """Runs, over all tenants, whose times a clock wrote that was ahead."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute(
                "SELECT tenant_id, run_id FROM engine_runs_ahead_v1(%s, %s)", [limit, patience_seconds]
            )
            return [(row["tenant_id"], row["run_id"]) for row in await cursor.fetchall()]

    async def set_back(self, tenant_id: UUID, run_id: UUID, *, patience_seconds: float) -> bool:
        """Count the times of a run from now on, if they still lie ahead."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(_SET_BACK, [LONGEST_LEASE_SECONDS, tenant_id, run_id, patience_seconds])
            return bool(cursor.rowcount)

    async def _park(
        self, connection: Session, tenant_id: UUID, run_id: UUID, halt: Mapping[str, Any], owner: str
    ) -> bool:
        """Park a queued run under a halt; one whose worker is gone has to be closed first, by whoever takes it over."""
        message = f"a {halt['scope']} halt stands: {halt['reason']}"
        cursor = await connection.execute(
            "UPDATE run_states SET state = 'halted', reason = 'halted', message = %s, result = NULL, "
            "updated_at = clock_timestamp() "
            "WHERE tenant_id = %s AND run_id = %s AND state = 'queued'",
            [message, tenant_id, run_id],
        )
        if cursor.rowcount:
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(run_id),
                EventKind.RUN_PARKED,
                f"worker:{owner}",
                {"state": RunState.HALTED.value, "reason": "halted", "message": message},
            )
        return bool(cursor.rowcount)

    async def _time_out_tickets(self, connection: Session, tenant_id: UUID, run_id: UUID) -> bool:
        """Lock the run and time its ticket out if the deadline passed; says whether the run was queued by that."""
        cursor = await connection.execute(
            "SELECT engine_time_out_tickets_v2(%s, %s, %s) AS expired", [tenant_id, run_id, RECOVERY]
        )
        row = await cursor.fetchone()
        return row is not None and bool(row["expired"])


async def queue_again(connection: Session, tenant_id: UUID, run_id: UUID, *, was: RunState) -> None:
    """Queue a parked run; the caller enqueues its job and records why."""
    await connection.execute(
        "UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp() "
        "WHERE tenant_id = %s AND run_id = %s AND state = %s",
        [tenant_id, run_id, was.value],
    )


async def close_books(connection: Session, tenant_id: UUID, run_id: UUID) -> None:
    """What ends with a run: questions still open to humans, and the time in which its quality is undecided.

    Raises:
        Conflict: a call of the run is not settled; what it had reserved would never come back.
    """
    cursor = await connection.execute(
        "SELECT id FROM grants WHERE tenant_id = %s AND run_id = %s AND state <> 'settled' LIMIT 1", [tenant_id, run_id]
    )
    if (row := await cursor.fetchone()) is not None:
        raise open_call(run_id, row["id"])
    await connection.execute(
        "UPDATE approval_tickets SET state = 'cancelled' WHERE tenant_id = %s AND run_id = %s AND state = 'pending'",
        [tenant_id, run_id],
    )
    await connection.execute(_SET_QUALITY, {"tenant": tenant_id, "run": run_id, "stream": run_stream(run_id)})


async def _standing_halt(connection: Session, tenant_id: UUID, run_id: UUID) -> Mapping[str, Any] | None:
    """The halt over a run, under locks that keep it so until the transaction ends; call it before the run is locked."""
    cursor = await connection.execute("SELECT engine_run_halt_v2(%s, %s, true) AS halt", [tenant_id, run_id])
    row = await cursor.fetchone()
    return row["halt"] if row is not None else None
