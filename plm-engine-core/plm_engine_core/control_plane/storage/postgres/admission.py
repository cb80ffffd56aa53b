"""Admission and settlement: one function call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import psycopg
from plm_shared.ledger import ledger_record, uuid_text
from plm_shared.sqlalchemy_kernel_emitter import Statement
from psycopg.rows import dict_row

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.limits import Assumed, Bucket, Dimension, Prepared, RateReading, Subjects
from plm_engine_core.control_plane.storage.commands import admit_json, settle_json
from plm_engine_core.control_plane.storage.ports import CLOCK_TOLERANCE, AdmitCommand, Connection, SettleCommand
from plm_engine_core.control_plane.storage.postgres.bookings import Bookings
from plm_engine_core.control_plane.storage.postgres.gateway import (
    Gateway,
    json_parameter,
    require_transaction,
    translated,
)

_PREPARE = (
    "SELECT engine_prepare_v2(%(tenant)s, %(run)s, %(buckets)s)"
    " || jsonb_build_object('at', clock_timestamp()) AS answer"
)
_ADMIT = "SELECT engine_admit_v6(%(command)s) AS answer"
# An argument is worked out before its function is called: what was assumed is taken once the decision is booked.
_ADMIT_AS_ASSUMED = (
    "SELECT CASE WHEN abs(extract(epoch FROM statement_timestamp() - %(at)s::timestamptz)) <= %(tolerance)s"
    " THEN engine_as_assumed_v2(engine_admit_v6(%(command)s), %(tenant)s, %(run)s, %(buckets)s)"
    """ ELSE '{"status": "not_as_assumed"}' END AS answer"""
)
_NOT_AS_ASSUMED = "PLA01"
_BEGIN = (
    "SELECT engine_begin_v4(%(tenant)s, %(run)s, %(step)s, %(attempt)s, %(grant)s, %(fencing)s, %(actor)s) AS answer"
)
_SETTLE = "SELECT engine_settle_v6(%(command)s, %(ledger)s) AS answer"


class PostgresAdmission:
    """The books of admission and settlement in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._bookings = Bookings(gateway)

    async def prepare(self, tenant_id: UUID, run_id: UUID, *, buckets: Sequence[Bucket]) -> Prepared:
        """Take one token of every bucket or of none, and read for whom the run works."""
        parameters = {
            "tenant": uuid_text(tenant_id),
            "run": uuid_text(run_id),
            "buckets": _buckets_json(tuple(buckets)),
        }
        answer = await self._booked(Statement(_PREPARE, parameters))
        return Prepared(
            rate=RateReading(
                allowed=answer["allowed"],
                retry_after_ms=answer["retry_after_ms"],
                dimension=Dimension(answer["dimension"]) if answer["dimension"] else None,
            ),
            at=datetime.fromisoformat(answer["at"]),
            subjects=Subjects.from_json(answer["run"]) if answer["run"] else None,
        )

    async def history(self, tenant_id: UUID, run_id: UUID, *, before_step: int, limit: int) -> Sequence[str]:
        """The capabilities of the run's earlier steps that were granted, the newest `limit` of them, oldest first."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT DISTINCT ON (step_index) capability FROM run_steps WHERE tenant_id = %s AND run_id = %s "
                "AND step_index < %s AND state NOT IN ('denied', 'steered', 'awaiting_approval', 'not_started') "
                "ORDER BY step_index DESC, attempt DESC LIMIT %s",
                [tenant_id, run_id, before_step, limit],
            )
            return [row["capability"] for row in await cursor.fetchall()][::-1]

    async def admit(self, command: AdmitCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book a decision in one transaction of its own, or in the caller's."""
        parameters = {"command": json_parameter(admit_json(command), root="proposal")}
        return await self._booked(Statement(_ADMIT, parameters), connection)

    async def admit_as_assumed(self, command: AdmitCommand, assumed: Assumed) -> Mapping[str, Any]:
        """Book a decision and take what it assumed, by one statement."""
        booking = json_parameter(admit_json(command), root="proposal")
        parameters = {
            "tenant": uuid_text(command.tenant_id),
            "run": uuid_text(command.run_id),
            "at": assumed.at.isoformat(),
            "tolerance": CLOCK_TOLERANCE.total_seconds(),
            "buckets": _buckets_json(tuple(assumed.buckets)),
            "command": booking,
        }
        try:
            return await self._booked(Statement(_ADMIT_AS_ASSUMED, parameters))
        except psycopg.Error as error:  # as the database says it; every other one has its translation already
            if error.sqlstate != _NOT_AS_ASSUMED:
                raise
            return {"status": "not_as_assumed"}

    async def begin(self, grant: Grant, *, fencing_token: int, actor: str) -> Mapping[str, Any]:
        """Use a grant up."""
        named = {"tenant": grant.tenant_id, "run": grant.run_id, "step": grant.step_index, "attempt": grant.attempt}
        parameters = {**named, "grant": grant.id, "fencing": fencing_token, "actor": actor}
        return await self._booked(Statement(_BEGIN, parameters))

    async def settle(self, command: SettleCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book an outcome: the grant is locked, ledger rows and settlement written, by one statement."""
        booking = json_parameter(settle_json(command), root="outcome")
        parameters = {"command": booking, "ledger": _ledger_json(command)}
        return await self._booked(Statement(_SETTLE, parameters), connection)

    async def _booked(self, statement: Statement, connection: Connection | None = None) -> Mapping[str, Any]:
        """What a statement answers, in a transaction of its own or in the caller's."""
        with translated():
            if connection is None:
                answer = await self._bookings.make(statement)
            else:
                require_transaction(connection)
                answer = await _executed(connection, statement)
        if answer is None:
            raise StorageUnavailable("the database gave no answer")
        booked: Mapping[str, Any] = answer
        return booked


@lru_cache(maxsize=16)
def _buckets_json(buckets: tuple[Bucket, ...]) -> str:
    wanted = [
        {"dimension": each.dimension.value, "per_second": each.per_second, "burst": each.burst} for each in buckets
    ]
    return json_parameter(wanted, root="buckets")


def _ledger_json(command: SettleCommand) -> str:
    """Rows by table."""
    rows: dict[str, list[str]] = {}
    for entry in command.ledger:
        record = ledger_record(entry, tenant_id=command.tenant_id, run_id=command.run_id)
        rows.setdefault(record.table, []).append(record.text)
    tables = [f'"{table}":[{",".join(texts)}]' for table, texts in rows.items()]
    return f"{{{','.join(tables)}}}"


async def _executed(connection: Connection, statement: Statement) -> Any:
    """On the caller's connection, whatever it is in the middle of; by a cursor of ours, whose rows are dictionaries."""
    cursor = connection.cursor(row_factory=dict_row)
    await cursor.execute(statement.sql.encode(), statement.params)
    row = await cursor.fetchone()
    return row["answer"] if row is not None else None
