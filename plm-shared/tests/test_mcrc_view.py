"""One row per run: right sums, one tenant, and indexes that the writer's login may use."""

from __future__ import annotations

import json
import os
import uuid
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plm_shared.addresses import DatabaseUrls
from plm_shared.batching_emitter import BatchingKernelEmitter
from plm_shared.idempotency import IdempotencyKey
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import LedgerArgs
from plm_shared.sqlalchemy_kernel_emitter import SqlAlchemyKernelEmitter
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

pytestmark = pytest.mark.every_postgres
SOAK = float(os.environ.get("SOAK", "0.05"))

COLUMNS = [
    "run_id",
    "tenant_id",
    "run_created_at",
    "run_updated_at",
    "actor_kind",
    "quality_level",
    "llm_call_count",
    "llm_cost_eur",
    "llm_cost_pending_count",
    "connector_call_count",
    "connector_cost_eur",
    "connector_cost_pending_count",
    "knowledge_call_count",
    "telemetry_event_count",
    "last_trace_id",
    "last_span_id",
]
FILL = """
    INSERT INTO runs (id, tenant_id, actor_kind) VALUES ('{run}', '{tenant}', 'agent'),
        (gen_random_uuid(), '{tenant}', 'human');
    INSERT INTO llm_calls (id, tenant_id, run_id, span_id, model, prompt_tokens, completion_tokens, cost_eur,
                           cost_status, pricing_version, idempotency_key)
        VALUES (gen_random_uuid(), '{tenant}', '{run}', 'a', 'm', 1, 1, 0.25, 'calculated', 'litellm-live', 'a'),
               (gen_random_uuid(), '{tenant}', '{run}', 'b', 'm', 1, 1, NULL, 'pending', 'litellm-live', 'b');
    INSERT INTO connector_calls (id, tenant_id, run_id, span_id, connector_id, capability, cost_eur, cost_status,
                                 pricing_version, idempotency_key)
        SELECT gen_random_uuid(), '{tenant}', '{run}', n::text, 'c', 'read', 0.5, 'calculated', 'x', n::text
        FROM generate_series(1, 3) AS n;
    INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload,
                                  idempotency_key, created_at)
        VALUES
        (gen_random_uuid(), '{tenant}', 't1', 's', 'knowledge_call', 'r', '{{"run_id": "{run}"}}', '1', now()),
        (gen_random_uuid(), '{tenant}', 't2', 's', 'other', 'r', '{{"run_id": "{run}"}}', '2', now() + interval '1s'),
        (gen_random_uuid(), '{tenant}', 't3', 's', 'e', 'r', '{{"run_id": "no uuid"}}', '3', now()),
        (gen_random_uuid(), '{tenant}', 't4', 's', 'e', 'r', '{{"run_id": [1]}}', '4', now()),
        (gen_random_uuid(), '{tenant}', 't5', 's', 'e', 'r', '[]', '5', now())
"""
MANY = """
    INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload, idempotency_key)
    SELECT gen_random_uuid(), '{tenant}', 't', 'many' || n, 'e', 'r',
           jsonb_build_object('run_id', gen_random_uuid()), 'many' || n
    FROM generate_series(1, 20000) AS n
"""


@pytest.fixture
def run(kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> uuid.UUID:
    run = uuid.uuid4()
    with psycopg.connect(kernel_database.app) as connection:
        bind(connection, two_tenants[0])
        connection.execute(FILL.format(run=run, tenant=two_tenants[0]).encode())
    return run


def bind(connection: psycopg.Connection[Any], tenant: uuid.UUID) -> None:
    connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(tenant),))


def test_each_ledger_is_counted_on_its_own_and_a_strange_run_id_breaks_nothing(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], run: uuid.UUID
) -> None:
    with psycopg.connect(kernel_database.app, row_factory=dict_row) as connection:
        bind(connection, two_tenants[0])
        rows = {row["run_id"]: row for row in connection.execute("SELECT * FROM mcrc_v1_view").fetchall()}
    assert len(rows) == 2
    row = rows.pop(run)
    assert list(row) == COLUMNS
    assert row["llm_call_count"] == 2
    assert row["llm_cost_eur"] == Decimal("0.25")
    assert row["llm_cost_pending_count"] == 1
    assert row["connector_call_count"] == 3
    assert row["connector_cost_eur"] == Decimal("1.5")
    assert row["connector_cost_pending_count"] == 0
    assert (row["knowledge_call_count"], row["telemetry_event_count"]) == (1, 2)
    assert (row["last_trace_id"], row["last_span_id"]) == ("t2", "s")
    empty = rows.popitem()[1]
    assert (empty["llm_call_count"], empty["llm_cost_eur"], empty["telemetry_event_count"]) == (0, 0, 0)
    assert empty["last_trace_id"] is None


def test_of_events_of_one_moment_the_greatest_id_is_the_last(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], run: uuid.UUID
) -> None:
    with psycopg.connect(kernel_database.app) as connection:
        bind(connection, two_tenants[0])
        for number in (2, 9, 5):
            connection.execute(
                "INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload,"
                " idempotency_key, created_at) VALUES (%s, %s, %s, 's', 'e', 'r', %s, %s, now() + interval '1 day')",
                (uuid.UUID(int=number), two_tenants[0], f"at-{number}", Jsonb({"run_id": str(run)}), f"at-{number}"),
            )
        last = connection.execute("SELECT last_trace_id FROM mcrc_v1_view WHERE run_id = %s", (run,)).fetchone()
    assert last == ("at-9",)


