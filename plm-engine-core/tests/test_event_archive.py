"""The archive: pieces in a folder or S3 that are checked without a database; and what it allows to prune."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core.control_plane.errors import FeedPruned, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.events import (
    Pruned,
    PublicKeys,
    Signer,
    open_archive,
    prune_events,
    rebuild,
    run_stream,
    verify_tenant,
)
from plm_engine_core.control_plane.events import archive as archive_module
from plm_engine_core.control_plane.events.archive import Archivist
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.events.export import export
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.limits.desk import OPERATOR_SCOPE, BudgetDesk
from plm_engine_core.control_plane.storage.postgres import gateway
from plm_engine_core.control_plane.vocabulary import BudgetScope, RunState
from plm_shared.artifact_store import ObjectStoreBackend
from plm_shared.testing.databases import create_tenants

KEY = Ed25519PrivateKey.generate()
BELIEVED = PublicKeys([KEY.public_key()])


STUB = (
    "INSERT INTO event_stubs (tenant_id, stream, number, last_seq, last_hash) "
    "SELECT tenant_id, stream, number, last_seq, last_hash FROM event_checkpoint_heads"
)
RECORD = "INSERT INTO event_exports (tenant_id, number, after, uri, size_bytes, sha256) VALUES (%s, 1, 0, 'x', 1, 'x')"


async def append(bench, stream, *numbers):
    gateway = bench.storage.events._gateway
    for number in numbers:
        async with gateway.transaction(bench.tenant) as connection:
            await gateway.append(connection, bench.tenant, stream, "test", "human:é", {"n": number})


async def sign(bench):
    return await Checkpointer(bench.storage.checkpoints, Signer(KEY)).take(bench.tenant)


async def verdict(bench, archive):
    """The streams that are bad against the archive."""
    copy = archive.read(bench.tenant, BELIEVED)
    assert copy.unforged, copy.problem
    results = await verify_tenant(bench.storage, bench.tenant, exported=copy)
    return [(each.stream, each.first_bad_seq) for each in results if not each.consistent]


@pytest.fixture(scope="session")
def bucket():
    """A bucket of a server of the tests' own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("moto_server")
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while True:
        assert server.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            continue
    yield f"s3://events?endpoint=http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture(params=["folder", "s3"])
