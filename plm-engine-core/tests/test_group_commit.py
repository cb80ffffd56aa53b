"""Bookings beside each other share a connection and a wait for the disk; no failure and nobody's lock."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_engine_core import migrations
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.bookings import Bookings
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Pool
from plm_engine_core.control_plane.storage.postgres.group_commit import MOST_TOGETHER
from plm_shared import migrations as kernel_migrations
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plm_shared.sqlalchemy_kernel_emitter import Statement
from plm_shared.testing.databases import create_tenants
from psycopg_pool import PoolTimeout

pytestmark = pytest.mark.postgres_only

LOCK = 7_000_001
MANY = 3 * MOST_TOGETHER


def double(number: int) -> Statement:
    return Statement("SELECT to_json(2 * %(number)s::integer) AS answer", {"number": number})


def backend() -> Statement:
    return Statement("SELECT to_json(pg_backend_pid()) AS answer", {})


def locked(lock: int = LOCK) -> Statement:
    return Statement("SELECT to_json(pg_advisory_xact_lock(%(lock)s::bigint)::text) AS answer", {"lock": lock})


@pytest.fixture
async def pool(bench) -> AsyncIterator[Pool]:
    async with open_pool(bench.database.app, max_size=4, timeout=2.0) as pool:
        yield pool


@pytest.fixture
def bookings(pool) -> Bookings:
    return Bookings(Gateway(pool))


@asynccontextmanager
async def holding(bench, lock: int = LOCK) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A session of somebody else's that holds a lock."""
    async with await psycopg.AsyncConnection.connect(bench.database.admin) as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", [lock])
        yield connection


async def waiters(bench, many: int) -> None:
    """Until so many sessions wait for an advisory lock."""
    async with await psycopg.AsyncConnection.connect(bench.database.admin, autocommit=True) as connection:
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s"
        async with asyncio.timeout(20):
            while (await (await connection.execute(query, [LOCK])).fetchone()) != (many,):  # noqa: ASYNC110  # in the server
                await asyncio.sleep(0.01)


async def test_each_is_answered_what_it_asked(bookings):
    assert await asyncio.gather(*(bookings.make(double(number)) for number in range(MANY))) == [
        2 * number for number in range(MANY)
    ]


async def test_those_beside_each_other_share_one_connection_and_give_it_back(bookings, pool):
    sessions = await asyncio.gather(*(bookings.make(backend()) for _ in range(MOST_TOGETHER)))
    assert len(set(sessions)) == 1
    async with AsyncExitStack() as all_of_them:
        for _ in range(pool.max_size):
            connection = await all_of_them.enter_async_context(pool.connection())
            await connection.execute("SELECT 1")


async def test_one_that_fails_undoes_no_other(bookings, bench):
    wanted = [double(1), double(2**31 - 1), double(2), double(2**31 - 1), double(3)]
    answers = await asyncio.gather(*(bookings.make(each) for each in wanted), return_exceptions=True)
    assert [answers[0], answers[2], answers[4]] == [2, 4, 6]
    assert all(isinstance(answers[each], psycopg.errors.NumericValueOutOfRange) for each in (1, 3))


async def test_one_alone_that_fails_leaves_the_connection_usable(bookings):
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        await bookings.make(double(2**31 - 1))
    assert await bookings.make(double(21)) == 42


async def test_a_statement_that_the_connection_forgot_is_prepared_again(bookings, pool):
    await asyncio.gather(*(bookings.make(double(number)) for number in range(4)))
    async with pool.connection() as connection:
        await connection.execute("DEALLOCATE ALL")
    assert await asyncio.gather(*(bookings.make(double(number)) for number in range(4))) == [0, 2, 4, 6]


async def test_a_statement_that_others_prepared_is_used_and_nothing_is_made_twice(bookings, bench, pool):
    bench.behind.sql("CREATE SEQUENCE made; GRANT USAGE ON made TO plm_engine_writer")
    once = Statement("SELECT to_json(nextval('made')) AS answer", {})
    numbers: list[int] = []
    for each in (bookings, Bookings(Gateway(pool)), Bookings(Gateway(pool))):
        numbers += await asyncio.gather(*(each.make(once) for _ in range(4)))
        numbers.append(await each.make(once))
    assert sorted(numbers) == list(range(1, 16))


