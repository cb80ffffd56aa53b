"""Both stores of jobs keep the same promises; the one on disk keeps more."""

from __future__ import annotations

import marshal
import os
import select
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    BlockReason,
    CallContext,
    ErrorCategory,
    FromStep,
    InMemoryJobStore,
    InputFile,
    Job,
    JobError,
    JobEvent,
    JobEventType,
    JobRequest,
    JobSequence,
    JobStatus,
    JobStore,
    LocalJobStore,
    OutputFile,
    ResourceShortfall,
    ResourceSnapshot,
    ResultFile,
    RetryPolicy,
    SequenceStatus,
    SequenceStep,
    StepResult,
    StoreError,
    WireValueError,
)
from plugin_substrate.queue.store import (
    Change,
    ChangedJob,
    ChangedSequence,
    Forget,
    ForgetSequence,
    JobFilter,
    KeptJob,
    NewEvent,
    NewJob,
    NewSequence,
)
from plugin_substrate.stores import job_writer
from plugin_substrate.stores.job_rows import changed_sequence_row
from plugin_substrate.stores.job_writer import LENGTH, connect

VALUES = [
    (1, "ä", None),
    b"\x00\xff",
    datetime(2024, 5, 1, tzinfo=UTC),
    Decimal("1.50"),
    Path("a/b"),
    {"$": [True, 0.5]},
]


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[JobStore]:
    """An open store of either kind."""
    made: JobStore = InMemoryJobStore() if request.param == "memory" else LocalJobStore(tmp_path / "jobs.db")
    made.open()
    yield made
    await made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "jobs.db"


async def keep(store: JobStore, *changes: Change) -> None:
    kept = store.write(changes)
    if kept is not None:
        await kept


def new(job_id: str, order: int, **fields: Any) -> NewJob:
    request = JobRequest(
        plugin_instance_id="probe",
        args=tuple(VALUES),
        kwargs={"x": VALUES},
        owner=fields.get("owner", ""),
        priority=fields.get("priority", 0),
        call=CallContext("call", "acme", "run", "step"),
        deadline_seconds=5.0,
        retry=RetryPolicy(categories=frozenset({ErrorCategory.RESOURCE})),
    )
    job = Job(id=job_id, plugin_instance_id="probe", args=request.args, kwargs=request.kwargs, **fields)
    return NewJob(KeptJob(job=job, request=request, order=order, idempotent=True))


def event(job_id: str, number: int, position: int, sequence_id: str | None = None) -> NewEvent:
    return NewEvent(
        JobEvent(
            number=number,
            position=position,
            type=JobEventType.PROGRESS_CHANGED,
            job_id=job_id,
            plugin_instance_id="probe",
            payload={"progress": number / 10, "status_message": "ä"},
            sequence_id=sequence_id,
        )
    )


def test_arguments_are_unpacked_as_they_were_packed(store: JobStore) -> None:
    for values in ([], [1, "two", None, [0.5, {"three": True}]], VALUES, [InputFile("a.txt", "text/plain", b"x")]):
        assert store.unpack(store.pack(values, {"x": values})) == (tuple(values), {"x": values})


async def test_a_job_is_read_as_it_was_written(store: JobStore) -> None:
    change = new("a", 1, owner="acme", priority=3, plugin_name="Probe")
    await keep(store, change)
    assert store.job("a") == change.kept
    job = replace(
        change.kept.job,
        status=JobStatus.FAILED,
        started_at=datetime.now(UTC),
        completed_at=datetime.now(UTC),
        progress=0.5,
        status_message="half",
        usage={"pages": 2.0},
        error=JobError(
            category=ErrorCategory.RESOURCE,
            message="too little",
            retriable=True,
            outcome_known=False,
            error_type="WorkerOOMError",
            fields_invalid=("x",),
            resource_shortfall=ResourceShortfall("memory_mb", 2, 1),
            log_tail=("last", "words"),
        ),
        block_reason=BlockReason(resource="slots", text="why", holders=("b",)),
        retry_count=2,
        last_resource_snapshot=ResourceSnapshot(
            timestamp=datetime.now(UTC), worker_pid=1, cpu_percent=2.0, memory_rss_mb=3.0
        ),
    )
    await keep(store, ChangedJob(job))
    kept = store.job("a")
    assert kept is not None
    assert replace(kept.job, args=(), kwargs={}) == replace(job, args=(), kwargs={})
    assert kept.job.args == (job.args if store.keeps_arguments else ())


