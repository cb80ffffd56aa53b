"""Jobs in memory: for as long as the process runs, and as many as the queue's retention says."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import marshal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from plugin_substrate.queue.folding import Folded, changed, fold, job_of, only_waits, request_of, without_arguments
from plugin_substrate.queue.job import Job, JobEvent, JobEventType, JobStatus
from plugin_substrate.queue.packing import Arguments, pack_arguments, unpack_arguments
from plugin_substrate.queue.sequences import JobSequence, StepResult
from plugin_substrate.queue.store import (
    Asked,
    Change,
    ChangedJob,
    ChangedSequence,
    Forget,
    ForgetSequence,
    JobFilter,
    KeptJob,
    Leftover,
    NewEvent,
    NewJob,
    NewSequence,
)

# A long queue is many of these, which the collector of garbage need not look into: plain tuples of plain values.
# Of an event: its position, its number, its job, its type, instance, sequence, index in it, time, and payload.
_Row = tuple[int, int, str, str, str, str | None, int | None, datetime, bytes]


class InMemoryJobStore:
    """Keeps everything but the arguments of ended jobs, which may be large."""

    durable = False
    keeps_arguments = False

    def __init__(self) -> None:
        self._submitted: dict[str, Folded] = {}
        self._jobs: dict[str, Job] = {}  # without those that stand as they were submitted
        self._events: dict[str, _Row] = {}
        self._positions: list[int] = []  # of all events, with those of forgotten jobs until they are half of it
        self._keys: list[str] = []  # of the same events
        self._forgotten = 0
        self._sequences: dict[str, JobSequence] = {}

    def open(self) -> Leftover:
        """Return nothing: who made it is the only one who ever had it."""
        return Leftover()

    def pack(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Return arguments as they are kept; a `WireValueError` names what of them could not reach a plugin."""
        return pack_arguments(args, kwargs)

    def unpack(self, packed: bytes) -> Arguments:
        """Return arguments."""
        return unpack_arguments(packed)

    def check_result(self, result: Any) -> None:
        """Take anything."""

    def write(self, changes: Sequence[Change]) -> asyncio.Future[None] | None:
        """Keep changes at once."""
        for change in changes:
            match change:
                case NewEvent(event):
                    self._put_event(event)
                case ChangedJob(job):
                    self._change(job)
                case NewJob(kept, arguments):
                    self._put_job(kept, arguments)
                case NewSequence(sequence) | ChangedSequence(sequence):
                    self._sequences[sequence.id] = sequence
                case Forget(job_id):
                    self._forget(job_id)
                case ForgetSequence(sequence_id):
                    self._sequences.pop(sequence_id, None)
        return None

    def job(self, job_id: str) -> KeptJob | None:
        """Return a kept job."""
        folded = self._submitted.get(job_id)
        if folded is None:
            return None
        job, request = self._jobs.get(job_id) or job_of(folded), request_of(folded)
        *_, arguments, order, idempotent, _ = folded
        if arguments:
            args, kwargs = unpack_arguments(arguments)
            job, request = replace(job, args=args, kwargs=kwargs), replace(request, args=args, kwargs=kwargs)
        return KeptJob(job=job, request=request, order=order, idempotent=idempotent)

    def jobs(self, wanted: JobFilter, limit: int) -> list[Job]:
        """Return kept jobs, those submitted last first."""
        return [kept.job for job_id in itertools.islice(self._found(wanted), limit) if (kept := self.job(job_id))]

    def sequence(self, sequence_id: str) -> JobSequence | None:
        """Return a kept sequence."""
        sequence = self._sequences.get(sequence_id)
        return None if sequence is None else with_job_results(sequence, self.job)

    def job_events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Return events of a job."""
        return [_event(row) for row in itertools.islice(self._rows(job_id, max(0, after) + 1), limit)]

    def queue_events(self, after: int, limit: int, sequence_id: str | None = None) -> list[JobEvent]:
        """Return events of one sequence or of all jobs."""
        found: list[JobEvent] = []
        for index in range(bisect.bisect_right(self._positions, after), len(self._keys)):
            if len(found) == limit:
                break
            row = self._events.get(self._keys[index])
            if row is not None and sequence_id in (None, row[5]):
                found.append(_event(row))
        return found

    def watch(self, news: Callable[[], object]) -> None:
        """Do nothing: nobody outside can reach this memory."""

    def asked(self) -> list[Asked]:
        """Return nothing."""
        return []

    async def close(self) -> None:
        """Do nothing: memory needs no end."""

    def _rows(self, job_id: str, number: int) -> Iterator[_Row]:
        """The events of a job from a number on: numbers are dense and start at 1."""
        while (row := self._events.get(_key(job_id, number))) is not None:
            yield row
            number += 1

    def _put_event(self, event: JobEvent) -> None:
        key = _key(event.job_id, event.number)
        self._positions.append(event.position)
        self._keys.append(key)
        self._events[key] = (
            event.position,
            event.number,
            event.job_id,
            event.type.value,
            event.plugin_instance_id,
            event.sequence_id,
            event.sequence_index,
            event.timestamp,
            marshal.dumps(event.payload),
        )

    def _put_job(self, kept: KeptJob, arguments: bytes | None) -> None:
        job, request = kept.job, kept.request
        if arguments is None:
            arguments = pack_arguments(request.args, request.kwargs)
        self._submitted[job.id] = fold(job, request, arguments, kept.order, idempotent=kept.idempotent)
        if not only_waits(job):
            self._jobs[job.id] = job

    def _change(self, job: Job) -> None:
        if job.status.terminal:
            job = replace(job, args=(), kwargs={}) if job.args or job.kwargs else job
            self._submitted[job.id] = without_arguments(self._submitted[job.id])
        elif job.id not in self._jobs and only_waits(job):
            self._submitted[job.id] = changed(self._submitted[job.id], job)
            return
        self._jobs[job.id] = job

    def _found(self, wanted: JobFilter) -> Iterator[str]:
        """The ids of the jobs that are meant, those submitted last first."""
        for job_id, (_, instance, owner, *_) in reversed(self._submitted.items()):
            status = self._jobs[job_id].status if job_id in self._jobs else JobStatus.PENDING
            if wanted.statuses and status not in wanted.statuses:
                continue
            if wanted.plugin_instance_id in ("", instance) and wanted.owner in ("", owner):
                yield job_id

    def _forget(self, job_id: str) -> None:
        if self._submitted.pop(job_id, None) is None:
            return
        self._jobs.pop(job_id, None)
        for number in itertools.count(1):
            if self._events.pop(_key(job_id, number), None) is None:
                break
            self._forgotten += 1
        if self._forgotten * 2 > len(self._keys):
            self._keys = [key for key in self._keys if key in self._events]
            self._positions = [self._events[key][0] for key in self._keys]
            self._forgotten = 0


def _key(job_id: str, number: int) -> str:
    return f"{job_id}/{number}"


def _event(row: _Row) -> JobEvent:
    position, number, job_id, kind, instance, sequence_id, sequence_index, timestamp, payload = row
    return JobEvent(
        number=number,
        position=position,
        type=JobEventType(kind),
        job_id=job_id,
        plugin_instance_id=instance,
        payload=marshal.loads(payload),  # noqa: S302 - made by `_put_event`
        sequence_id=sequence_id,
        sequence_index=sequence_index,
        timestamp=timestamp,
    )


def with_job_results(sequence: JobSequence, job_of: Callable[[str], KeptJob | None]) -> JobSequence:
    """Return the sequence with what its jobs gave."""

    def filled(step: StepResult) -> StepResult:
        kept = job_of(step.job_id) if step.success else None
        return step if kept is None else replace(step, result=kept.job.result)

    return replace(sequence, results=tuple(filled(step) for step in sequence.results))
