"""The ledger's writer on a real database: three outcomes, alone and at once, on its own connection and on yours."""

from __future__ import annotations

import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_shared import db
from plm_shared.addresses import DatabaseUrls
from plm_shared.canonical_json import JsonRefused
from plm_shared.idempotency import LONGEST_KEY, IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import (
    EmitConnectorCallArgs,
    EmitGovernanceArgs,
    EmitLlmCallArgs,
    EmitTelemetryArgs,
    KernelEmitter,
)
from plm_shared.pricing import TokenRates
from plm_shared.sqlalchemy_kernel_emitter import (
    IdempotencyConflict,
    KeyMismatch,
    SqlAlchemyKernelEmitter,
    TenantMismatch,
    UnknownTenant,
    ledger_statements,
)
from psycopg import sql
from psycopg.rows import dict_row
from pydantic import ValidationError
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

pytestmark = pytest.mark.every_postgres
TRACE = "a" * 32


@pytest.fixture
def tenant(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    db.reset_engine()
    yield str(two_tenants[0])
    db.reset_engine()


def key(tenant: str, content: Any = "x", *, span: str = "s1", event: str = "e1") -> IdempotencyKey:
    return IdempotencyKey(tenant, TRACE, span, event, compute_content_hash(content))


def telemetry(tenant: str, payload: dict[str, Any], **names: str) -> EmitTelemetryArgs:
    made = key(tenant, str(payload), **names)
    return EmitTelemetryArgs(
        event_type=made.event_type, span_id=made.span_id, capability="read", payload=payload, idempotency_key=made
    )


def llm(tenant: str, tokens: int = 1, **names: str) -> EmitLlmCallArgs:
    made = key(tenant, tokens, **names)
    return EmitLlmCallArgs(
        span_id=made.span_id,
        model="m",
        prompt_tokens=tokens,
        completion_tokens=2,
        pricing_version="overrides-static",
        cost_eur=0.1,
        cost_status="calculated",
        idempotency_key=made,
    )


def connector(tenant: str, envelope: dict[str, Any], **names: str) -> EmitConnectorCallArgs:
    made = key(tenant, str(envelope), **names)
    return EmitConnectorCallArgs(
        span_id=made.span_id,
        connector_id="c",
        capability="read",
        envelope=envelope,
        pricing_version="unavailable",
        cost_status="unavailable",
        idempotency_key=made,
    )


def governance(tenant: str, payload: dict[str, Any], **names: str) -> EmitGovernanceArgs:
    made = key(tenant, str(payload), **names)
    return EmitGovernanceArgs(
        governance_event_type=made.event_type, span_id=made.span_id, payload=payload, idempotency_key=made
    )


METHODS: dict[str, tuple[str, str, Callable[[str, int], Any]]] = {
    "telemetry": ("emit_telemetry", "telemetry_events", lambda tenant, n: telemetry(tenant, {"n": n})),
    "governance": ("emit_governance", "telemetry_events", lambda tenant, n: governance(tenant, {"n": n})),
    "llm": ("record_llm_call", "llm_calls", llm),
    "connector": ("record_connector_call", "connector_calls", lambda tenant, n: connector(tenant, {"n": n})),
}


def rows(database: DatabaseUrls, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.admin) as connection:
        return connection.execute(query.encode()).fetchall()


def count(database: DatabaseUrls, table: str) -> int:
    with psycopg.connect(database.admin) as connection:
        found = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchone()
        assert found is not None
        return int(found[0])


@pytest.mark.parametrize("kind", METHODS)
def test_new_is_inserted_same_is_silent_and_other_content_is_a_conflict(
    kernel_database: DatabaseUrls, tenant: str, kind: str
) -> None:
    method, table, make = METHODS[kind]
    emit = getattr(SqlAlchemyKernelEmitter(tenant), method)
    assert emit(make(tenant, 1)) is None
    assert emit(make(tenant, 1)) is None
    with pytest.raises(IdempotencyConflict) as caught:
        emit(make(tenant, 2))
    assert caught.value.table == table
    assert caught.value.idempotency_key == make(tenant, 2).idempotency_key.as_db_key()
    assert count(kernel_database, table) == 1


@pytest.mark.parametrize("kind", METHODS)
def test_the_outcomes_do_not_depend_on_the_order_in_which_indexes_are_checked(
    kernel_database: DatabaseUrls, tenant: str, kind: str
) -> None:
    method, table, make = METHODS[kind]
    name = f"{table}_idempotency_key_key"
    with psycopg.connect(kernel_database.owner) as connection:
        connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
        connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} UNIQUE (idempotency_key)")
    emit = getattr(SqlAlchemyKernelEmitter(tenant), method)
    emit(make(tenant, 1))
    emit(make(tenant, 1))
    with pytest.raises(IdempotencyConflict):
        emit(make(tenant, 2))