@pytest.mark.parametrize("result", [*VALUES, VALUES, OutputFile("a.txt", "text/plain", b"x"), "ä" * 1_000_000])
async def test_a_result_of_any_kind_and_size_is_read_as_it_was_written(store: JobStore, result: Any) -> None:
    change = new("a", 1)
    done = replace(change.kept.job, status=JobStatus.COMPLETED, result=result, completed_at=datetime.now(UTC))
    await keep(store, change, ChangedJob(done))
    kept = store.job("a")
    assert kept is not None
    found = kept.job.result
    assert (found.load() if isinstance(found, ResultFile) else found) == result


async def test_jobs_are_listed_by_what_they_are_the_last_submitted_first(store: JobStore) -> None:
    await keep(store, *(new(name, order, owner=name[0]) for order, name in enumerate(["x1", "y1", "x2"])))
    await keep(store, ChangedJob(replace(new("x1", 0).kept.job, owner="x", status=JobStatus.RUNNING)))
    assert [job.id for job in store.jobs(JobFilter(), 10)] == ["x2", "y1", "x1"]
    assert [job.id for job in store.jobs(JobFilter(), 2)] == ["x2", "y1"]
    assert [job.id for job in store.jobs(JobFilter(owner="x"), 10)] == ["x2", "x1"]
    assert [job.id for job in store.jobs(JobFilter(statuses=[JobStatus.RUNNING]), 10)] == ["x1"]
    assert store.jobs(JobFilter(plugin_instance_id="nobody"), 10) == []


async def test_events_are_read_after_a_number_or_a_position_a_page_at_a_time(store: JobStore) -> None:
    await keep(store, new("a", 1, sequence_id="s"), new("b", 2))
    written = [event("a", 1, 1, "s"), event("b", 1, 2), event("a", 2, 3, "s"), event("b", 2, 4)]
    await keep(store, *written)
    events = [each.event for each in written]
    assert store.job_events("a", 0, 10) == [events[0], events[2]]
    assert store.job_events("a", 1, 10) == [events[2]]
    assert store.job_events("b", 0, 1) == [events[1]]
    assert store.queue_events(0, 3) == events[:3]
    assert store.queue_events(3, 3) == events[3:]
    assert store.queue_events(1, 10, "s") == [events[2]]
    assert store.job_events("nobody", 0, 10) == []


async def test_what_is_forgotten_is_gone_with_its_events(store: JobStore) -> None:
    await keep(store, new("a", 1), event("a", 1, 1), new("b", 2), event("b", 1, 2))
    await keep(store, Forget("a"))
    assert (store.job("a"), store.job_events("a", 0, 10)) == (None, [])
    assert [each.job_id for each in store.queue_events(0, 10)] == ["b"]
    await keep(store, Forget("a"), NewSequence(JobSequence(id="s", steps=())), ForgetSequence("s"))
    assert store.sequence("s") is None


async def test_a_sequence_is_read_with_what_its_jobs_gave(store: JobStore) -> None:
    steps = (
        SequenceStep(plugin_instance_id="probe", args=((1, 2),), kwargs={"from_step": {"dict": 1}}),
        SequenceStep(
            plugin_instance_id="probe", args=([FromStep(0, "rows", 1)],), kwargs={"x": FromStep(0)}, priority=2
        ),
    )
    sequence = JobSequence(id="s", steps=steps, owner="acme", priority=1, fail_fast=False, current_job_id="a")
    change = new("a", 1)
    await keep(store, change, NewSequence(sequence))
    assert store.sequence("s") == sequence
    done = replace(change.kept.job, status=JobStatus.COMPLETED, result={"rows": [1, 2]}, completed_at=datetime.now(UTC))
    ended = replace(
        sequence, status=SequenceStatus.COMPLETED, results=(StepResult(job_id="a", success=True, result=done.result),)
    )
    await keep(store, ChangedJob(done), ChangedSequence(ended))
    assert store.sequence("s") == ended
    await keep(store, Forget("a"))
    kept = store.sequence("s")
    assert kept is not None
    assert kept.results[0].success


