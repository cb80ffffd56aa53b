"""The only module that knows how the ledger is written.

``ledger_statements`` renders the statements for one emission; the emitter runs them in a transaction of its own or in
the caller's, and the engine's settlement sends them on its driver connection.

::

    LedgerRefused
    ├── IdempotencyConflict   the logical row exists with another content: the caller has a bug
    ├── UnknownTenant         create the tenant first
    ├── KeyMismatch           the idempotency key speaks of another tenant, span or event than the arguments
    └── TenantMismatch        the caller's connection is bound to another tenant, or holds no transaction
    JsonRefused               a payload that jsonb cannot hold; names the path (from ``canonical_json``)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple, assert_never, cast

import psycopg
import sqlalchemy
from psycopg.pq import TransactionStatus

from plm_shared.canonical_json import storable_json
from plm_shared.db import tenant_scoped_session
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs

__all__ = [
    "IdempotencyConflict",
    "KeyMismatch",
    "LedgerArgs",
    "LedgerRefused",
    "SqlAlchemyKernelEmitter",
    "Statement",
    "TenantMismatch",
    "UnknownTenant",
    "ledger_statements",
    "utc_today",
]

LedgerArgs = EmitTelemetryArgs | EmitGovernanceArgs | EmitLlmCallArgs | EmitConnectorCallArgs
Connection = sqlalchemy.Connection | psycopg.Connection[Any]


class LedgerRefused(Exception):
    """Nothing was written."""


class IdempotencyConflict(LedgerRefused):
    """The logical row is taken by another content."""

    def __init__(self, *, table: str, idempotency_key: str) -> None:
        super().__init__(
            f"{table}: this span and event are recorded with another content than {idempotency_key!r}; use a new span"
        )
        self.table = table
        self.idempotency_key = idempotency_key


class UnknownTenant(LedgerRefused):
    """The tenant has no row."""

    def __init__(self, tenant_id: str) -> None:
        super().__init__(f"tenant {tenant_id} does not exist; create it before anything is recorded for it")
        self.tenant_id = tenant_id


class KeyMismatch(LedgerRefused, ValueError):
    """A part of the idempotency key differs from what is being recorded."""

    def __init__(self, part: str, *, key: str, expected: str) -> None:
        super().__init__(f"idempotency_key.{part} is {key!r}, but {expected!r} is being recorded; make the key from it")
        self.part = part
        self.key = key
        self.expected = expected


class TenantMismatch(LedgerRefused, ValueError):
    """The caller's connection cannot carry this tenant's rows."""


class Statement(NamedTuple):
    """One statement for any psycopg connection, sync or async: ``connection.execute(*statement)``."""

    sql: str
    params: Mapping[str, Any]


class _Row(NamedTuple):
    """What an emission writes: the table, and per column its SQL type and value, besides those every table has."""

    table: str
    event_type: str | None
    span_id: str
    columns: Mapping[str, tuple[str, Any]]
    priced_model: str | None = None
    pricing_version: str = "unavailable"


def utc_today() -> date:
    """The date in UTC, which prices are kept by."""
    return datetime.now(UTC).date()


def ledger_statements(
    args: LedgerArgs,
    *,
    tenant_id: str | uuid.UUID,
    run_id: str | uuid.UUID | None = None,
    clock: Callable[[], date] = utc_today,
) -> list[Statement]:
    """The statements that record ``args`` once, to be run in order in one READ COMMITTED transaction.

    ``app.tenant_id`` must be set on the connection. Nothing needs to be read back: a replay changes nothing, a
    conflict is a unique violation of ``uq_<table>_logical`` that aborts the transaction, an unknown tenant a foreign
    key violation. They may be sent through a pipeline. A telemetry event carries ``run_id`` inside its payload.

    Raises:
        KeyMismatch: the key's tenant, span or event type is not the one recorded; or the payload names another run.
        JsonRefused: the payload holds what jsonb cannot; the message names its path.
        ValueError: ``tenant_id`` or ``run_id`` is no UUID.
    """
    tenant = str(uuid.UUID(str(tenant_id)))
    run = str(uuid.UUID(str(run_id))) if run_id is not None else None
    row = _row(args, run)
    key = args.idempotency_key
    for part, expected in (("tenant_id", tenant), ("span_id", row.span_id), ("event_type", row.event_type)):
        found = getattr(key, part)
        if expected is not None and found != expected:
            raise KeyMismatch(part, key=found, expected=expected)
    columns = {
        "id": ("uuid", str(uuid.uuid4())),
        "tenant_id": ("uuid", tenant),
        "span_id": ("text", row.span_id),
        "idempotency_key": ("text", key.as_db_key()),
        **({"trace_id": ("text", key.trace_id)} if row.table == "telemetry_events" else {}),
        **row.columns,
    }
    if row.priced_model is None or row.pricing_version == "unavailable":
        return _insert_once(row.table, columns)
    day = clock()
    return [_snapshot(row, columns, day), *_insert_once(row.table, columns, snapshot=(row.priced_model, day))]


_UNSEEN: Final = (
    "NOT EXISTS (SELECT FROM {table} WHERE tenant_id = %(tenant_id)s::uuid AND idempotency_key = %(idempotency_key)s)"
)
_SNAPSHOT_ID: Final = (
    "(SELECT id FROM pricing_snapshots WHERE tenant_id = %(tenant_id)s::uuid"
    " AND model = %(priced_model)s AND snapshot_date = %(snapshot_date)s::date)"
)


def _insert_once(
    table: str, columns: Mapping[str, tuple[str, Any]], *, snapshot: tuple[str, date] | None = None
) -> list[Statement]:
    """Insert unless something stands in the way; then let only what is no replay fail.

    The first statement swallows every uniqueness error, whichever index PostgreSQL checks first. The second does
    nothing when the key is there, be it ours or a replay's; otherwise it meets the row in the way and names it.
    """
    names = [*columns, *(["pricing_snapshot_id"] if snapshot else [])]
    values = [f"%({name})s::{kind}" for name, (kind, _) in columns.items()] + ([_SNAPSHOT_ID] if snapshot else [])
    params = {name: value for name, (_, value) in columns.items()}
    if snapshot:
        params |= {"priced_model": snapshot[0], "snapshot_date": snapshot[1]}
    # Table and column names are this module's constants; every value is a parameter.
    insert = f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(values)}"
    return [
        Statement(f"{insert} ON CONFLICT DO NOTHING", params),
        Statement(f"{insert} WHERE {_UNSEEN.format(table=table)}", params),
    ]


def _snapshot(row: _Row, columns: Mapping[str, tuple[str, Any]], day: date) -> Statement:
    """Note the day's price source for the model, once, unless the call itself is a replay."""
    sql = (
        "INSERT INTO pricing_snapshots (id, tenant_id, model, snapshot_date, pricing_version)"
        " SELECT %(id)s::uuid, %(tenant_id)s::uuid, %(model)s::text, %(snapshot_date)s::date, %(pricing_version)s::text"
        f" WHERE {_UNSEEN.format(table=row.table)}"
        " ON CONFLICT (tenant_id, model, snapshot_date) DO NOTHING"
    )
    params = {
        "id": str(uuid.uuid4()),
        "tenant_id": columns["tenant_id"][1],
        "model": row.priced_model,
        "snapshot_date": day,
        "pricing_version": row.pricing_version,
        "idempotency_key": columns["idempotency_key"][1],
    }
    return Statement(sql, params)


