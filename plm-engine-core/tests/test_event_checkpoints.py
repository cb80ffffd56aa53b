"""Signed checkpoints and exports: with a copy elsewhere, whatever is changed, cut off or removed is found."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from hashlib import sha256
from io import BytesIO

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.events import (
    PublicKeys,
    Signer,
    export,
    load_public_keys,
    load_signer,
    read_exports,
    verify_tenant,
)
from plm_engine_core.control_plane.events.checkpoint import Head, root_of
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.events.export import lines_of
from plm_engine_core.control_plane.events.merkle import tree_root
from plm_engine_core.control_plane.events.signing import key_id, new_private_pem

pytestmark = pytest.mark.every_storage

KEY = Ed25519PrivateKey.generate()
SIGNER = Signer(KEY)
BELIEVED = PublicKeys([KEY.public_key()])


def checkpointer(bench, signer=SIGNER):
    return Checkpointer(bench.storage.checkpoints, signer)


async def exported(bench, *, after=0):
    file = BytesIO()
    await export(bench.storage.checkpoints, bench.tenant, file, after=after)
    return file.getvalue().splitlines(keepends=True)


@pytest.fixture
async def history(bench):
    """Three streams, three checkpoints; the middle stream does not change after the first."""
    await bench.append("a", 1, 2, 3)
    await bench.append("b", 1, 2)
    await checkpointer(bench).take(bench.tenant)
    await bench.append("a", 4)
    await bench.append("c", 1)
    await checkpointer(bench).take(bench.tenant)
    await bench.append("c", 2, 3)
    await checkpointer(bench).take(bench.tenant)
    return bench


def superuser(bench, *statements):
    """Change what is stored, as one who took triggers and keys away first."""
    for table in ("events", "event_checkpoints", "event_checkpoint_heads"):
        bench.sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    for statement in statements:
        bench.sql(statement)


def reference_root(leaves):
    """The definition of RFC 6962, as it stands there."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + reference_root(leaves[:split]) + reference_root(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=5), max_size=40))
def test_the_root_is_that_of_the_rfc(leaves):
    assert tree_root(leaves) == reference_root(leaves)


def test_the_root_is_that_of_the_published_test_vectors():
    leaves = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243")]
    assert tree_root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tree_root(leaves[:1]).hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert tree_root(leaves[:2]).hex() == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    assert tree_root(leaves[:3]).hex() == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"


HEADS = st.lists(st.tuples(st.text(max_size=4), st.integers(1, 9)), unique_by=lambda head: head[0], min_size=1)


@given(HEADS, st.data())
def test_any_change_of_any_head_changes_the_root(heads, data):
    before = [Head(name, seq, bytes([seq])) for name, seq in heads]
    at = data.draw(st.integers(0, len(heads) - 1))
    head = before[at]
    changes = [replace(head, seq=0), replace(head, hash=b"x"), replace(head, stream=head.stream + "!!!!!")]
    changed = data.draw(st.sampled_from([[], *([change] for change in changes)]))
    assert root_of([*before[:at], *changed, *before[at + 1 :]]) != root_of(before)
    assert root_of(reversed(before)) == root_of(before)


async def test_a_checkpoint_covers_what_has_changed_and_only_then_is_there_another(bench):
    assert await checkpointer(bench).take(bench.tenant) is None
    await bench.append("a", 1)
    first = await checkpointer(bench).take(bench.tenant)
    assert (first.number, first.streams, [head.stream for head in first.heads]) == (1, 1, ["a"])
    assert await checkpointer(bench).take(bench.tenant) is None
    await bench.append("b", 1)
    second = await checkpointer(bench).take(bench.tenant)
    assert (second.number, second.streams, [head.stream for head in second.heads]) == (2, 2, ["b"])
    assert second.previous == first.digest()