@pytest.mark.parametrize(("kind", "suffix"), [("telemetry", "_ccnew"), ("llm", "_ccold"), ("connector", "_ccold1")])
def test_on_the_callers_connection_a_conflict_is_one_under_the_names_of_a_rebuild_too(
    kernel_database: DatabaseUrls, tenant: str, kind: str, suffix: str
) -> None:
    method, table, make = METHODS[kind]
    with psycopg.connect(kernel_database.owner) as connection:
        old = f"uq_{table}_logical"
        connection.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {old}{suffix}")
    with psycopg.connect(kernel_database.app) as connection:
        emit = getattr(SqlAlchemyKernelEmitter(tenant, connection=connection), method)
        emit(make(tenant, 1))
        emit(make(tenant, 1))
        with pytest.raises(IdempotencyConflict):
            emit(make(tenant, 2))


@pytest.mark.parametrize("kind", METHODS)
def test_of_many_writers_at_once_one_row_stands_and_only_other_content_is_refused(
    kernel_database: DatabaseUrls, tenant: str, kind: str
) -> None:
    method, table, make = METHODS[kind]
    together = threading.Barrier(8)
    outcomes: list[tuple[int, str]] = []

    def write(content: int) -> None:
        emitter = SqlAlchemyKernelEmitter(tenant)
        together.wait()
        try:
            getattr(emitter, method)(make(tenant, content))
        except IdempotencyConflict:
            outcomes.append((content, "conflict"))
        else:
            outcomes.append((content, "ok"))

    writers = [threading.Thread(target=write, args=(number % 2,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    winners = {content for content, outcome in outcomes if outcome == "ok"}
    assert len(outcomes) == 8
    assert len(winners) == 1
    assert {content for content, outcome in outcomes if outcome == "conflict"} == {0, 1} - winners
    assert count(kernel_database, table) == 1


def test_a_writer_waits_for_the_same_key_in_an_open_transaction_and_then_replays(
    kernel_database: DatabaseUrls, tenant: str
) -> None:
    with psycopg.connect(kernel_database.app) as first:
        SqlAlchemyKernelEmitter(tenant, connection=first).record_llm_call(llm(tenant))
        second = threading.Thread(target=SqlAlchemyKernelEmitter(tenant).record_llm_call, args=(llm(tenant),))
        second.start()
        with psycopg.connect(kernel_database.admin, autocommit=True) as watcher:
            while not watcher.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
                pass
        first.commit()
        second.join()
    assert rows(kernel_database, "SELECT count(*), count(pricing_snapshot_id) FROM llm_calls") == [(1, 1)]
    assert rows(kernel_database, "SELECT count(*) FROM pricing_snapshots") == [(1,)]


def test_every_column_holds_what_was_given(kernel_database: DatabaseUrls, tenant: str) -> None:
    run = uuid.uuid4()
    with psycopg.connect(kernel_database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (tenant,))
        connection.execute("INSERT INTO runs (id, tenant_id, actor_kind) VALUES (%s, %s, 'agent')", (run, tenant))
    emitter = SqlAlchemyKernelEmitter(tenant, clock=lambda: date(2020, 1, 2))
    emitter.emit_telemetry(telemetry(tenant, {"ä": [1, None]}), run_id=run)
    emitter.emit_governance(governance(tenant, {}, event="hitl_resolved"))
    emitter.record_llm_call(llm(tenant), run_id=run)
    emitter.record_connector_call(connector(tenant, {"a": 1}), run_id=run)
    assert rows(
        kernel_database,
        "SELECT tenant_id::text, trace_id, span_id, parent_span_id, event_type, capability, payload"
        " FROM telemetry_events ORDER BY event_type",
    ) == [
        (tenant, TRACE, "s1", None, "e1", "read", {"ä": [1, None], "run_id": str(run)}),
        (tenant, TRACE, "s1", None, "hitl_resolved", "governance", {}),
    ]
    assert rows(
        kernel_database,
        "SELECT c.run_id, c.span_id, c.model, prompt_tokens, completion_tokens, cost_eur::text, cost_status::text,"
        " c.pricing_version, s.model, s.snapshot_date, s.input_rate_per_1k"
        " FROM llm_calls AS c JOIN pricing_snapshots AS s ON s.id = c.pricing_snapshot_id",
    ) == [(run, "s1", "m", 1, 2, "0.10000000", "calculated", "overrides-static", "m", date(2020, 1, 2), None)]
    assert rows(
        kernel_database,
        "SELECT run_id, connector_id, capability, envelope, cost_eur, cost_status::text, pricing_snapshot_id"
        " FROM connector_calls",
    ) == [(run, "c", "read", {"a": 1}, None, "unavailable", None)]


@pytest.mark.parametrize(
    ("cost", "held"),
    [
        ("1E-20000", "0.00000000"),
        ("0.123456785", "0.12345679"),
        ("9999999999.999999994", "9999999999.99999999"),
        ("1E+9", "1000000000.00000000"),
        (5e-324, "0.00000000"),
    ],
)
def test_any_cost_that_the_model_takes_is_held_to_eight_decimals(
    kernel_database: DatabaseUrls, tenant: str, cost: Any, held: str
) -> None:
    exact = Decimal(cost) if isinstance(cost, str) else cost
    rates = TokenRates(input_per_1k=Decimal(cost), output_per_1k=Decimal(1))
    args = EmitLlmCallArgs.model_validate({**llm(tenant).model_dump(), "cost_eur": exact, "rates": rates})
    SqlAlchemyKernelEmitter(tenant).record_llm_call(args)
    found = "SELECT cost_eur::text, input_rate_per_1k::text FROM llm_calls JOIN pricing_snapshots USING (model)"
    assert rows(kernel_database, found) == [(held, held)]


@pytest.mark.parametrize(("connector_bytes", "capability_bytes"), [(1000, 999), (1000, 1000), (2000, 2000)])
def test_names_that_the_model_takes_fit_the_indexes(
    kernel_database: DatabaseUrls, tenant: str, connector_bytes: int, capability_bytes: int
) -> None:
    names = {"connector_id": incompressible(connector_bytes), "capability": incompressible(capability_bytes)}
    priced = {"pricing_version": "overrides-static", "cost_status": "pending"}
    given = {**connector(tenant, {}).model_dump(), **names, **priced}
    if connector_bytes + capability_bytes >= LONGEST_KEY:
        with pytest.raises(ValidationError, match="connector_id and capability"):
            EmitConnectorCallArgs.model_validate(given)
    else:
        SqlAlchemyKernelEmitter(tenant).record_connector_call(EmitConnectorCallArgs.model_validate(given))
        assert count(kernel_database, "connector_calls") == 1
    SqlAlchemyKernelEmitter(tenant).record_llm_call(
        EmitLlmCallArgs.model_validate({**llm(tenant).model_dump(), "model": incompressible(LONGEST_KEY)})
    )


def incompressible(length: int) -> str:
    return secrets.token_urlsafe(length)[:length]


def test_ids_sort_by_the_time_of_their_transaction(kernel_database: DatabaseUrls, tenant: str) -> None:
    emitter = SqlAlchemyKernelEmitter(tenant)
    for place in range(20):
        emitter.emit_telemetry(telemetry(tenant, {}, span=f"s{place}"))
    found = rows(kernel_database, "SELECT id, extract(epoch FROM created_at) FROM telemetry_events")
    assert {(each.version, each.variant) for each, _ in found} == {(7, uuid.RFC_4122)}
    assert all((each.int >> 80) - int(at * 1000) in (0, 1) for each, at in found)
    assert len({each.int & (2**62 - 1) for each, _ in found}) == 20


def test_a_snapshot_is_taken_once_a_day_and_never_for_a_replay(kernel_database: DatabaseUrls, tenant: str) -> None:
    def on(day: int) -> SqlAlchemyKernelEmitter:
        return SqlAlchemyKernelEmitter(tenant, clock=lambda: date(2020, 1, day))

    on(1).record_llm_call(llm(tenant, span="a"))
    on(1).record_llm_call(llm(tenant, span="b"))
    on(2).record_llm_call(llm(tenant, span="a"))
    assert rows(kernel_database, "SELECT snapshot_date FROM pricing_snapshots") == [(date(2020, 1, 1),)]
    on(2).record_llm_call(llm(tenant, span="c"))
    assert rows(kernel_database, "SELECT count(*) FROM pricing_snapshots") == [(2,)]


def test_a_tenant_without_a_row_is_a_typed_error(tenant: str) -> None:
    stranger = str(uuid.uuid4())
    for args, method in ((telemetry(stranger, {}), "emit_telemetry"), (llm(stranger), "record_llm_call")):
        with pytest.raises(UnknownTenant) as caught:
            getattr(SqlAlchemyKernelEmitter(stranger), method)(args)
        assert caught.value.tenant_id == stranger


def test_a_key_of_another_tenant_span_or_event_is_refused_before_any_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_DSN", raising=False)
    mine, theirs = str(uuid.uuid4()), str(uuid.uuid4())
    emitter = SqlAlchemyKernelEmitter(mine)
    good = telemetry(mine, {})
    for part, args in {
        "tenant_id": telemetry(theirs, {}),
        "span_id": good.model_copy(update={"span_id": "other"}),
        "event_type": good.model_copy(update={"event_type": "other"}),
    }.items():
        with pytest.raises(KeyMismatch) as caught:
            emitter.emit_telemetry(args)
        assert caught.value.part == part
    with pytest.raises(KeyMismatch, match=r"payload\.run_id"):
        emitter.emit_telemetry(telemetry(mine, {"run_id": "x"}), run_id=uuid.uuid4())


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"a": [{"when": datetime(2020, 1, 1)}]}, "payload.a[0].when"),  # noqa: DTZ001 - any datetime is refused
        ({"a": float("nan")}, "payload.a"),
        ({"a": {"b": "x\0"}}, "payload.a.b"),
        ({"a": "\ud800"}, "payload.a"),
    ],
)
def test_a_payload_that_jsonb_cannot_hold_names_its_path_before_any_sql(payload: dict[str, Any], path: str) -> None:
    tenant = str(uuid.uuid4())
    args = EmitTelemetryArgs(
        event_type="e1", span_id="s1", capability="read", payload=payload, idempotency_key=key(tenant)
    )
    with pytest.raises(JsonRefused) as caught:
        SqlAlchemyKernelEmitter(tenant).emit_telemetry(args)
    assert caught.value.path == path


