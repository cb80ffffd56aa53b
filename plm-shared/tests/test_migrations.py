"""The chain 0001 to 0012 on real servers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from plm_shared import migrations
from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.testing.databases import TemplateDatabases

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
