"""Halts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

import psycopg

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.halts import Halt, HaltDrill
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, is_damage
from plm_engine_core.control_plane.storage.rows import halt_row
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, EventKind, HaltScope, RunState

logger = logging.getLogger(__name__)

_SYSTEM = "halt/system"

_HALTS = """
SELECT h.*, c.revoked, c.in_flight, c.open, c.last_ended_at FROM (
    SELECT id, scope, scope_id, subject, epoch, reason, triggered_by, triggered_at, lifted_by, lifted_at, cancel_seconds
        FROM halts WHERE tenant_id = %(tenant)s
    UNION ALL SELECT id, 'system', NULL, NULL, epoch, reason, triggered_by, triggered_at, lifted_by, lifted_at,
        cancel_seconds FROM halts_system
) AS h CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE NOT k.began) AS revoked, count(*) FILTER (WHERE k.began) AS in_flight,
           count(*) FILTER (WHERE k.began AND g.settled_at IS NULL) AS open,
           max(g.settled_at) FILTER (WHERE k.began) AS last_ended_at
    FROM halt_calls AS k JOIN grants AS g ON g.id = k.grant_id AND g.tenant_id = %(tenant)s
    WHERE k.tenant_id = %(tenant)s AND k.halt_id = h.id
) AS c
"""
_ONE = _HALTS + " WHERE h.id = %(id)s"
_LIST = (
    _HALTS + " WHERE (%(at)s::timestamptz IS NULL OR (h.triggered_at, h.id) < (%(at)s, %(halt)s::uuid)) "
    "AND (NOT %(standing)s OR h.lifted_at IS NULL) ORDER BY h.triggered_at DESC, h.id DESC LIMIT %(limit)s"
)

_PARKED = "SELECT run_id FROM run_states WHERE tenant_id = %(tenant)s AND state = 'halted'"

_KNOWN = {
    HaltScope.RUN: "SELECT FROM run_states WHERE tenant_id = %(tenant)s AND run_id = %(scope_id)s LIMIT 1",
    HaltScope.RUN_GROUP: "SELECT FROM run_states WHERE tenant_id = %(tenant)s AND run_group_id = %(scope_id)s LIMIT 1",
    HaltScope.AGENT: "SELECT FROM run_states WHERE tenant_id = %(tenant)s AND agent_id = %(subject)s LIMIT 1",
}

_OVER = """
(%(scope)s IN ('system', 'tenant') OR (%(scope)s = 'agent' AND r.agent_id = %(subject)s)
    OR (%(scope)s = 'run_group' AND r.run_group_id = %(scope_id)s::uuid)
    OR (%(scope)s = 'run' AND r.run_id = %(scope_id)s::uuid)
    OR (%(scope)s = 'capability' AND {capability} = %(subject)s))
"""
# What a run's newest attempt still wants to use, as `engine_run_halt_v2` has it.
_WANTED = """
(SELECT CASE WHEN s.state IN ('awaiting_approval', 'granted', 'running', 'not_started', 'cancelled', 'superseded')
                  OR s.error ->> 'reason' = 'halted' THEN s.capability END
    FROM run_steps AS s WHERE s.tenant_id = %(tenant)s AND s.run_id = r.run_id
    ORDER BY s.step_index DESC, s.attempt DESC LIMIT 1)
"""
_RUNS_MET = f"""
SELECT r.state, count(*) AS number FROM run_states AS r
WHERE r.tenant_id = %(tenant)s AND r.state <> ALL(%(ended)s) AND {_OVER.format(capability=_WANTED)} GROUP BY r.state
"""  # noqa: S608  # from the two above
_CALLS_MET = f"""
SELECT count(*) FILTER (WHERE g.state = 'issued') AS grants, count(*) FILTER (WHERE g.state = 'begun') AS calls
FROM run_states AS r JOIN grants AS g ON g.tenant_id = %(tenant)s AND g.run_id = r.run_id
    AND g.state IN ('issued', 'begun')
JOIN run_steps AS s ON s.tenant_id = %(tenant)s AND s.run_id = g.run_id AND s.step_index = g.step_index
    AND s.attempt = g.attempt
