"""Whatever is done to what was stored is found: every kind of event, every column, and the checkpoints over them.

Kinds come from the vocabulary and columns from the catalog, so a new one is tried too, or these tests fail.
"""

# ruff: noqa: S608  # a forger's statements, with names from the catalog

from __future__ import annotations

import json
from io import BytesIO

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import PublicKeys, Signer, export, read_exports, verify_tenant
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.vocabulary import EventKind

KEY = Ed25519PrivateKey.generate()
BELIEVED = PublicKeys([KEY.public_key()])
KINDS = [*EventKind]
STREAM = "tenant"

PLACE_IN_THE_FEED = "feed_position"  # says when readers are shown an event, nothing of what happened; it is not hashed

COLUMNS = """
SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute AS a
WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# By type, a value that the column has nowhere.
OTHER = {
    "uuid": "gen_random_uuid()",
    "text": "{0} || '!'",
    "bytea": "sha256({0})",
    "bigint": "{0} + 1000",
    "timestamp with time zone": "{0} + interval '1 microsecond'",
    "xid8": "'7'",
}
REMEMBER = ("CREATE TABLE events_before AS TABLE events", "CREATE TABLE streams_before AS TABLE event_streams")
RESTORE = (
    "DELETE FROM events",
    "INSERT INTO events TABLE events_before",
    "DELETE FROM event_streams",
    "INSERT INTO event_streams TABLE streams_before",
)
# As one who owns the database would: numbers and hashes anew from the first event to the head.
REHASH = """
DO $$
DECLARE
    v_prev bytea := '\\x';
    v_hash bytea;
    v_seq  bigint := 0;
    v_at   xid8 := '0';
    r      record;
BEGIN
    FOR r IN SELECT ctid, * FROM events WHERE stream = 'tenant' AND tenant_id = 'TENANT' ORDER BY seq, kind LOOP
        v_seq := v_seq + 1;
        v_hash := engine_event_hash_v1(
            r.tenant_id, r.stream, v_seq, v_prev, r.kind, r.actor, r.occurred_at, r.payload);
        v_at := GREATEST(v_at, r.feed_position);
        UPDATE events SET seq = v_seq, prev_hash = v_prev, hash = v_hash, feed_position = v_at WHERE ctid = r.ctid;
        v_prev := v_hash;
    END LOOP;
    UPDATE event_streams SET last_seq = v_seq, last_hash = v_prev, last_position = v_at
        WHERE stream = 'tenant' AND tenant_id = 'TENANT';
    DELETE FROM event_streams WHERE last_seq = 0;
