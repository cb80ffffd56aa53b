"""Pruning goes batch by batch: after each, whoever ended it and however, the rest is whole and the next goes on."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core import migrations
from plm_engine_core.control_plane.errors import FeedPruned, InvalidRequest
from plm_engine_core.control_plane.events import (
    Archivist,
    PublicKeys,
    Signer,
    export,
    open_archive,
    prune_events,
    rebuild,
    run_stream,
    verify_tenant,
)
from plm_engine_core.control_plane.events.checkpoint import next_checkpoint
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import RunState
from plm_shared import migrations as kernel_migrations
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plm_shared.testing.databases import create_tenants

KEY = Ed25519PrivateKey.generate()
BELIEVED = PublicKeys([KEY.public_key()])
SCRIPT = Path(__file__).with_name("pruner.py")
LONGEST = 120.0  # seconds that anything here may take on a loaded machine
GONE = {"long": 40, "short": 2, "tenant": 5}
STUBS = "SELECT stream, max(last_seq) FROM event_stubs WHERE tenant_id = %s GROUP BY 1"
PRUNING = "SELECT pid FROM pg_stat_activity WHERE query ~ 'engine_prune' AND pid <> pg_backend_pid()"
ACTOR = "system:test"


class Old:
    """A tenant whose events are archived and older than it keeps them, and a few that came since."""

    def __init__(self, urls, tenant, storage, folder):
        self.urls, self.tenant, self.storage = urls, tenant, storage
        self.archive = open_archive(str(folder))

    def sql(self, query, *parameters):
        with psycopg.connect(self.urls.admin, autocommit=True) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    async def append(self, stream, many):
        gateway = self.storage.events._gateway
        for number in range(many):
            async with gateway.transaction(self.tenant) as connection:
                await gateway.append(connection, self.tenant, stream, "test", "human:x", {"n": number})

    async def sign(self, *, days_ago=0):
        def make(previous, heads, changed, now):
            taken_at = now - timedelta(days=days_ago)
            return next_checkpoint(previous, self.tenant, heads, changed, taken_at=taken_at, signer=Signer(KEY))

        await self.storage.checkpoints.take(self.tenant, make)
        await Archivist(self.storage, self.archive).archive(self.tenant)

    async def grow(self):
        """Of `GONE` half before one checkpoint and half before the next, which is old; the rest is new."""
        for half in (lambda many: many // 2, lambda many: many - many // 2):
            for stream, many in GONE.items():
                await self.append(stream, half(many))
            await self.sign(days_ago=2)
        await self.append("long", 3)
        await self.sign()
        self.keep()

    def keep(self, days=1):
        with psycopg.connect(self.urls.owner) as owner:
            owner.execute("SELECT set_config('app.tenant_id', %s, true)", [str(self.tenant)])
            owner.execute("DELETE FROM event_retention")
            if days is not None:
                owner.execute("INSERT INTO event_retention VALUES (%s, make_interval(days => %s))", [self.tenant, days])

    async def batch(self, limit):
        return await self.storage.checkpoints.prune(self.tenant, actor=ACTOR, limit=limit)

    async def prune(self, limit):
        return await prune_events(self.storage.checkpoints, self.tenant, actor=ACTOR, batch_events=limit)

    def left(self):
        """How many events are stored of each stream, without what tells of pruning."""
        count = "SELECT stream, count(*) FROM events WHERE tenant_id = %s AND kind <> 'events_pruned' GROUP BY 1"
        return Counter(dict(self.sql(count, self.tenant)))

    def told(self):
        told = "SELECT payload::jsonb FROM events WHERE tenant_id = %s AND kind = 'events_pruned' ORDER BY seq"
        return [payload for (payload,) in self.sql(told, self.tenant)]

    async def assert_whole(self):
        """All agree: chains, stubs, checkpoints, the archive from before, tables, and an export that goes on."""
        copy = await asyncio.to_thread(self.archive.read, self.tenant, BELIEVED)
        assert copy.unforged, copy.problem
        for how in ({}, {"exported": copy}, {"trusted": BELIEVED}):
            results = await verify_tenant(self.storage, self.tenant, **how)
            assert [each for each in results if not each.consistent] == []
        assert (await rebuild(self.storage, self.tenant))[1] == []
        pruned = await self.storage.checkpoints.pruned(self.tenant)
        newest = await export(self.storage.checkpoints, self.tenant, io.BytesIO(), after=pruned)
        assert newest == await self.storage.checkpoints.archived(self.tenant)
        if pruned:
            with pytest.raises(InvalidRequest, match="were exported and pruned"):
                await export(self.storage.checkpoints, self.tenant, io.BytesIO())

    async def assert_pruned(self):
        """All that may go is gone, is told of once, and leaves the stubs of one pruning and no trace of its way."""
        await self.assert_whole()
        assert dict(self.sql(STUBS, self.tenant)) == GONE
        assert self.left() == {"long": 3}
        assert self.sql("SELECT * FROM event_prunings") == []
        told = self.told()
        assert sum(each["events"] for each in told) == sum(GONE.values())
        assert sum(each["streams"] for each in told) == len(GONE)
        assert {(each["checkpoint"], each["keep"]) for each in told} == {(2, "1 day")}
        assert [each["more"] for each in told] == ([False] if len(told) == 1 else [True, False])


@pytest.fixture
async def old(bench, tmp_path):
    found = Old(bench.database, bench.tenant, bench.storage, tmp_path / "archive")
    await found.grow()
    return found


@pytest.mark.parametrize("limit", [1, 4, 41, 1000])
async def test_after_every_batch_of_any_size_the_rest_is_whole(old, limit):
    more, before = True, old.left()
    while more:
        batch = await old.batch(limit)
        after = old.left()
        assert (before - after).total() == batch.events <= limit
        assert (after - before).total() == 0
        before, more = after, batch.more
        await old.assert_whole()
    assert len(old.told()) <= 2, "however many batches there are"
    await old.assert_pruned()
    told = old.told()
    for _ in range(2):
        assert (await old.batch(limit)).events == 0
    assert old.told() == told
    await old.assert_pruned()


async def test_runs_that_end_between_two_batches_wait_for_the_next_pruning_and_others_go(bench, tmp_path):
    old = Old(bench.database, bench.tenant, bench.storage, tmp_path / "archive")
    ended, going_on = [], []
    for number in range(6):
        lease = await bench.lease()
        (ended if number % 2 else going_on).append(lease)
    for lease in ended:
        await finish(bench, lease)
    await old.grow()
    while (await old.batch(2)).more:
        await old.assert_whole()
        if going_on:
            await finish(bench, going_on.pop(0))
    await old.assert_whole()
    gone = dict(old.sql(STUBS, old.tenant))
    assert gone.items() >= {run_stream(lease.run.id): 3 for lease in ended}.items()
    await old.prune(2)
    await old.assert_whole()
    assert {stream: many for stream, many in old.left().items() if stream != "long"} == {
        stream: 1 for stream in old.left() if stream.startswith("run/")
    }, "of the others the end is newer than what is kept"


async def finish(bench, lease):
    await bench.storage.runs.finish(
        bench.tenant, lease.run.id, fencing_token=lease.fencing_token, state=RunState.FAILED, actor="worker:w"
    )


async def test_several_who_prune_at_once_share_the_batches(old):
    async with open_pool(old.urls.app, max_size=4) as pool:
        storage = PostgresStorage(pool, None)
        pruned = await asyncio.gather(
            *(prune_events(storage.checkpoints, old.tenant, actor=ACTOR, batch_events=3) for _ in range(4))
        )
    assert sum(each.events for each in pruned) == sum(GONE.values())
    await old.assert_pruned()


async def test_who_is_cancelled_between_two_batches_has_pruned_the_first(old):
    go_on, asked = asyncio.Event(), asyncio.Event()

    class Slow:
        async def prune(self, *arguments, **options):
            if old.left()["long"] < 43:
                asked.set()
                await go_on.wait()
            return await old.storage.checkpoints.prune(*arguments, **options)

    pruning = asyncio.ensure_future(prune_events(Slow(), old.tenant, actor=ACTOR, batch_events=7))
    await asyncio.wait_for(asked.wait(), LONGEST)
    pruning.cancel()
    await asyncio.wait([pruning])
    assert old.left()["long"] == 36
    await old.assert_whole()
    await old.prune(1000)
    await old.assert_pruned()


async def test_between_two_batches_no_feed_waits(old):
    other = create_tenants(old.urls, "beside")[0]
    beside = Old(old.urls, other, old.storage, Path(tempfile.gettempdir()) / "none")
    batches = 0
    while (await old.batch(5)).more:
        batches += 1
        await beside.append("tenant", 1)
        assert len((await caught_up(beside)).events) == batches
    assert batches > 5


async def test_a_reader_is_told_of_each_batch_that_overtook_it_and_of_no_other(bench, tmp_path):
    old = Old(bench.database, bench.tenant, bench.storage, tmp_path / "archive")
    await old.append("first", 2)
    page = await caught_up(old)
    ahead_of_first = page.cursor
    await old.grow()
    assert (await old.batch(2)).more
    assert dict(old.sql(STUBS, old.tenant)) == {"first": 2}
    page = await old.storage.events.feed(old.tenant, after=ahead_of_first, limit=3)
    assert len(page.events) == 3, "it had read what went"
    stubs = 1
    while (await old.batch(20)).more:
        newer = len(old.sql(STUBS, old.tenant))
        if newer > stubs:
            with pytest.raises(FeedPruned) as told:
                await old.storage.events.feed(old.tenant, after=page.cursor)
            page = await bench.control_plane.feed(old.tenant, cursor=told.value.cursor, limit=1)
        else:
            page = await old.storage.events.feed(old.tenant, after=page.cursor, limit=1)
        stubs = newer


async def caught_up(old):
    """The feed, once nothing holds it back: the server's own housekeeping may for a moment."""
    async with asyncio.timeout(LONGEST):
        while (page := await old.storage.events.feed(old.tenant)).held_back is not None:  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.02)
    return page


