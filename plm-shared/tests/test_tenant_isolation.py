"""Row-level security as the application's login meets it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from plm_shared import db
from plm_shared.addresses import DatabaseUrls
from psycopg import errors, sql
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

pytestmark = pytest.mark.every_postgres

INSERTS = {
    "runs": "INSERT INTO runs (id, tenant_id, actor_kind) VALUES (%(id)s, %(tenant)s, 'agent')",
    "telemetry_events": "INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability,"
    " idempotency_key) VALUES (%(id)s, %(tenant)s, 't', 's', 'e', 'read', %(id)s::uuid::text)",
    "llm_calls": "INSERT INTO llm_calls (id, tenant_id, span_id, model, prompt_tokens, completion_tokens,"
    " pricing_version, idempotency_key) VALUES (%(id)s, %(tenant)s, 's', 'm', 1, 1, 'unavailable', %(id)s::uuid::text)",
    "connector_calls": "INSERT INTO connector_calls (id, tenant_id, span_id, connector_id, capability,"
    " pricing_version, idempotency_key) VALUES (%(id)s, %(tenant)s, 's', 'c', 'read', 'unavailable',"
    " %(id)s::uuid::text)",
    "artifacts": "INSERT INTO artifacts (id, tenant_id, trace_id, mime_type, size_bytes, backend, storage_uri)"
    " VALUES (%(id)s, %(tenant)s, 't', 'text/plain', 1, 'local', 'file:///x')",
    "pricing_snapshots": "INSERT INTO pricing_snapshots (id, tenant_id, model, snapshot_date, pricing_version)"
    " VALUES (%(id)s, %(tenant)s, 'm', '2020-01-01', 'litellm-live')",
}
NOBODY = str(uuid.UUID(int=0))


def insert(connection: psycopg.Connection[Any], table: str, tenant: uuid.UUID) -> None:
    connection.execute(INSERTS[table].encode(), {"id": uuid.uuid4(), "tenant": tenant})


def visible(connection: psycopg.Connection[Any], table: str) -> int:
    row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchone()
    assert row is not None
    return int(row[0])


def bind(connection: psycopg.Connection[Any], tenant: uuid.UUID | str) -> None:
    connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(tenant),))


@pytest.fixture
def filled(kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> DatabaseUrls:
    """One row of each tenant in every table, written by the application."""
    with psycopg.connect(kernel_database.app) as connection:
        for tenant in two_tenants:
            bind(connection, tenant)
            for table in INSERTS:
                insert(connection, table, tenant)
    return kernel_database


@pytest.mark.parametrize("table", [*INSERTS, "mcrc_v1_view"])
def test_a_tenant_sees_its_own_rows_and_nobody_sees_any(
    filled: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], table: str
) -> None:
    with psycopg.connect(filled.app) as connection:
        assert visible(connection, table) == 0
        connection.commit()
        for setting, rows in ((two_tenants[0], 1), (two_tenants[1], 1), ("", 0), (NOBODY, 0)):
            bind(connection, setting)
            assert visible(connection, table) == rows
            connection.commit()
        # The same connection used before: its setting is now the empty text, not unset.
        assert connection.execute("SELECT current_setting('app.tenant_id', true)").fetchone() == ("",)
        assert visible(connection, table) == 0


@pytest.mark.parametrize("table", INSERTS)
def test_a_row_without_or_for_another_tenant_cannot_be_written(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], table: str
) -> None:
    mine, theirs = two_tenants
    with psycopg.connect(kernel_database.app) as connection:
        for setting in (None, "", theirs):
            if setting is not None:
                bind(connection, setting)
            with pytest.raises(errors.InsufficientPrivilege) as caught:
                insert(connection, table, mine)
            assert caught.value.sqlstate == "42501"
            connection.rollback()


def test_even_the_owner_is_bound(filled: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]) -> None:
    with psycopg.connect(filled.owner) as connection:
        assert visible(connection, "runs") == 0
        bind(connection, two_tenants[0])
        assert visible(connection, "runs") == 1


def test_the_application_cannot_update_another_tenants_row_nor_move_its_own(
    filled: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID]
) -> None:
    with psycopg.connect(filled.app) as connection:
        bind(connection, two_tenants[0])
        changed = connection.execute("UPDATE runs SET quality_level = 'gold' WHERE tenant_id = %s", (two_tenants[1],))
        assert changed.rowcount == 0
        with pytest.raises(errors.InsufficientPrivilege):
            connection.execute("UPDATE runs SET tenant_id = %s", (two_tenants[1],))


@pytest.fixture
def pooled(filled: DatabaseUrls, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PG_DSN", filled.app)
    db.reset_engine()
    yield
    db.reset_engine()


@pytest.mark.usefixtures("pooled")
def test_a_session_shows_one_tenant_and_leaves_nothing_on_the_pooled_connection(
    two_tenants: tuple[uuid.UUID, uuid.UUID],
) -> None:
    backends = set()
    for tenant in two_tenants:
        with db.tenant_scoped_session(tenant) as session:
            assert session.execute(text("SELECT tenant_id FROM runs")).scalars().all() == [tenant]
            backends.add(session.execute(text("SELECT pg_backend_pid()")).scalar())
    with db.get_sessionmaker()() as session:
        assert session.execute(text("SELECT count(*) FROM runs")).scalar() == 0
        backends.add(session.execute(text("SELECT pg_backend_pid()")).scalar())
    assert len(backends) == 1


@pytest.mark.usefixtures("pooled")
def test_a_session_commits_at_the_end_and_rolls_back_on_an_error(two_tenants: tuple[uuid.UUID, uuid.UUID]) -> None:
    tenant = two_tenants[0]
    add = text("INSERT INTO runs (id, tenant_id, actor_kind) VALUES (gen_random_uuid(), :tenant, 'human')")

    def write_and_fail() -> None:
        with db.tenant_scoped_session(tenant) as session:
            session.execute(add, {"tenant": tenant})
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    with db.tenant_scoped_session(str(tenant)) as session:
        session.execute(add, {"tenant": tenant})
    with db.tenant_scoped_session(tenant) as session:
        assert session.execute(text("SELECT count(*) FROM runs")).scalar() == 2


@pytest.mark.usefixtures("pooled")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_each_process_has_connections_of_its_own(two_tenants: tuple[uuid.UUID, uuid.UUID]) -> None:
    def backend() -> int:
        with db.tenant_scoped_session(two_tenants[0]) as session:
            return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())

    mine = backend()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(backend()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        theirs = answer.read()
    os.waitpid(child, 0)
    assert theirs.isdigit()
    assert int(theirs) != mine
    assert backend() == mine


def test_a_session_refuses_a_tenant_that_is_no_uuid_and_a_missing_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_DSN", raising=False)
    db.reset_engine()
    with pytest.raises(ValueError, match="badly formed"), db.tenant_scoped_session("nobody"):
        pass
    with pytest.raises(RuntimeError, match="PG_DSN is not set"), db.tenant_scoped_session(uuid.uuid4()):
        pass


async def test_a_coroutines_session_keeps_the_same_promises(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_DSN", kernel_database.app)
    mine, theirs = two_tenants
    insert_run = text("INSERT INTO runs (id, tenant_id, actor_kind) VALUES (:id, :tenant, 'agent')")
    count = text("SELECT count(*) FROM runs")

    async def change_my_mind(tenant: uuid.UUID) -> None:
        async with db.async_tenant_scoped_session(tenant) as session:
            await session.execute(insert_run, {"id": uuid.uuid4(), "tenant": tenant})
            raise RuntimeError("changed my mind")

    try:
        async with db.async_tenant_scoped_session(mine) as session:
            await session.execute(insert_run, {"id": uuid.uuid4(), "tenant": mine})
        with pytest.raises(RuntimeError, match="changed my mind"):
            await change_my_mind(mine)
        with pytest.raises(ProgrammingError, match="row-level security"):
            async with db.async_tenant_scoped_session(theirs) as session:
                await session.execute(insert_run, {"id": uuid.uuid4(), "tenant": mine})
        async with db.async_tenant_scoped_session(mine) as session:
            assert await session.scalar(count) == 1
        async with db.async_tenant_scoped_session(theirs) as session:
            assert await session.scalar(count) == 0
        async with db.get_async_engine().connect() as connection:
            assert await connection.scalar(count) == 0
    finally:
        await db.reset_async_engine()
