"""Migration 0013 on real servers: the chain, what it needs below it, and an audit log that nobody can change."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import plm_shared.migrations
import psycopg
import pytest
from plm_engine_core import migrations
from plm_shared import schema_lint
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import TemplateDatabases, create_tenants

pytestmark = pytest.mark.every_postgres
INSERT = "INSERT INTO audit_log (tenant_id, id, actor_kind, event_type) VALUES (%s, %s, 'human', %s)"
BIND = "SELECT set_config('app.tenant_id', %s, true)"


@pytest.fixture
def empty(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("migrating_engine")
    yield database
    template_databases.drop(database)


def write(connection: psycopg.Connection, tenant: uuid.UUID, event_type: str = "identity.bind") -> None:
    connection.execute(BIND, (str(tenant),))
    connection.execute(INSERT, (tenant, uuid.uuid4(), event_type))


def test_upgrade_is_refused_without_the_kernel_schema(empty: DatabaseUrls) -> None:
    with pytest.raises(migrations.KernelSchemaMissing, match=r"no plm-shared schema.*plm-cli db upgrade") as caught:
        migrations.upgrade(empty.owner)
    assert (caught.value.found, caught.value.needed) == (None, "0012")
    assert migrations.current(empty.owner) is None


def test_upgrade_is_refused_on_an_older_kernel_schema(empty: DatabaseUrls) -> None:
    plm_shared.migrations.upgrade(empty.owner, "0011")
    with pytest.raises(migrations.KernelSchemaMissing, match="revision 0011; the engine needs revision 0012"):
        migrations.upgrade(empty.owner)


def test_the_owner_goes_up_down_and_up_again_beside_the_kernel_chain(empty: DatabaseUrls) -> None:
    plm_shared.migrations.upgrade(empty.owner)
    for _ in range(2):
        migrations.upgrade(empty.owner, "0013")
        assert migrations.current(empty.owner) == "0013"
        assert plm_shared.migrations.current(empty.owner) == "0012"
        migrations.downgrade(empty.owner)
        assert migrations.current(empty.owner) is None


@pytest.mark.parametrize("login", ["app", "owner", "admin"])
@pytest.mark.parametrize(
    "statement", ["UPDATE audit_log SET payload = '{}'", "DELETE FROM audit_log", "TRUNCATE audit_log"]
)
def test_no_role_changes_a_row_once_it_is_written(engine_database: DatabaseUrls, login: str, statement: str) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    with psycopg.connect(engine_database.app) as connection:
        write(connection, tenant)
    refusal = psycopg.errors.InsufficientPrivilege if login == "app" else psycopg.errors.CheckViolation
    with psycopg.connect(getattr(engine_database, login)) as connection:
        connection.execute(BIND, (str(tenant),))
        with pytest.raises(refusal):
            connection.execute(statement)


def test_a_superuser_cannot_put_the_triggers_to_rest_with_replica_mode(engine_database: DatabaseUrls) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    with psycopg.connect(engine_database.admin) as connection:
        write(connection, tenant)
        connection.execute("SET LOCAL session_replication_role = replica")
        with pytest.raises(psycopg.errors.CheckViolation, match="append-only: DELETE"):
            connection.execute("DELETE FROM audit_log")


def test_each_tenant_sees_and_writes_only_its_own_rows(engine_database: DatabaseUrls) -> None:
    first, second = create_tenants(engine_database, "first", "second")
    for tenant in (first, second):
        with psycopg.connect(engine_database.app) as connection:
            write(connection, tenant)
    with psycopg.connect(engine_database.app) as connection:
        assert connection.execute("SELECT count(*) FROM audit_log").fetchone() == (0,)
        connection.execute(BIND, (str(first),))
        assert connection.execute("SELECT DISTINCT tenant_id FROM audit_log").fetchall() == [(first,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(INSERT, (second, uuid.uuid4(), "identity.bind"))


def test_an_event_without_a_type_is_refused(engine_database: DatabaseUrls) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    with psycopg.connect(engine_database.app) as connection, pytest.raises(psycopg.errors.CheckViolation):
        write(connection, tenant, "")


def test_every_table_of_both_schemas_keeps_the_rules_of_the_schema_lint(engine_database: DatabaseUrls) -> None:
    assert schema_lint.lint(engine_database.admin) == []
