"""Migrations 0014 onwards on real servers: up, down and up; who may call what; and the rules of every table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import plm_shared.migrations
import psycopg
import pytest
from plm_engine_core import migrations
from plm_shared.addresses import DatabaseUrls
from plm_shared.schema_lint import lint
from plm_shared.sqlalchemy_kernel_emitter import ledger_function, quick_ledger_function
from plm_shared.testing.databases import TemplateDatabases, create_tenants

pytestmark = pytest.mark.every_postgres
REVISIONS = tuple(f"{number:04}" for number in range(13, 54))

SHAPE = """
    SELECT 'column', c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull::text
        || coalesce(a.attacl::text, '')
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'relation', relname, relacl::text || relrowsecurity::text || relforcerowsecurity::text
    FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'function', oid::regprocedure::text,
        proacl::text || proowner::regrole::text || prosecdef::text || prosrc
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) || tgenabled::text FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace
    ORDER BY 1, 2, 3
"""
FUNCTIONS = """
    SELECT p.oid::regprocedure::text, p.proowner::regrole::text, p.prosecdef FROM pg_proc AS p
    WHERE p.proname LIKE 'engine\\_%\\_v_' ORDER BY 1
"""


@pytest.fixture
def empty(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("migrating_governance")
    plm_shared.migrations.upgrade(database.owner)
    yield database
    template_databases.drop(database)


def query(dsn: str, statement: str, *parameters: object) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement.encode(), parameters or None).fetchall()


def test_the_owner_goes_up_down_and_up_again_and_leaves_nothing_behind(empty: DatabaseUrls) -> None:
    bare = query(empty.admin, SHAPE)
    migrations.upgrade(empty.owner)
    assert migrations.current(empty.owner) == REVISIONS[-1]
    full = query(empty.admin, SHAPE)
    migrations.downgrade(empty.owner)
    left = {row for row in query(empty.admin, SHAPE) if "alembic_version_plm_engine_core" not in str(row[1:])}
    assert {row[:2] for row in left} == {row[:2] for row in bare}
    migrations.upgrade(empty.owner)
    assert query(empty.admin, SHAPE) == full


def test_every_single_revision_can_be_undone_and_repeated(empty: DatabaseUrls) -> None:
    for revision in REVISIONS:
        migrations.upgrade(empty.owner, revision)
        before = query(empty.admin, SHAPE)
        migrations.downgrade(empty.owner, "-1")
        migrations.upgrade(empty.owner, revision)
        assert query(empty.admin, SHAPE) == before, revision


def test_the_schema_breaks_no_rule_that_keeps_tenants_apart(engine_database: DatabaseUrls) -> None:
    assert lint(engine_database.admin) == []


def test_functions_are_callable_through_the_engines_writer_role_only(engine_database: DatabaseUrls) -> None:
    functions = query(engine_database.admin, FUNCTIONS)
    assert len(functions) >= 15
    may = "SELECT has_function_privilege(%s, %s, 'EXECUTE')"
    for signature, _, _ in functions:
        assert query(engine_database.admin, may, "plm_engine_writer", signature) == [(True,)], signature
        assert query(engine_database.admin, may, "plm_kernel_writer", signature) == [(False,)], signature
    call = "SELECT * FROM engine_abandoned_runs_v2(1, 30)"
    assert query(engine_database.app, call) == []
    with psycopg.connect(engine_database.admin, autocommit=True) as connection:
        connection.execute("REVOKE plm_engine_writer FROM plm_app")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), psycopg.connect(engine_database.app) as app:
            app.execute(call)
        connection.execute("GRANT plm_engine_writer TO plm_app")


def test_only_the_look_for_abandoned_runs_goes_across_tenants_and_only_what_forgets_has_the_owners_rights(
    engine_database: DatabaseUrls,
) -> None:
    functions = query(engine_database.admin, FUNCTIONS)
    definers = [(signature, owner) for signature, owner, definer in functions if definer]
    assert sorted(definers) == [
        ("engine_abandoned_halts_v1(integer)", "plm_migrator"),
        ("engine_abandoned_runs_v1(integer)", "plm_migrator"),
        ("engine_abandoned_runs_v2(integer,double precision)", "plm_migrator"),
        ("engine_abandoned_runs_v3(integer,double precision)", "plm_migrator"),
        ("engine_abandoned_runs_v4(integer,double precision)", "plm_migrator"),
        (
            "engine_expire_records_v1(uuid,double precision,integer)",
            "plm_owner",
        ),  # under row-level security, like everyone
        ("engine_expired_grants_v1(integer)", "plm_migrator"),
        ("engine_orphaned_runs_v1(integer,double precision)", "plm_migrator"),
        ("engine_prune_events_v1(uuid,text)", "plm_owner"),
        ("engine_prune_events_v2(uuid,text)", "plm_owner"),
        ("engine_prune_events_v3(uuid,text,integer)", "plm_owner"),
        ("engine_runs_ahead_v1(integer,double precision)", "plm_migrator"),
    ]


def test_every_function_stands_in_a_shipped_file_or_its_migration(engine_database: DatabaseUrls) -> None:
    package = files("plm_engine_core")
    folders = (package / "control_plane" / "storage" / "sql", package / "migrations" / "versions")
    shipped = [each for folder in folders for each in folder.iterdir() if each.name.endswith(".sql")]
    written = "".join(each.read_text() for each in shipped)
    for signature, _, _ in query(engine_database.admin, FUNCTIONS):
        name = str(signature).partition("(")[0]
        assert re.search(rf"(FUNCTION|PROCEDURE) {name}\(", written) or "abandoned" in name or "orphaned" in name, name


def test_the_functions_that_write_the_ledger_are_those_that_its_emitter_renders() -> None:
    shipped = files("plm_engine_core") / "migrations" / "versions"
    for_sets = (shipped / "0033_ledger_v2.sql").read_text()
    assert for_sets.endswith(ledger_function("engine_write_ledger_v2"))
    for_one = (shipped / "0036_ledger_v4.sql").read_text()
    assert for_one.endswith(quick_ledger_function("engine_write_ledger_v4", rest="engine_write_ledger_v2"))


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM run_states",
        "UPDATE run_states SET principal = '{}'",
        "UPDATE run_steps SET step_key = 'x'",
        "UPDATE grants SET expires_at = now()",
        "UPDATE approval_tickets SET digest = 'x'",
        "UPDATE budgets SET tenant_id = tenant_id",
        "UPDATE events SET payload = '{}'",
        "DELETE FROM events",
        "UPDATE event_retention SET keep = '1 day'",
        "DELETE FROM halts",
        "TRUNCATE reservations",
        "DELETE FROM idempotency_records",
    ],
)
def test_the_application_changes_only_what_moves(engine_database: DatabaseUrls, statement: str) -> None:
    with psycopg.connect(engine_database.app) as app, pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute(statement.encode())


def test_rows_are_seen_and_written_in_ones_own_tenant_only(engine_database: DatabaseUrls) -> None:
    first, second = create_tenants(engine_database, "first", "second")
    insert = "INSERT INTO rate_buckets (tenant_id, dimension, tokens) VALUES (%s, %s, 1)"
    with psycopg.connect(engine_database.app) as app:
        app.execute("SELECT set_config('app.tenant_id', %s, true)", [str(first)])
        app.execute(insert, [first, "tenant"])
        assert app.execute("SELECT count(*) FROM rate_buckets").fetchone() == (1,)
        app.execute("SELECT set_config('app.tenant_id', %s, true)", [str(second)])
        assert app.execute("SELECT count(*) FROM rate_buckets").fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute(insert, [first, "other"])