def _row(args: LedgerArgs, run: str | None) -> _Row:
    match args:
        case EmitTelemetryArgs():
            return _telemetry(args.event_type, args.span_id, args.capability, args.payload, run)
        case EmitGovernanceArgs():
            return _telemetry(args.governance_event_type, args.span_id, "governance", args.payload, run)
        case EmitLlmCallArgs():
            tokens = {"prompt_tokens": args.prompt_tokens, "completion_tokens": args.completion_tokens}
            columns = {"model": ("text", args.model), **{name: ("integer", count) for name, count in tokens.items()}}
            return _call("llm_calls", args, columns, args.model, run)
        case EmitConnectorCallArgs():
            columns = {
                "connector_id": ("text", args.connector_id),
                "capability": ("text", args.capability),
                "envelope": ("jsonb", storable_json(args.envelope, root="envelope")),
            }
            return _call("connector_calls", args, columns, f"{args.connector_id}:{args.capability}", run)
        case _:
            assert_never(args)


def _telemetry(event_type: str, span_id: str, capability: str, payload: dict[str, Any], run: str | None) -> _Row:
    if run is not None:
        named = payload.get("run_id", run)
        if named != run:
            raise KeyMismatch("payload.run_id", key=str(named), expected=run)
        payload = {**payload, "run_id": run}
    columns = {
        "event_type": ("text", event_type),
        "capability": ("text", capability),
        "payload": ("jsonb", storable_json(payload)),
    }
    return _Row(table="telemetry_events", event_type=event_type, span_id=span_id, columns=columns)


