"""Jobs that outlive the host: in one SQLite file in WAL mode, every commit synced, large results in files beside it.

One host at a time owns the file, which a lock on a file beside it ensures; any number of processes may read.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plugin_substrate.errors import StoreError
from plugin_substrate.queue.job import Job, JobEvent, JobStatus
from plugin_substrate.queue.memory_store import with_job_results
from plugin_substrate.queue.results import from_bytes, to_bytes
from plugin_substrate.queue.sequences import JobSequence
from plugin_substrate.queue.store import (
    Answered,
    Asked,
    Change,
    ChangedJob,
    ChangedSequence,
    Ended,
    Forget,
    ForgetSequence,
    JobFilter,
    KeptJob,
    Leftover,
    NewEvent,
    NewJob,
    NewSequence,
)
from plugin_substrate.stores import job_rows as rows
from plugin_substrate.stores.files import PASSAGE, make_private, private_folder
from plugin_substrate.stores.group_commit import GroupCommit, Statement
from plugin_substrate.stores.job_writer import PUT_FILE, REMOVE_FILE, connect

_VERSION = 1
_CLAIM_SECONDS = 5.0
_KEPT_ANSWERS = 1000


class LocalJobStore:
    """Keeps everything in ``path``, and results of more than ``max_result_bytes`` in files below ``<path>.results``.

    Reading needs no claim and takes no longer than a row or a page of them; writing is another process's.
    """

    durable = True
    keeps_arguments = True

    def __init__(self, path: Path, *, max_result_bytes: int = 1 << 20) -> None:
        self.path = path
        self._results = path.with_name(path.name + ".results")
        self._max_result_bytes = max_result_bytes
        self._lock: int | None = None
        self._writer: GroupCommit | None = None
        self._reader: sqlite3.Connection | None = None
        self._readable = False
        self._bell: int | None = None

    def open(self) -> Leftover:
        """Claim the file, making it if need be, and return what an earlier host left in it."""
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=PASSAGE)
            make_private(self.path, 0o600)  # before anything is made beside what is no file of ours
            private_folder(self._results)
            self._lock = self._claim()
            try:
                with closing(self._connect()) as connection:
                    set_up(connection, self.path)
                left = self._leftover()
                self._sweep()
                self._writer = GroupCommit(self.path, self._lock)
            except BaseException:
                self._give_up()
                raise
            return left

    def pack(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Return arguments as they are kept; a `WireValueError` names what of them cannot be."""
        return rows.arguments_to_bytes(args, kwargs)

    def unpack(self, packed: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that `pack` was given; a `StoreError` when the bytes are damaged."""
        args, kwargs = from_bytes(packed, "the arguments of a job")
        return tuple(args), kwargs

    def check_result(self, result: Any) -> None:
        """Raise a `WireValueError` when a result cannot be kept."""
        to_bytes(result, "result")

    def write(self, changes: Sequence[Change]) -> asyncio.Future[None]:
        """Have changes kept with the next commit; the future ends when they are on disk."""
        if self._writer is None:
            raise StoreError(f"{self.path} is not open", path=str(self.path))
        return self._writer.write([statement for change in changes for statement in self._statements(change)])

    def job(self, job_id: str) -> KeptJob | None:
        """Return a kept job."""
        found = self.select(rows.JOBS + "WHERE id = ?", job_id)
        return rows.kept_job(found[0], self._results) if found else None

    def jobs(self, wanted: JobFilter, limit: int) -> list[Job]:
        """Return kept jobs, those submitted last first."""
        conditions, values = [], []
        for column, value in (("instance", wanted.plugin_instance_id), ("owner", wanted.owner)):
            if value:
                conditions.append(f"{column} = ?")
                values.append(value)
        if wanted.statuses:
            conditions.append(f"status IN ({','.join('?' * len(wanted.statuses))})")
            values += [status.value for status in wanted.statuses]
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        statement = f"{rows.JOBS} {where} ORDER BY ord DESC LIMIT ?"
        return [rows.kept_job(row, self._results).job for row in self.select(statement, *values, limit)]

    def sequence(self, sequence_id: str) -> JobSequence | None:
        """Return a kept sequence, with the results of its steps as far as their jobs are kept."""
        found = self.select("SELECT id, status, steps, state FROM sequences WHERE id = ?", sequence_id)
        return with_job_results(rows.sequence_of(found[0]), self.job) if found else None

    def job_events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Return events of a job."""
        statement = rows.EVENTS + "WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?"
        return [rows.event_of(row) for row in self.select(statement, job_id, after, limit)]

    def queue_events(self, after: int, limit: int, sequence_id: str | None = None) -> list[JobEvent]:
        """Return events of one sequence or of all jobs."""
        which, values = ("", ()) if sequence_id is None else ("sequence_id = ? AND", (sequence_id,))
        statement = f"{rows.EVENTS} WHERE {which} position > ? ORDER BY position LIMIT ?"
        return [rows.event_of(row) for row in self.select(statement, *values, after, limit)]

    def last_position(self) -> int:
        """Return the position of the last event."""
        found = self.select("SELECT coalesce(max(position), 0) FROM events")
        return int(found[0][0]) if found else 0

    def watch(self, news: Callable[[], object]) -> None:
        """Call ``news`` when somebody rings, see `JobDesk`."""
        if self._bell is not None:
            asyncio.get_running_loop().remove_reader(self._bell)
            os.close(self._bell)
        bell = self.path.with_name(self.path.name + ".bell")
        with self._errors():
            if not bell.exists():
                os.mkfifo(bell, 0o600)
            self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        asyncio.get_running_loop().add_reader(self._bell, self._on_bell, self._bell, news)

    def asked(self) -> list[Asked]:
        """Return what was asked and not answered, in order."""
        statement = "SELECT id, verb, arguments FROM requests WHERE answer IS NULL ORDER BY number"
        return [
            Asked(id=request_id, verb=verb, arguments=from_bytes(arguments, f"request {request_id}"))
            for request_id, verb, arguments in self.select(statement)
        ]

    async def close(self) -> None:
        """Have everything written kept, and give the file up."""
        if self._bell is not None:
            asyncio.get_running_loop().remove_reader(self._bell)
            os.close(self._bell)
            self._bell = None
        if self._writer is not None:
            await self._writer.close()
            self._writer = None
        self._give_up()

    def close_reader(self) -> None:
        """Give up the connection for reading; the next read opens another."""
        if self._reader is not None:
            self._reader.close()
            self._reader, self._readable = None, False

    def _give_up(self) -> None:
        self.close_reader()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _on_bell(bell: int, news: Callable[[], object]) -> None:
        with suppress(BlockingIOError):
            os.read(bell, 1 << 12)
        news()

    def _statements(self, change: Change) -> list[Statement]:
        match change:
            case NewEvent(event):
                return [(rows.INSERT_EVENT, rows.event_row(event))]
            case ChangedJob(job):
                return self._change(change, job)
            case NewJob():
                return [(rows.INSERT_JOB, rows.new_job_row(change))]
            case NewSequence(sequence):
                return [(rows.INSERT_SEQUENCE, rows.new_sequence_row(sequence))]
            case ChangedSequence(sequence):
                return [(rows.UPDATE_SEQUENCE, rows.changed_sequence_row(sequence))]
            case Forget(job_id):
                return [
                    ("DELETE FROM events WHERE job_id = ?", (job_id,)),
                    ("DELETE FROM jobs WHERE id = ?", (job_id,)),
                    (REMOVE_FILE, (str(self._results / job_id),)),
                ]
            case ForgetSequence(sequence_id):
                return [("DELETE FROM sequences WHERE id = ?", (sequence_id,))]
            case Answered(request_id, answer):
                old = (
                    "DELETE FROM requests WHERE answer IS NOT NULL AND number < (SELECT max(number) FROM requests) - ?"
                )
                return [
                    ("UPDATE requests SET answer = ? WHERE id = ?", (json.dumps(dict(answer)), request_id)),
                    (old, (_KEPT_ANSWERS,)),
                ]

    def _change(self, change: ChangedJob, job: Job) -> list[Statement]:
        *values, job_id = rows.changed_job_row(change)
        if not job.status.terminal or job.result is None:
            return [(rows.UPDATE_JOB, (*values, job_id))]
        data = to_bytes(job.result, "result")
        if len(data) <= self._max_result_bytes:
            return [(rows.END_JOB, (*values, data, None, job_id))]
        file = str(self._results / job_id)
        return [(PUT_FILE, (file, data)), (rows.END_JOB, (*values, None, len(data), job_id))]

    # -- reading

    def select(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read rows, nothing where there is no file or nothing was ever put in it."""
        with self._errors():
            if self._reader is None:
                if not self.path.exists():
                    return []
                self._reader = self._connect()
                self._reader.execute("PRAGMA query_only = 1")
            if not self._readable and not has_tables(self._reader, self.path):
                return []
            self._readable = True
            return self._reader.execute(statement, values).fetchall()

    def _leftover(self) -> Leftover:
        live = [JobStatus.PENDING.value, JobStatus.RUNNING.value]
        statement = rows.JOBS + "WHERE status IN (?, ?) ORDER BY ord"
        numbers = dict(
            self.select(
                "SELECT job_id, max(number) FROM events WHERE job_id IN (SELECT id FROM jobs WHERE status IN (?, ?)) "
                "GROUP BY job_id",
                *live,
            )
        )
        ended = (
            "SELECT id, status, completed_at FROM jobs WHERE completed_at IS NOT NULL "
            "AND coalesce(sequence_id, '') NOT IN (SELECT id FROM sequences WHERE status = 'running') "
            "ORDER BY completed_at, ord"
        )
        running = self.select("SELECT id FROM sequences WHERE status = 'running'")
        sequences = [self.sequence(sequence_id) for (sequence_id,) in running]
        gone = "SELECT id FROM sequences WHERE completed_at IS NOT NULL ORDER BY completed_at"
        return Leftover(
            live=[self._with_events(row, numbers) for row in self.select(statement, *live)],
            sequences=[sequence for sequence in sequences if sequence is not None],
            ended=[
                Ended(job_id=job_id, status=JobStatus(status), completed_at=datetime.fromtimestamp(at, UTC))
                for job_id, status, at in self.select(ended)
            ],
            ended_sequences=[sequence_id for (sequence_id,) in self.select(gone)],
            last_order=self.select("SELECT coalesce(max(ord), 0) FROM jobs")[0][0],
            last_position=self.last_position(),
        )

    def _with_events(self, row: tuple[Any, ...], numbers: dict[str, int]) -> KeptJob:
        kept = rows.kept_job(row, self._results)
        return replace(kept, events=numbers.get(kept.job.id, 0))

    # -- the file

    def _connect(self) -> sqlite3.Connection:
        make_private(self.path, 0o600)
        if not self.path.exists():
            self.path.touch(mode=0o600)
        return connect(self.path)

    def _claim(self) -> int:
        """Take the lock, which the writer of a host that has just died may still hold for a moment."""
        place = self.path.with_name(self.path.name + ".lock")
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + _CLAIM_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                os.close(lock)
                raise StoreError(
                    f"the jobs in {self.path} are another host's, which runs; stop it, or use another file",
                    path=str(self.path),
                ) from None
            return lock

    def _sweep(self) -> None:
        """Remove results whose jobs never came to know of them, as the host died before."""
        known = {job_id for (job_id,) in self.select("SELECT id FROM jobs WHERE result_size IS NOT NULL")}
        for file in self._results.iterdir():
            if file.name not in known:
                with suppress(OSError):
                    file.unlink()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the jobs in {self.path} cannot be used: {error}", path=str(self.path)) from error


def set_up(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file; a `StoreError` when it is of another version of this program."""
    if not has_tables(connection, path):
        connection.executescript(f"BEGIN IMMEDIATE; {rows.SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")


def has_tables(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has been set up; a `StoreError` when it is of another version of this program."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise StoreError(
            f"the jobs in {path} are of version {version}, and this program knows {_VERSION}; use the one they are of",
            path=str(path),
        )
    return bool(version)
