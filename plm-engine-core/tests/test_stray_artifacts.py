"""Files that no record names are removed, and no other file ever is."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
import uuid
from datetime import timedelta

import pytest
from plm_engine_core.control_plane import ArtifactRecord
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.runs.run import ArtifactRow
from plm_shared.artifact_store import ArtifactRef, LocalFilesystemBackend

pytestmark = pytest.mark.every_storage

GRACE = 3600.0


@pytest.fixture
def store(tmp_path):
    return LocalFilesystemBackend(tmp_path / "artifacts")


def kept(store, tenant, *, identifier=None, age=2 * GRACE, trace="0" * 32):
    """A file in the store that is so many seconds old, and its name."""
    ref = ArtifactRef(str(tenant), trace, str(identifier or new_id()), "txt")
    store.put(ref, io.BytesIO(b"x"))
    path = store._path(ref)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return ref


KIND = {"mime_type": "text/plain", "size_bytes": 1, "backend": "local", "storage_uri": "file:///x"}


async def given(bench, identifier):
    """A run that was made with an artifact of this id."""
    request = bench.request()
    row = ArtifactRow(id=identifier, run_id=request.run_id, trace_id=request.trace_id, **KIND)
    return await bench.run(run_id=request.run_id, trace_id=request.trace_id, artifacts=[row])


def stands(store, ref):
    return store._path(ref).exists()


def recovery(bench, store, **options):
    return Recovery(bench.storage, artifacts=store, artifact_grace_seconds=GRACE, **options)


async def test_a_file_without_a_record_goes_when_its_grace_is_over(bench, store):
    old, young = kept(store, bench.tenant), kept(store, bench.tenant, age=GRACE / 2)
    assert [await recovery(bench, store).sweep_artifacts() for _ in range(2)] == [1, 0]
    assert [stands(store, ref) for ref in (old, young)] == [False, True]


async def test_a_machine_whose_clock_is_ahead_removes_nothing_that_may_be_recorded_still(
    bench, store, monkeypatch, caplog
):
    """Its clock makes each file look as much older as it is ahead of the database's."""
    young, old = kept(store, bench.tenant, age=1.5 * GRACE), kept(store, bench.tenant, age=3 * GRACE)
    now = bench.storage.runs.now

    async def behind():
        return await now() - timedelta(seconds=GRACE)

    monkeypatch.setattr(bench.storage.runs, "now", behind)
    assert await recovery(bench, store).sweep_artifacts() == 1
    assert (stands(store, young), stands(store, old)) == (True, False)
    assert "s ahead of the database's; set it right" in caplog.text


async def test_what_a_run_was_given_or_left_behind_stays_however_old_it_is(bench, store):
    brought, left = new_id(), new_id()
    files = [kept(store, bench.tenant, identifier=each) for each in (brought, left)]
    lease = await bench.lease(await given(bench, brought))
    record = ArtifactRecord(id=left, name="x", sha256="0", **KIND)
    await bench.settle(await bench.begun(lease), lease, artifacts=(record,))
    assert await recovery(bench, store).sweep_artifacts() == 0
    assert all(stands(store, ref) for ref in files)


async def test_a_process_that_is_killed_before_the_commit_leaves_nothing_for_ever(bench, store, tmp_path):
    script = (
        "import io, os, sys; from plm_shared.artifact_store import *\n"
        "LocalFilesystemBackend(sys.argv[1]).put(ArtifactRef(*sys.argv[2:]), io.BytesIO(b'x'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    name = [str(bench.tenant), "0" * 32, str(new_id()), "txt"]
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(tmp_path / "artifacts"), *name], check=False
    )
    ref = ArtifactRef(*name)
    assert stands(store, ref)
    assert await recovery(bench, store).sweep_artifacts() == 0, "its process may be about to record it"
    os.utime(store._path(ref), (0, 0))
    assert await recovery(bench, store).sweep_artifacts() == 1
    assert not stands(store, ref)


