"""The only module that knows how the ledger is written.

Rows travel as JSON (``LedgerRecord``) and PostgreSQL takes them apart, so one text per table serves a single event, a
batch of hundreds, and the engine's settlement on its own connection. Refusals are drawn in ``plm_shared.ledger``. It is
long as no other module may know the ledger's columns: all that writes them stands here.

SQLAlchemy is loaded by its first use: the engine and the writer of batches, which need the texts alone, start without.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import date
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import (
    IdempotencyConflict,
    KeyMismatch,
    LedgerArgs,
    LedgerRecord,
    LedgerRefused,
    TenantMismatch,
    UnknownRun,
    UnknownTenant,
    ledger_record,
    utc_today,
    uuid_text,
)

__all__ = [
    "IdempotencyConflict",
    "KeyMismatch",
    "LedgerArgs",
    "LedgerRefused",
    "SqlAlchemyKernelEmitter",
    "Statement",
    "TenantMismatch",
    "UnknownRun",
    "UnknownTenant",
    "insert_many",
    "ledger_function",
    "ledger_statements",
    "quick_ledger_function",
    "refusal_of",
    "rows_of_unknown_runs",
    "utc_today",
]

if TYPE_CHECKING:
    import sqlalchemy

    Connection = sqlalchemy.Connection | psycopg.Connection[Any]


class Statement(NamedTuple):
    """One statement for any psycopg connection, sync or async: ``connection.execute(*statement)``."""

    sql: str
    params: Mapping[str, Any]


# UUIDs of version 7 (RFC 9562, section 5.7), which PostgreSQL makes only since 18: rows that come later stand later in
# the primary key, so that writing touches its end and not, ever more slowly, all of it. The time is the transaction's.
_TIME: Final = (
    "overlay(lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0') PLACING '-' FROM 9 FOR 0) || '-7'"
)
_ID: Final = f"((SELECT {_TIME}) || substr(gen_random_uuid()::text, 16))::uuid"

# The same for the one row `v_row`: its key, of which there is no second, stands for chance. A server that was built
# without OpenSSL opens a file for every random UUID.
_ID_OF_ROW: Final = (
    "(v_time || overlay(left(encode(sha256(convert_to(v_row ->> 'idempotency_key', 'UTF8')), 'hex'), 18)"
    " PLACING '8' FROM 4 FOR 0))::uuid"
)


class _Table:
    """The texts that write one table, rendered once."""

    def __init__(self, name: str, identity: str, *, priced: bool, **columns: str) -> None:
        kinds = {**columns, "idempotency_key": "text"}
        names, values = ", ".join(kinds), ", ".join(f"r.{column}" for column in kinds)
        shape = ", ".join(f"{column} {kind}" for column, kind in {**kinds, **(_PRICE if priced else {})}.items())
        # Every writer takes the rows of a table in the order of their identity: batches that overlap wait for each
        # other, and never in a circle. Among rows of one identity the first given wins.
        rows = f"ROWS FROM (json_to_recordset(%(rows)s::json) AS ({shape})) WITH ORDINALITY AS r"
        order = f" ORDER BY {', '.join(f'r.{column}' for column in identity.split())}, r.ordinality"
        # LIMIT keeps this a look into the index per row; a join of the whole ledger would grow with it. The key holds
        # the identity, which is named all the same: either unique index then leads to the one row, and not, in a plan
        # made while the table was small, one of them to all rows of the tenant.
        same = "".join(f" AND old.{column} = r.{column}" for column in (*identity.split(), "idempotency_key"))
        seen = (
            f" LEFT JOIN LATERAL (SELECT true AS found FROM {name} AS old WHERE old.tenant_id = %(tenant_id)s::uuid"  # noqa: S608 - our own constants
            f"{same} LIMIT 1) AS seen ON true"
        )
        link = (", pricing_snapshot_id", f", {_SNAPSHOT_ID}") if priced else ("", "")
        into = f"INSERT INTO {name} (id, tenant_id, {names}{link[0]})"
        insert = f"{into} SELECT {_ID}, %(tenant_id)s::uuid, {values}{link[1]} FROM {rows}"  # noqa: S608 - our own constants
        given = ", ".join(_given(column, kind) for column, kind in kinds.items())
        self.name, self.priced = name, priced
        self.identity_constraint = f"uq_{name}_logical"
        self.insert_new = f"{insert}{order} ON CONFLICT DO NOTHING"
        one = f"VALUES ({_ID_OF_ROW}, p_tenant, {given})"
        if priced:  # no row where its price is not known yet
            one = (
                f"SELECT {_ID_OF_ROW}, p_tenant, {given}, CASE WHEN {_of_row(_SAME_PRICE)} THEN s.id END"  # noqa: S608 - our own constants
                " FROM (SELECT) AS one LEFT JOIN pricing_snapshots AS s"
                f" ON s.tenant_id = p_tenant AND {_of_row(_SAME_DAY)}"
                " WHERE s.id IS NOT NULL OR v_row ->> 'priced_model' IS NULL"
            )
        self.insert_one = f"{into} {one} ON CONFLICT DO NOTHING"
        self.insert_or_fail = f"{insert}{seen} WHERE seen.found IS NULL{order}"
        self.unwritten = f"SELECT r.ordinality - 1 FROM {rows}{seen} WHERE seen.found IS NULL"  # noqa: S608 - our own constants
        self.unknown_runs = (
            f"SELECT r.ordinality - 1 FROM {rows}"  # noqa: S608 - our own constants
            " WHERE r.run_id IS NOT NULL AND NOT EXISTS"
            " (SELECT FROM runs WHERE runs.tenant_id = %(tenant_id)s::uuid AND runs.id = r.run_id)"
        )
        self.unpriced = (
            "EXISTS (SELECT FROM json_to_recordset(%(rows)s::json) AS r (priced_model text, snapshot_date date)"
            " WHERE r.priced_model IS NOT NULL AND NOT EXISTS (SELECT FROM pricing_snapshots AS s"
            " WHERE s.tenant_id = %(tenant_id)s::uuid AND s.model = r.priced_model"
            " AND s.snapshot_date = r.snapshot_date))"
        )
        self.snapshot = (
            "INSERT INTO"  # noqa: S608 - our own constants
            " pricing_snapshots (id, tenant_id, model, snapshot_date, pricing_version,"
            " input_rate_per_1k, output_rate_per_1k)"
            " SELECT DISTINCT ON (r.priced_model, r.snapshot_date) gen_random_uuid(), %(tenant_id)s::uuid,"
            " r.priced_model, r.snapshot_date, r.pricing_version, r.input_rate_per_1k, r.output_rate_per_1k"
            f" FROM {rows}{seen}"
            " WHERE r.priced_model IS NOT NULL AND seen.found IS NULL"
            " ORDER BY r.priced_model, r.snapshot_date, r.ordinality"
            " ON CONFLICT (tenant_id, model, snapshot_date) DO NOTHING"
        )


def _given(column: str, kind: str) -> str:
    """A column of the one row ``v_row``, an object of jsonb, within a database function."""
    match kind:
        case "jsonb":
            return f"v_row -> '{column}'"
        case "text":
            return f"v_row ->> '{column}'"
        case _:
            return f"(v_row ->> '{column}')::{kind}"


_PRICE: Final = {
    "priced_model": "text",
    "snapshot_date": "date",
    "input_rate_per_1k": "numeric(18, 8)",
    "output_rate_per_1k": "numeric(18, 8)",
}


def _of_row(condition: str) -> str:
    """A condition on the columns of ``r``, asked of the one row ``v_row``."""
    kinds = {"pricing_version": "text", **_PRICE}
    return re.sub(r"\br\.(\w+)", lambda found: _given(found[1], kinds[found[1]]), condition)


# The day's first price stands for the day; a call at another price is not linked to it.
_SAME_PRICE: Final = (
    "s.pricing_version = r.pricing_version"
    " AND (r.input_rate_per_1k IS NULL"
    " OR (s.input_rate_per_1k, s.output_rate_per_1k) = (r.input_rate_per_1k, r.output_rate_per_1k))"
)
_SAME_DAY: Final = "s.model = r.priced_model AND s.snapshot_date = r.snapshot_date"
_SNAPSHOT_ID: Final = (
    "(SELECT s.id FROM pricing_snapshots AS s WHERE s.tenant_id = %(tenant_id)s::uuid"  # noqa: S608 - our own constants
    f" AND {_SAME_DAY} AND {_SAME_PRICE})"
)
_COST: Final = {
    "run_id": "uuid",
    "cost_eur": "numeric",
    "cost_status": "cost_status",
    "pricing_version": "text",
}
_TABLES: Final = {
    "telemetry_events": _Table(
        "telemetry_events",
        "trace_id span_id event_type",
        priced=False,
        trace_id="text",
        span_id="text",
        event_type="text",
        capability="text",
        payload="jsonb",
    ),
    "llm_calls": _Table(
        "llm_calls",
        "span_id",
        priced=True,
        span_id="text",
        model="text",
        prompt_tokens="integer",
        completion_tokens="integer",
        **_COST,
    ),
    "connector_calls": _Table(
        "connector_calls",
        "span_id",
        priced=True,
        span_id="text",
        connector_id="text",
        capability="text",
        envelope="jsonb",
        **_COST,
    ),
}


# A plan made while a table was small, and kept, must not read all of it when it has grown.
_BIND: Final = "SELECT set_config('app.tenant_id', %(tenant_id)s, true), set_config('enable_seqscan', 'off', true)"


def ledger_statements(
    args: LedgerArgs,
    *,
    tenant_id: str | uuid.UUID,
    run_id: str | uuid.UUID | None = None,
    clock: Callable[[], date] = utc_today,
    alone: bool = False,
) -> list[Statement]:
    """The statements that record ``args`` once, to be run in order in one READ COMMITTED transaction.

    ``alone`` promises that the transaction holds a lock which keeps every other writer of this key out; then fewer
    statements say the same.

    ``app.tenant_id`` must be set on the connection. Nothing needs to be read back: a replay changes nothing, a
    conflict is a unique violation of ``uq_<table>_logical`` that aborts the transaction, an unknown tenant or run a
    foreign key violation. They may be sent through a pipeline. A telemetry event carries ``run_id`` in its payload.

    While a unique index is rebuilt concurrently its name may end in ``_ccnew`` or ``_ccold``, and a row that another
    transaction writes at the same moment may be reported as a violation: run the transaction again.

    Raises:
        KeyMismatch: the key's tenant, span or event type is not the one recorded; or the payload names another run.
        JsonRefused: the payload holds what jsonb cannot; the message names its path.
        ValueError: ``tenant_id`` or ``run_id`` is no UUID.
    """
    record = ledger_record(args, tenant_id=tenant_id, run_id=run_id, clock=clock)
    return _statements(record, uuid_text(tenant_id), alone=alone)


def _statements(record: LedgerRecord, tenant_id: str, *, alone: bool = False) -> list[Statement]:
    table, params = _TABLES[record.table], _params(tenant_id, [record])
    # The first insert swallows every uniqueness error, whichever index PostgreSQL checks first. The second does
    # nothing when the key is there, be it ours or a replay's; otherwise it meets the row in the way and names it.
    # Where nobody else can write the key meanwhile, the look of the second is enough.
    inserts = [table.insert_or_fail] if alone else [table.insert_new, table.insert_or_fail]
    texts = [*([table.snapshot] if record.priced else []), *inserts]
    return [Statement(text, params) for text in texts]


def ledger_function(name: str) -> str:
    """The text of a database function ``name(p_tenant uuid, p_ledger json)`` that records entries.

    ``p_ledger`` maps tables to lists of the objects that ``ledger_record`` renders. The transaction must hold a lock
    that keeps every other writer of their keys out, as for ``alone`` of ``ledger_statements``, which it then equals.

    Nearly always every row is new, which the insert itself finds out; only where one was not is looked for the row in
    its way. So no plan that was made while the tables were small can make every call read all of them.
    """
    body = "".join(_written(table) for table in _TABLES.values())
    body = body.replace("%(tenant_id)s::uuid", "p_tenant").replace("%(rows)s::json", "v_rows")
    return (
        f"CREATE FUNCTION {name}(p_tenant uuid, p_ledger json) RETURNS void\n"
        "LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$\n"
        f"DECLARE\n    v_rows json;\n    v_new  integer;\nBEGIN\n{body}END\n$$;\n"
    )


def _written(table: _Table) -> str:
    lines = [f"    v_rows := p_ledger -> '{table.name}';", "    IF v_rows IS NOT NULL THEN"]
    if table.priced:
        lines += [f"        IF {table.unpriced} THEN", f"            {table.snapshot};", "        END IF;"]
    lines += [
        f"        {table.insert_new};",
        "        GET DIAGNOSTICS v_new = ROW_COUNT;",
        "        IF v_new < json_array_length(v_rows) THEN",
        f"            {table.insert_or_fail};",
        "        END IF;",
        "    END IF;",
    ]
    return "".join(f"{line}\n" for line in lines)


def quick_ledger_function(name: str, *, rest: str) -> str:
    """The text of a database function ``name(p_tenant uuid, p_ledger jsonb)`` that records what nearly all calls give.

    That is one row of a table, which is new, and whose price is known or has none: to insert it needs no set of rows to
    be made, ordered and joined, which costs more than the row. All else is left to ``rest``, a function of
    ``ledger_function``, whose promises and conditions this one has.
    """
    body = "".join(_written_quickly(table) for table in _TABLES.values())
    return (
        f"CREATE FUNCTION {name}(p_tenant uuid, p_ledger jsonb) RETURNS void\n"
        "LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$\n"
        f"DECLARE\n    v_time  text := {_TIME};\n"
        "    v_rest  jsonb := p_ledger;\n    v_row   jsonb;\nBEGIN\n"
        f"{body}    IF v_rest <> '{{}}' THEN\n        PERFORM {rest}(p_tenant, v_rest::json);\n    END IF;\nEND\n$$;\n"
    )


def _written_quickly(table: _Table) -> str:
    lines = [
        f"IF jsonb_array_length(p_ledger -> '{table.name}') = 1 THEN",
        f"    v_row := p_ledger #> '{{{table.name},0}}';",
        f"    {table.insert_one};",
        "    IF FOUND THEN",
        f"        v_rest := v_rest - '{table.name}';",
        "    END IF;",
        "END IF;",
    ]
    return "".join(f"    {line}\n" for line in lines)


_REBUILT: Final = re.compile(r"_cc(?:new|old)\d*$")  # what REINDEX CONCURRENTLY appends to the one of two that goes
_REBUILDS: Final = 100  # attempts while an index is rebuilt concurrently; each is a whole transaction


def insert_many(
    connection: psycopg.Connection[Any], tenant_id: str, records: Sequence[LedgerRecord]
) -> list[IdempotencyConflict | None]:
    """Write records of one tenant in one transaction of its own; per record None (written, or a replay) or a conflict.

    The outcomes are those of writing them one by one in their order. When anything else stands in the way nothing is
    written, and the database's error is raised for the whole: ``refusal_of`` translates it. A call that ended in a lost
    connection may have been committed; repeating it is safe.
    """
    for _ in range(_REBUILDS):
        try:
            return _insert_many(connection, tenant_id, records)
        except psycopg.errors.UniqueViolation:
            continue  # ON CONFLICT overlooks an index that is being rebuilt beside the old one; soon it will not
    return _insert_many(connection, tenant_id, records)


def _insert_many(
    connection: psycopg.Connection[Any], tenant_id: str, records: Sequence[LedgerRecord]
) -> list[IdempotencyConflict | None]:
    outcomes: list[IdempotencyConflict | None] = [None] * len(records)
    places: dict[str, list[int]] = {name: [] for name in _TABLES}
    for place, record in enumerate(records):
        places[record.table].append(place)
    parts = {
        name: (found, _params(tenant_id, [records[place] for place in found]))
        for name, found in places.items()
        if found
    }
    with _transaction(connection, pipelined=len(records) > 1):
        _run(connection, _BIND, {"tenant_id": tenant_id})
        for name in ("llm_calls", "connector_calls"):
            if name in parts:
                _run(connection, _TABLES[name].snapshot, parts[name][1])
        inserts = {name: _run(connection, _TABLES[name].insert_new, params) for name, (_, params) in parts.items()}
    short = [name for name, (found, _) in parts.items() if inserts[name].rowcount < len(found)]
    if not short:
        return outcomes
    with _transaction(connection, pipelined=True):
        _run(connection, _BIND, {"tenant_id": tenant_id})
        looks = {name: _run(connection, _TABLES[name].unwritten, parts[name][1]) for name in short}
    for name, look in looks.items():
        for (index,) in look:
            place = parts[name][0][index]
            outcomes[place] = IdempotencyConflict(table=name, idempotency_key=records[place].idempotency_key)
    return outcomes


@contextmanager
def _transaction(connection: psycopg.Connection[Any], *, pipelined: bool) -> Iterator[None]:
    """One transaction; in a pipeline all of it is one message and one answer, read after the block.

    That spares a batch more than the way there and back: whoever waits for the server in between must get the
    interpreter back from every thread that emits, and holds the transaction open meanwhile. Around a single row a
    pipeline costs more than it saves.
    """
    try:
        with connection.pipeline() if pipelined else nullcontext(), connection.transaction():
            yield
    except psycopg.Error:
        if connection.info.transaction_status == TransactionStatus.INERROR:
            connection.rollback()  # after an error the server skips the rest of a pipeline, its COMMIT included
        raise


def rows_of_unknown_runs(
    connection: psycopg.Connection[Any], tenant_id: str, records: Sequence[LedgerRecord]
) -> set[int]:
    """The places of those records that name a run which the tenant does not have."""
    unknown: set[int] = set()
    with connection.transaction():
        _run(connection, _BIND, {"tenant_id": tenant_id})
        for name in ("llm_calls", "connector_calls"):
            places = [place for place, record in enumerate(records) if record.table == name]
            params = _params(tenant_id, [records[place] for place in places])
            unknown |= {places[index] for (index,) in _run(connection, _TABLES[name].unknown_runs, params)}
    return unknown


def refusal_of(error: psycopg.Error, tenant_id: str, record: LedgerRecord) -> Exception:
    """What a failed statement about this one record means; the error itself when it is none of the known refusals."""
    constraint = _REBUILT.sub("", error.diag.constraint_name or "")
    if constraint == _TABLES[record.table].identity_constraint:
        return IdempotencyConflict(table=record.table, idempotency_key=record.idempotency_key)
    if constraint in (f"{record.table}_tenant_id_fkey", "pricing_snapshots_tenant_id_fkey"):
        return UnknownTenant(tenant_id)
    if constraint == f"{record.table}_run_id_fkey":
        return UnknownRun(str(record.columns["run_id"]))
    return error


def _params(tenant_id: str, records: Sequence[LedgerRecord]) -> dict[str, str]:
    return {"tenant_id": tenant_id, "rows": f"[{','.join([record.text for record in records])}]"}


def _run(connection: psycopg.Connection[Any], text: str, params: Mapping[str, str]) -> psycopg.Cursor[Any]:
    return connection.cursor(row_factory=tuple_row).execute(text.encode(), params, prepare=True)


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
        self._tenant = uuid_text(tenant_id)
        self._connection = connection
        self._clock = clock

    def emit_telemetry(self, args: EmitTelemetryArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record an event."""
        self._write(args, run_id)

    def emit_governance(self, args: EmitGovernanceArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a decision."""
        self._write(args, run_id)

    def record_llm_call(self, args: EmitLlmCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a model call and its cost."""
        self._write(args, run_id)

    def record_connector_call(self, args: EmitConnectorCallArgs, *, run_id: str | uuid.UUID | None = None) -> None:
        """Record a connector call and its cost."""
        self._write(args, run_id)

    def statements(self, args: LedgerArgs, *, run_id: str | uuid.UUID | None = None) -> list[Statement]:
        """``ledger_statements`` for this tenant and clock."""
        return ledger_statements(args, tenant_id=self._tenant, run_id=run_id, clock=self._clock)

    def _write(self, args: LedgerArgs, run_id: str | uuid.UUID | None) -> None:
        from sqlalchemy.exc import IntegrityError

        record = ledger_record(args, tenant_id=self._tenant, run_id=run_id, clock=self._clock)
        try:
            if self._connection is None:
                refusal = _write_alone(self._tenant, record)
            else:
                _write_within(self._connection, self._tenant, _statements(record, self._tenant))
                refusal = None
        except (IntegrityError, psycopg.IntegrityError) as error:
            cause = error.orig if isinstance(error, IntegrityError) else error
            found = refusal_of(cause, self._tenant, record) if isinstance(cause, psycopg.Error) else error
            if isinstance(found, LedgerRefused):
                raise found from error
            raise
        if refusal is not None:
            raise refusal


def _write_alone(tenant: str, record: LedgerRecord) -> IdempotencyConflict | None:
    """One transaction on a pooled connection. SQLAlchemy's own execution would cost as much again as the insert."""
    from sqlalchemy.exc import DBAPIError

    from plm_shared.db import get_engine

    try:
        with closing(get_engine().raw_connection()) as pooled:
            return insert_many(cast("psycopg.Connection[Any]", pooled.driver_connection), tenant, [record])[0]
    except psycopg.Error as error:
        raise DBAPIError.instance(None, None, error, psycopg.Error) from error


def _write_within(connection: Connection, tenant: str, statements: Sequence[Statement]) -> None:
    """A savepoint in the caller's transaction, and another when an index that is being rebuilt was overlooked."""
    from sqlalchemy.exc import IntegrityError

    _bind_tenant(connection, tenant)
    for attempt in range(_REBUILDS):
        last = statements[-1]  # the only one that may meet the row in the way
        try:
            with connection.transaction() if isinstance(connection, psycopg.Connection) else connection.begin_nested():
                for running in statements:
                    _execute(connection, running)
        except (IntegrityError, psycopg.errors.UniqueViolation) as error:
            overlooked = isinstance(getattr(error, "orig", error), psycopg.errors.UniqueViolation)
            if not overlooked or running is last or attempt == _REBUILDS - 1:
                raise
        else:
            return


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
    if isinstance(connection, psycopg.Connection):
        # The caller's connection may make something else of a row.
        return connection.cursor(row_factory=tuple_row).execute(cast("Any", statement.sql), statement.params)
    return connection.exec_driver_sql(statement.sql, dict(statement.params))