def test_how_a_sequence_stands_is_written_without_its_steps() -> None:
    """Else each step of a long one would cost as much as all of them."""
    step = SequenceStep(plugin_instance_id="probe", args=(b"x" * 10_000,))
    sequence = JobSequence(id="s", steps=(step,) * 100)
    assert sum(len(str(value)) for value in changed_sequence_row(sequence)) < 1000


async def test_what_a_host_leaves_is_found_by_the_next(path: Path) -> None:
    first = LocalJobStore(path)
    assert first.open().live == () or first.job("a") is None
    waits, runs, done = new("waits", 1), new("runs", 2), new("done", 3)
    ended = replace(done.kept.job, status=JobStatus.COMPLETED, completed_at=datetime.now(UTC))
    sequence = JobSequence(id="s", steps=(), current_job_id="runs")
    await keep(first, waits, runs, done, NewSequence(sequence), event("runs", 1, 1), event("runs", 2, 2))
    running = replace(runs.kept.job, status=JobStatus.RUNNING, progress=0.5)
    await keep(first, ChangedJob(running, recoveries=1), ChangedJob(ended))
    await first.close()
    second = LocalJobStore(path)
    left = second.open()
    assert [(kept.job.id, kept.job.status, kept.events, kept.recoveries) for kept in left.live] == [
        ("waits", "pending", 0, 0),
        ("runs", "running", 2, 1),
    ]
    assert left.live[0].request.args == tuple(VALUES)
    assert [each.job_id for each in left.ended] == ["done"]
    assert (left.sequences, left.last_order, left.last_position) == ([sequence], 3, 2)
    await second.close()


async def test_two_hosts_cannot_have_the_same_jobs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugin_substrate.stores.jobs._CLAIM_SECONDS", 0.05)
    first = LocalJobStore(path)
    first.open()
    second = LocalJobStore(path)
    with pytest.raises(StoreError, match="another host's"):
        second.open()
    await keep(first, new("a", 1))
    assert second.job("a") is not None, "reading needs no claim"
    await second.close()
    await first.close()


async def test_a_result_over_the_limit_is_a_file_that_goes_with_its_job(path: Path) -> None:
    store = LocalJobStore(path, max_result_bytes=1000)
    store.open()
    change = new("a", 1)
    done = replace(change.kept.job, status=JobStatus.COMPLETED, result=b"x" * 5000, completed_at=datetime.now(UTC))
    await keep(store, change, ChangedJob(done))
    kept = store.job("a")
    assert kept is not None
    result = kept.job.result
    assert isinstance(result, ResultFile)
    assert (result.load(), result.size > 5000) == (b"x" * 5000, True)
    assert stat.S_IMODE(result.path.stat().st_mode) == 0o600
    result.path.write_bytes(result.path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="cannot be read"):
        result.load()
    await keep(store, Forget("a"))
    assert not result.path.exists()
    (result.path.parent / "nobodys").write_bytes(b"")
    await store.close()
    again = LocalJobStore(path)
    again.open()
    assert list(result.path.parent.iterdir()) == [], "what a host that died left behind is swept"
    await again.close()


async def test_the_file_is_nobody_elses_to_read_and_every_commit_is_synced(path: Path) -> None:
    store = LocalJobStore(path)
    store.open()
    await keep(store, new("a", 1))
    for file in path.parent.iterdir():
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    with closing(connect(path)) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL"
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_when_a_write_fails_so_does_everything_after_it(path: Path) -> None:
    store = LocalJobStore(path)
    store.open()
    await keep(store, new("a", 1))
    broken = store.write([new("a", 2)])
    later = store.write([new("b", 3)])
    for kept in (broken, later):
        with pytest.raises(StoreError, match="cannot be written"):
            await kept
    with pytest.raises(StoreError):
        await store.write([new("c", 4)])
    assert [job.id for job in store.jobs(JobFilter(), 10)] == ["a"]
    await store.close()


