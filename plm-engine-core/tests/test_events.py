"""Event streams: dense, append-only, and any change to what was stored is found."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plm_engine_core.control_plane.events import Event, event_hash, run_stream, verify_tenant
from plm_engine_core.control_plane.vocabulary import OutcomeStatus

pytestmark = pytest.mark.every_storage

LENGTH = 8


async def filled(bench, stream="tenant", length=LENGTH):
    """A stream of its own with some events."""
    await bench.append(stream, *range(length))


async def verdict(bench):
    (verification,) = await bench.control_plane.verify_events(bench.tenant)
    return verification


async def test_sequences_are_dense_and_unique_however_many_append_at_once(bench):
    await asyncio.gather(*(filled(bench, length=5) for _ in range(8)))
    events = await bench.storage.events.read(bench.tenant, "tenant")
    assert [event.seq for event in events] == list(range(1, 41))
    assert (await verdict(bench)).consistent


async def test_each_event_continues_the_one_before_and_carries_its_own_hash(bench):
    await filled(bench)
    previous = b""
    for event in await bench.storage.events.read(bench.tenant, "tenant"):
        assert (event.prev_hash, event.hash) == (previous, event_hash(event))
        previous = event.hash


texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
times = st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # hypothesis wants naive bounds


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.uuids(), texts, st.integers(1, 2**62), st.binary(max_size=40), texts, texts, times, texts)
def test_python_and_the_database_compute_the_same_hash(
    hashing_connection, tenant, stream, seq, previous, kind, actor, at, payload
):
    event = Event(
        tenant_id=tenant,
        stream=stream,
        seq=seq,
        prev_hash=previous,
        hash=b"",
        kind=kind,
        actor=actor,
        occurred_at=at,
        payload=payload,
    )
    (computed,) = hashing_connection.execute(
        "SELECT engine_event_hash_v1(%s, %s, %s, %s, %s, %s, %s, %s)",
        [tenant, stream, seq, previous, kind, actor, at, payload],
    ).fetchone()
    assert computed == event_hash(event)


@pytest.fixture
def hashing_connection(engine_database):
    with psycopg.connect(engine_database.app, autocommit=True) as connection:
        yield connection


def test_no_two_different_events_share_their_bytes():
    """Lengths are part of what is hashed, so a boundary between two texts cannot be moved."""
    base = {
        "tenant_id": "t",
        "stream": "ab",
        "seq": 1,
        "prev_hash": b"",
        "hash": b"",
        "kind": "cd",
        "actor": "ef",
        "occurred_at": datetime(2020, 1, 1, tzinfo=UTC),
        "payload": "gh",
    }
    moved = [
        base,
        {**base, "kind": "c", "actor": "def"},
        {**base, "kind": "cde", "actor": "f"},
        {**base, "actor": "efg", "payload": "h"},
        {**base, "stream": "a", "kind": "bcd"},
        {**base, "occurred_at": base["occurred_at"] + timedelta(microseconds=1)},
    ]
    assert len({event_hash(Event(**each)) for each in moved}) == len(moved)


@pytest.mark.parametrize("role", ["owner", "app", "admin"])
@pytest.mark.parametrize("statement", ["UPDATE events SET actor = 'x'", "DELETE FROM events", "TRUNCATE events"])
@pytest.mark.postgres_only
async def test_nobody_changes_an_event(bench, role, statement):
    await filled(bench, length=1)
    with psycopg.connect(getattr(bench.database, role)) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(bench.tenant)])
        if role == "admin":
            connection.execute("SET session_replication_role = replica")
        with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.InsufficientPrivilege)):
            connection.execute(statement)
    assert (await verdict(bench)).consistent


def forge(bench, *statements):
    """Change stored events as a superuser who took the triggers and the key away first."""
    bench.sql("ALTER TABLE events DISABLE TRIGGER ALL")
    bench.sql("ALTER TABLE events DROP CONSTRAINT events_pkey")
    for statement in statements:
        bench.sql(statement)


FORGERIES = {
    "hash": "UPDATE events SET hash = decode('00', 'hex') WHERE seq = 4",
    "prev_hash": "UPDATE events SET prev_hash = decode('00', 'hex') WHERE seq = 4",
    "kind": "UPDATE events SET kind = 'other' WHERE seq = 4",
    "actor": "UPDATE events SET actor = 'human:y' WHERE seq = 4",
    "time": "UPDATE events SET occurred_at = occurred_at + interval '1 microsecond' WHERE seq = 4",
    "payload": "UPDATE events SET payload = replace(payload, '3', '4') WHERE seq = 4",
    "a space in the payload": "UPDATE events SET payload = payload || ' ' WHERE seq = 4",
    "seq": "UPDATE events SET seq = 40 WHERE seq = 4",
    "stream": "UPDATE events SET stream = 'else' WHERE seq = 4",
    "tenant": "UPDATE events SET tenant_id = gen_random_uuid() WHERE seq = 4",
    "delete": "DELETE FROM events WHERE seq = 4",
    "swap": "UPDATE events SET seq = 9 - seq WHERE seq IN (4, 5)",
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.postgres_only
async def test_a_changed_event_is_found_and_named(bench, forgery):
    await filled(bench)
    forge(bench, FORGERIES[forgery])
    found, *moved = await bench.control_plane.verify_events(bench.tenant)
    assert found.first_bad_seq == 4
    assert [(each.stream, each.first_bad_seq) for each in moved] == ([("else", 4)] if forgery == "stream" else [])


@pytest.mark.postgres_only
async def test_each_position_is_guarded(bench):
    await filled(bench)
    forge(bench)
    for seq in range(1, LENGTH + 1):
        bench.sql("UPDATE events SET actor = actor || '!' WHERE seq = %s", seq)
        assert (await verdict(bench)).first_bad_seq == seq
        bench.sql("UPDATE events SET actor = rtrim(actor, '!') WHERE seq = %s", seq)
    assert (await verdict(bench)).consistent


@pytest.mark.parametrize(
    ("statement", "first_bad"),
    [
        ("DELETE FROM events WHERE seq > 5", 6),
        ("DELETE FROM events", 1),
        ("DELETE FROM event_streams", 1),
        ("UPDATE event_streams SET last_seq = 5", 6),
        ("UPDATE event_streams SET last_seq = 20", 9),
        ("UPDATE event_streams SET last_hash = decode('00', 'hex')", 8),
        ("UPDATE event_streams SET last_seq = 5, last_hash = (SELECT hash FROM events WHERE seq = 5)", 6),
    ],
)
@pytest.mark.postgres_only
async def test_a_cut_off_end_or_a_moved_head_is_found(bench, statement, first_bad):
    await filled(bench)
    forge(bench, statement)
    verification = await verdict(bench)
    assert (verification.consistent, verification.first_bad_seq) == (False, first_bad)
    assert verification.problem


async def test_a_stream_that_grows_while_it_is_checked_is_consistent(bench):
    await filled(bench, length=3)
    done = asyncio.Event()

    async def grow():
        while not done.is_set():
            await filled(bench, length=1)

    growing = asyncio.create_task(grow())
    for _ in range(30):
        assert (await verdict(bench)).consistent
    done.set()
    await growing


async def test_streams_that_begin_while_others_are_checked_are_left_to_the_next_time(bench, monkeypatch):
    await filled(bench, length=1)
    heads = bench.storage.events.heads
    begun = []

    async def heads_and_then_another_stream(tenant_id):
        found = await heads(tenant_id)
        if not begun:
            begun.append(await bench.append("later", 1, 2))
        return found

    monkeypatch.setattr(bench.storage.events, "heads", heads_and_then_another_stream)
    assert [(each.stream, each.consistent) for each in await verify_tenant(bench.storage, bench.tenant)] == [
        ("tenant", True)
    ]
    assert {each.stream for each in await verify_tenant(bench.storage, bench.tenant)} == {"tenant", "later"}


async def test_reading_goes_on_after_a_sequence(bench):
    await filled(bench)
    page = await bench.storage.events.read(bench.tenant, "tenant", after=5, limit=2)
    assert [(event.seq, event.data["n"]) for event in page] == [(6, 5), (7, 6)]


async def test_every_stream_of_a_tenant_is_checked_and_no_other_tenants(bench):
    other = bench.behind.new_tenant()
    await filled(bench.in_tenant(other))
    lease = await bench.lease()
    await bench.settle(await bench.begun(lease), lease, OutcomeStatus.FAILED, error={"message": secrets.token_hex(8)})
    await filled(bench)
    results = {each.stream: each.events for each in await bench.control_plane.verify_events(bench.tenant)}
    assert results == {run_stream(lease.run.id): 5, "tenant": LENGTH}