def archive(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return open_archive(str(tmp_path / "archive"))
    address = request.getfixturevalue("bucket")
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    found = open_archive(address)
    assert isinstance(found._backend, ObjectStoreBackend)
    if "events" not in [each["Name"] for each in found._backend._client.list_buckets()["Buckets"]]:
        found._backend._client.create_bucket(Bucket="events")
    return found


@pytest.fixture
def local(tmp_path):
    return open_archive(str(tmp_path / "archive"))


async def test_pieces_go_on_where_one_ended_and_are_checked_without_a_database(bench, archive):
    archivist = Archivist(bench.storage, archive)
    assert await archivist.archive(bench.tenant) == []
    assert archive.read(bench.tenant, BELIEVED).newest is None
    await append(bench, "a", 1, 2)
    await sign(bench)
    (first,) = await archivist.archive(bench.tenant)
    await append(bench, "a", 3)
    await append(bench, "b", 1)
    await sign(bench)
    await sign(bench)
    (second,) = await archivist.archive(bench.tenant)
    assert ((first.after, first.number), (second.after, second.number)) == ((0, 1), (1, 2))
    assert await archivist.archive(bench.tenant) == []
    copy = archive.read(bench.tenant, BELIEVED)
    assert (copy.unforged, copy.events, copy.newest.number) == (True, 4, 2)
    assert await verdict(bench, archive) == []


async def test_a_sweep_brings_every_tenants_archive_up(bench, local):
    (other,) = create_tenants(bench.database, "other")
    for each in (bench, bench.in_tenant(other)):
        await append(each, "a", 1)
        await sign(each)
    archivist = Archivist(bench.storage, local)
    assert (await archivist.sweep(), await archivist.sweep()) == (2, 0)
    assert all(local.read(tenant, BELIEVED).unforged for tenant in (bench.tenant, other))


@pytest.mark.parametrize("error", [StorageUnavailable("locked"), RuntimeError("damaged")], ids=str)
async def test_one_tenant_that_cannot_be_archived_does_not_hold_up_the_others(bench, local, monkeypatch, caplog, error):
    (other,) = create_tenants(bench.database, "other")
    for each in (bench, bench.in_tenant(other)):
        await append(each, "a", 1)
        await sign(each)
    archived = bench.storage.checkpoints.archived

    async def failing(tenant_id):
        if tenant_id == bench.tenant:
            raise error
        return await archived(tenant_id)

    monkeypatch.setattr(bench.storage.checkpoints, "archived", failing)
    assert await Archivist(bench.storage, local).sweep() == 1
    assert local.read(other, BELIEVED).unforged
    assert str(bench.tenant) in caplog.text


async def test_a_sweep_prunes_when_the_archive_of_every_tenant_is_brought_up(bench, local, monkeypatch):
    """However long a pruning takes, no archive is behind for it; and one that fails holds no other one up."""
    tenants = (bench.tenant, *create_tenants(bench.database, "other", "third"))
    for tenant in tenants:
        await append(bench.in_tenant(tenant), "a", 1)
        await sign(bench.in_tenant(tenant))
    pruned = []

    async def failing(tenant_id, *, actor, limit):
        assert all([await bench.storage.checkpoints.archived(each) == 1 for each in tenants])
        pruned.append(tenant_id)
        raise StorageUnavailable("somebody else prunes")

    monkeypatch.setattr(bench.storage.checkpoints, "prune", failing)
    assert await Archivist(bench.storage, local).sweep() == 3
    assert sorted(pruned) == sorted(tenants)


async def test_many_at_once_store_each_piece_once(bench, local):
    for number in range(3):
        await append(bench, "a", number)
        await sign(bench)
    await asyncio.gather(*(Archivist(bench.storage, local).archive(bench.tenant) for _ in range(5)))
    assert await bench.storage.checkpoints.archived(bench.tenant) == 3
    assert local.read(bench.tenant, BELIEVED).events == 3


async def test_a_writer_that_ended_before_its_piece_was_recorded_is_followed_by_one_that_records_it(bench, local):
    await append(bench, "a", 1)
    await sign(bench)
    stored = await local.write(bench.storage.checkpoints, bench.tenant, after=0)
    await append(bench, "a", 2)
    await sign(bench)
    pieces = await Archivist(bench.storage, local).archive(bench.tenant)
    assert [(each.after, each.number) for each in pieces] == [(0, 1), (1, 2)]
    assert (pieces[0].sha256, pieces[0].size_bytes, pieces[0].uri) == (stored.sha256, stored.size_bytes, stored.uri)
    assert local.read(bench.tenant, BELIEVED).unforged


async def test_pieces_are_bounded(bench, local, monkeypatch):
    monkeypatch.setattr(archive_module, "PIECE_BYTES", 1)
    for number in range(3):
        await append(bench, "a", number)
        await sign(bench)
    assert len(await Archivist(bench.storage, local).archive(bench.tenant)) == 3
    assert await verdict(bench, local) == []


async def test_a_database_that_went_another_way_since_does_not_go_on_in_the_same_archive(bench, local):
    await append(bench, "a", 1)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    for table in ("event_exports", "event_checkpoints", "event_checkpoint_heads"):
        bench.sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        bench.sql(f"DELETE FROM {table}")  # noqa: S608  # one of three literals
    await append(bench, "a", 2)
    await sign(bench)
    with pytest.raises(InvalidRequest, match="no piece of this history"):
        await Archivist(bench.storage, local).archive(bench.tenant)


@pytest.mark.parametrize("damage", ["changed", "cut", "emptied"])
async def test_a_damaged_piece_is_named(bench, tmp_path, local, damage):
    await append(bench, "a", 1, 2)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    (piece,) = tmp_path.glob("archive/*/events/*.jsonl")
    text = piece.read_bytes()
    piece.write_bytes({"changed": text.replace(b'"test"', b'"tent"', 1), "cut": text[:-20], "emptied": b""}[damage])
    found = local.read(bench.tenant, BELIEVED)
    assert not found.unforged
    assert "piece after checkpoint 0" in found.problem


def test_an_archive_of_another_kind_is_refused_in_one_sentence():
    for address in ("ftp://somewhere", "s3://", "s3://user:secret@bucket", "s3://bucket/prefix"):
        with pytest.raises(InvalidRequest, match="is no archive") as refusal:
            open_archive(address)
        assert "secret" not in str(refusal.value)


def keep(bench, days=1):
    with psycopg.connect(bench.database.owner) as owner:
        owner.execute("SELECT set_config('app.tenant_id', %s, true)", [str(bench.tenant)])
        owner.execute(
            "INSERT INTO event_retention (tenant_id, keep) VALUES (%s, make_interval(days => %s))", [bench.tenant, days]
        )


def age(bench, days=2):
    """Let what was signed so far be as old as that, signature included: the checkpoints are signed anew for it."""
    bench.sql("ALTER TABLE event_checkpoints DISABLE TRIGGER ALL")
    bench.sql("UPDATE event_checkpoints SET taken_at = taken_at - make_interval(days => %s)", days)


async def prune(bench):
    return await prune_events(bench.storage.checkpoints, bench.tenant, actor="system:test")


async def finished_run(bench):
    lease = await bench.lease()
    await bench.storage.runs.finish(
        bench.tenant, lease.run.id, fencing_token=lease.fencing_token, state=RunState.FAILED, actor="worker:w"
    )
    return run_stream(lease.run.id)


async def test_nothing_is_pruned_without_a_retention_an_age_and_a_recorded_export(bench, local):
    stream = await finished_run(bench)
    await sign(bench)
    age(bench)
    assert await prune(bench) == Pruned(checkpoint=None, streams=0, events=0), "no retention is set"
    keep(bench, days=5)
    assert await prune(bench) == Pruned(checkpoint=None, streams=0, events=0), "not old enough"
    age(bench, days=9)
    assert await prune(bench) == Pruned(checkpoint=None, streams=0, events=0), "not exported"
    await Archivist(bench.storage, local).archive(bench.tenant)
    assert await prune(bench) == Pruned(checkpoint=1, streams=1, events=3)
    assert await bench.storage.events.read(bench.tenant, stream) == []


@pytest.fixture
async def prunable(bench, local):
    """A bench in which everything is archived, old, and no longer kept."""
    for _ in range(2):
        await finished_run(bench)
        await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    keep(bench)
    age(bench)
    return bench


async def test_what_is_pruned_while_it_is_exported_is_not_missing_from_a_file_that_says_it_holds_it(
    prunable, monkeypatch
):
    read = prunable.storage.checkpoints.read

    async def read_late(*arguments, **options):
        found = await read(*arguments, **options)
        await prune(prunable)
        return found

    monkeypatch.setattr(prunable.storage.checkpoints, "read", read_late)
    with pytest.raises(InvalidRequest, match="up to checkpoint 2 were exported and pruned; go on after 2"):
        await export(prunable.storage.checkpoints, prunable.tenant, io.BytesIO())


async def test_a_pruning_that_takes_longer_than_any_answer_may_is_made(prunable, monkeypatch):
    prunable.sql(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3); RETURN NEW; END $$"
    )
    prunable.sql("CREATE TRIGGER slowly BEFORE INSERT ON event_stubs FOR EACH ROW EXECUTE FUNCTION slowly()")
    monkeypatch.setattr(gateway, "LONGEST_ANSWER_SECONDS", 5)
    assert await prune(prunable) == Pruned(checkpoint=2, streams=2, events=6)