END
$$
"""


class Forger:
    """A superuser on one connection, who took triggers and keys away, and puts everything back after each forgery."""

    def __init__(self, bench, connection):
        self.bench = bench
        self.connection = connection
        for table in ("events", "event_streams", "event_checkpoints", "event_checkpoint_heads"):
            connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL".encode())
        connection.execute("ALTER TABLE events DROP CONSTRAINT events_pkey")

    def columns(self, table):
        return dict(self.connection.execute(COLUMNS, [table]).fetchall())

    def run(self, *statements):
        with self.connection.transaction():
            for statement in statements:
                self.connection.execute(statement.encode())

    def rehash(self):
        self.run(REHASH.replace("TENANT", str(self.bench.tenant)))


@pytest.fixture
async def history(bench):
    """One event of every kind, each under an actor of its own, and a checkpoint over them."""
    gateway = bench.storage.events._gateway
    for number, kind in enumerate(KINDS):
        async with gateway.transaction(bench.tenant) as connection:
            await gateway.append(connection, bench.tenant, STREAM, kind, f"human:{number}", {"n": number})
    await Checkpointer(bench.storage.checkpoints, Signer(KEY)).take(bench.tenant)
    return bench


@pytest.fixture
def forger(history):
    with psycopg.connect(history.database.admin, autocommit=True) as connection:
        forger = Forger(history, connection)
        forger.run(*REMEMBER)
        yield forger


def mutations(forger, seq):
    """By name, what may be done to the event `seq`; and whether the verifier names that very event."""
    here = f"seq = {seq}"
    changes = {
        column: f"UPDATE events SET {column} = {OTHER[kind].format(column)} WHERE {here}"
        for column, kind in forger.columns("events").items()
        if column != PLACE_IN_THE_FEED
    }
    neighbour = seq - 1 if seq == len(KINDS) else seq + 1
    return {
        **changes,
        "delete": f"DELETE FROM events WHERE {here}",
        "swap": f"UPDATE events SET seq = {seq + neighbour} - seq WHERE seq IN ({seq}, {neighbour})",
        "truncate": f"DELETE FROM events WHERE seq >= {seq}",
        "doubled": f"INSERT INTO events SELECT * FROM events WHERE {here}",
    }


def elsewhere(name, seq):
    """What is found beside the stream of the event: where it came to stand, when it was moved to another."""
    return [(f"{STREAM}!", seq)] if name == "stream" else []


async def exported(bench):
    file = BytesIO()
    await export(bench.storage.checkpoints, bench.tenant, file)
    return read_exports([file.getvalue().splitlines(keepends=True)], BELIEVED)


def bad(results):
    return [each for each in results if not each.consistent]


async def test_every_change_of_every_kind_of_event_is_found_and_named(forger):
    bench = forger.bench
    for seq, kind in enumerate(KINDS, 1):
        for name, statement in mutations(forger, seq).items():
            forger.run(statement)
            found, *more = bad(await verify_tenant(bench.storage, bench.tenant))
            assert [(each.stream, each.first_bad_seq) for each in more] == elsewhere(name, seq), (kind, name)
            named = seq - 1 if name == "swap" and seq == len(KINDS) else seq + (name == "doubled")
            assert (found.stream, found.first_bad_seq) == (STREAM, named), (kind, name, found)
            forger.run(*RESTORE)
    assert not bad(await verify_tenant(bench.storage, bench.tenant))


async def test_a_place_in_the_feed_that_its_stream_cannot_have_is_found_and_named(forger):
    """Places are not hashed: what is found is one that is out of the order of its stream, or beyond its head."""
    bench, last = forger.bench, len(KINDS)
    for seq in range(1, last + 1):
        moved = {f"UPDATE events SET feed_position = '4611686018427387904' WHERE seq = {seq}": seq}
        if seq > 1:
            moved[f"UPDATE events SET feed_position = '0' WHERE seq = {seq}"] = seq
            swapped = f"(SELECT feed_position FROM events AS o WHERE o.seq = {2 * seq - 1} - e.seq)"
            moved[f"UPDATE events AS e SET feed_position = {swapped} WHERE seq IN ({seq - 1}, {seq})"] = seq
        for statement, named in moved.items():
            forger.run(statement)
            (found,) = bad(await verify_tenant(bench.storage, bench.tenant))
            assert (found.stream, found.first_bad_seq) == (STREAM, named), statement
            assert "its place in the feed" in found.problem
            forger.run(*RESTORE)
    assert not bad(await verify_tenant(bench.storage, bench.tenant, trusted=BELIEVED))


UNFOUND = {
    "between its neighbours": ["UPDATE events SET feed_position = '1500' WHERE seq = 3"],
    "to its neighbour's place": ["UPDATE events SET feed_position = '1000' WHERE seq = 3"],
    "the first to the front": ["UPDATE events SET feed_position = '0' WHERE seq = 1"],
    "the last, with the head's copy": [
        f"UPDATE events SET feed_position = '3000' WHERE seq = {len(KINDS)}",
        "UPDATE event_streams SET last_position = '3000'",
    ],
}


@pytest.mark.parametrize("moved", UNFOUND)
async def test_what_the_security_model_says_is_not_found_of_places_changes_no_stream(forger, moved):
    """Places are no content; the test is here to be changed, with that page, by whoever has one more of them found."""
    bench = forger.bench
    before = await bench.storage.events.read(bench.tenant, STREAM)
    forger.run(
        "UPDATE events SET feed_position = (CASE WHEN seq < 3 THEN '1000' ELSE '2000' END)::xid8",
        "UPDATE event_streams SET last_position = '2000'",
        *UNFOUND[moved],
    )
    assert not bad(await verify_tenant(bench.storage, bench.tenant, exported=await exported(bench)))
    assert await bench.storage.events.read(bench.tenant, STREAM) == before


async def test_a_forger_who_hashes_everything_anew_is_found_with_an_export(forger):
    bench = forger.bench
    copy = await exported(bench)
    for seq, kind in enumerate(KINDS, 1):
        for name, statement in mutations(forger, seq).items():
            last = seq == len(KINDS)
            if name in {"hash", "prev_hash"} or (last and name in {"seq", "doubled"}):
                continue  # the forger puts it right again himself, or has only appended something
            forger.run(statement)
            forger.rehash()
            if seq == 1:  # alone, the database is consistent
                alone = bad(await verify_tenant(bench.storage, bench.tenant))
                assert [(each.stream, each.first_bad_seq) for each in alone] == elsewhere(name, seq), (kind, name)
            found, *more = bad(await verify_tenant(bench.storage, bench.tenant, exported=copy))
            assert found.stream == STREAM, (kind, name)
            assert [(each.stream, each.first_bad_seq) for each in more] == elsewhere(name, seq), (kind, name)
            forger.run(*RESTORE)
    assert not bad(await verify_tenant(bench.storage, bench.tenant, exported=copy))


async def test_what_is_appended_to_a_forged_stream_does_not_hide_the_forgery(forger):
    bench = forger.bench
    copy = await exported(bench)
    forger.run("DELETE FROM events WHERE seq = 3")
    forger.rehash()
    gateway = bench.storage.events._gateway
    for number in range(5):
        async with gateway.transaction(bench.tenant) as connection:
            await gateway.append(connection, bench.tenant, STREAM, "run_created", "human:x", {"n": number})
    assert not bad(await verify_tenant(bench.storage, bench.tenant))
    (found,) = bad(await verify_tenant(bench.storage, bench.tenant, exported=copy))
    assert "rewritten" in found.problem


async def still_good(bench, copy):
    """What one says who trusts the checkpoints that are there, one who has a copy, and what a new copy is worth."""
    try:
        trusted = not bad(await verify_tenant(bench.storage, bench.tenant, trusted=BELIEVED))
    except InvalidRequest:
        trusted = False
    against_the_copy = not bad(await verify_tenant(bench.storage, bench.tenant, exported=copy))
    return trusted, against_the_copy, (await exported(bench)).unforged


@pytest.mark.parametrize("number", [1, 2])
async def test_every_change_of_a_checkpoint_is_found(forger, number):
    """The newest is what the others are trusted for; an older one is needed for an export, and seen there."""
    bench = forger.bench
    gateway = bench.storage.events._gateway
    async with gateway.transaction(bench.tenant) as connection:
        await gateway.append(connection, bench.tenant, STREAM, "run_created", "human:x", {})
    assert (await Checkpointer(bench.storage.checkpoints, Signer(KEY)).take(bench.tenant)).number == 2
    copy = await exported(bench)
    assert await still_good(bench, copy) == (True, True, True)
    tables = ("event_checkpoints", "event_checkpoint_heads")
    for table in tables:
        forger.run(f"CREATE TABLE {table}_before AS TABLE {table}")
    back = [
        statement
        for table in tables
        for statement in (f"DELETE FROM {table}", f"INSERT INTO {table} TABLE {table}_before")
    ]
    for table in tables:
        changes = {
            column: f"UPDATE {table} SET {column} = {OTHER[kind].format(column)} WHERE number = {number}"
            for column, kind in forger.columns(table).items()
        }
        for name, statement in {**changes, "delete": f"DELETE FROM {table} WHERE number = {number}"}.items():
            forger.run(statement)
            trusted, against_the_copy, copied = await still_good(bench, copy)
            assert not (against_the_copy and copied), (table, name)
            if number == copy.newest.number:
                assert not (trusted and against_the_copy), (table, name)
            else:
                assert not copied, (table, name)
            forger.run(*back)
    assert await still_good(bench, copy) == (True, True, True)


@pytest.mark.parametrize("time", ["infinity", "-infinity", "294276-12-31", "4713-01-01 BC"])
async def test_a_time_that_no_event_can_have_is_found_and_named(forger, time):
    bench = forger.bench
    forger.run(f"UPDATE events SET occurred_at = '{time}' WHERE seq = 3")
    (found,) = bad(await verify_tenant(bench.storage, bench.tenant))
    assert (found.stream, found.first_bad_seq) == (STREAM, 3)


@pytest.mark.parametrize("time", [2**63, -(10**30), 1.5, None, "1"])
async def test_a_time_that_no_event_can_have_is_found_in_an_export(history, time):
    file = BytesIO()
    await export(history.storage.checkpoints, history.tenant, file)
    lines = file.getvalue().splitlines(keepends=True)
    event = json.loads(lines[1])
    event[6] = time
    found = read_exports([[lines[0], json.dumps(event).encode() + b"\n", *lines[2:]]], BELIEVED)
    assert found.problem == f"file 1: line 2: {STREAM}, event 1: its content does not match its hash"