async def test_a_verifier_beside_a_pruning_walks_once_and_then_only_what_went(old, monkeypatch):
    heads, links, walked = old.storage.events.heads, old.storage.checkpoints.links, []

    async def heads_early(*arguments):
        found = await heads(*arguments)
        await old.batch(21)
        return found

    def seen(*arguments, **options):
        walked.append(options["streams"])
        return links(*arguments, **options)

    monkeypatch.setattr(old.storage.events, "heads", heads_early)
    monkeypatch.setattr(old.storage.checkpoints, "links", seen)
    results = await verify_tenant(old.storage, old.tenant)
    assert [each for each in results if not each.consistent] == []
    assert sorted(each.stream for each in results) == ["long", "short", "tenant"]
    assert (walked[0], walked[1]) == (None, {"long"})
    assert None not in walked[1:]


async def test_a_retention_that_is_withdrawn_ends_the_pruning_and_what_went_is_told(old):
    assert (await old.batch(41)).more  # all that is old of the first stream, and half of the second
    old.keep(None)
    batch = await old.batch(1000)
    assert not batch.more
    assert old.left() == {"long": 3, "tenant": 5}
    assert old.sql("SELECT * FROM event_prunings") == []
    assert sum(each["events"] for each in old.told()) == 42
    await old.assert_whole()
    old.keep(1)
    await old.prune(3)
    await old.assert_whole()
    assert dict(old.sql(STUBS, old.tenant)) == GONE