async def test_a_text_that_the_database_cannot_hold_is_refused_before_it_is_sent(bookings):
    for value, error in (("4\0", psycopg.DataError), ("\ud800", UnicodeEncodeError)):
        with pytest.raises(error):
            await bookings.make(Statement(double(0).sql, {"number": value}))
    assert await bookings.make(double(21)) == 42


@pytest.mark.parametrize("place", [0, 3, 7])
async def test_who_waits_for_a_lock_keeps_nobody_waiting(bookings, bench, place):
    async with holding(bench) as holder:
        wanted = [double(number) for number in range(8)]
        wanted[place] = locked()
        made = [asyncio.ensure_future(bookings.make(each)) for each in wanted]
        others = [each for number, each in enumerate(made) if number != place]
        assert await asyncio.gather(*others) == [2 * number for number in range(8) if number != place]
        later = await asyncio.gather(*(bookings.make(double(number)) for number in range(8)))
        assert later == [2 * number for number in range(8)]
        assert not made[place].done()
        await holder.rollback()
        assert await made[place] == ""


async def waits_of_one_session(bench, many: int) -> None:
    """Until the session that waited first has waited so many times."""
    query = "SELECT pid, waitstart FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s"
    async with await psycopg.AsyncConnection.connect(bench.database.admin, autocommit=True) as connection:
        waits: dict[int, set[Any]] = {}
        async with asyncio.timeout(20):
            while not waits or len(next(iter(waits.values()))) < many:
                for pid, since in await (await connection.execute(query, [LOCK])).fetchall():
                    if since is not None:
                        waits.setdefault(pid, set()).add(since)


async def test_nobody_is_put_behind_many_who_wait(bench):
    async with open_pool(bench.database.app, max_size=20) as pool, holding(bench) as holder:
        bookings = Bookings(Gateway(pool))
        made = [asyncio.ensure_future(bookings.make(each)) for each in (*(locked() for _ in range(12)), backend())]
        await waits_of_one_session(bench, 3)  # the first alone, and two of the round after it
        assert await bookings.make(backend()) != await made.pop()
        await holder.rollback()
        assert await asyncio.gather(*made) == [""] * 12


async def test_one_behind_a_single_one_that_waits_is_served(bookings, bench):
    async with holding(bench) as holder:
        alone = asyncio.ensure_future(bookings.make(locked()))
        await waiters(bench, 1)
        assert await asyncio.gather(*(bookings.make(double(number)) for number in range(4))) == [0, 2, 4, 6]
        assert not alone.done()
        await holder.rollback()
        assert await alone == ""


async def test_all_connections_may_wait_and_then_the_next_is_refused(bookings, bench, pool):
    async with holding(bench) as holder:
        made = [asyncio.ensure_future(bookings.make(locked())) for _ in range(4)]
        await waiters(bench, 4)
        with pytest.raises(PoolTimeout):
            await asyncio.gather(*(bookings.make(double(number)) for number in range(3)))
        await holder.rollback()
        assert await asyncio.gather(*made) == [""] * 4
    assert await bookings.make(double(21)) == 42


async def made_until(over: asyncio.Event, bookings: Bookings, served: asyncio.Event) -> None:
    """One who books again as soon as it was answered; served when that was so three times."""
    for number in itertools.count(1):
        await bookings.make(double(21))
        if number == 3:
            served.set()
        if over.is_set():
            return


@pytest.fixture
async def only_one(bench) -> AsyncIterator[Pool]:
    async with open_pool(bench.database.app, max_size=1, timeout=2.0) as pool:
        yield pool


async def test_bookings_without_end_leave_a_connection_to_others(only_one):
    over, bookings = asyncio.Event(), Bookings(Gateway(only_one))
    booking = [asyncio.ensure_future(made_until(over, bookings, asyncio.Event())) for _ in range(3)]
    try:
        for _ in range(2):
            async with only_one.connection() as connection:
                await connection.execute("SELECT 1")
    finally:
        over.set()
        await asyncio.gather(*booking)


