"""The chain 0001 to 0012 on real servers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_shared import migrations
from plm_shared.addresses import DatabaseUrls, sqlalchemy_url
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.tables import METADATA
from plm_shared.testing.databases import ClusterPool, TemplateDatabases
from psycopg import sql
from sqlalchemy import create_engine

pytestmark = pytest.mark.every_postgres
PACKAGE = Path(__file__).parents[1]
SHAPE = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, c.relacl::text,
           c.relrowsecurity, c.relforcerowsecurity
    FROM pg_class AS c LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relnamespace = 'public'::regnamespace ORDER BY 1, 2
"""


@pytest.fixture
def empty(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("migrating")
    yield database
    template_databases.drop(database)


def shape(database: DatabaseUrls) -> list[tuple[object, ...]]:
    with psycopg.connect(database.admin) as connection:
        return connection.execute(SHAPE).fetchall()


def test_the_owner_who_is_no_superuser_goes_up_down_and_up_again(empty: DatabaseUrls) -> None:
    migrations.upgrade(empty.owner)
    assert migrations.current(empty.owner) == "0012"
    full = shape(empty)
    migrations.upgrade(empty.owner)
    migrations.downgrade(empty.owner)
    assert migrations.current(empty.owner) is None
    assert {row[0] for row in shape(empty)} == {"alembic_version_plm_shared", "alembic_version_plm_shared_pkc"}
    migrations.upgrade(empty.owner)
    assert shape(empty) == full


def test_every_single_revision_can_be_undone_and_repeated(empty: DatabaseUrls) -> None:
    for revision in (f"{number:04d}" for number in range(1, 13)):
        migrations.upgrade(empty.owner, revision)
        before = shape(empty)
        migrations.downgrade(empty.owner, "-1")
        migrations.upgrade(empty.owner, revision)
        assert shape(empty) == before, revision


def test_a_superuser_migrates_a_bare_database(postgres_cluster: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres_cluster.admin_dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE bare")
        try:
            bare = postgres_cluster.admin_dsn.replace("/postgres?", "/bare?")
            migrations.upgrade(bare)
            migrations.downgrade(bare)
            migrations.upgrade(bare)
            assert migrations.current(bare) == "0012"
        finally:
            connection.execute("DROP DATABASE bare")


def test_a_downgrade_leaves_roles_that_another_database_needs(
    empty: DatabaseUrls, kernel_database: DatabaseUrls
) -> None:
    migrations.upgrade(empty.admin)
    migrations.downgrade(empty.admin)
    with psycopg.connect(kernel_database.app) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)


def test_two_databases_of_one_cluster_may_be_migrated_at_once(postgres_cluster: EmbeddedPostgres) -> None:
    """Neither role exists when either migration begins; the one that comes second waits for the first and goes on."""
    clusters = ClusterPool()
    address = clusters.cluster(postgres_cluster.major).admin_dsn
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            migrations.upgrade(address)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    try:
        with psycopg.connect(address) as other, psycopg.connect(address, autocommit=True) as watcher:
            other.execute("CREATE ROLE plm_kernel_writer NOLOGIN")
            migrating = threading.Thread(target=migrate)
            migrating.start()
            while migrating.is_alive() and not watcher.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
                migrating.join(0.01)
            other.commit()
            migrating.join()
        assert failures == []
        assert migrations.current(address) == "0012"
    finally:
        clusters.close()


def test_alembic_works_in_the_package_folder(empty: DatabaseUrls) -> None:
    def alembic(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "alembic", *words],
            cwd=PACKAGE,
            env={**os.environ, "PG_DSN": empty.owner.replace("postgresql://", "postgresql+psycopg://")},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    alembic("upgrade", "head")
    assert "0012 (head)" in alembic("current")
    alembic("downgrade", "base")
    assert alembic("current") == ""


def test_the_printed_plan_builds_the_same_schema(empty: DatabaseUrls, kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(empty.owner, autocommit=True) as connection:
        connection.execute(migrations.sql_for())
    assert shape(empty) == shape(kernel_database)


BUILT = {
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            pg_get_expr(d.adbin, d.adrelid), a.attgenerated
        FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
            AND c.relname NOT LIKE 'alembic%'
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n' AND conname NOT LIKE 'alembic%'
    """,
    "indexes": """
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexname NOT LIKE 'alembic%'
    """,
    "types": """
        SELECT t.typname, e.enumlabel, e.enumsortorder FROM pg_type AS t JOIN pg_enum AS e ON e.enumtypid = t.oid
    """,
}


def test_a_database_built_from_the_models_equals_a_migrated_one(
    empty: DatabaseUrls, kernel_database: DatabaseUrls
) -> None:
    engine = create_engine(sqlalchemy_url(empty.owner))
    METADATA.create_all(engine)
    engine.dispose()
    for what, query in BUILT.items():
        with psycopg.connect(empty.admin) as built, psycopg.connect(kernel_database.admin) as migrated:
            expected = sorted(migrated.execute(query.encode()).fetchall(), key=str)
            assert sorted(built.execute(query.encode()).fetchall(), key=str) == expected, what


KILLED_UPGRADE = """
import os, sys
from alembic import op
from plm_shared import migrations
left = int(sys.argv[2])
execute = op.execute
def counted(*words):
    global left
    execute(*words)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
op.execute = counted
migrations.upgrade(sys.argv[1])
"""


@pytest.mark.parametrize("statements", [1, 4, 13, 20, 27, 40, 60])
def test_an_upgrade_killed_at_any_point_is_finished_by_the_next(
    empty: DatabaseUrls, kernel_database: DatabaseUrls, statements: int
) -> None:
    words = [sys.executable, "-c", KILLED_UPGRADE, empty.owner, str(statements)]
    killed = subprocess.run(words, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    migrations.upgrade(empty.owner)
    assert migrations.current(empty.owner) == "0012"
    assert shape(empty) == shape(kernel_database)


ROWS = {
    "tenants": "INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'tenant {n}'",
    "runs": "INSERT INTO runs (id, tenant_id, actor_kind) SELECT gen_random_uuid(), t.id, 'agent' FROM tenants AS t",
    "telemetry_events": "INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability,"
    " idempotency_key, payload) SELECT gen_random_uuid(), t.id, 't', 's{n}', 'e', 'read', '{n}:' || t.id,"
    " CASE WHEN {n} % 2 = 0 THEN '{{}}' ELSE '{{\"run_id\": \"no uuid\"}}' END::jsonb FROM tenants AS t",
    "llm_calls": "INSERT INTO llm_calls (id, tenant_id, span_id, model, prompt_tokens, completion_tokens,"
    " pricing_version, idempotency_key) SELECT gen_random_uuid(), t.id, 's{n}', 'm', 1, 1, 'litellm-live',"
    " '{n}:' || t.id FROM tenants AS t",
    "connector_calls": "INSERT INTO connector_calls (id, tenant_id, span_id, connector_id, capability,"
    " pricing_version, idempotency_key) SELECT gen_random_uuid(), t.id, 's{n}', 'c', 'read', 'litellm-live',"
    " '{n}:' || t.id FROM tenants AS t",
    "artifacts": "INSERT INTO artifacts (id, tenant_id, trace_id, mime_type, size_bytes, backend, storage_uri)"
    " SELECT gen_random_uuid(), t.id, 't', 'text/plain', 1, 'local', 'file:///x' FROM tenants AS t",
    "pricing_snapshots": "INSERT INTO pricing_snapshots (id, tenant_id, model, snapshot_date, pricing_version)"
    " SELECT gen_random_uuid(), t.id, 'm{n}', '2030-01-01', 'litellm-live' FROM tenants AS t",
}


def test_each_revision_goes_up_and_down_with_data_in_the_tables(empty: DatabaseUrls) -> None:
    def counted(connection: psycopg.Connection[Any], table: str) -> int:
        found = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchone()
        return int(found[0]) if found else 0

    def fill(number: int) -> dict[str, int]:
        with psycopg.connect(empty.admin) as connection:
            there = [
                name for name in ROWS if connection.execute("SELECT to_regclass(%s)", (name,)).fetchone() != (None,)
            ]
            for table in there:
                connection.execute(ROWS[table].format(n=number).encode())
            return {table: counted(connection, table) for table in there}

    made: set[str] = set()
    for number in range(1, 13):
        migrations.upgrade(empty.owner, f"{number:04d}")
        before = fill(number)
        migrations.downgrade(empty.owner, "-1")
        migrations.upgrade(empty.owner, f"{number:04d}")
        with psycopg.connect(empty.admin) as connection:
            for table in made:
                assert counted(connection, table) == before[table]
        made |= set(before)
    assert made == set(ROWS)
    migrations.downgrade(empty.owner)
    migrations.upgrade(empty.owner)
