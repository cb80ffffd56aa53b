"""What the application's login can never do to the ledger, and the one-way states."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from psycopg import errors, sql

pytestmark = pytest.mark.every_postgres

SEED = """
    INSERT INTO runs (id, tenant_id, actor_kind) VALUES (gen_random_uuid(), '{0}', 'agent');
    INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, idempotency_key)
        VALUES (gen_random_uuid(), '{0}', 't', 's', 'e', 'read', 'k');
    INSERT INTO pricing_snapshots (id, tenant_id, model, snapshot_date, pricing_version)
        VALUES (gen_random_uuid(), '{0}', 'm', '2020-01-01', 'litellm-live');
    INSERT INTO llm_calls (id, tenant_id, span_id, model, prompt_tokens, completion_tokens, pricing_version,
                           idempotency_key, pricing_snapshot_id)
        SELECT gen_random_uuid(), '{0}', 's', 'm', 1, 1, 'litellm-live', 'k', id FROM pricing_snapshots;
    INSERT INTO connector_calls (id, tenant_id, span_id, connector_id, capability, pricing_version,
                                 idempotency_key, pricing_snapshot_id)
        SELECT gen_random_uuid(), '{0}', 's', 'c', 'read', 'litellm-live', 'k', id FROM pricing_snapshots;
    INSERT INTO artifacts (id, tenant_id, trace_id, mime_type, size_bytes, backend, storage_uri)
        VALUES (gen_random_uuid(), '{0}', 't', 'text/plain', 1, 'local', 'file:///x')
"""
TABLES = ("runs", "telemetry_events", "llm_calls", "connector_calls", "artifacts", "pricing_snapshots", "tenants")
FORBIDDEN = [
    *(f"{verb} {table}" for table in TABLES for verb in ("DELETE FROM", "TRUNCATE", "DROP TABLE")),
    *(f"ALTER TABLE {table} DISABLE TRIGGER ALL" for table in TABLES),
    *(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in TABLES),
    "COPY tenants FROM STDIN",
    "COPY telemetry_events TO '/tmp/stolen'",
    "COPY telemetry_events TO PROGRAM 'cat'",
    "CREATE RULE quiet AS ON INSERT TO telemetry_events DO INSTEAD NOTHING",
    "CREATE TRIGGER quiet BEFORE INSERT ON telemetry_events EXECUTE FUNCTION guard_quality_level()",
    "UPDATE telemetry_events SET payload = '{}'",
    "UPDATE telemetry_events SET created_at = now()",
    "UPDATE pricing_snapshots SET pricing_version = 'x'",
    "UPDATE tenants SET name = 'x'",
    "INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'x')",
    "UPDATE runs SET actor_kind = 'human'",
    "UPDATE llm_calls SET prompt_tokens = 0",
    "UPDATE connector_calls SET envelope = '{}'",
    "UPDATE artifacts SET storage_uri = 'x'",
    "DROP POLICY tenant_isolation ON runs",
    "CREATE TABLE mine (n int)",
    "CREATE SCHEMA mine",
    "SET ROLE plm_owner",
    "SET ROLE plm_migrator",
    "SET SESSION AUTHORIZATION plm_owner",
    "SET session_replication_role = replica",
    "ALTER ROLE plm_app BYPASSRLS",
    "GRANT plm_migrator TO plm_app",
    "DROP FUNCTION guard_cost_status CASCADE",
    "ALTER TABLE telemetry_events OWNER TO plm_app",
    "ALTER TABLE llm_calls DISABLE TRIGGER USER",
    "ALTER FUNCTION guard_cost_status RESET search_path",
    "CREATE FUNCTION guard_cost_status() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    "INSERT INTO telemetry_events (id) SELECT id FROM telemetry_events ON CONFLICT (id) DO UPDATE SET span_id = 'x'",
    "WITH gone AS (DELETE FROM telemetry_events RETURNING *) SELECT * FROM gone",
    "MERGE INTO telemetry_events AS t USING tenants ON true WHEN MATCHED THEN DELETE",
    "SELECT * FROM telemetry_events FOR UPDATE",
    "DO $$ BEGIN LOCK TABLE telemetry_events IN ACCESS EXCLUSIVE MODE; END $$",
    "DO $$ BEGIN DELETE FROM telemetry_events; END $$",
    "COPY (DELETE FROM telemetry_events RETURNING *) TO STDOUT",
    "SELECT lo_export(0, '/tmp/stolen')",
    "SELECT pg_read_file('/etc/passwd')",
    "ALTER SYSTEM SET row_security = off",
    "DROP EXTENSION plpgsql",
]


@pytest.fixture
def seeded(kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> DatabaseUrls:
    tenant = two_tenants[0]
    with psycopg.connect(kernel_database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(tenant),))
        connection.execute(SEED.format(tenant).encode())
    return kernel_database


@pytest.fixture
def mine(seeded: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> DatabaseUrls:
    """The application's address, with the first tenant already set on every connection."""
    tenant = f"{seeded.app}&options=-c%20app.tenant_id%3D{two_tenants[0]}"
    return DatabaseUrls(admin=seeded.admin, owner=seeded.owner, app=tenant)


