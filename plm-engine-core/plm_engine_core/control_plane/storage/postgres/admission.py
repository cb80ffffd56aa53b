"""Admission and settlement: one function call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import psycopg
from plm_shared.ledger import uuid_text

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.limits import Assumed, Bucket, Dimension, Prepared, RateReading, Subjects
from plm_engine_core.control_plane.policy.run_risk import GrantedAttempt
from plm_engine_core.control_plane.storage.commands import admit_json, settle_json
from plm_engine_core.control_plane.storage.ports import CLOCK_TOLERANCE, AdmitCommand, Connection, SettleCommand
from plm_engine_core.control_plane.storage.postgres.bookings import Bookings
from plm_engine_core.control_plane.storage.postgres.callers import fetched
from plm_engine_core.control_plane.storage.postgres.calls import BOOK_PATIENTLY
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, json_parameter, translated

_BOOK = BOOK_PATIENTLY.format("%s").encode()
_NOT_AS_ASSUMED = "PLA01"
_DECIDED_ON = (
    "SELECT decision #> '{facts,capability}' AS capability FROM run_steps "
    "WHERE tenant_id = %s AND run_id = %s AND step_index = %s AND attempt = %s"
)
_GRANTED_BESIDE = (
    "run_steps WHERE tenant_id = %s AND run_id = %s AND (step_index, attempt) <> (%s, %s) "
    "AND state NOT IN ('denied', 'steered', 'awaiting_approval', 'not_started') AND grant_id IS NOT NULL"
)


class PostgresAdmission:
    """The books of admission and settlement in PostgreSQL."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._bookings = Bookings(gateway)

    async def prepare(self, tenant_id: UUID, run_id: UUID, *, buckets: Sequence[Bucket]) -> Prepared:
        """Take one token of every bucket or of none, and read for whom the run works."""
        answer = await self._booked(
            f'{{"kind":"prepare","tenant_id":"{uuid_text(tenant_id)}","run_id":"{uuid_text(run_id)}",'
            f'"buckets":{_buckets_json(tuple(buckets))}}}'
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

    async def history(
        self, tenant_id: UUID, run_id: UUID, *, beside: tuple[int, int], limit: int
    ) -> tuple[Sequence[GrantedAttempt], int]:
        """The newest `limit` granted attempts beside this one, oldest first, and how many are older."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                f"SELECT step_index, capability FROM {_GRANTED_BESIDE} ORDER BY created_at DESC, step_index DESC, "  # noqa: S608  # literal
                "attempt DESC LIMIT %s".encode(),
                [tenant_id, run_id, *beside, limit],
            )
            newest = [GrantedAttempt(**row) for row in await cursor.fetchall()]
            if len(newest) < limit:
                return newest[::-1], 0
            cursor = await connection.execute(
                f"SELECT count(*) AS attempts FROM {_GRANTED_BESIDE}".encode(),  # noqa: S608  # literal
                [tenant_id, run_id, *beside],
            )
            row: Any = await cursor.fetchone()
            return newest[::-1], row["attempts"] - len(newest)

    async def decided_on(
        self, tenant_id: UUID, run_id: UUID, step_index: int, attempt: int, *, connection: Connection | None = None
    ) -> Any:
        """The capability as the recorded decision of an attempt describes it."""
        return await self._described(_DECIDED_ON, [tenant_id, run_id, step_index, attempt], connection)

    async def _described(self, query: str, parameters: list[Any], connection: Connection | None = None) -> Any:
        if connection is not None:
            with translated():
                await fetched(connection, b"SELECT engine_enter_v2(%s)", parameters[:1])
                row = await fetched(connection, query.encode(), parameters)
        else:
            async with self._gateway.transaction(parameters[0]) as own:
                row = await (await own.execute(query, parameters)).fetchone()
        return row["capability"] if row is not None else None

    async def admit(self, command: AdmitCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book a decision in one transaction of its own, or in the caller's."""
        booking = json_parameter(admit_json(command), root="proposal")
        return await self._booked(f'{{"kind":"admit","command":{booking}}}', connection)

    async def admit_as_assumed(self, command: AdmitCommand, assumed: Assumed) -> Mapping[str, Any]:
        """Book a decision and take what it assumed, by one statement."""
        booking = json_parameter(admit_json(command), root="proposal")
        document = (
            f'{{"kind":"admit_as_assumed","at":"{assumed.at.isoformat()}","tolerance":{CLOCK_TOLERANCE.total_seconds()},'
            f'"buckets":{_buckets_json(tuple(assumed.buckets))},"command":{booking}}}'
        )
        try:
            return await self._booked(document)
        except psycopg.Error as error:  # as the database says it; every other one has its translation already
            if error.sqlstate != _NOT_AS_ASSUMED:
                raise
            return {"status": "not_as_assumed"}

    async def begin(self, grant: Grant, *, fencing_token: int, actor: str) -> Mapping[str, Any]:
        """Use a grant up."""
        booking = {
            "kind": "begin",
            "tenant_id": uuid_text(grant.tenant_id),
            "run_id": uuid_text(grant.run_id),
            "step_index": grant.step_index,
            "attempt": grant.attempt,
            "grant_id": str(grant.id),
            "fencing_token": fencing_token,
            "actor": actor,
        }
        return await self._booked(json_parameter(booking, root="grant"))

    async def settle(self, command: SettleCommand, *, connection: Connection | None = None) -> Mapping[str, Any]:
        """Book an outcome: the grant is locked, ledger rows and settlement written, by one statement."""
        booking = json_parameter(settle_json(command), root="outcome")
        document = f'{{"kind":"settle","command":{booking},"ledger":{_ledger_json(command)}}}'
        return await self._booked(document, connection)

    async def expire(self, command: SettleCommand) -> bool:
        """Book that a call never started because its grant ran out."""
        values = [json_parameter(settle_json(command), root="outcome"), _ledger_json(command)]
        async with self._gateway.transaction(command.tenant_id) as connection:
            cursor = await connection.execute("SELECT engine_expire_v1(%s, %s) AS done", values)
            row = await cursor.fetchone()
            return row is not None and bool(row["done"])

    async def _booked(self, document: str, connection: Connection | None = None) -> Mapping[str, Any]:
        """What a booking answers, in a transaction of its own or in the caller's."""
        with translated():
            if connection is None:
                answer = await self._bookings.make(document)
            else:
                row = await fetched(connection, _BOOK, [document])
                answer = row["answer"] if row is not None else None
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
    for record in command.ledger:
        rows.setdefault(record.table, []).append(record.text)
    tables = [f'"{table}":[{",".join(texts)}]' for table, texts in rows.items()]
    return f"{{{','.join(tables)}}}"