async def test_of_many_who_take_one_at_once_one_does(bench):
    await bench.append("a", 1)
    taken = await asyncio.gather(*(checkpointer(bench).take(bench.tenant) for _ in range(8)))
    assert [checkpoint.number for checkpoint in taken if checkpoint] == [1]


async def test_a_sweep_covers_every_tenant_in_which_something_happened(bench):
    other = bench.behind.new_tenant()
    await bench.append("a", 1)
    await bench.in_tenant(other).append("a", 1)
    assert await checkpointer(bench).sweep() == 2
    assert await checkpointer(bench).sweep() == 0


@pytest.mark.parametrize("error", [StorageUnavailable("locked"), RuntimeError("damaged")], ids=str)
async def test_one_tenant_of_which_none_can_be_taken_does_not_leave_the_others_unsigned(
    bench, monkeypatch, caplog, error
):
    other = bench.other()
    await bench.append("a", 1)
    await other.append("a", 1)
    take = bench.storage.checkpoints.take

    async def failing(tenant_id, make):
        if tenant_id == bench.tenant:
            raise error
        return await take(tenant_id, make)

    monkeypatch.setattr(bench.storage.checkpoints, "take", failing)
    assert await checkpointer(bench).sweep() == 1
    assert (await bench.storage.checkpoints.newest(other.tenant)).number == 1
    assert str(bench.tenant) in caplog.text


@pytest.mark.parametrize("table", ["event_checkpoints", "event_checkpoint_heads"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET number = 7", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
@pytest.mark.parametrize("role", ["owner", "app"])
@pytest.mark.postgres_only
async def test_nobody_changes_a_checkpoint(history, table, statement, role):
    with psycopg.connect(getattr(history.database, role)) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(history.tenant)])
        with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.InsufficientPrivilege)):
            connection.execute(statement.format(table).encode())


async def test_an_export_is_checked_without_a_database_and_agrees_with_it(history):
    found = read_exports([await exported(history)], BELIEVED)
    assert (found.problem, found.unforged, found.events, found.newest.number) == ("", True, 9, 3)
    assert {name: head.seq for name, head in found.heads.items()} == {"a": 4, "b": 2, "c": 3}
    results = await verify_tenant(history.storage, history.tenant, exported=found)
    assert all(each.consistent for each in results)


async def test_exports_go_on_where_one_ended(history):
    first = await exported(history)
    await history.append("b", 3)
    await history.append("d", 1)
    await checkpointer(history).take(history.tenant)
    second = await exported(history, after=3)
    found = read_exports([first, second], BELIEVED)
    assert (found.unforged, found.events, found.newest.number) == (True, 11, 4)
    assert found.heads == read_exports([await exported(history)], BELIEVED).heads
    assert "starts after checkpoint 3" in read_exports([second], BELIEVED).problem
    assert "starts after checkpoint 0" in read_exports([first, first], BELIEVED).problem
    cut_off = read_exports([first, second[:1]], BELIEVED)
    assert (cut_off.unforged, cut_off.problem) == (
        False,
        "file 2: it holds no checkpoint, which every export ends with",
    )


async def test_every_byte_of_an_export_counts(history):
    """Whatever is changed, left out, doubled or swapped in a file, it is no longer what was signed."""
    lines = await exported(history)
    assert read_exports([lines], BELIEVED).unforged
    for at, line in enumerate(lines):
        value = json.loads(line)
        places = range(len(value)) if isinstance(value, list) else list(value)
        for place in places:
            changed = json.loads(line)
            changed[place] = altered(changed[place])
            forged = [*lines[:at], json.dumps(changed).encode() + b"\n", *lines[at + 1 :]]
            assert not read_exports([forged], BELIEVED).unforged, (line, place)
        assert not read_exports([[*lines[:at], *lines[at + 1 :]]], BELIEVED).unforged or at == len(lines) - 1
        assert not read_exports([[*lines[: at + 1], *lines[at:]]], BELIEVED).unforged
        if at + 1 < len(lines) and lines[at] != lines[at + 1]:
            swapped = [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]
            assert not read_exports([swapped], BELIEVED).unforged or both_are_events(lines[at], lines[at + 1])