@pytest.mark.parametrize("batches", [0, 1, 9, 13])
async def test_a_node_of_the_release_before_prunes_beside(old, batches):
    """It prunes all at once, and also what a stub of ours stands for already."""
    for _ in range(batches):
        assert (await old.batch(4)).more or batches == 13
    async with old.storage.events._gateway.transaction(old.tenant) as connection:
        await connection.execute("SELECT engine_prune_events_v2(%s, 'system:old')", [old.tenant])
    await old.assert_whole()
    assert old.left() == {"long": 3}
    assert (await old.prune(4)).events == 0
    await old.assert_whole()
    assert dict(old.sql(STUBS, old.tenant)) == GONE
    assert old.sql("SELECT * FROM event_prunings") == []
    assert {each["checkpoint"] for each in old.told()} == {2}
    assert sum(each["streams"] for each in old.told()) == len(GONE)


async def test_a_process_that_is_killed_between_two_batches_or_within_one_leaves_the_rest_whole(old):
    process = await pruner(old, 4)
    for told in (b"", b"\n", b"\n"):
        process.stdin.write(told)
        assert await asyncio.wait_for(process.stdout.readline(), LONGEST) == b"batch\n"
    process.kill()
    await process.wait()
    before = old.left()
    assert before["long"] == 43 - 3 * 4
    await old.assert_whole()
    with psycopg.connect(old.urls.admin) as holder:  # its last batch waits here, when the events are gone already
        holder.execute("SELECT FROM event_streams WHERE tenant_id = %s AND stream = 'tenant' FOR UPDATE", [old.tenant])
        process = await pruner(old, 1000)
        await until(old, PRUNING + " AND wait_event_type = 'Lock'", many=1)
        process.kill()
        await process.wait()
    await until(old, PRUNING, many=0)
    assert old.left() == before, "a batch is whole or nothing"
    await old.assert_whole()
    await old.prune(4)
    await old.assert_pruned()


