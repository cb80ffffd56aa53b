"""Halts."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.errors import NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.halts import Halt
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session
from plm_engine_core.control_plane.storage.rows import halt_row
from plm_engine_core.control_plane.vocabulary import EventKind, HaltScope, RunState

_SYSTEM = "halt/system"


class PostgresHalts:
    """Halts in PostgreSQL. Triggering waits for what was admitted before it, and holds back what comes after."""

    def __init__(self, gateway: Gateway, delivery: Delivery) -> None:
        self._gateway = gateway
        self._delivery = delivery

    async def trigger(
        self, tenant_id: UUID, scope: HaltScope, scope_id: UUID | None, *, reason: str, by: UUID, actor: str
    ) -> Halt:
        """Commit a halt, or answer the one that stands in this scope."""
        async with self._gateway.transaction(tenant_id) as connection:
            target = scope_id or tenant_id
            name = _SYSTEM if scope is HaltScope.SYSTEM else f"halt/{scope.value}/{target}"
            await _lock(connection, name)
            standing = await self._standing(connection, tenant_id, scope, target)
            if standing is not None:
                return standing
            if scope is HaltScope.SYSTEM:
                cursor = await connection.execute(
                    "INSERT INTO halts_system (id, reason, triggered_by) VALUES (%s, %s, %s) RETURNING *",
                    [new_id(), reason, by],
                )
            else:
                if scope is HaltScope.RUN:
                    await self._require_run(connection, tenant_id, target)
                cursor = await connection.execute(
                    "INSERT INTO halts (tenant_id, id, scope, scope_id, epoch, reason, triggered_by) "
                    "SELECT %(tenant)s, %(id)s, %(scope)s, %(target)s, COALESCE(max(epoch), 0) + 1, %(reason)s, %(by)s "
                    "FROM halts WHERE tenant_id = %(tenant)s AND scope = %(scope)s AND scope_id = %(target)s "
                    "RETURNING *",
                    {
                        "tenant": tenant_id,
                        "id": new_id(),
                        "scope": scope.value,
                        "target": target,
                        "reason": reason,
                        "by": by,
                    },
                )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("halt", name)
            halt = halt_row(row)
            await self._gateway.append(
                connection, tenant_id, TENANT_STREAM, EventKind.HALT_TRIGGERED, actor, halt.to_json()
            )
            return halt

    async def get(self, tenant_id: UUID, halt_id: UUID) -> Halt:
        """One halt of the tenant, or of the system."""
        async with self._gateway.transaction(tenant_id) as connection:
            for query in (
                "SELECT * FROM halts WHERE tenant_id = %(tenant)s AND id = %(id)s",
                "SELECT * FROM halts_system WHERE id = %(id)s",
            ):
                cursor = await connection.execute(query.encode(), {"tenant": tenant_id, "id": halt_id})
                row = await cursor.fetchone()
                if row is not None:
                    return halt_row(row)
        raise NotFound("halt", halt_id)

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
                "WHERE id = %s AND lifted_at IS NULL RETURNING *".encode(),
                [by, halt.id],
            )
            row = await cursor.fetchone()
            if row is not None:
                lifted = halt_row(row)
                parked = await connection.execute(
                    "UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, "
                    "updated_at = clock_timestamp() WHERE tenant_id = %(tenant)s AND state = 'halted' "
                    "AND engine_standing_halt_v2(tenant_id, run_id, run_group_id, agent_id, NULL) IS NULL "
                    "RETURNING run_id",
                    {"tenant": tenant_id},
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
                await self._gateway.append(
                    connection, tenant_id, TENANT_STREAM, EventKind.HALT_LIFTED, actor, lifted.to_json()
                )
                return lifted
        return await self.get(tenant_id, halt.id)

    async def _standing(self, connection: Session, tenant_id: UUID, scope: HaltScope, target: UUID) -> Halt | None:
        if scope is HaltScope.SYSTEM:
            cursor = await connection.execute("SELECT * FROM halts_system WHERE lifted_at IS NULL")
        else:
            cursor = await connection.execute(
                "SELECT * FROM halts WHERE tenant_id = %s AND scope = %s AND scope_id = %s AND lifted_at IS NULL",
                [tenant_id, scope.value, target],
            )
        row = await cursor.fetchone()
        return halt_row(row) if row is not None else None

    async def _require_run(self, connection: Session, tenant_id: UUID, run_id: UUID) -> None:
        cursor = await connection.execute(
            "SELECT 1 FROM run_states WHERE tenant_id = %s AND run_id = %s", [tenant_id, run_id]
        )
        if await cursor.fetchone() is None:
            raise NotFound("run", run_id)


async def _lock(connection: Session, name: str) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
