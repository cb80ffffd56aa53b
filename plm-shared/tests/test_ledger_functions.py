"""The database functions that record the ledger: each writes what the emitter writes, and refuses what it refuses."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from plm_shared.idempotency import IdempotencyKey
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import LedgerArgs, ledger_record
from plm_shared.pricing import TokenRates
from plm_shared.sqlalchemy_kernel_emitter import insert_many, ledger_function, quick_ledger_function

pytestmark = pytest.mark.every_postgres

TODAY = date(2026, 1, 2)
TABLES = ("telemetry_events", "llm_calls", "connector_calls")
FUNCTIONS = ("for_sets", "quick")
RATES, OTHER_RATES = (TokenRates(input_per_1k=Decimal(rate), output_per_1k=Decimal(2)) for rate in (1, 3))
ODD = {
    "text": 'é "\\ \u2028',
    "numbers": [0, -1, 1.50, 1e30, 1e-7, 12345678901234567890],
    "nothing": None,
    "deep": {"a": [{}]},
}

Recorder = Callable[[list[LedgerArgs]], None]


def telemetry(tenant: str, span: str = "s1", content: int = 1, payload: Any = None) -> EmitTelemetryArgs:
    key = IdempotencyKey(tenant, "t1", span, "e1", str(content))
    return EmitTelemetryArgs(
        event_type="e1", span_id=span, capability="read", payload=payload or {"c": content}, idempotency_key=key
    )


def governance(tenant: str, span: str = "s1", content: int = 1) -> EmitGovernanceArgs:
    key = IdempotencyKey(tenant, "t1", span, "e2", str(content))
    return EmitGovernanceArgs(governance_event_type="e2", span_id=span, payload=ODD, idempotency_key=key)


def llm(tenant: str, span: str = "s1", content: int = 1, **other: Any) -> EmitLlmCallArgs:
    columns = {
        "model": "m",
        "pricing_version": "overrides-static",
        "cost_eur": 0.1,
        "cost_status": "calculated",
        **other,
    }
    key = IdempotencyKey(tenant, "t1", span, "llm", str(content))
    return EmitLlmCallArgs(span_id=span, prompt_tokens=content, completion_tokens=2, idempotency_key=key, **columns)


def connector(tenant: str, span: str = "s1", content: int = 1, **other: Any) -> EmitConnectorCallArgs:
    columns = {"pricing_version": "overrides-static", "cost_eur": "12.00000001", "cost_status": "calculated", **other}
    key = IdempotencyKey(tenant, "t1", span, "connector", str(content))
    return EmitConnectorCallArgs(
        span_id=span, connector_id="c", capability="read", envelope=ODD, idempotency_key=key, **columns
    )


UNPRICED: dict[str, Any] = {"pricing_version": "unavailable", "cost_eur": None, "cost_status": "unavailable"}
# What is recorded, transaction by transaction; no two of one transaction say another thing of the same.
STORIES: dict[str, Callable[[str], list[list[LedgerArgs]]]] = {
    "one row of each table": lambda t: [[telemetry(t), llm(t), connector(t)]],
    "values of every kind": lambda t: [[telemetry(t, payload=ODD), connector(t, **UNPRICED)]],
    "several rows of a table": lambda t: [[telemetry(t, "s2"), telemetry(t, "s1"), governance(t), connector(t)]],
    "the same row twice at once": lambda t: [[telemetry(t), telemetry(t), llm(t), llm(t)]],
    "the same rows again": lambda t: [[telemetry(t), llm(t), connector(t)]] * 2,
    "some again and some new": lambda t: [
        [telemetry(t), llm(t)],
        [telemetry(t), connector(t)],
        [llm(t), llm(t, "s2")],
    ],
    "a price that is known": lambda t: [[llm(t, rates=RATES)], [llm(t, "s2", rates=RATES)], [llm(t, "s3")]],
    "another price of the day": lambda t: [
        [llm(t, rates=RATES)],
        [llm(t, "s2", rates=OTHER_RATES)],
        [llm(t, "s3", pricing_version="litellm-live")],
    ],
    "a price and none": lambda t: [
        [llm(t)],
        [llm(t, "s2", **UNPRICED)],
        [connector(t), connector(t, "s2", **UNPRICED)],
    ],
    "nothing": lambda _: [[]],
}


@pytest.fixture
def tenant(kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> str:
    with psycopg.connect(kernel_database.owner) as owner:
        owner.execute(ledger_function("for_sets").encode())
        owner.execute(quick_ledger_function("quick", rest="for_sets").encode())
        owner.execute("GRANT EXECUTE ON FUNCTION for_sets(uuid, json), quick(uuid, jsonb) TO plm_kernel_writer")
    return str(two_tenants[0])


@pytest.fixture
def connection(kernel_database: DatabaseUrls, tenant: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(kernel_database.app) as connection:
        yield connection


def record(connection: psycopg.Connection[Any], function: str, tenant: str, entries: list[LedgerArgs]) -> None:
    rows: dict[str, list[str]] = {}
    for entry in entries:
        made = ledger_record(entry, tenant_id=tenant, clock=lambda: TODAY)
        rows.setdefault(made.table, []).append(made.text)
    ledger = ",".join(f'"{table}":[{",".join(texts)}]' for table, texts in rows.items())
    with connection.transaction():
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
        connection.execute(f"SELECT {function}(%s, %s)".encode(), [tenant, f"{{{ledger}}}"])


def written(connection: psycopg.Connection[Any], tenant: str) -> list[tuple[Any, ...]]:
    """Every row but for its id and time, and for its price's id the price."""
    with connection.transaction(force_rollback=True):
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
        price = "(SELECT to_jsonb(s) - '{{id,created_at}}'::text[] FROM pricing_snapshots AS s WHERE s.id = {})"
        found = []
        for table in TABLES:
            linked = price.format("pricing_snapshot_id") if table != "telemetry_events" else "NULL"
            text = f"SELECT to_jsonb(t) - '{{id,created_at,pricing_snapshot_id}}'::text[], {linked} FROM {table} AS t"  # noqa: S608
            found += connection.execute(f"{text} ORDER BY idempotency_key".encode()).fetchall()
        return found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("story", STORIES)