async def test_more_at_once_than_a_connection_takes_are_all_served(only_one):
    over, bookings = asyncio.Event(), Bookings(Gateway(only_one))
    served = [asyncio.Event() for _ in range(MANY)]
    booking = [asyncio.ensure_future(made_until(over, bookings, each)) for each in served]
    everybody = asyncio.gather(*(each.wait() for each in served))
    await asyncio.wait([everybody, *booking], return_when=asyncio.FIRST_COMPLETED)
    over.set()
    everybody.cancel()
    *ends, _ = await asyncio.gather(*booking, everybody, return_exceptions=True)
    assert ends == [None] * MANY


async def test_a_caller_that_gives_up_takes_nobody_along(bookings, bench):
    async with holding(bench):
        made = [asyncio.ensure_future(bookings.make(each)) for each in (double(1), locked(), double(2))]
        await waiters(bench, 1)
        made[1].cancel()
        assert await asyncio.gather(made[0], made[2]) == [2, 4]
        with pytest.raises(asyncio.CancelledError):
            await made[1]
    assert await bookings.make(double(21)) == 42


async def test_what_nobody_waits_for_any_more_ends_and_gives_its_connection_back(bookings, bench):
    async with holding(bench):
        made = [asyncio.ensure_future(bookings.make(each)) for each in (locked(), locked(), double(1))]
        assert await made[2] == 2
        await waiters(bench, 2)  # each over a connection of its own
        made[0].cancel()
        made[1].cancel()
        await waiters(bench, 0)


async def test_a_lost_connection_fails_all_that_were_on_their_way_and_nobody_after_them(bookings, bench):
    async with holding(bench) as holder:
        made = [asyncio.ensure_future(bookings.make(locked())) for _ in range(3)]
        await waiters(bench, 3)
        await holder.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s",
            [LOCK],
        )
        lost = await asyncio.gather(*made, return_exceptions=True)
        assert all(isinstance(each, psycopg.OperationalError) for each in lost), lost
    assert await asyncio.gather(*(bookings.make(double(number)) for number in range(4))) == [0, 2, 4, 6]


async def test_large_messages_wait_until_the_server_has_taken_them(bookings):
    large = "x" * 3_000_000
    statement = Statement("SELECT to_json(length(%(text)s::text)) AS answer", {"text": large})
    assert await asyncio.gather(*(bookings.make(statement) for _ in range(6))) == [len(large)] * 6