def scans(plan: dict[str, Any]) -> list[dict[str, Any]]:
    below = [scan for child in plan.get("Plans", []) for scan in scans(child)]
    return [plan, *below] if "Relation Name" in plan or "Index Name" in plan else below


def test_the_writer_reads_one_run_through_indexes_under_row_level_security(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], run: uuid.UUID
) -> None:
    with psycopg.connect(kernel_database.admin) as connection:
        connection.execute(MANY.format(tenant=two_tenants[0]).encode())
        connection.execute("ANALYZE")
    with psycopg.connect(kernel_database.app) as connection:
        bind(connection, two_tenants[0])
        explained = connection.execute(
            "EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM mcrc_v1_view WHERE run_id = %s", (run,)
        ).fetchone()
    assert explained is not None
    found = scans(explained[0][0]["Plan"])
    telemetry = [scan for scan in found if scan.get("Relation Name") == "telemetry_events"]
    used = {scan.get("Index Name") for scan in found}
    assert "ix_telemetry_events_tenant_payload_run" in used, json.dumps(explained[0], indent=1)
    assert all(scan["Node Type"] != "Seq Scan" for scan in telemetry)
    assert max(scan["Actual Rows"] for scan in telemetry) <= 2


MONEY = st.decimals(min_value=0, max_value=10**6, places=8)
COSTED = st.tuples(
    st.sampled_from(["llm", "connector"]), st.sampled_from(["calculated", "pending", "unavailable"]), MONEY
)
TOLD = st.tuples(st.sampled_from(["telemetry", "governance"]), st.sampled_from(["knowledge_call", "other"]), st.just(0))
WRITTEN = st.lists(st.tuples(st.integers(0, 1), COSTED | TOLD), max_size=20)


def emission(tenant: str, span: str, kind: str, what: str, cost: Any) -> LedgerArgs:
    """One event whose type, or whose state of cost, is ``what``."""
    event_type = what if kind in ("telemetry", "governance") else kind
    shared: dict[str, Any] = {"span_id": span, "idempotency_key": IdempotencyKey(tenant, "t", span, event_type, "h")}
    if kind == "telemetry":
        return EmitTelemetryArgs(event_type=what, capability="read", **shared)
    if kind == "governance":
        return EmitGovernanceArgs(governance_event_type=what, **shared)
    shared |= {"cost_status": what, "cost_eur": cost if what == "calculated" else None}
    shared["pricing_version"] = "unavailable" if what == "unavailable" else "overrides-static"
    if kind == "llm":
        return EmitLlmCallArgs(model="m", prompt_tokens=1, completion_tokens=1, **shared)
    return EmitConnectorCallArgs(connector_id="c", capability="read", **shared)


@pytest.mark.parametrize("batched", [False, True])
@settings(max_examples=max(10, int(200 * SOAK)), deadline=None, suppress_health_check=list(HealthCheck))
@given(written=WRITTEN, replayed=st.lists(st.integers(0, 19), max_size=5))
def test_every_total_of_a_run_is_the_plain_sum_of_what_was_emitted_for_it(
    kernel_database: DatabaseUrls,
    two_tenants: tuple[uuid.UUID, uuid.UUID],
    batched: bool,
    written: list[tuple[int, tuple[str, str, Decimal]]],
    replayed: list[int],
) -> None:
    tenant, runs = str(two_tenants[0]), (uuid.uuid4(), uuid.uuid4())
    events = [
        (emission(tenant, f"{runs[0].hex}-{place}", *event), runs[of_run])
        for place, (of_run, event) in enumerate(written)
    ]
    events += [events[place] for place in replayed if place < len(written)]
    with psycopg.connect(kernel_database.app, row_factory=dict_row) as connection:
        bind(connection, two_tenants[0])
        for run in runs:
            connection.execute("INSERT INTO runs (id, tenant_id, actor_kind) VALUES (%s, %s, 'agent')", (run, tenant))
        if not batched:
            emitter = SqlAlchemyKernelEmitter(tenant, connection=connection)
            for args, run in events:
                emitter._write(args, run)  # the four methods differ in nothing else
    if batched:
        with BatchingKernelEmitter(tenant, dsn=kernel_database.app) as batching:
            for args, run in events:
                batching.submit(args, run_id=run)
    with psycopg.connect(kernel_database.app, row_factory=dict_row) as connection:
        bind(connection, two_tenants[0])
        found = {row["run_id"]: row for row in connection.execute("SELECT * FROM mcrc_v1_view").fetchall()}
    for number, run in enumerate(runs):
        mine = [event for of_run, event in written if of_run == number]
        for kind in ("llm", "connector"):
            calls = [(what, cost) for each, what, cost in mine if each == kind]
            assert found[run][f"{kind}_call_count"] == len(calls)
            assert found[run][f"{kind}_cost_eur"] == sum(cost for what, cost in calls if what == "calculated")
            assert found[run][f"{kind}_cost_pending_count"] == sum(what == "pending" for what, _ in calls)
        told = [what for kind, what, _ in mine if kind in ("telemetry", "governance")]
        assert found[run]["telemetry_event_count"] == len(told)
        assert found[run]["knowledge_call_count"] == told.count("knowledge_call")