@pytest.mark.parametrize("role", ["plm_app", "plm_kernel_writer"])
def test_the_application_can_change_nothing_that_is_recorded(mine: DatabaseUrls, role: str) -> None:
    """Neither as itself nor in the one role that it may take."""
    with psycopg.connect(mine.app, autocommit=True) as connection:
        assert connection.execute("SELECT session_user").fetchone() == ("plm_app",)
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        assert connection.execute("SELECT count(*) FROM telemetry_events").fetchone() == (1,)
        for statement in FORBIDDEN:
            with pytest.raises((errors.InsufficientPrivilege, errors.CantChangeRuntimeParam), match=r".") as caught:
                connection.execute(statement.encode())
            assert caught.value.sqlstate == "42501", statement


def test_quality_moves_once_from_pending_and_then_stands(mine: DatabaseUrls) -> None:
    with psycopg.connect(mine.app, autocommit=True) as connection:
        connection.execute("UPDATE runs SET quality_level = 'pending'")
        connection.execute("UPDATE runs SET quality_level = 'silver', updated_at = now()")
        connection.execute("UPDATE runs SET quality_level = 'silver'")
        for level in ("pending", "bronze", "gold"):
            with pytest.raises(errors.CheckViolation) as caught:
                connection.execute("UPDATE runs SET quality_level = %s::quality_level", (level,))
            assert caught.value.diag.constraint_name == "runs_quality_level_once"
        assert connection.execute("SELECT quality_level::text FROM runs").fetchone() == ("silver",)


def test_a_run_starts_as_pending(mine: DatabaseUrls) -> None:
    with psycopg.connect(mine.app) as connection, pytest.raises(errors.CheckViolation) as caught:
        connection.execute(
            "INSERT INTO runs (id, tenant_id, actor_kind, quality_level)"
            " VALUES (gen_random_uuid(), current_setting('app.tenant_id')::uuid, 'agent', 'gold')"
        )
    assert caught.value.diag.constraint_name == "runs_quality_level_starts_pending"


@pytest.mark.parametrize("table", ["llm_calls", "connector_calls"])
@pytest.mark.parametrize("final", ["calculated", "unavailable"])
def test_a_final_cost_is_frozen_in_every_column(mine: DatabaseUrls, table: str, final: str) -> None:
    with psycopg.connect(mine.app, autocommit=True) as connection:

        def update(change: str) -> None:
            connection.execute(sql.SQL("UPDATE {} SET {}").format(sql.Identifier(table), sql.SQL(change)))

        update("cost_eur = 0.5")
        update(f"cost_status = '{final}', cost_eur = 1")
        update(f"cost_status = '{final}', cost_eur = 1.0")
        for change in (
            "cost_status = 'pending'",
            "cost_eur = 2",
            "cost_eur = NULL",
            "pricing_version = 'unavailable'",
            "pricing_snapshot_id = NULL",
        ):
            with pytest.raises(errors.CheckViolation) as caught:
                update(change)
            assert caught.value.diag.constraint_name == f"{table}_cost_once"