async def test_what_is_not_this_databases_or_no_artifact_of_a_run_is_left_alone(bench, store):
    """Another database, or the archive of events, may share the store."""
    others = [
        kept(store, uuid.uuid4()),
        kept(store, bench.tenant, identifier="after-0", trace="events"),
        kept(store, bench.tenant, identifier=uuid.uuid4().hex),
    ]
    assert await recovery(bench, store).sweep_artifacts() == 0
    assert all(stands(store, ref) for ref in others)


async def test_a_record_of_another_tenant_keeps_no_file(bench, store):
    other = bench.behind.new_tenant()
    identifier = new_id()
    await given(bench, identifier)
    mine, theirs = (kept(store, tenant, identifier=identifier) for tenant in (bench.tenant, other))
    assert await recovery(bench, store).sweep_artifacts() == 1
    assert [stands(store, ref) for ref in (mine, theirs)] == [True, False]


async def test_what_is_recorded_while_a_page_is_read_stays(bench, store):
    """The records are asked after the listing, so that nothing committed before a removal is missed."""
    identifier = new_id()
    ref = kept(store, bench.tenant, identifier=identifier)
    loop = asyncio.get_running_loop()

    class Slow(LocalFilesystemBackend):
        def list(self, tenant_id, **options):
            page = super().list(tenant_id, **options)
            asyncio.run_coroutine_threadsafe(given(bench, identifier), loop).result(30)
            return page

    assert await recovery(bench, Slow(store._root)).sweep_artifacts() == 0
    assert stands(store, ref)


async def test_many_sweepers_at_once_remove_the_same_files_and_no_others(bench, store):
    strays = [kept(store, bench.tenant, trace=f"{number % 7:032x}") for number in range(40)]
    young = [kept(store, bench.tenant, age=0) for _ in range(5)]
    await asyncio.gather(*(recovery(bench, store).sweep_artifacts() for _ in range(4)))
    assert not any(stands(store, ref) for ref in strays)
    assert all(stands(store, ref) for ref in young)


async def test_more_than_a_page_is_swept_whole(bench, store, monkeypatch):
    monkeypatch.setattr("plm_engine_core.control_plane.stray_artifacts._PAGE", 3)
    strays = [kept(store, bench.tenant) for _ in range(10)]
    assert await recovery(bench, store).sweep_artifacts() == len(strays)


async def test_one_tenant_that_cannot_be_swept_does_not_hold_up_the_others(bench, store, caplog):
    other = bench.behind.new_tenant()
    ref = kept(store, other)

    class Broken(LocalFilesystemBackend):
        def list(self, tenant_id, **options):
            if tenant_id == str(bench.tenant):
                raise OSError("the disk is gone")
            return super().list(tenant_id, **options)

    assert await recovery(bench, Broken(store._root)).sweep_artifacts() == 1
    assert not stands(store, ref)
    assert "stay until the next pass" in caplog.text


async def test_without_the_records_nothing_is_removed(bench, store, monkeypatch):
    ref = kept(store, bench.tenant)

    async def away(*_):
        raise StorageUnavailable("gone")

    monkeypatch.setattr(bench.storage.runs, "unrecorded", away)
    with pytest.raises(StorageUnavailable):
        await recovery(bench, store).sweep_artifacts()
    assert stands(store, ref)


async def test_a_store_that_does_not_answer_holds_up_no_run(bench, store, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    class Hanging(LocalFilesystemBackend):
        def list(self, tenant_id, **options):
            entered.set()
            leave.wait(60)
            return super().list(tenant_id, **options)

    passes = asyncio.Queue()
    abandoned = bench.storage.runs.abandoned

    async def counted(limit, *, patience_seconds):
        passes.put_nowait(limit)
        return await abandoned(limit, patience_seconds=patience_seconds)

    monkeypatch.setattr(bench.storage.runs, "abandoned", counted)
    task = asyncio.create_task(recovery(bench, Hanging(store._root), every_seconds=0).run())
    try:
        assert await asyncio.to_thread(entered.wait, 30)
        async with asyncio.timeout(30):
            for _ in range(passes.qsize() + 3):
                await passes.get()
    finally:
        leave.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