@pytest.fixture(scope="module")
def durable_server() -> Iterator[tuple[EmbeddedPostgres, Any]]:
    """A durable server, that by itself writes nothing to disk for ten seconds."""
    with tempfile.TemporaryDirectory(prefix="plm-group-") as name:
        Path(name).chmod(0o711)  # the server's account must pass through it when root runs the tests
        server = EmbeddedPostgres(Path(name))
        server.start()
        try:
            with psycopg.connect(server.admin_dsn, autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
                connection.execute("SELECT pg_reload_conf()")
            urls = provision(server.admin_dsn, "grouped")
            kernel_migrations.upgrade(urls.owner)
            migrations.upgrade(urls.owner)
            yield server, urls
        finally:
            server.remove()


@pytest.fixture
def mortal(durable_server: tuple[EmbeddedPostgres, Any]) -> Iterator[tuple[EmbeddedPostgres, Any]]:
    """A durable server that the test may kill."""
    yield durable_server
    server, _ = durable_server
    server.start()  # a test that failed may have left it dead
    with psycopg.connect(server.admin_dsn, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")


def postmaster(server: EmbeddedPostgres) -> int:
    return int((server.cluster_dir / "postmaster.pid").read_text().split("\n", 1)[0])


def killed(server: EmbeddedPostgres) -> None:
    os.kill(postmaster(server), signal.SIGKILL)
    server.start()


async def test_a_cancel_that_comes_late_reaches_nobody_else(mortal, caplog):
    server, urls = mortal
    async with (
        open_pool(urls.app, max_size=1) as pool,
        await psycopg.AsyncConnection.connect(urls.admin) as holder,
    ):
        await holder.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        bookings = Bookings(Gateway(pool))
        lost = await bookings.make(backend())
        made = [asyncio.ensure_future(bookings.make(each)) for each in (locked(), double(1))]
        os.kill(postmaster(server), signal.SIGSTOP)  # cancels are heard by it alone
        try:
            async with asyncio.timeout(20):
                while "could not be cancelled" not in caplog.text:  # noqa: ASYNC110  # said by a log
                    await asyncio.sleep(0.01)
            await holder.rollback()
            assert await asyncio.gather(*made) == ["", 2]
        finally:
            os.kill(postmaster(server), signal.SIGCONT)
        assert await bookings.make(backend()) != lost


def make_books(urls: Any) -> None:
    with psycopg.connect(urls.admin, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS booked CASCADE")
        connection.execute("CREATE TABLE booked (number integer)")
        connection.execute("GRANT INSERT, SELECT ON booked TO plm_engine_writer")
        connection.execute(
            "CREATE OR REPLACE FUNCTION book(number integer) RETURNS json LANGUAGE sql AS "
            "'INSERT INTO booked VALUES ($1) RETURNING to_json(number)'"
        )


def book(number: int) -> Statement:
    return Statement("SELECT book(%(number)s::integer) AS answer", {"number": number})


async def at_a_standby(urls: Any, statement: str) -> None:
    """Until a statement that contains this waits for a standby."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE %s"
    async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection, asyncio.timeout(20):
        while (await (await connection.execute(query, [f"%{statement}%"])).fetchone()) != (1,):  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.01)


async def test_who_is_cancelled_at_a_standby_is_not_answered_without_it(mortal):
    server, urls = mortal
    make_books(urls)
    async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection:
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
    await asyncio.to_thread(killed, server)
    async with open_pool(urls.app, max_size=1) as pool:
        bookings = Bookings(Gateway(pool))
        made = [asyncio.ensure_future(bookings.make(book(1)))]
        await at_a_standby(urls, "book(")
        made.append(asyncio.ensure_future(bookings.make(book(2))))
        again = asyncio.ensure_future(at_a_standby(urls, "pg_logical_emit_message"))
        await asyncio.wait([again, *made], return_when=asyncio.FIRST_COMPLETED)
        assert not any(each.done() for each in made)
        await again
        async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection:
            await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await connection.execute("SELECT pg_reload_conf()")
        assert await asyncio.gather(*made) == [1, 2]


async def test_what_was_answered_outlasts_the_server(mortal):
    server, urls = mortal
    make_books(urls)
    async with open_pool(urls.app, max_size=2) as pool:
        bookings = Bookings(Gateway(pool))
        answered: list[int] = []
        enough = asyncio.Event()

        async def books(first: int) -> None:
            for number in range(first, first + 1_000_000):
                answered.append(await bookings.make(book(number)))
                if len(answered) >= 200:
                    enough.set()

        booking = [asyncio.ensure_future(books(1_000_000 * each)) for each in range(5)]
        await asyncio.wait([asyncio.ensure_future(enough.wait()), *booking], return_when=asyncio.FIRST_COMPLETED)
        assert enough.is_set(), [each.exception() for each in booking if each.done()]
        await asyncio.to_thread(killed, server)
        ends = await asyncio.gather(*booking, return_exceptions=True)
        assert all(isinstance(each, psycopg.OperationalError) for each in ends), ends
    with psycopg.connect(urls.admin) as connection:
        kept = {number for (number,) in connection.execute("SELECT number FROM booked").fetchall()}
    assert len(answered) >= 200
    assert set(answered) <= kept


@pytest.mark.parametrize("reader", ["read", "feed"])
async def test_what_a_reader_was_told_outlasts_the_server(mortal, reader):
    server, urls = mortal
    (tenant,) = create_tenants(urls, "read")

    async def told() -> list[bytes]:
        async with open_pool(urls.app) as pool:
            events = PostgresStorage(pool, None).events  # type: ignore[arg-type]  # nothing is delivered
            if reader == "read":
                return [event.hash for event in await events.read(tenant, "run/1")]
            return [event.hash for event in (await events.feed(tenant)).events]

    with psycopg.connect(urls.app, autocommit=True) as connection, connection.transaction():
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant)])
        connection.execute("SELECT set_config('synchronous_commit', 'off', true)")
        connection.execute(
            "SELECT engine_append_event_v1(%s, 'run/1', 'test', 'test', %s)", [tenant, json.dumps({"number": 1})]
        )
    before = await told()
    assert len(before) == 1
    await asyncio.to_thread(killed, server)
    assert await told() == before