def test_a_tenant_and_its_final_rows_can_still_be_deleted_by_the_owner(mine: DatabaseUrls) -> None:
    with psycopg.connect(mine.app) as connection:
        connection.execute("UPDATE llm_calls SET cost_status = 'calculated', cost_eur = 1")
    with psycopg.connect(mine.owner) as connection:
        connection.execute("SET ROLE plm_migrator")
        connection.execute("DELETE FROM pricing_snapshots")
        assert connection.execute("SELECT pricing_snapshot_id FROM llm_calls").fetchone() == (None,)
        connection.execute("DELETE FROM tenants")
        assert connection.execute("SELECT count(*) FROM llm_calls").fetchone() == (0,)


def test_a_temporary_type_of_the_callers_does_not_mislead_the_triggers(mine: DatabaseUrls) -> None:
    with psycopg.connect(mine.owner) as connection:
        connection.execute(
            "SELECT set_config('app.tenant_id', (SELECT id::text FROM tenants WHERE name = 'first'), true)"
        )
        connection.execute("CREATE TYPE pg_temp.quality_level AS ENUM ('gold')")
        connection.execute("CREATE TYPE pg_temp.text AS ENUM ('x')")
        connection.execute("UPDATE runs SET quality_level = 'gold'")
        with pytest.raises(errors.CheckViolation):
            connection.execute("UPDATE runs SET quality_level = 'bronze'")


def test_a_crafted_search_path_shadows_nothing_that_the_guards_use(mine: DatabaseUrls) -> None:
    with psycopg.connect(mine.app, autocommit=True) as connection:
        for statement in (
            "SET search_path = pg_temp, public, pg_catalog",
            "CREATE TYPE pg_temp.cost_status AS ENUM ('pending', 'calculated', 'unavailable')",
            "CREATE TEMP TABLE pricing_snapshots (id uuid)",
            "UPDATE public.llm_calls SET cost_status = 'calculated', cost_eur = 1",
        ):
            try:
                connection.execute(statement.encode())
            except errors.InsufficientPrivilege:
                assert "TEMP" in statement or "pg_temp" in statement  # the application may make nothing temporary
        with pytest.raises(errors.CheckViolation):
            connection.execute("UPDATE public.llm_calls SET cost_eur = 2")
        with pytest.raises(errors.CheckViolation):
            connection.execute("UPDATE public.llm_calls SET pricing_snapshot_id = NULL")


def test_the_rows_of_others_cannot_be_copied_out(mine: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> None:
    with psycopg.connect(mine.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(two_tenants[1]),))
        for table in TABLES[:-1]:
            with connection.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copy:
                assert list(copy) == []


@pytest.mark.parametrize("role", ["plm_app", "plm_kernel_writer"])
def test_nothing_is_copied_in_past_the_policies_and_nothing_out_without_them(mine: DatabaseUrls, role: str) -> None:
    with psycopg.connect(mine.app, autocommit=True) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        for table in TABLES[:-1]:
            with pytest.raises((errors.FeatureNotSupported, errors.InsufficientPrivilege)):
                connection.execute(f"COPY {table} FROM STDIN".encode())
        connection.execute("SET row_security = off")
        for table in TABLES[:-1]:
            for query in ("TABLE {}", "COPY {} TO STDOUT"):
                with pytest.raises(errors.InsufficientPrivilege):
                    connection.execute(sql.SQL(query).format(sql.Identifier(table)))


def test_the_migrator_may_do_what_was_granted_and_nothing_else(mine: DatabaseUrls) -> None:
    forbidden = [
        *(f"{verb} {table}" for table in TABLES for verb in ("TRUNCATE", "DROP TABLE")),
        *(f"ALTER TABLE {table} DISABLE TRIGGER ALL" for table in TABLES),
        *(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in TABLES),
        "SELECT * FROM mcrc_v1_view",
        "DROP POLICY tenant_isolation ON runs",
        "CREATE TABLE mine (n int)",
        "ALTER ROLE plm_app BYPASSRLS",
        "SET session_replication_role = replica",
    ]
    with psycopg.connect(mine.owner, autocommit=True) as connection:
        connection.execute("SET ROLE plm_migrator")
        for statement in forbidden:
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement.encode())
        for table in TABLES:
            connection.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))
        connection.execute("UPDATE tenants SET name = 'renamed'")
        connection.execute("DELETE FROM artifacts")
