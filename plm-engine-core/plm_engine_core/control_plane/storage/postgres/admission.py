"""Admission and settlement: one function call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from plm_shared.sqlalchemy_kernel_emitter import ledger_statements
from psycopg.rows import dict_row

from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.limits import Bucket, Dimension, Prepared, RateReading, Subjects
from plm_engine_core.control_plane.storage.commands import admit_json, settle_json
from plm_engine_core.control_plane.storage.ports import AdmitCommand, Connection, SettleCommand
from plm_engine_core.control_plane.storage.postgres.gateway import (
    Gateway,
    Session,
    jsonb,
    require_transaction,
    translated,
)

_ADMIT = "SELECT engine_admit_v2(%s) AS answer"
_SETTLE = "SELECT engine_settle_v2(%s) AS answer"


class PostgresAdmission:
    """The books of admission and settlement in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def prepare(self, tenant_id: UUID, run_id: UUID, *, buckets: Sequence[Bucket]) -> Prepared:
        """Take one token of every bucket or of none, and read for whom the run works."""
        wanted = [
            {"dimension": each.dimension.value, "per_second": each.per_second, "burst": each.burst} for each in buckets
        ]
        async with self._gateway.connection() as connection:
            answer = await _scalar(
                connection,
                "SELECT engine_prepare_v2(%s, %s, %s) || jsonb_build_object('at', clock_timestamp()) AS answer",
                [tenant_id, run_id, jsonb(wanted, root="buckets")],
            )
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
        """Book a decision in one autocommit statement, or in the caller's transaction."""
        parameters = [jsonb(admit_json(command), root="proposal")]
        if connection is not None:
            with translated():
                require_transaction(connection)
                return await _scalar(connection, _ADMIT, parameters)
        async with self._gateway.connection() as own:
            return await _scalar(own, _ADMIT, parameters)

    async def begin(
        self, tenant_id: UUID, run_id: UUID, grant_id: UUID, *, fencing_token: int, actor: str
    ) -> Mapping[str, Any]:
        """Use a grant up."""
        async with self._gateway.connection() as connection:
            return await _scalar(
                connection,
                "SELECT engine_begin_v2(%s, %s, %s, %s, %s) AS answer",
                [tenant_id, run_id, grant_id, fencing_token, actor],
            )

    async def settle(self, command: SettleCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book an outcome: the grant is locked, ledger rows and settlement written, in one pipelined transaction."""
        parameters = [jsonb(settle_json(command), root="outcome")]
        if connection is not None:
            with translated():
                require_transaction(connection)
                return await _first(await _send_settlement(connection, command, parameters))
        async with self._gateway.connection() as own:
            # What a pipeline sends up to its end is one transaction: committed whole, or not at all.
            try:
                async with own.pipeline():
                    cursor = await _send_settlement(own, command, parameters)
            except psycopg.Error:
                await _forget_prepared(own)
                raise
            return await _first(cursor)


async def _send_settlement(
    connection: Session, command: SettleCommand, parameters: list[Any]
) -> psycopg.AsyncCursor[Any]:
    await connection.execute(
        "SELECT engine_hold_grant_v1(%s, %s, %s, %s, %s)",
        [command.tenant_id, command.run_id, command.grant_id, command.fencing_token, command.outcome_digest],
    )
    for entry in command.ledger:
        # The grant is held, and its span is in the key: nobody else can be writing these rows.
        statements = ledger_statements(entry, tenant_id=str(command.tenant_id), run_id=command.run_id, alone=True)
        for statement in statements:
            await connection.execute(statement.sql.encode(), statement.params)
    return await _rows(connection).execute(_SETTLE, parameters)


async def _forget_prepared(connection: Session) -> None:
    """Have driver and server agree again on what is prepared, which is nothing.

    The server skips what comes after an error in a pipeline, also what was to be prepared there; the driver learns of
    that from a ROLLBACK only, and a pipeline that is a transaction by itself has none.
    """
    if not connection.closed:
        with suppress(psycopg.Error):  # what went wrong before is what counts
            async with connection.transaction(force_rollback=True):
                pass


def _rows(connection: Session) -> psycopg.AsyncCursor[Any]:
    """A cursor of ours, whatever kind of rows the caller's connection answers."""
    return connection.cursor(row_factory=dict_row)


async def _scalar(connection: Session, query: str, parameters: list[Any]) -> Mapping[str, Any]:
    return await _first(await _rows(connection).execute(query.encode(), parameters))


async def _first(cursor: psycopg.AsyncCursor[Any]) -> Mapping[str, Any]:
    row = await cursor.fetchone()
    if row is None:
        raise StorageUnavailable("the database gave no answer")
    answer: Mapping[str, Any] = row["answer"]
    return answer