async def test_a_correction_that_was_pruned_is_no_difference_between_events_and_tables(bench, local):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease)
    desk, by = BudgetDesk(bench.storage.budgets), replace(bench.requester, scopes=frozenset({OPERATOR_SCOPE}))
    for scope, scope_id in ((BudgetScope.RUN, lease.run.id), (BudgetScope.TENANT, bench.tenant)):
        key = BudgetKey(scope=scope, scope_id=scope_id, unit="calls")
        await desk.correct(bench.tenant, key, Decimal(-1), reason="it failed", command_id=scope, by=by)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    keep(bench)
    age(bench)
    assert (await prune(bench)).streams == 1  # the tenant's; the run goes on
    assert (await rebuild(bench.storage, bench.tenant))[1] == []
    bench.sql("UPDATE budgets SET reserved = 1 WHERE scope_kind = 'run' AND unit = 'calls'")
    (found,) = (await rebuild(bench.storage, bench.tenant))[1]
    assert found.table.reserved == 1


async def test_what_is_pruned_while_it_is_verified_is_not_taken_for_forged(prunable, monkeypatch):
    heads = prunable.storage.events.heads

    async def heads_early(*arguments):
        found = await heads(*arguments)
        await prune(prunable)
        return found

    monkeypatch.setattr(prunable.storage.events, "heads", heads_early)
    results = await verify_tenant(prunable.storage, prunable.tenant)
    assert [each for each in results if not each.consistent] == []
    assert await prunable.storage.checkpoints.pruned(prunable.tenant) == 2