def altered(value):
    match value:
        case str():
            return value[:-1] + ("0" if value[-1:] != "0" else "1")
        case int():
            return value + 1
        case list():
            return value[:-1]


def both_are_events(one, other):
    """Events of two streams have no order between them."""
    first, second = json.loads(one), json.loads(other)
    return isinstance(first, list) and isinstance(second, list) and first[0] != second[0]


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory():
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    found = read_exports([lines_of(io.BufferedReader(Endless()))], BELIEVED)
    assert found.problem == "file 1: a line is longer than any of an export"


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"[]\n", b"{}\n", b'{"format":1}\n'])), max_size=5))
def test_nothing_that_is_no_export_passes_or_breaks_the_reader(lines):
    assert not read_exports([lines], BELIEVED).unforged


@pytest.mark.postgres_only
async def test_a_rewritten_chain_is_consistent_and_yet_not_what_was_exported(history):
    """One who owns the database can make a new chain that holds; only the copy elsewhere tells."""
    copy = read_exports([await exported(history)], BELIEVED)
    superuser(history, "UPDATE events SET actor = 'human:forged' WHERE stream = 'b' AND seq = 1", REHASH)
    assert all(each.consistent for each in await history.control_plane.verify_events(history.tenant))
    bad = [each for each in await verify_tenant(history.storage, history.tenant, exported=copy) if not each.consistent]
    assert [(each.stream, each.first_bad_seq) for each in bad] == [("b", 2)]
    assert "rewritten" in bad[0].problem


REHASH = """
DO $$
DECLARE
    v_prev bytea := '\\x';
    r      record;
BEGIN
    FOR r IN SELECT * FROM events WHERE stream = 'b' ORDER BY seq LOOP
        UPDATE events SET prev_hash = v_prev, hash = engine_event_hash_v1(
            r.tenant_id, r.stream, r.seq, v_prev, r.kind, r.actor, r.occurred_at, r.payload)
            WHERE stream = 'b' AND seq = r.seq RETURNING hash INTO v_prev;
    END LOOP;
    UPDATE event_streams SET last_hash = v_prev WHERE stream = 'b';
END
$$
"""
CUT_OFF = (
    "DELETE FROM events WHERE stream = 'b' AND seq = 2",
    """UPDATE event_streams SET (last_seq, last_hash, last_position) =
            (SELECT seq, hash, feed_position FROM events WHERE stream = 'b')
        WHERE stream = 'b'""",
)
REMOVED = ("DELETE FROM events WHERE stream = 'b'", "DELETE FROM event_streams WHERE stream = 'b'")


@pytest.mark.parametrize(
    ("statements", "first_bad", "said"), [(REMOVED, 1, "is gone"), (CUT_OFF, 2, "its export at 2")]
)
@pytest.mark.postgres_only
async def test_what_was_cut_off_cleanly_is_missing_from_its_export(history, statements, first_bad, said):
    copy = read_exports([await exported(history)], BELIEVED)
    superuser(history, *statements)
    assert all(each.consistent for each in await history.control_plane.verify_events(history.tenant))
    bad = [each for each in await verify_tenant(history.storage, history.tenant, exported=copy) if not each.consistent]
    assert [(each.stream, each.first_bad_seq) for each in bad] == [("b", first_bad)]
    assert said in bad[0].problem


@pytest.mark.postgres_only
async def test_only_what_no_checkpoint_covers_is_walked_when_the_checkpoint_is_trusted(history):
    await history.append("b", 3)
    await history.append("new", 1, 2)
    results = await verify_tenant(history.storage, history.tenant, trusted=BELIEVED)
    assert {each.stream: each.events for each in results} == {"a": 0, "b": 1, "c": 0, "new": 2}
    assert all(each.consistent for each in results)
    superuser(history, "UPDATE events SET actor = 'x' WHERE stream = 'b' AND seq = 3")
    results = await verify_tenant(history.storage, history.tenant, trusted=BELIEVED)
    assert [(each.stream, each.first_bad_seq) for each in results if not each.consistent] == [("b", 3)]


