"""The feed over all streams of a tenant: nothing is left out, in whatever order transactions commit."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import uuid
from contextlib import contextmanager

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.errors import Conflict, InvalidRequest
from plm_engine_core.control_plane.events import BEGINNING, FeedCursor
from plm_shared.testing.databases import create_tenants

SOAK = float(os.environ.get("SOAK", "0.05"))
APPEND = "SELECT engine_append_event_v1(%s, %s, 'test', 'human:x', '{}')"


@contextmanager
def writer(bench):
    """A transaction of its own that has its id already, as one that wrote something before it appends."""
    with psycopg.connect(bench.database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true), pg_current_xact_id()", [str(bench.tenant)])
        yield connection


def append(bench, connection, stream):
    connection.execute(APPEND, [bench.tenant, stream])


def put(bench, *streams):
    for stream in streams:
        with writer(bench) as connection:
            append(bench, connection, stream)


async def look(bench, after=BEGINNING, limit=500):
    page = await bench.storage.events.feed(bench.tenant, after=after, limit=limit)
    return [(event.stream, event.seq) for event in page.events], page


async def read(bench, after=BEGINNING, limit=500, *, blocked_by=None):
    """A page, once nothing but `blocked_by` holds the feed back: the server's own housekeeping may for a moment."""
    pid = blocked_by.info.backend_pid if blocked_by is not None else None
    for _ in range(1000):
        events, page = await look(bench, after, limit)
        if len(events) == limit or (page.held_back.blocking_pid if page.held_back is not None else None) == pid:
            return events, page
        await asyncio.sleep(0.02)
    raise TimeoutError(page)


async def everything(bench, *, limit=500):
    seen, cursor = [], BEGINNING
    while True:
        events, page = await read(bench, cursor, limit)
        if not events:
            return seen
        seen += events
        cursor = page.cursor


async def test_pages_of_any_size_show_every_event_once_and_the_cursor_waits_at_the_end(bench):
    put(bench, "a", "b", "a", "c", "b")
    with writer(bench) as connection:
        for stream in ("b", "a", "d", "a"):
            append(bench, connection, stream)
    whole = await everything(bench)
    assert sorted(whole) == sorted(
        [*(("a", n) for n in (1, 2, 3, 4)), *(("b", n) for n in (1, 2, 3)), ("c", 1), ("d", 1)]
    )
    for limit in (1, 2, 3, 7):
        assert await everything(bench, limit=limit) == whole
    _, page = await read(bench)
    nothing, after = await read(bench, page.cursor)
    assert (nothing, after.cursor, after.held_back) == ([], page.cursor, None)
    put(bench, "e")
    assert (await read(bench, after.cursor))[0] == [("e", 1)]


async def test_an_event_whose_transaction_began_first_and_ended_last_is_not_missed(bench):
    put(bench, "a")
    with writer(bench) as slow:
        append(bench, slow, "slow")
        put(bench, "b")
        shown, page = await read(bench, blocked_by=slow)
        assert shown == [("a", 1)]
        assert page.held_back.events == 1
    assert sorted((await read(bench, page.cursor))[0]) == [("b", 1), ("slow", 1)]


async def test_a_transaction_that_appends_nothing_holds_the_feed_back_only_while_it_runs(bench):
    with writer(bench) as idle:
        put(bench, "a", "b")
        shown, page = await read(bench, blocked_by=idle)
        assert (shown, page.cursor, page.held_back.events) == ([], FeedCursor(0, "", 0, tenant=str(bench.tenant)), 2)
        assert page.held_back.since <= (await bench.storage.events.read(bench.tenant, "a"))[0].occurred_at
    shown, page = await read(bench)
    assert (shown, page.held_back) == ([("a", 1), ("b", 1)], None)


async def test_a_stream_keeps_its_order_where_the_later_event_has_the_older_transaction(bench):
    with writer(bench) as old:
        put(bench, "a")
        append(bench, old, "a")
    put(bench, "a")
    assert await everything(bench) == [("a", 1), ("a", 2), ("a", 3)]


async def test_what_is_rolled_back_is_never_shown_and_holds_nothing_back_afterwards(bench):
    with writer(bench) as connection:
        append(bench, connection, "a")
        put(bench, "b")
        connection.rollback()
    assert await everything(bench) == [("b", 1)]