def _call(
    table: str, args: EmitLlmCallArgs | EmitConnectorCallArgs, columns: dict[str, Any], model: str, run: str | None
) -> _Row:
    cost = None if args.cost_eur is None else Decimal(str(args.cost_eur))
    columns |= {
        "run_id": ("uuid", run),
        "cost_eur": ("numeric", cost),
        "cost_status": ("cost_status", args.cost_status),
        "pricing_version": ("text", args.pricing_version),
    }
    return _Row(
        table=table,
        event_type=None,
        span_id=args.span_id,
        columns=columns,
        priced_model=model,
        pricing_version=args.pricing_version,
    )


class SqlAlchemyKernelEmitter:
    """Writes the ledger of one tenant; a ``KernelEmitter``.

    Without ``connection`` each call is one transaction of its own, on the engine that ``PG_DSN`` names. With the
    caller's connection it neither opens nor commits one: a rollback of the caller's leaves nothing, and a refusal
    leaves the caller's transaction usable.

    Every method returns None both when the row was written and when the same key had been written before, and raises
    a class of ``LedgerRefused``, ``JsonRefused``, or what the database raised, unchanged.

    Raises:
        ValueError: ``tenant_id`` is no UUID.
    """

    def __init__(
        self,
        tenant_id: str | uuid.UUID,
        *,
        connection: Connection | None = None,
        clock: Callable[[], date] = utc_today,
    ) -> None:
        self._tenant = str(uuid.UUID(str(tenant_id)))
        self._connection = connection
        self._clock = clock

    def emit_telemetry(self, args: EmitTelemetryArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record an event."""
        self._write("telemetry_events", args, run_id)

    def emit_governance(self, args: EmitGovernanceArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a decision."""
        self._write("telemetry_events", args, run_id)

    def record_llm_call(self, args: EmitLlmCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a model call and its cost."""
        self._write("llm_calls", args, run_id)

    def record_connector_call(self, args: EmitConnectorCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a connector call and its cost."""
        self._write("connector_calls", args, run_id)

    def statements(self, args: LedgerArgs, *, run_id: str | uuid.UUID | None = None) -> list[Statement]:
        """``ledger_statements`` for this tenant and clock."""
        return ledger_statements(args, tenant_id=self._tenant, run_id=run_id, clock=self._clock)

    def _write(self, table: str, args: LedgerArgs, run_id: str | uuid.UUID | None) -> None:
        statements = self.statements(args, run_id=run_id)
        try:
            with self._transaction() as connection:
                for statement in statements:
                    _execute(connection, statement)
        except (sqlalchemy.exc.IntegrityError, psycopg.IntegrityError) as error:
            constraint = _constraint(error)
            if constraint == f"uq_{table}_logical":
                raise IdempotencyConflict(table=table, idempotency_key=args.idempotency_key.as_db_key()) from error
            if constraint in (f"{table}_tenant_id_fkey", "pricing_snapshots_tenant_id_fkey"):
                raise UnknownTenant(self._tenant) from error
            raise

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        if self._connection is None:
            with tenant_scoped_session(self._tenant) as session:
                yield session.connection()
            return
        _bind_tenant(self._connection, self._tenant)
        if isinstance(self._connection, sqlalchemy.Connection):
            with self._connection.begin_nested():
                yield self._connection
        else:
            with self._connection.transaction():
                yield self._connection


def _bind_tenant(connection: Connection, tenant: str) -> None:
    """Set the tenant for the caller's transaction, unless it works for another one already."""
    if (
        isinstance(connection, psycopg.Connection)
        and connection.autocommit
        and connection.info.transaction_status == TransactionStatus.IDLE
    ):
        raise TenantMismatch("the connection is in autocommit mode and holds no transaction; open one first")
    bound = _execute(connection, Statement("SELECT current_setting('app.tenant_id', true)", {})).fetchone()
    if bound is not None and bound[0] and bound[0] != tenant:
        raise TenantMismatch(f"the connection works for tenant {bound[0]}, not for {tenant}; use another connection")
    _execute(connection, Statement("SELECT set_config('app.tenant_id', %(tenant)s, true)", {"tenant": tenant}))


def _execute(connection: Connection, statement: Statement) -> Any:
    if isinstance(connection, sqlalchemy.Connection):
        return connection.exec_driver_sql(statement.sql, dict(statement.params))
    return connection.execute(cast("Any", statement.sql), statement.params)


def _constraint(error: sqlalchemy.exc.IntegrityError | psycopg.IntegrityError) -> str | None:
    cause = error.orig if isinstance(error, sqlalchemy.exc.IntegrityError) else error
    return cause.diag.constraint_name if isinstance(cause, psycopg.Error) else None
