"""Budgets, as an operator sees and changes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.errors import IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey, Reserve
from plm_engine_core.control_plane.storage.ports import Correction
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, jsonb
from plm_engine_core.control_plane.storage.rows import budget_row, budget_told, unknown_zone
from plm_engine_core.control_plane.vocabulary import BudgetScope, EventKind

_CORRECT = "budgets.correct"
_NAMED = (
    "tenant_id = %(tenant)s AND scope_kind = %(scope)s AND scope_id = %(scope_id)s AND unit = %(unit)s "
    "AND period = %(period)s AND starts_at = %(starts_at)s"
)

_PLACE = (  # as `BudgetKey.place` has it
    "array_position(%(widths)s::text[], scope_kind), subject IS NULL, coalesce(subject, '') COLLATE \"C\", scope_id, "
    'unit COLLATE "C", period COLLATE "C"'
)
_LIST = (
    "SELECT * FROM budgets WHERE tenant_id = %(tenant)s "  # noqa: S608  # literals
    "AND engine_window_runs_v1(clock_timestamp(), period, starts_at, ends_at) "
    "AND (%(scope)s::text IS NULL OR scope_kind = %(scope)s) AND (%(of)s::uuid IS NULL OR scope_id = %(of)s) "
    f"AND (%(width)s::integer IS NULL OR ({_PLACE}) > (%(width)s, %(nameless)s, %(subject)s, %(after)s, %(unit)s, "
    f"%(period)s)) ORDER BY {_PLACE} LIMIT %(limit)s"
).encode()


class PostgresBudgets:
    """Budgets in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def list(
        self,
        tenant_id: UUID,
        *,
        limit: int,
        after: BudgetKey | None = None,
        scope: BudgetScope | None = None,
        scope_id: UUID | None = None,
    ) -> Sequence[Budget]:
        """Total budgets and present windows in the order of their places, at most `limit`, strictly behind `after`."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                _LIST,
                {
                    "tenant": tenant_id,
                    "scope": scope and scope.value,
                    "of": scope_id,
                    "widths": [each.value for each in BudgetScope],
                    **_behind(after),
                    "limit": limit,
                },
            )
            return [budget_row(row) for row in await cursor.fetchall()]

    async def set_limit(
        self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, time_zone: str | None = None, actor: str
    ) -> Budget:
        """Set and pin the limit of the present window, opening it where it is not there, in UTC or in `time_zone`."""
        entry = Reserve.nothing_of(key, limit, time_zone=time_zone).stored
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT engine_open_window_v1(%s, %s) AS starts_at", [tenant_id, jsonb(entry, root="budget")]
            )
            named = {**_names(tenant_id, key), **(await cursor.fetchone() or {}), "limit": limit}
            cursor = await connection.execute(
                f"UPDATE budgets SET limit_amount = %(limit)s, pinned = true WHERE {_NAMED} RETURNING *".encode(),  # noqa: S608  # a literal
                named,
            )
            row = await cursor.fetchone()
            if row is None:
                raise unknown_zone(time_zone)
            await self._gateway.append(
                connection,
                tenant_id,
                TENANT_STREAM,
                EventKind.BUDGET_SET,
                actor,
                {**budget_told(row), "limit": str(limit)},
            )
            return budget_row(row)

    async def correct(self, tenant_id: UUID, correction: Correction, *, actor: str) -> Budget:
        """Book a counter-entry once, unless it would leave less than nothing spent."""
        key = correction.key
        async with self._gateway.transaction(tenant_id) as connection:
            named = _names(tenant_id, key)
            # Where no window runs there is none in UTC either, and that is what is then not found.
            cursor = await connection.execute(
                "SELECT COALESCE(engine_window_in_use_v1(%s, %s, clock_timestamp()), engine_window_v2(%s)) "
                "AS starts_at",
                [tenant_id, jsonb(Reserve.nothing_of(key, Decimal(0)).stored, root="budget"), key.period.value],
            )
            named |= await cursor.fetchone() or {}
            before = await self._claim(connection, tenant_id, correction, named["starts_at"])
            replayed, named["starts_at"] = before is not None, before or named["starts_at"]
            change = (
                "SELECT * FROM budgets WHERE " if replayed else "UPDATE budgets SET spent = spent + %(amount)s WHERE "
            )
            allowed = "" if replayed else " AND spent + %(amount)s >= 0 RETURNING *"
            cursor = await connection.execute(
                f"{change}{_NAMED}{allowed}".encode(), {**named, "amount": correction.amount}
            )
            row = await cursor.fetchone()
            if row is None:
                raise await self._refusal(connection, named)
            if not replayed:
                await self._gateway.append(
                    connection,
                    tenant_id,
                    TENANT_STREAM,
                    EventKind.BUDGET_CORRECTED,
                    actor,
                    {**budget_told(row), "amount": str(correction.amount), "reason": correction.reason},
                )
            return budget_row(row)

    async def _claim(
        self, connection: Session, tenant_id: UUID, correction: Correction, starts_at: datetime
    ) -> datetime | None:
        """Take the command id for this window; when the same correction took it before, for which one that did."""
        named = {"tenant": tenant_id, "operation": _CORRECT, "command": correction.command_id}
        claimed = await connection.execute(
            "INSERT INTO idempotency_records (tenant_id, operation, command_id, digest, result) "
            "VALUES (%(tenant)s, %(operation)s, %(command)s, %(digest)s, %(result)s) ON CONFLICT DO NOTHING",
            {
                **named,
                "digest": correction.digest,
                "result": jsonb({"starts_at": starts_at.isoformat()}, root="result"),
            },
        )
        if claimed.rowcount:
            return None
        cursor = await connection.execute(
            "SELECT digest, result FROM idempotency_records WHERE tenant_id = %(tenant)s AND operation = %(operation)s "
            "AND command_id = %(command)s",
            named,
        )
        record = await cursor.fetchone()
        if record is None or record["digest"] != correction.digest:
            raise IdempotencyConflict(f"command {correction.command_id} was already used for another correction")
        # Releases that did not keep the window answered by the present one.
        return datetime.fromisoformat(record["result"]["starts_at"]) if record["result"] else starts_at

    async def _refusal(self, connection: Session, named: dict[str, Any]) -> Exception:
        cursor = await connection.execute(f"SELECT spent FROM budgets WHERE {_NAMED}".encode(), named)  # noqa: S608  # a literal
        row = await cursor.fetchone()
        if row is None:
            return NotFound("budget", f"{named['scope']}/{named['scope_id']}/{named['unit']}")
        return InvalidRequest(
            f"only {row['spent'].normalize():f} {named['unit']} were spent; no more can be given back", field="amount"
        )


def _behind(after: BudgetKey | None) -> dict[str, Any]:
    names = ("width", "nameless", "subject", "after", "unit", "period")
    if after is None:
        return dict.fromkeys(names)
    width, *rest = after.place
    return dict(zip(names, (width + 1, *rest), strict=True))  # SQL counts from 1


def _names(tenant_id: UUID, key: BudgetKey) -> dict[str, Any]:
    return {
        "tenant": tenant_id,
        "scope": key.scope.value,
        "scope_id": key.scope_id,
        "unit": key.unit,
        "period": key.period.value,
    }
