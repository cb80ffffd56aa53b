"""A host's own transaction: what can hold a booking takes it, what cannot is refused, and no refusal is committed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import psycopg
import pytest
from plm_engine_core.control_plane import ControlPlane, Granted, SyncControlPlane
from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool

pytestmark = pytest.mark.postgres_only


class Host:
    """Each operation that takes a connection, ready to be done."""

    def __init__(self, bench, lease, grant, printer):
        self.bench, self.lease, self.grant, self.printer = bench, lease, grant, printer

    async def admit(self, connection):
        proposal = self.bench.proposal(self.lease, step_index=1, step_id="second")
        return await self.bench.control_plane.admit(proposal, connection=connection)

    async def settle(self, connection):
        return await self.bench.settle(self.grant, self.lease, connection=connection)

    async def require_lease(self, connection):
        return await self.bench.control_plane.require_lease(self.printer, connection=connection)


OPERATIONS = pytest.mark.parametrize("operation", ["admit", "settle", "require_lease"])


@pytest.fixture
async def host(bench):
    lease = await bench.lease()
    printer = await bench.control_plane.acquire_lease(
        bench.tenant, "printer/1", owner="host", seconds=60, by=bench.requester
    )
    return Host(bench, lease, await bench.begun(lease), printer)


@OPERATIONS
async def test_a_transaction_that_has_failed_is_refused(bench, host, operation):
    async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.execute("SELECT 1/0")
        with pytest.raises(InvalidRequest, match="transaction is aborted") as caught:
            await getattr(host, operation)(connection)
        assert caught.value.field == "connection"
        await connection.rollback()
        await getattr(host, operation)(connection)


@OPERATIONS
async def test_a_transaction_that_may_only_read_is_refused(bench, host, operation):
    async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
        await connection.set_read_only(True)
        with pytest.raises(InvalidRequest, match="read-only transaction") as caught:
            await getattr(host, operation)(connection)
        assert caught.value.field == "connection"


@OPERATIONS
async def test_what_is_no_connection_is_refused(host, operation):
    with pytest.raises(InvalidRequest, match=r"one of psycopg's, not a asyncio\.locks\.Lock") as caught:
        await getattr(host, operation)(asyncio.Lock())
    assert caught.value.field == "connection"


@OPERATIONS
@pytest.mark.parametrize("cursor_factory", [psycopg.AsyncRawCursor, psycopg.AsyncClientCursor])
async def test_the_hosts_own_kind_of_cursor_does_not_matter(bench, host, operation, cursor_factory):
    connect = psycopg.AsyncConnection.connect(bench.database.app, cursor_factory=cursor_factory)
    async with await connect as connection:
        await getattr(host, operation)(connection)


@OPERATIONS
async def test_in_a_pipeline_without_a_transaction_nothing_is_booked(bench, host, operation):
    connect = psycopg.AsyncConnection.connect(bench.database.app, autocommit=True)
    async with await connect as connection, connection.pipeline():
        await connection.execute("SELECT 1")
        with pytest.raises(InvalidRequest, match="open one first"):
            await getattr(host, operation)(connection)
        async with connection.transaction():
            await connection.execute("SELECT 1")
            await getattr(host, operation)(connection)


@OPERATIONS
async def test_a_synchronous_connection_will_do(bench, host, operation):
    before = await bench.kinds(host.lease.run)
    with psycopg.connect(bench.database.app) as connection:
        await getattr(host, operation)(connection)
        connection.rollback()
        assert await bench.kinds(host.lease.run) == before
    with psycopg.connect(bench.database.app, autocommit=True) as connection:
        with pytest.raises(InvalidRequest, match="open one first"):
            await getattr(host, operation)(connection)
        with connection.pipeline():
            connection.execute("SELECT 1")
            with pytest.raises(InvalidRequest, match="open one first"):
                await getattr(host, operation)(connection)
            with connection.transaction():
                await getattr(host, operation)(connection)


async def test_a_synchronous_host_books_in_its_own_transaction(bench, host):
    """As whoever has no event loop does it: the synchronous face, and a connection that it never awaits."""

    @asynccontextmanager
    async def opened():
        async with open_pool(bench.database.app, max_size=2) as pool:
            core = bench.control_plane
            yield ControlPlane(policy=core.policy, registry=core.registry, storage=PostgresStorage(pool, None))

    def work():
        with SyncControlPlane(opened()) as plane, psycopg.connect(bench.database.app) as connection:
            proposal = bench.proposal(host.lease, step_index=1, step_id="second")
            assert isinstance(plane.admit(proposal, connection=connection), Granted)
            connection.rollback()
            return plane.admit(proposal, connection=connection)

    assert isinstance(await asyncio.to_thread(work), Granted)
    assert (await bench.kinds(host.lease.run)).count("step_granted") == 2


async def test_no_denial_is_answered_in_a_transaction_that_can_only_be_rolled_back(bench, host):
    """A host that took the answer and committed would lose what it had written beside it, and hear nothing of that."""
    bench.sql("ALTER FUNCTION engine_book_patiently_v1 SET lock_timeout = '50ms'")
    with psycopg.connect(bench.database.admin) as blocker:
        blocker.execute("SELECT FROM run_states WHERE run_id = %s FOR UPDATE", [host.lease.run.id])
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            with pytest.raises(StorageUnavailable):
                await host.admit(connection)
            await connection.rollback()
            blocker.rollback()
            assert isinstance(await host.admit(connection), Granted)