async def test_what_is_left_after_pruning_verifies_on_from_the_stubs(bench, local):
    ended = await finished_run(bench)
    going_on = run_stream((await bench.lease()).run.id)
    await append(bench, "tenant", 1, 2)
    await sign(bench)
    archivist = Archivist(bench.storage, local)
    await archivist.archive(bench.tenant)
    await append(bench, "tenant", 3)
    await sign(bench)
    await archivist.archive(bench.tenant)
    keep(bench)
    copy = local.read(bench.tenant, BELIEVED)
    bench.sql("ALTER TABLE event_checkpoints DISABLE TRIGGER ALL")
    bench.sql("UPDATE event_checkpoints SET taken_at = taken_at - interval '2 days' WHERE number = 1")
    assert await prune(bench) == Pruned(checkpoint=1, streams=2, events=5)
    bench.sql("UPDATE event_checkpoints SET taken_at = taken_at + interval '2 days' WHERE number = 1")
    assert await prune(bench) == Pruned(checkpoint=None, streams=0, events=0)

    kinds = [(event.seq, event.kind) for event in await bench.storage.events.read(bench.tenant, "tenant")]
    assert kinds == [(3, "test"), (4, "events_pruned")]
    assert len(await bench.storage.events.read(bench.tenant, going_on)) == 2
    for results in (
        await verify_tenant(bench.storage, bench.tenant),
        await verify_tenant(bench.storage, bench.tenant, exported=copy),
        await verify_tenant(bench.storage, bench.tenant, trusted=BELIEVED),
    ):
        assert all(each.consistent for each in results), results
    counted = {each.stream: each.events for each in await verify_tenant(bench.storage, bench.tenant)}
    assert counted == {ended: 0, going_on: 2, "tenant": 2}

    _, differences = await rebuild(bench.storage, bench.tenant)
    assert differences == [], "what went cannot be rebuilt and is left out; the rest agrees"
    await append(bench, "tenant", 5)
    await sign(bench)
    await archivist.archive(bench.tenant)
    assert await verdict(bench, local) == []
    with pytest.raises(InvalidRequest, match="were exported and pruned"):
        await local.write(bench.storage.checkpoints, bench.tenant, after=0)


FORGED = {
    "a stub of nothing": "UPDATE event_stubs SET last_seq = last_seq + 1 WHERE stream = 'tenant'",
    "a stub with another hash": "UPDATE event_stubs SET last_hash = sha256('x') WHERE stream = 'tenant'",
    "no stub": "DELETE FROM event_stubs WHERE stream = 'tenant'",
    "an event after the stub": "UPDATE events SET actor = 'x' WHERE stream = 'tenant' AND seq = 3",
    "no event after the stub": "DELETE FROM events WHERE stream = 'tenant' AND seq = 3",
}