def test_a_function_writes_what_the_emitter_writes(
    connection: psycopg.Connection[Any], kernel_database: DatabaseUrls, tenant: str, story: str, function: str
) -> None:
    transactions = STORIES[story](tenant)
    for entries in transactions:
        insert_many(connection, tenant, [ledger_record(e, tenant_id=tenant, clock=lambda: TODAY) for e in entries])
    expected = written(connection, tenant)
    with psycopg.connect(kernel_database.admin) as admin:
        admin.execute("TRUNCATE telemetry_events, llm_calls, connector_calls, pricing_snapshots")
    for entries in transactions:
        record(connection, function, tenant, entries)
    assert written(connection, tenant) == expected


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("make", [telemetry, governance, llm, connector])
def test_another_content_under_the_same_identity_is_a_violation_that_names_it_and_leaves_nothing(
    connection: psycopg.Connection[Any], tenant: str, make: Callable[..., LedgerArgs], function: str
) -> None:
    record(connection, function, tenant, [make(tenant)])
    before = written(connection, tenant)
    other = make(tenant, content=2)
    for entries in ([other], [other, make(tenant, "s2")], [telemetry(tenant, "s3"), connector(tenant, "s3"), other]):
        with pytest.raises(psycopg.errors.UniqueViolation) as caught:
            record(connection, function, tenant, entries)
        table = ledger_record(other, tenant_id=tenant).table
        assert caught.value.diag.constraint_name == f"uq_{table}_logical"
        assert written(connection, tenant) == before


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ids_are_of_version_7_and_of_the_transactions_time(
    connection: psycopg.Connection[Any], tenant: str, function: str
) -> None:
    record(connection, function, tenant, [telemetry(tenant), llm(tenant), connector(tenant)])
    with connection.transaction():
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
        for table in TABLES:
            text = f"SELECT id, extract(epoch FROM created_at) * 1000 FROM {table}"  # noqa: S608
            ((made, milliseconds),) = connection.execute(text.encode()).fetchall()
            assert (made.version, made.variant) == (7, uuid.RFC_4122)
            assert abs((made.int >> 80) - milliseconds) <= 1