def test_a_tenant_id_that_is_no_uuid_is_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match="badly formed"):
        SqlAlchemyKernelEmitter("tenant-1")


def test_without_an_address_the_emitter_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_DSN", raising=False)
    tenant = str(uuid.uuid4())
    with pytest.raises(RuntimeError, match="PG_DSN is not set"):
        SqlAlchemyKernelEmitter(tenant).emit_telemetry(telemetry(tenant, {}))


def test_a_database_that_is_away_is_an_operational_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_DSN", f"postgresql://x@/x?host={tmp_path}")
    db.reset_engine()
    tenant = str(uuid.uuid4())
    with pytest.raises(OperationalError):
        SqlAlchemyKernelEmitter(tenant).emit_telemetry(telemetry(tenant, {}))
    db.reset_engine()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg, rows as dictionaries", "sqlalchemy"])
def test_on_the_callers_connection_a_rollback_leaves_nothing_and_a_conflict_leaves_it_usable(
    kernel_database: DatabaseUrls, tenant: str, driver: str
) -> None:
    engine = create_engine(db.sqlalchemy_url(kernel_database.app))
    with engine.connect() if driver == "sqlalchemy" else psycopg.connect(kernel_database.app) as connection:
        if isinstance(connection, psycopg.Connection) and "dictionaries" in driver:
            connection.row_factory = dict_row  # type: ignore[assignment]
        emitter = SqlAlchemyKernelEmitter(tenant, connection=connection)
        emitter.record_llm_call(llm(tenant))
        with pytest.raises(IdempotencyConflict):
            emitter.record_llm_call(llm(tenant, 9))
        connection.rollback()
        assert rows(kernel_database, "SELECT count(*) FROM llm_calls") == [(0,)]
        emitter.record_llm_call(llm(tenant))
        with pytest.raises(IdempotencyConflict):
            emitter.record_llm_call(llm(tenant, 9))
        emitter.emit_telemetry(telemetry(tenant, {}))
        connection.commit()
    engine.dispose()
    assert rows(kernel_database, "SELECT count(*) FROM llm_calls") == [(1,)]
    assert rows(kernel_database, "SELECT count(*) FROM telemetry_events") == [(1,)]


