"""The audit sink on a real PostgreSQL, as the application's login."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from plm_engine_core.control_plane.identity import (
    AuditTenantUnknown,
    AuditUnavailable,
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    PostgresAuditSink,
    make_test_identity,
)
from plm_engine_core.control_plane.identity.audit import Surface, anonymous_record, bind_record, reject_record
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants
from psycopg_pool import AsyncConnectionPool

Pool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]


@pytest.fixture(params=[True, False], ids=["autocommit", "transactional"])
async def pool(engine_database: DatabaseUrls, request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    options = {"autocommit": request.param}
    async with AsyncConnectionPool(engine_database.app, min_size=1, max_size=1, kwargs=options, open=False) as opened:
        yield opened


def rows(database: DatabaseUrls) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.admin) as connection:
        return connection.execute(
            "SELECT tenant_id, id, user_id, actor_kind::text, event_type, payload FROM audit_log ORDER BY created_at"
        ).fetchall()


async def test_records_of_several_tenants_go_through_one_connection(engine_database: DatabaseUrls, pool: Pool) -> None:
    first, second = create_tenants(engine_database, "first", "second")
    sink = PostgresAuditSink(pool)
    identity = make_test_identity(tenant_id=first, scopes=["b", "a"], session_id="s-1")
    bound = bind_record(identity, provider="hs256")
    refused = reject_record(second, IdentityExpiredError(), provider="hs256", surface=Surface.HTTP)
    await sink.write(bound)
    await sink.write(refused)
    assert rows(engine_database) == [
        (first, bound.id, identity.user_id, "human", "identity.bind",
         {"provider": "hs256", "scopes": ["a", "b"], "session_id": "s-1"}),
        (second, refused.id, None, "system", "identity.reject",
         {"provider": "hs256", "reason": "expired", "code": "IDENTITY_EXPIRED", "surface": "http"}),
    ]  # fmt: skip
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT count(*) FROM audit_log")
        assert await cursor.fetchone() == (0,), "the tenant setting must end with the transaction"


async def test_what_proves_no_tenant_is_kept_for_the_installation_and_nobody_changes_it(
    engine_database: DatabaseUrls, pool: Pool
) -> None:
    record = anonymous_record(
        IdentityInvalidSignatureError(), provider="hs256", surface=Surface.HTTP, client="192.0.2.1", omitted=3
    )
    await PostgresAuditSink(pool).write(record)
    kept = "SELECT id, event_type, payload->>'reason', payload->'omitted' FROM audit_log_system"
    for login in ("admin", "owner"):
        with psycopg.connect(getattr(engine_database, login), autocommit=True) as connection:
            rows_kept = connection.execute(kept).fetchall()
            assert rows_kept == [(record.id, "identity.reject", "bad_signature", 3)]
            for change in ("UPDATE audit_log_system SET payload = '{}'", "DELETE FROM audit_log_system"):
                with pytest.raises(psycopg.errors.CheckViolation, match="append-only"):
                    connection.execute(change)
            with pytest.raises(psycopg.errors.CheckViolation, match="append-only"):
                connection.execute("TRUNCATE audit_log_system")
    assert rows(engine_database) == []


async def test_a_record_for_an_unknown_tenant_says_so_and_the_pool_goes_on(
    engine_database: DatabaseUrls, pool: Pool
) -> None:
    sink = PostgresAuditSink(pool)
    with pytest.raises(AuditTenantUnknown) as caught:
        await sink.write(bind_record(make_test_identity(tenant_id=uuid.UUID(int=9)), provider="hs256"))
    assert caught.value.tenant_id == uuid.UUID(int=9)
    (tenant,) = create_tenants(engine_database, "acme")
    await sink.write(bind_record(make_test_identity(tenant_id=tenant), provider="hs256"))
    assert len(rows(engine_database)) == 1


async def test_a_locked_table_is_unavailable_in_bounded_time(engine_database: DatabaseUrls, pool: Pool) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    record = bind_record(make_test_identity(tenant_id=tenant), provider="hs256")
    with psycopg.connect(engine_database.owner) as blocker:
        blocker.execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(AuditUnavailable, match="TimeoutError"):
            await PostgresAuditSink(pool, timeout_seconds=0.2).write(record)
    await PostgresAuditSink(pool).write(record)
    assert len(rows(engine_database)) == 1


async def test_an_audit_log_that_is_slow_keeps_nobody_else_from_the_database(engine_database: DatabaseUrls) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    options = {"autocommit": True}
    async with AsyncConnectionPool(engine_database.app, min_size=4, max_size=4, kwargs=options, open=False) as pool:
        await pool.wait()
        sink = PostgresAuditSink(pool, timeout_seconds=60)
        with psycopg.connect(engine_database.owner) as blocker:
            blocker.execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE")
            records = [bind_record(make_test_identity(tenant_id=tenant), provider="hs256") for _ in range(50)]
            writing = [asyncio.create_task(sink.write(record)) for record in records]
            for _ in range(20):
                async with pool.connection(timeout=10) as connection:
                    await connection.execute("SELECT 1")
            assert not any(task.done() for task in writing)
        await asyncio.gather(*writing)
    assert len(rows(engine_database)) == 50


async def test_a_lost_database_is_unavailable(engine_database: DatabaseUrls, pool: Pool) -> None:
    (tenant,) = create_tenants(engine_database, "acme")
    await pool.close()
    with pytest.raises(AuditUnavailable):
        await PostgresAuditSink(pool).write(bind_record(make_test_identity(tenant_id=tenant), provider="hs256"))


async def test_a_cancel_that_comes_with_the_connection_is_one(
    engine_database: DatabaseUrls, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait that ends by both may be told as one that has not been cancelled."""
    (tenant,) = create_tenants(engine_database, "acme")
    getconn, came = pool.getconn, asyncio.Event()

    async def with_a_cancel(**patience: float | None) -> psycopg.AsyncConnection[Any]:
        connection = await getconn(**patience)
        came.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return connection

    monkeypatch.setattr(pool, "getconn", with_a_cancel)
    record = bind_record(make_test_identity(tenant_id=tenant), provider="hs256")
    writing = asyncio.ensure_future(PostgresAuditSink(pool).write(record))
    await came.wait()
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()