@pytest.mark.postgres_only
async def test_a_stream_that_the_trusted_checkpoint_covers_may_not_be_missing(history):
    superuser(history, *REMOVED)
    results = await verify_tenant(history.storage, history.tenant, trusted=BELIEVED)
    bad = [(each.stream, each.first_bad_seq) for each in results if not each.consistent]
    assert bad == [("b", 1)]
    others = await verify_tenant(history.storage, history.tenant, stream="a", trusted=BELIEVED)
    assert [(each.stream, each.consistent) for each in others] == [("a", True)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event_checkpoint_heads SET last_seq = 1 WHERE stream = 'b'",
        "UPDATE event_checkpoints SET root = decode('00', 'hex') WHERE number = 3",
        "UPDATE event_checkpoints SET signature = decode('00', 'hex') WHERE number = 3",
        "UPDATE event_checkpoints SET taken_at = taken_at + interval '1 hour' WHERE number = 3",
        "DELETE FROM event_checkpoint_heads WHERE stream = 'c'",
    ],
)
@pytest.mark.postgres_only
async def test_a_forged_checkpoint_is_not_trusted(history, statement):
    superuser(history, statement)
    with pytest.raises(InvalidRequest, match="not to be trusted"):
        await verify_tenant(history.storage, history.tenant, trusted=BELIEVED)


@pytest.mark.postgres_only
async def test_a_chain_that_is_lost_while_it_is_read_is_never_taken_for_whole(bench):
    """More than the sockets between hold, so that the server is still sending when it is cut off."""
    gateway = bench.storage.events._gateway
    for _ in range(100):
        async with gateway.transaction(bench.tenant) as connection:
            await gateway.append(connection, bench.tenant, "long", "test", "human:a", {"text": "x" * 100_000})

    def cut_off():
        links = bench.storage.checkpoints.links(bench.tenant)
        read = [next(links)]
        bench.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY%'")
        with pytest.raises(StorageUnavailable):
            read.extend(links)
        return read

    assert 0 < len(await asyncio.to_thread(cut_off)) < 100


async def test_after_a_rotation_both_keys_are_needed(history):
    key = Ed25519PrivateKey.generate()
    await history.append("a", 5)
    await checkpointer(history, Signer(key)).take(history.tenant)
    lines = await exported(history)
    assert read_exports([lines], PublicKeys([KEY.public_key(), key.public_key()])).unforged
    for only in (KEY, key):
        assert "is not among those believed" in read_exports([lines], PublicKeys([only.public_key()])).problem


def test_a_signing_key_is_read_from_a_file_of_its_owners_alone(tmp_path):
    path = tmp_path / "key.pem"
    path.write_text(new_private_pem(), encoding="ascii")
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        load_signer(path)
    path.chmod(0o600)
    signer = load_signer(path)
    public = tmp_path / "public.pem"
    public.write_text(signer.public_pem, encoding="ascii")
    assert load_public_keys([public]).problem(signer.key_id, signer.sign(b"x"), b"x") == ""
    assert "is wrong" in load_public_keys([public]).problem(signer.key_id, signer.sign(b"x"), b"y")
    for load in (load_signer, lambda file: load_public_keys([file])):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            load(tmp_path / "absent.pem")
        with pytest.raises(InvalidRequest, match="holds no") as refusal:
            load(nonsense(tmp_path))
        assert "hunter2" not in str(refusal.value)
    assert len(key_id(KEY.public_key())) == 16


def nonsense(folder):
    path = folder / "nonsense.pem"
    path.write_text("hunter2", encoding="ascii")
    path.chmod(0o600)
    return path
