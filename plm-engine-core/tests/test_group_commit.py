"""Bookings beside each other share a connection and a wait for the disk; no failure and nobody's lock.

Of the database's part all is as it is shipped but for the kinds of bookings: those of this file stand in their place.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_engine_core import migrations
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, group_commit, open_pool
from plm_engine_core.control_plane.storage.postgres.bookings import Bookings
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Pool
from plm_engine_core.control_plane.storage.postgres.group_commit import MOST_TOGETHER
from plm_shared import migrations as kernel_migrations
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plm_shared.testing.databases import create_tenants
from psycopg_pool import PoolTimeout

pytestmark = pytest.mark.postgres_only

LOCK = 7_000_001
MANY = 3 * MOST_TOGETHER


KINDS = """
CREATE SEQUENCE made;
CREATE TABLE booked (number integer);
CREATE TABLE booked_once (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
GRANT USAGE ON made TO plm_engine_writer;
GRANT INSERT, SELECT ON booked, booked_once TO plm_engine_writer;
CREATE OR REPLACE FUNCTION engine_book_v1(b jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_number integer := (b ->> 'number')::integer;
BEGIN
    IF b ->> 'kind' = 'double' THEN
        RETURN jsonb_build_object('is', 2 * v_number);
    ELSIF b ->> 'kind' = 'backend' THEN
        RETURN jsonb_build_object('is', pg_backend_pid());
    ELSIF b ->> 'kind' = 'clock' THEN
        RETURN jsonb_build_object('is', extract(epoch FROM clock_timestamp()));
    ELSIF b ->> 'kind' = 'sleep' THEN
        PERFORM pg_sleep(v_number);
    ELSIF b ->> 'kind' = 'nothing' THEN
        RETURN NULL;
    ELSIF b ->> 'kind' = 'deep' THEN
        RETURN (repeat('[', 300) || repeat(']', 300))::jsonb;
    ELSIF b ->> 'kind' = 'length' THEN
        RETURN jsonb_build_object('is', length(b ->> 'text'));
    ELSIF b ->> 'kind' = 'lock' THEN
        PERFORM pg_advisory_xact_lock(v_number);
        RETURN jsonb_build_object('is', v_number);
    ELSIF b ->> 'kind' = 'made' THEN
        RETURN jsonb_build_object('is', nextval('made'));
    ELSIF b ->> 'kind' = 'once' THEN
        INSERT INTO booked_once VALUES (v_number);
    ELSE
        INSERT INTO booked VALUES (v_number);
    END IF;
    RETURN jsonb_build_object('is', v_number);
END
$$
"""


def booking(kind: str, **values: Any) -> str:
    return json.dumps({"kind": kind, **values})


def double(number: int) -> str:
    return booking("double", number=number)


def book(number: int) -> str:
    return booking("book", number=number)


FIRST = double(0)  # it opens the connection, and goes alone: those behind it are a round
CLOCK = booking("clock")
BACKEND = booking("backend")
LOCKED = booking("lock", number=LOCK)


async def made(bookings: Bookings, document: str) -> Any:
    return (await bookings.make(document))["is"]


def all_made(bookings: Bookings, documents: Iterable[str]) -> list[asyncio.Future[Any]]:
    return [asyncio.ensure_future(made(bookings, each)) for each in documents]


@pytest.fixture
def kinds(bench) -> None:
    bench.behind.sql(KINDS)


@pytest.fixture
async def pool(bench, kinds) -> AsyncIterator[Pool]:
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
    answers = await asyncio.gather(*all_made(bookings, [double(number) for number in range(MANY)]))
    assert answers == [2 * number for number in range(MANY)]


async def test_those_beside_each_other_share_one_connection_and_give_it_back(bookings, pool):
    sessions = await asyncio.gather(*all_made(bookings, [BACKEND] * MOST_TOGETHER))
    assert len(set(sessions)) == 1
    async with AsyncExitStack() as all_of_them:
        for _ in range(pool.max_size):
            connection = await all_of_them.enter_async_context(pool.connection())
            await connection.execute("SELECT 1")
            for name in ("lock_timeout", "synchronous_commit"):
                cursor = await connection.execute(
                    "SELECT setting = reset_val AS own FROM pg_settings WHERE name = %s", [name]
                )
                assert await cursor.fetchone() == {"own": True}, name


async def test_one_that_fails_undoes_no_other(bookings, bench):
    wanted = [double(1), double(2**31 - 1), double(2), double(2**31 - 1), double(3)]
    answers = await asyncio.gather(*all_made(bookings, wanted), return_exceptions=True)
    assert [answers[0], answers[2], answers[4]] == [2, 4, 6]
    assert all(isinstance(answers[each], psycopg.errors.NumericValueOutOfRange) for each in (1, 3))


async def test_one_alone_that_fails_leaves_the_connection_usable(bookings):
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        await made(bookings, double(2**31 - 1))
    assert await made(bookings, double(21)) == 42


async def test_a_statement_that_the_connection_forgot_is_prepared_again(bookings, pool):
    await asyncio.gather(*all_made(bookings, [double(number) for number in range(4)]))
    async with pool.connection() as connection:
        await connection.execute("DEALLOCATE ALL")
    assert await asyncio.gather(*all_made(bookings, [double(number) for number in range(4)])) == [0, 2, 4, 6]


async def test_a_statement_that_others_prepared_is_used_and_nothing_is_made_twice(bookings, pool):
    numbers: list[int] = []
    for each in (bookings, Bookings(Gateway(pool)), Bookings(Gateway(pool))):
        numbers += await asyncio.gather(*all_made(each, [booking("made")] * 4))
        numbers.append(await made(each, booking("made")))
    assert sorted(numbers) == list(range(1, 16))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ('{"kind": "length", "text": "\\u0000"}', psycopg.DataError),
        ('{"kind": "length", "text": "\\ud800"}', psycopg.DataError),
        ('{"kind": "length", "text": "\ud800"}', UnicodeEncodeError),
        ('{"kind": "length"', psycopg.DataError),
        ("[" * 1_000_000, psycopg.errors.StatementTooComplex),
    ],
    ids=["zero", "half a pair, escaped", "half a pair", "half a document", "too deep"],
)
async def test_a_document_that_the_database_cannot_read_is_nobody_elses_failure(bookings, bad, error):
    answers = await asyncio.gather(
        *all_made(bookings, [double(1), bad, double(2), double(3), double(4)]), return_exceptions=True
    )
    assert isinstance(answers.pop(1), error)
    assert answers == [2, 4, 6, 8]


async def test_no_text_of_a_booking_ends_it(bookings):
    texts = ["\x1e", '\x1e{"kind": "backend"}', "\\x1e", "'); SELECT 1; --", "{}", "$1", "\x1e" * 4]
    assert await asyncio.gather(*all_made(bookings, [booking("length", text=each) for each in texts])) == [
        len(each) for each in texts
    ]


@pytest.mark.parametrize("text", ["\x1e", '\x1e{"kind":"begin"}', "\x00", "\x1e\ud800"], ids=ascii)
async def test_a_text_that_ends_documents_is_a_text_as_any_to_those_who_book(bench, text):
    leases = [await bench.lease() for _ in range(6)]
    wanted = [{"arguments": {"text": text}} if number % 2 else {} for number in range(6)]

    async def pair(lease: Any, changes: Any) -> Any:
        admission = await bench.control_plane.admit(bench.proposal(lease, **changes), begin=True)
        await bench.settle(admission.grant, lease, output=changes or {})
        ((step,),) = [await bench.storage.runs.steps(bench.tenant, lease.run.id)]
        return step.output

    ends = await asyncio.gather(*map(pair, leases, wanted), return_exceptions=True)
    storable = "\x00" not in text and text.isascii()
    for end, changes in zip(ends, wanted, strict=True):
        assert end == changes if storable or not changes else isinstance(end, InvalidRequest), end


@pytest.mark.parametrize("place", [0, 3, 7])
async def test_who_waits_for_a_lock_keeps_nobody_waiting(bookings, bench, place):
    async with holding(bench) as holder:
        wanted = [double(number) for number in range(8)]
        wanted[place] = LOCKED
        made_of = all_made(bookings, wanted)
        others = [each for number, each in enumerate(made_of) if number != place]
        assert await asyncio.gather(*others) == [2 * number for number in range(8) if number != place]
        later = await asyncio.gather(*all_made(bookings, [double(number) for number in range(8)]))
        assert later == [2 * number for number in range(8)]
        assert not made_of[place].done()
        await holder.rollback()
        assert await made_of[place] == LOCK


async def round_of(connection: psycopg.AsyncConnection[Any], *documents: str, patience: str = "250ms") -> list[Any]:
    sequence = "".join(f"\x1e{each}" for each in documents)
    cursor = await connection.execute("CALL public.engine_book_round_v1(%s, %s, NULL)", [sequence, patience])
    ((answers,),) = await cursor.fetchall()
    return [json.loads(each) for each in answers.split("\x1e")[1:]]


@pytest.fixture
async def session(bench, kinds) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(bench.database.app, autocommit=True) as connection:
        yield connection


async def test_many_who_wait_hold_up_the_others_as_one_does(bench, session):
    """The one after the first waits but for a moment, whatever patience there is."""
    async with holding(bench):
        answers = await round_of(session, CLOCK, LOCKED, CLOCK, LOCKED, CLOCK, patience="2s")
    assert answers[1] == answers[3] == "55P03"
    first, second = answers[2]["is"] - answers[0]["is"], answers[4]["is"] - answers[2]["is"]
    assert second < first / 4


async def test_a_round_that_takes_long_makes_no_more(session):
    answers = await round_of(session, CLOCK, booking("sleep", number=5), CLOCK, CLOCK)
    assert answers[1:] == [{"is": 5}, "57014", "57014"]


async def test_a_crafted_search_path_shadows_nothing_that_a_round_uses(bench, session):
    bench.behind.sql(
        "CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC;"
        "CREATE DOMAIN evil.text AS text CHECK (false); CREATE DOMAIN evil.jsonb AS jsonb CHECK (false);"
        "CREATE FUNCTION evil.gone(int, int) RETURNS int LANGUAGE sql AS 'SELECT 1 / 0';"
        "CREATE FUNCTION evil.gone(text, text) RETURNS text LANGUAGE sql AS 'SELECT (1 / 0)::text';"
        "CREATE OPERATOR evil.- (LEFTARG = int, RIGHTARG = int, FUNCTION = evil.gone);"
        "CREATE OPERATOR evil.+ (LEFTARG = int, RIGHTARG = int, FUNCTION = evil.gone);"
        "CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.gone);"
        "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.gone)"
    )
    await session.execute("SET search_path = evil, pg_catalog, public")
    answers = await round_of(session, double(1), double(2**31 - 1), double(2))
    assert answers == [{"is": 2}, "22003", {"is": 4}]


async def test_nobody_is_put_behind_many_who_wait(bench, kinds):
    async with open_pool(bench.database.app, max_size=20) as pool, holding(bench) as holder:
        bookings = Bookings(Gateway(pool))
        made_of = all_made(bookings, [*[LOCKED] * 12, double(21)])
        assert await made_of.pop() == 42
        await waiters(bench, 12)  # each over a connection of its own
        assert await made(bookings, double(21)) == 42
        await holder.rollback()
        assert await asyncio.gather(*made_of) == [LOCK] * 12


async def test_one_behind_a_single_one_that_waits_is_served(bookings, bench):
    async with holding(bench) as holder:
        (alone,) = all_made(bookings, [LOCKED])
        await waiters(bench, 1)
        assert await asyncio.gather(*all_made(bookings, [double(number) for number in range(4)])) == [0, 2, 4, 6]
        assert not alone.done()
        await holder.rollback()
        assert await alone == LOCK


async def test_all_connections_may_wait_and_then_the_next_is_refused(bookings, bench):
    async with holding(bench) as holder:
        waiting = all_made(bookings, [LOCKED] * 4)
        await waiters(bench, 4)
        with pytest.raises(PoolTimeout):
            await asyncio.gather(*all_made(bookings, [double(number) for number in range(3)]))
        await holder.rollback()
        assert await asyncio.gather(*waiting) == [LOCK] * 4
    assert await made(bookings, double(21)) == 42


@pytest.mark.parametrize("beside", [0, 4])
async def test_who_waits_longer_than_anybody_may_fails(bookings, bench, beside):
    bench.behind.sql("ALTER FUNCTION engine_book_patiently_v1 SET lock_timeout = '50ms'")
    async with holding(bench):
        waiting, *others = all_made(bookings, [LOCKED, *(double(number) for number in range(beside))])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await waiting
        assert await asyncio.gather(*others) == [2 * number for number in range(beside)]


@pytest.mark.parametrize("beside", [0, 4])
async def test_who_is_cancelled_is_made_after_all_and_nobody_twice(bookings, pool, bench, beside):
    """As an administrator does it, or a time limit of the role's; for one by itself it is a failure as any."""
    await pool.wait()  # who has to wait for a connection goes alone, and before those beside it
    async with holding(bench) as holder:
        waiting, *others = all_made(bookings, [LOCKED, *(book(number) for number in range(beside))])
        await waiters(bench, 1)
        await holder.execute("SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted AND objid = %s", [LOCK])
        assert await asyncio.gather(*others) == list(range(beside))
        if beside:
            await waiters(bench, 1)
            await holder.rollback()
            assert await waiting == LOCK
        else:
            with pytest.raises(psycopg.errors.QueryCanceled):
                await waiting
    assert sorted(bench.behind.sql("SELECT number FROM booked")) == [(number,) for number in range(beside)]


async def test_what_cannot_be_committed_leaves_all_of_its_round_unknown_and_nobody_after_them(bookings, bench):
    """Those before it have been made and are not answered, those after it have not: nobody is told either."""
    wanted = [FIRST, book(1), booking("once", number=7), booking("once", number=7), book(2)]
    _, *answers = await asyncio.gather(*all_made(bookings, wanted), return_exceptions=True)
    assert {type(each) for each in answers} == {psycopg.OperationalError}
    assert bench.behind.sql("SELECT number FROM booked") == [(1,)]
    assert await asyncio.gather(*all_made(bookings, [double(number) for number in range(4)])) == [0, 2, 4, 6]


async def made_until(over: asyncio.Event, bookings: Bookings, served: asyncio.Event) -> None:
    """One who books again as soon as it was answered; served when that was so three times."""
    for number in itertools.count(1):
        await made(bookings, double(21))
        if number == 3:
            served.set()
        if over.is_set():
            return


@pytest.fixture
async def only_one(bench, kinds) -> AsyncIterator[Pool]:
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


async def test_a_connection_that_comes_with_a_cancel_goes_back_and_the_cancel_is_kept(only_one, monkeypatch):
    """A wait that ends by both may be told as one that has not been cancelled."""
    getconn, came = only_one.getconn, asyncio.Event()

    async def with_a_cancel():
        connection = await getconn()
        came.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(only_one, "getconn", with_a_cancel)
        booking = asyncio.ensure_future(made(Bookings(Gateway(only_one)), FIRST))
        await came.wait()
        booking.cancel()
        await asyncio.wait([booking])
    assert booking.cancelled()
    async with only_one.connection() as connection:
        await connection.execute("SELECT 1")


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
        made_of = all_made(bookings, [double(1), LOCKED, double(2)])
        await waiters(bench, 1)
        made_of[1].cancel()
        assert await asyncio.gather(made_of[0], made_of[2]) == [2, 4]
        with pytest.raises(asyncio.CancelledError):
            await made_of[1]
    assert await made(bookings, double(21)) == 42


async def test_what_nobody_waits_for_any_more_ends_and_gives_its_connection_back(bookings, bench):
    bench.behind.sql("ALTER FUNCTION engine_book_patiently_v1 SET lock_timeout = '1s'")
    async with holding(bench):
        made_of = all_made(bookings, [LOCKED, LOCKED, double(1)])
        assert await made_of[2] == 2
        await waiters(bench, 2)  # each over a connection of its own
        made_of[0].cancel()
        made_of[1].cancel()
        await waiters(bench, 0)


async def test_a_lost_connection_fails_all_that_were_on_their_way_and_nobody_after_them(bookings, bench):
    async with holding(bench) as holder:
        made_of = all_made(bookings, [LOCKED] * 3)
        await waiters(bench, 3)
        await holder.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s",
            [LOCK],
        )
        lost = await asyncio.gather(*made_of, return_exceptions=True)
        assert all(isinstance(each, psycopg.OperationalError) for each in lost), lost
    assert await asyncio.gather(*all_made(bookings, [double(number) for number in range(4)])) == [0, 2, 4, 6]


async def test_an_answer_that_cannot_be_read_fails_who_asked_for_it(bookings):
    answers = await asyncio.gather(
        *all_made(bookings, [double(1), double(2), booking("deep"), double(3)]), return_exceptions=True
    )
    assert isinstance(answers.pop(2), ValueError)
    assert answers == [2, 4, 6]


async def test_no_answer_is_none(bookings):
    nothing = booking("nothing")
    assert await bookings.make(nothing) is None
    answers = await asyncio.gather(*(bookings.make(each) for each in (FIRST, nothing, double(1), nothing)))
    assert answers[1:] == [None, {"is": 2}, None]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("DROP PROCEDURE engine_book_round_v1", psycopg.errors.UndefinedFunction),
        (
            "REVOKE EXECUTE ON PROCEDURE engine_book_round_v1 FROM plm_engine_writer",
            psycopg.errors.InsufficientPrivilege,
        ),
    ],
    ids=["not there", "not allowed"],
)
async def test_a_round_that_cannot_begin_says_why(bookings, bench, change, error):
    bench.behind.sql(change)
    _, *answers = await asyncio.gather(*all_made(bookings, [FIRST, double(1), double(2)]), return_exceptions=True)
    assert {type(each) for each in answers} == {error}