WHERE r.tenant_id = %(tenant)s AND r.state = 'running' AND {_OVER.format(capability="s.capability")}
"""  # noqa: S608  # from the one above


class PostgresHalts:
    """Halts in PostgreSQL. Triggering waits for what was admitted before it, and holds back what comes after."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def trigger(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        reason: str,
        by: UUID,
        actor: str,
        cancel_seconds: float,
        registered: bool = False,
    ) -> Halt:
        """Commit a halt, or answer the one that stands in this scope."""
        values = {
            "tenant": tenant_id,
            "id": new_id(),
            "scope": scope.value,
            "scope_id": tenant_id if scope is HaltScope.TENANT else scope_id,
            "subject": subject,
            "reason": reason,
            "by": by,
            "cancel_seconds": cancel_seconds,
        }
        async with self._gateway.transaction(tenant_id) as connection:
            await _lock(connection, _lock_name(tenant_id, scope, scope_id, subject))
            standing = await self._standing(connection, scope, values)
            if standing is not None:
                return await self._read(connection, tenant_id, standing)
            if not registered:
                await _require_known(connection, scope, values)
            await self._insert(connection, scope, values)
            halt = await self._read(connection, tenant_id, values["id"])
            await self._record(connection, tenant_id, EventKind.HALT_TRIGGERED, actor, halt)
            return halt

    async def met(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None,
        *,
        subject: str | None,
        registered: bool = False,
    ) -> HaltDrill:
        """What a halt of this scope would meet in the tenant now."""
        values = {
            "tenant": tenant_id,
            "scope": scope.value,
            "scope_id": scope_id,
            "subject": subject,
            "ended": [state.value for state in TERMINAL_RUN_STATES],
        }
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute("SELECT FROM tenants WHERE id = %s", [tenant_id])
            if not cursor.rowcount:
                raise NotFound("tenant", "of this request")
            if not registered:
                await _require_known(connection, scope, values)
            cursor = await connection.execute(_RUNS_MET.encode(), values)
            runs = {RunState(row["state"]): int(row["number"]) for row in await cursor.fetchall()}
            cursor = await connection.execute(_CALLS_MET.encode(), values)
            open_now = await cursor.fetchone() or {}
        return HaltDrill(scope=scope, scope_id=scope_id, subject=subject, runs=runs, **open_now)

    async def _insert(self, connection: Session, scope: HaltScope, values: Mapping[str, object]) -> None:
        if scope is HaltScope.SYSTEM:
            await connection.execute(
                "INSERT INTO halts_system (id, reason, triggered_by, cancel_seconds) "
                "VALUES (%(id)s, %(reason)s, %(by)s, %(cancel_seconds)s)",
                values,
            )
            return
        await connection.execute(
            "INSERT INTO halts (tenant_id, id, scope, scope_id, subject, epoch, reason, triggered_by, cancel_seconds) "
            "SELECT %(tenant)s, %(id)s, %(scope)s, %(scope_id)s, %(subject)s, COALESCE(max(epoch), 0) + 1, %(reason)s, "
            "%(by)s, %(cancel_seconds)s FROM halts WHERE tenant_id = %(tenant)s AND scope = %(scope)s "
            "AND scope_id IS NOT DISTINCT FROM %(scope_id)s::uuid AND subject IS NOT DISTINCT FROM %(subject)s::text",
            values,
        )

    async def end_halted(self, tenant_id: UUID) -> int:
        """Revoke unused grants and note calls in flight under the standing halts; answers how many rows would not."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute("SELECT engine_end_halted_v3(%s) AS damaged", [tenant_id])
            row = await cursor.fetchone()
            return int(row["damaged"]) if row is not None else 0

    async def unfinished(self, limit: int) -> Sequence[UUID]:
        """Tenants, over all, in which a standing halt has not ended everything yet."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute("SELECT tenant_id FROM engine_abandoned_halts_v1(%s)", [limit])
            return [row["tenant_id"] for row in await cursor.fetchall()]

    async def get(self, tenant_id: UUID, halt_id: UUID) -> Halt:
        """One halt of the tenant, or of the system."""
        async with self._gateway.transaction(tenant_id) as connection:
            return await self._read(connection, tenant_id, halt_id)

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, standing: bool
    ) -> Sequence[Halt]:
        """Newest first."""
        at, halt_id = before or (None, None)
        values = {"tenant": tenant_id, "at": at, "halt": halt_id, "standing": standing, "limit": limit}
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(_LIST.encode(), values)
            return [halt_row(row) for row in await cursor.fetchall()]

    async def lift(self, tenant_id: UUID, halt: Halt, *, by: UUID, actor: str) -> Halt:
        """Lift a halt and queue this tenant's runs it parked; runs of other tenants follow by recovery."""
        table = "halts_system" if halt.scope is HaltScope.SYSTEM else "halts"
        async with self._gateway.transaction(tenant_id) as connection:
            # A run that is being parked is either seen here, or sees that nothing stands any more.
            if halt.scope is HaltScope.SYSTEM:
                await _lock(connection, _SYSTEM)
            await _lock(connection, f"halt/tenant/{tenant_id}")
            cursor = await connection.execute(
                f"UPDATE {table} SET lifted_by = %s, lifted_at = clock_timestamp() "  # noqa: S608  # one of two literals
                "WHERE id = %s AND lifted_at IS NULL".encode(),
                [by, halt.id],
            )
            if cursor.rowcount:
                await self._queue_parked(connection, tenant_id, halt, actor)
            lifted = await self._read(connection, tenant_id, halt.id)
            if cursor.rowcount:
                await self._record(connection, tenant_id, EventKind.HALT_LIFTED, actor, lifted)
            return lifted

    async def _queue_parked(self, connection: Session, tenant_id: UUID, halt: Halt, actor: str) -> None:
        """Queue what no halt stands over any more; a damaged run is left to recovery, and keeps no other back."""
        try:
            async with connection.transaction():
                await self._queue(connection, tenant_id, halt, actor)
        except psycopg.Error as error:
            if not is_damage(error):
                raise
        else:
            return
        cursor = await connection.execute(_PARKED, {"tenant": tenant_id})
        for each in await cursor.fetchall():
            try:
                async with connection.transaction():
                    await self._queue(connection, tenant_id, halt, actor, run_id=each["run_id"])
            except psycopg.Error as error:
                if not is_damage(error):
                    raise
                logger.exception("a run could not be queued when its halt was lifted", extra={"run_id": each["run_id"]})

    async def _queue(
        self, connection: Session, tenant_id: UUID, halt: Halt, actor: str, *, run_id: UUID | None = None
    ) -> None:
        """Of all parked runs of the tenant, or of one, those that no halt stands over any more."""
        parked = await connection.execute(
            "UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp() "
            "WHERE tenant_id = %(tenant)s AND state = 'halted' AND (%(run)s::uuid IS NULL OR run_id = %(run)s) "
            "AND engine_run_halt_v2(%(tenant)s, run_id, false) IS NULL RETURNING run_id",
            {"tenant": tenant_id, "run": run_id},
        )
        for each in await parked.fetchall():
            await self._delivery.enqueue(connection, tenant_id, each["run_id"])
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(each["run_id"]),
                EventKind.RUN_RESUMED,
                actor,
                {"was": RunState.HALTED.value, "halt_id": str(halt.id)},
            )

    async def _record(self, connection: Session, tenant_id: UUID, kind: EventKind, actor: str, halt: Halt) -> None:
        """The halt's event; a stream that is damaged, in whatever way, must not keep a halt from standing."""
        try:
            async with connection.transaction():
                await self._gateway.append(connection, tenant_id, TENANT_STREAM, kind, actor, halt.to_json())
        except psycopg.Error as error:
            if kind is not EventKind.HALT_TRIGGERED or not is_damage(error):
                raise
            logger.exception("the stream of the tenant is damaged; the halt stands, its event is missing")

    async def _standing(self, connection: Session, scope: HaltScope, values: Mapping[str, object]) -> UUID | None:
        if scope is HaltScope.SYSTEM:
            cursor = await connection.execute("SELECT id FROM halts_system WHERE lifted_at IS NULL")
        else:
            cursor = await connection.execute(
                "SELECT id FROM halts WHERE tenant_id = %(tenant)s AND scope = %(scope)s AND lifted_at IS NULL "
                "AND scope_id IS NOT DISTINCT FROM %(scope_id)s::uuid "
                "AND subject IS NOT DISTINCT FROM %(subject)s::text",
                values,
            )
        row = await cursor.fetchone()
        return row["id"] if row is not None else None

    async def _read(self, connection: Session, tenant_id: UUID, halt_id: object) -> Halt:
        cursor = await connection.execute(_ONE.encode(), {"tenant": tenant_id, "id": halt_id})
        row = await cursor.fetchone()
        if row is None:
            raise NotFound("halt", halt_id)
        return halt_row(row)


async def _require_known(connection: Session, scope: HaltScope, values: Mapping[str, object]) -> None:
    """Refuse a name under which nothing has run in the tenant."""
    if scope in _KNOWN:
        cursor = await connection.execute(_KNOWN[scope].encode(), values)
        if not cursor.rowcount:
            raise NotFound(scope.value.replace("_", " "), values["subject"] or values["scope_id"])


def _lock_name(tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, subject: str | None) -> str:
    """The name that `engine_lock_halts_v2` knows the scope by."""
    if scope is HaltScope.SYSTEM:
        return _SYSTEM
    if subject is not None:
        return f"halt/{scope.value}/{tenant_id}/{subject}"
    return f"halt/{scope.value}/{scope_id or tenant_id}"


async def _lock(connection: Session, name: str) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