async def test_a_reader_beside_writers_that_overlap_sees_each_event_once_and_each_stream_in_order(bench):
    """Real transactions of random length on shared streams, some rolled back; the reader polls all the while."""
    rounds, writers = max(4, int(80 * SOAK)), 6
    written: set[tuple[str, int]] = set()

    async def write(number):
        chance = random.Random(number)  # a test's dice
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            for _ in range(rounds):
                appended = []
                await connection.execute(
                    "SELECT set_config('app.tenant_id', %s, true), pg_current_xact_id()", [str(bench.tenant)]
                )
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                for stream in sorted(chance.sample(["a", "b", "c", f"own/{number}"], k=chance.randint(1, 3))):
                    (seq,) = await (await connection.execute(APPEND, [bench.tenant, stream])).fetchone()
                    appended.append((stream, seq))
                    await asyncio.sleep(chance.random() / 500)
                if chance.random() < 0.2:
                    await connection.rollback()
                else:
                    await connection.commit()
                    written.update(appended)

    seen: list[tuple[str, int]] = []
    cursor = BEGINNING
    working = [asyncio.create_task(write(number)) for number in range(writers)]
    ended = False
    while True:
        last = ended
        events, page = await look(bench, cursor, limit=7)
        seen += events
        cursor = page.cursor
        if last and not events and page.held_back is None:
            break
        ended = all(task.done() for task in working)
    await asyncio.gather(*working)
    assert len(seen) == len(set(seen))
    assert set(seen) == written
    for stream in {name for name, _ in seen}:
        order = [seq for name, seq in seen if name == stream]
        assert order == list(range(1, len(order) + 1)), stream


async def test_the_feed_is_of_one_tenant(bench):
    (other,) = create_tenants(bench.database, "other")
    put(bench.in_tenant(other), "theirs")
    put(bench, "ours")
    assert await everything(bench) == [("ours", 1)]


async def test_events_that_were_there_before_the_feed_come_first(bench):
    put(bench, "b", "a")
    bench.sql("ALTER TABLE events DISABLE TRIGGER ALL")
    bench.sql("UPDATE events SET feed_position = '0'")
    bench.sql("UPDATE event_streams SET last_position = '0'")
    put(bench, "a")
    assert await everything(bench, limit=1) == [("a", 1), ("b", 1), ("a", 2)]


async def test_the_application_reads_the_feed_by_its_index(bench):
    with writer(bench) as connection:
        connection.execute("SET enable_seqscan = off")
        plan = "\n".join(
            line
            for (line,) in connection.execute(
                "EXPLAIN SELECT stream, seq FROM events WHERE tenant_id = %s AND feed_position >= %s::xid8 "
                "AND feed_position < %s::xid8 ORDER BY feed_position, stream, seq LIMIT 5",
                [bench.tenant, "5", "10"],
            )
        )
    assert "ix_events_feed" in plan
    assert "feed_position >=" in plan.partition("Index Cond:")[2]


async def test_a_cursor_of_another_database_is_refused(bench):
    put(bench, "a")
    with pytest.raises(InvalidRequest, match="another database"):
        await read(bench, FeedCursor(2**62, "a", 1))


async def test_a_cursor_of_another_tenants_feed_is_refused(bench, memory_storage):
    """It would leave out what this tenant wrote before it."""
    put(bench, "a")
    _, page = await read(bench)
    for storage in (bench.storage, memory_storage):
        with pytest.raises(InvalidRequest, match="another tenant"):
            await storage.events.feed(uuid.uuid4(), after=FeedCursor.decode(page.cursor.encode()))
    older = base64.urlsafe_b64encode(b'[0, "", 0, 0]').decode()  # of a release that did not say whose
    assert (await look(bench, FeedCursor.decode(older)))[0] == [("a", 1)]


async def test_events_restored_from_a_server_that_was_further_are_told_of_and_not_silently_missed(bench):
    put(bench, "a")
    bench.sql("ALTER TABLE events DISABLE TRIGGER ALL")
    bench.sql("UPDATE events SET feed_position = '4611686018427387904'")
    with pytest.raises(Conflict, match="pg_resetwal"):
        await read(bench)


@given(
    st.integers(0, 2**63 - 1),
    st.text(st.characters(categories=["L", "N", "P"]), max_size=20),
    st.integers(0, 2**63 - 1),
    st.none() | st.uuids(),
)
def test_a_cursor_comes_back_from_its_text(position, stream, seq, tenant):
    cursor = FeedCursor(position, stream, seq)
    cursor = cursor.of(tenant) if tenant is not None else cursor
    assert FeedCursor.decode(cursor.encode()) == cursor


@given(st.one_of(st.text(max_size=60), st.binary(max_size=40).map(lambda raw: base64.urlsafe_b64encode(raw).decode())))
def test_a_text_that_no_feed_gave_is_refused_in_our_own_words(text):
    with pytest.raises(InvalidRequest, match="not a cursor"):
        FeedCursor.decode(text)