async def test_a_connection_that_is_given_up_while_it_is_written_to_fails_all(only_one, monkeypatch):
    monkeypatch.setattr(group_commit, "LONGEST_ANSWER_SECONDS", 1.0)
    bookings = Bookings(Gateway(only_one))
    made_of = all_made(bookings, [booking("sleep", number=30), booking("length", text="x" * 8_000_000)])
    done, waiting = await asyncio.wait(made_of, timeout=20)
    assert not waiting
    assert {type(each.exception()) for each in done} == {TimeoutError}
    assert await made(bookings, double(21)) == 42


async def test_large_documents_wait_until_the_server_has_taken_them(bookings):
    large = "x" * 3_000_000
    wanted = [double(1), *[booking("length", text=large)] * 6, double(2)]
    assert await asyncio.gather(*all_made(bookings, wanted)) == [2, *[len(large)] * 6, 4]


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
            with psycopg.connect(urls.admin) as connection:
                connection.execute(KINDS)
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


async def at_a_standby(urls: Any, statement: str) -> None:
    """Until a statement that contains this waits for a standby."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE %s"
    async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection, asyncio.timeout(20):
        while (await (await connection.execute(query, [f"%{statement}%"])).fetchone()) != (1,):  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("many", "statement"), [(1, "engine_book_v1"), (4, "engine_book_round_v1")])
async def test_nobody_is_answered_before_the_standby_has_what_was_booked(mortal, many, statement):
    server, urls = mortal
    async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection:
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
    await asyncio.to_thread(killed, server)
    async with open_pool(urls.app, max_size=1) as pool:
        bookings = Bookings(Gateway(pool))
        first, *made_of = all_made(bookings, [FIRST, *(book(number) for number in range(many))])
        await first
        waits = asyncio.ensure_future(at_a_standby(urls, statement))
        await asyncio.wait([waits, *made_of], return_when=asyncio.FIRST_COMPLETED)
        assert not any(each.done() for each in made_of)
        await waits
        async with await psycopg.AsyncConnection.connect(urls.admin, autocommit=True) as connection:
            await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await connection.execute("SELECT pg_reload_conf()")
        assert await asyncio.gather(*made_of) == list(range(many))


async def test_what_was_answered_outlasts_the_server(mortal):
    server, urls = mortal
    async with open_pool(urls.app, max_size=2) as pool:
        bookings = Bookings(Gateway(pool))
        answered: list[int] = []
        enough = asyncio.Event()

        async def books(first: int) -> None:
            for number in range(first, first + 1_000_000):
                answered.append(await made(bookings, book(number)))
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