@pytest.mark.parametrize("forgery", FORGED)
async def test_a_forged_stub_and_what_is_changed_after_one_are_found(bench, local, forgery):
    await append(bench, "tenant", 1, 2)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    keep(bench)
    age(bench)
    await prune(bench)
    for table in ("events", "event_stubs"):
        bench.sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    bench.sql(FORGED[forgery])
    (found,) = [each for each in await verify_tenant(bench.storage, bench.tenant) if not each.consistent]
    assert found.stream == "tenant"


async def test_a_stub_that_fits_forged_checkpoints_is_not_what_was_exported(bench, local):
    await append(bench, "tenant", 1, 2)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    copy = local.read(bench.tenant, BELIEVED)
    keep(bench)
    for table in ("events", "event_stubs", "event_checkpoint_heads", "event_streams"):
        bench.sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    bench.sql("UPDATE event_checkpoint_heads SET last_hash = sha256('x')")
    bench.sql(STUB)
    bench.sql("DELETE FROM events")
    bench.sql("UPDATE event_streams SET last_hash = sha256('x')")
    assert all(each.consistent for each in await verify_tenant(bench.storage, bench.tenant))
    found = [each for each in await verify_tenant(bench.storage, bench.tenant, exported=copy) if not each.consistent]
    assert ("tenant", 2) in [(each.stream, each.first_bad_seq) for each in found]


@pytest.mark.parametrize("role", ["owner", "app"])
async def test_nobody_deletes_an_event_that_no_covered_stub_stands_for(bench, role):
    await append(bench, "tenant", 1)
    await sign(bench)
    refused = (psycopg.errors.CheckViolation, psycopg.errors.InsufficientPrivilege)
    with psycopg.connect(getattr(bench.database, role)) as connection:
        for statement in ("DELETE FROM events", STUB, "UPDATE event_exports SET number = 9"):
            connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(bench.tenant)])
            if "event_exports" in statement:
                connection.execute(RECORD, [bench.tenant])
            with pytest.raises(refused):
                connection.execute(statement)
            connection.rollback()
    with psycopg.connect(bench.database.app) as app, pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute("INSERT INTO event_retention (tenant_id, keep) VALUES (%s, '1 day')", [bench.tenant])


async def read_all(bench, cursor=None):
    """Every event that the feed shows from a cursor on, and where it ends."""
    seen = []
    async with asyncio.timeout(60):
        while True:
            page = await bench.control_plane.feed(bench.tenant, cursor=cursor, limit=2)
            seen += [(event.stream, event.seq) for event in page.events]
            cursor = page.cursor.encode()
            if page.held_back is None and not page.events:
                return seen, cursor
            await asyncio.sleep(0.01 if page.events else 0.05)


async def test_a_reader_of_the_feed_whom_pruning_overtook_is_told_once_and_misses_nothing_else(bench, local):
    await append(bench, "tenant", 1)
    behind = (await read_all(bench))[1]
    ended = await finished_run(bench)
    going_on = run_stream((await bench.lease()).run.id)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    ahead = (await read_all(bench, behind))[1]
    keep(bench, days=5)
    age(bench, days=9)
    assert (await prune(bench)).events
    with pytest.raises(FeedPruned) as told:
        await bench.control_plane.feed(bench.tenant, cursor=behind)
    assert (told.value.reason, told.value.streams) == ("feed_pruned", 1)
    left = [(going_on, 1), (going_on, 2), ("tenant", 2)]
    assert (await read_all(bench, told.value.cursor))[0] == left
    assert (await read_all(bench, ahead))[0] == [("tenant", 2)], "who has seen it all is told nothing"
    anew, cursor = await read_all(bench)
    assert ended not in {stream for stream, _ in anew}
    assert (await read_all(bench, cursor))[0] == []


async def test_the_record_says_what_was_pruned_and_by_whom(bench, local):
    await finished_run(bench)
    await sign(bench)
    await Archivist(bench.storage, local).archive(bench.tenant)
    keep(bench, days=30)
    age(bench, days=31)
    await prune(bench)
    (event,) = await bench.storage.events.read(bench.tenant, "tenant")
    assert (event.kind, event.actor) == ("events_pruned", "system:test")
    assert json.loads(event.payload) == {"checkpoint": 1, "streams": 1, "events": 3, "keep": "30 days", "more": False}