async def pruner(old, limit):
    return await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), old.urls.app, str(old.tenant), str(limit)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


async def until(old, query, *, many):
    """Until a query finds so many rows."""
    async with asyncio.timeout(LONGEST):
        while len(old.sql(query)) != many:  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    """A durable server that the tests kill."""
    with tempfile.TemporaryDirectory(prefix="plm-prune-") as name:
        Path(name).chmod(0o711)  # the server's account must pass through it when root runs the tests
        server = EmbeddedPostgres(Path(name))
        server.start()
        try:
            urls = provision(server.admin_dsn, "pruned")
            kernel_migrations.upgrade(urls.owner)
            migrations.upgrade(urls.owner)
            yield server, urls
        finally:
            server.start()  # a test that failed may have left it dead
            server.remove()


@pytest.mark.parametrize("moment", ["between", "within"])
async def test_a_server_that_is_killed_between_two_batches_or_within_one_leaves_the_rest_whole(
    server, tmp_path, moment
):
    cluster, urls = server
    (tenant,) = create_tenants(urls, f"killed-{moment}")
    async with open_pool(urls.app, max_size=2) as pool:
        old = Old(urls, tenant, PostgresStorage(pool, None), tmp_path / "archive")
        await old.grow()
    process = await pruner(old, 7)
    assert await asyncio.wait_for(process.stdout.readline(), LONGEST) == b"batch\n"
    before = old.left()
    if moment == "within":
        process.kill()
        await process.wait()
        holder = psycopg.connect(urls.admin)  # the last batch waits here, when its events are gone already
        holder.execute("SELECT FROM event_streams WHERE tenant_id = %s AND stream = 'tenant' FOR UPDATE", [tenant])
        process = await pruner(old, 1000)
        await until(old, PRUNING + " AND wait_event_type = 'Lock'", many=1)
    os.kill(int((cluster.cluster_dir / "postmaster.pid").read_text().split("\n", 1)[0]), signal.SIGKILL)
    if moment == "within":
        holder.close()
    process.kill()
    await process.wait()
    cluster.start()
    async with open_pool(urls.app, max_size=2) as pool:
        old.storage = PostgresStorage(pool, None)
        assert old.left() == before, "what was answered outlasts, and a batch is whole or nothing"
        await old.assert_whole()
        await old.prune(7)
        await old.assert_pruned()