async def test_a_writer_that_dies_is_an_error_not_a_silence(path: Path) -> None:
    store = LocalJobStore(path)
    store.open()
    await keep(store, new("a", 1))
    assert store._writer is not None
    os.kill(store._writer._process.pid, 9)
    store._writer._process.wait()
    with pytest.raises(StoreError, match="cannot be written"):
        await store.write([event("a", 1, 1)])
    await store.close()


def test_a_writer_whose_host_was_killed_ends_without_a_word(path: Path) -> None:
    path.parent.mkdir()
    ours, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, job_writer.__file__, path], stdin=theirs, stderr=subprocess.PIPE) as writer:
        theirs.close()
        message = marshal.dumps([("CREATE TABLE t (x)", ())])
        ours.sendall(LENGTH.pack(len(message)) + message)
        assert select.select([ours], [], [], 60)[0], "it has answered, and nobody has read it"
        ours.close()
        assert writer.communicate(timeout=60)[1] == b""
    assert writer.returncode == 0
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,), "what it had sent is there"


@pytest.mark.parametrize("damage", ["not a database", "another version", "a damaged row"])
async def test_a_file_that_cannot_be_used_says_so(path: Path, damage: str) -> None:
    store = LocalJobStore(path)
    store.open()
    await keep(store, new("a", 1))
    await store.close()
    if damage == "not a database":
        path.write_bytes(b"x" * 10_000)  # noqa: ASYNC240 - nothing else runs
    else:
        with sqlite3.connect(path) as connection:
            statement = "PRAGMA user_version = 7" if "version" in damage else "UPDATE jobs SET state = '{}'"
            connection.execute(statement)
        connection.close()
    with pytest.raises(StoreError):
        LocalJobStore(path).open()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_and_left_as_it_was(path: Path, kind: str) -> None:
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    path.chmod(0o755)
    with pytest.raises(StoreError, match="is no file"):
        LocalJobStore(path).open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert list(path.parent.iterdir()) == [path], "nothing was made beside it"


async def test_a_file_of_a_newer_program_is_not_read_and_an_empty_one_has_no_jobs(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"")  # noqa: ASYNC240 - nothing else runs
    reader = LocalJobStore(path)
    assert reader.jobs(JobFilter(), 10) == [], "a host may be about to set it up"
    writer = LocalJobStore(path)
    writer.open()
    await keep(writer, new("a", 1))
    await writer.close()
    assert [job.id for job in reader.jobs(JobFilter(), 10)] == ["a"]
    reader.close_reader()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="are of version 7, and this program knows 1"):
        reader.jobs(JobFilter(), 10)


async def test_a_result_that_cannot_be_kept_is_told_before_it_is_written(path: Path) -> None:
    """A plugin can send text that is longer here than it was on the wire."""
    store = LocalJobStore(path)
    store.check_result(b"x" * (10 << 20))
    with pytest.raises(WireValueError, match="result"):
        store.check_result("ä" * (3 << 20))


async def test_arguments_that_cannot_be_kept_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalJobStore(path)
    with pytest.raises(WireValueError, match=r"args\[1\]\.rows"):
        store.pack((1, {"rows": {1, 2}}), {})
    with pytest.raises(WireValueError, match=r"kwargs\.weight"):
        store.pack((), {"weight": float("nan")})
    with pytest.raises(WireValueError, match=r"kwargs: .* bytes of JSON are over the limit"):
        store.pack((), {"text": "x" * (9 << 20)})
    monkeypatch.setattr("plugin_substrate.stores.job_rows.MAX_FRAME_BYTES", 1000)
    half = b"x" * 500
    with pytest.raises(WireValueError, match=r"the arguments: .* for a call; use files"):
        store.pack((half, half), {})