def test_a_connection_of_another_tenant_or_without_a_transaction_is_refused(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], tenant: str
) -> None:
    with psycopg.connect(kernel_database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(two_tenants[1]),))
        with pytest.raises(TenantMismatch, match="works for tenant"):
            SqlAlchemyKernelEmitter(tenant, connection=connection).emit_telemetry(telemetry(tenant, {}))
    with psycopg.connect(kernel_database.app, autocommit=True) as connection:
        with pytest.raises(TenantMismatch, match="autocommit"):
            SqlAlchemyKernelEmitter(tenant, connection=connection).emit_telemetry(telemetry(tenant, {}))
        with connection.transaction():
            SqlAlchemyKernelEmitter(tenant, connection=connection).emit_telemetry(telemetry(tenant, {}))
    assert rows(kernel_database, "SELECT count(*) FROM telemetry_events") == [(1,)]


@pytest.mark.parametrize("alone", [False, True])
async def test_the_statements_run_through_an_async_pipeline_and_a_conflict_aborts_it(
    kernel_database: DatabaseUrls, tenant: str, alone: bool
) -> None:
    async with await psycopg.AsyncConnection.connect(kernel_database.app) as connection:

        async def settle(args: EmitLlmCallArgs) -> None:
            async with connection.pipeline(), connection.transaction():
                await connection.execute("SELECT set_config('app.tenant_id', %s, true)", (tenant,))
                for statement in ledger_statements(args, tenant_id=tenant, alone=alone):
                    await connection.execute(*statement)

        await settle(llm(tenant))
        await settle(llm(tenant))
        with pytest.raises(psycopg.errors.UniqueViolation) as caught:
            await settle(llm(tenant, 9))
        assert (
            caught.value.diag.constraint_name == "uq_llm_calls_logical" or alone
        )  # whichever of its indexes is looked at first
    assert rows(kernel_database, "SELECT count(*) FROM llm_calls") == [(1,)]


def test_it_is_a_kernel_emitter(tenant: str) -> None:
    emitter: KernelEmitter = SqlAlchemyKernelEmitter(tenant)
    assert emitter.emit_telemetry(telemetry(tenant, {})) is None
