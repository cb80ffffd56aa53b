"""Jobs in memory: for as long as the process runs, and as many as the queue's retention says."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from operator import itemgetter
from typing import Any

from plugin_substrate.queue.job import Job, JobEvent, JobEventType
from plugin_substrate.queue.request import JobRequest
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
_Row = tuple[int, str, str, str | None, int | None, datetime, str]  # of an event; the last is its payload, as JSON
_Place = tuple[int, str, int]  # of an event in the timeline: position, job, number


class InMemoryJobStore:
    """Keeps everything but the arguments of ended jobs, which may be large."""

    durable = False
    keeps_arguments = False

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._requests: dict[str, JobRequest] = {}
        self._origins: dict[str, tuple[int, bool]] = {}  # by job: its order, and whether it may be repeated
        self._event_counts: dict[str, int] = {}
        self._events: dict[tuple[str, int], _Row] = {}  # by job and number
        self._timeline: list[_Place] = []  # of all jobs, with those of forgotten jobs until they are half of it
        self._forgotten = 0
        self._sequences: dict[str, JobSequence] = {}

    def open(self) -> Leftover:
        """Return nothing: who made it is the only one who ever had it."""
        return Leftover()

    def check(self, request: JobRequest) -> None:
        """Take anything."""

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
                case NewJob(kept):
                    self._jobs[kept.job.id] = kept.job
                    self._requests[kept.job.id] = kept.request
                    self._origins[kept.job.id] = kept.order, kept.idempotent
                case NewSequence(sequence) | ChangedSequence(sequence):
                    self._sequences[sequence.id] = sequence
                case Forget(job_id):
                    self._forget(job_id)
                case ForgetSequence(sequence_id):
                    self._sequences.pop(sequence_id, None)
        return None

    def job(self, job_id: str) -> KeptJob | None:
        """Return a kept job."""
        job = self._jobs.get(job_id)
        if job is None:
            return None
        order, idempotent = self._origins[job_id]
        return KeptJob(job=job, request=self._requests[job_id], order=order, idempotent=idempotent)

    def jobs(self, wanted: JobFilter, limit: int) -> list[Job]:
        """Return kept jobs, those submitted last first."""
        found = (job for job in reversed(self._jobs.values()) if matches(job, wanted))
        return list(itertools.islice(found, limit))

    def sequence(self, sequence_id: str) -> JobSequence | None:
        """Return a kept sequence."""
        sequence = self._sequences.get(sequence_id)
        return None if sequence is None else with_job_results(sequence, self.job)

    def job_events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Return events of a job."""
        first = max(0, after) + 1  # numbers are dense and start at 1
        last = min(self._event_counts.get(job_id, 0), first + limit - 1)
        return [self._event(job_id, number) for number in range(first, last + 1)]

    def queue_events(self, after: int, limit: int, sequence_id: str | None = None) -> list[JobEvent]:
        """Return events of one sequence or of all jobs."""
        first = bisect.bisect_right(self._timeline, after, key=itemgetter(0))
        found: list[JobEvent] = []
        for index in range(first, len(self._timeline)):
            _, job_id, number = self._timeline[index]
            if len(found) == limit:
                break
            job = self._jobs.get(job_id)
            if job is not None and sequence_id in (None, job.sequence_id):
                found.append(self._event(job_id, number))
        return found

    def watch(self, news: Callable[[], object]) -> None:
        """Do nothing: nobody outside can reach this memory."""

    def asked(self) -> list[Asked]:
        """Return nothing."""
        return []

    async def close(self) -> None:
        """Do nothing: memory needs no end."""

    def _put_event(self, event: JobEvent) -> None:
        self._event_counts[event.job_id] = event.number
        self._timeline.append((event.position, event.job_id, event.number))
        self._events[event.job_id, event.number] = (
            event.position,
            event.type.value,
            event.plugin_instance_id,
            event.sequence_id,
            event.sequence_index,
            event.timestamp,
            json.dumps(event.payload),
        )

    def _event(self, job_id: str, number: int) -> JobEvent:
        position, kind, instance, sequence_id, sequence_index, timestamp, payload = self._events[job_id, number]
        return JobEvent(
            number=number,
            position=position,
            type=JobEventType(kind),
            job_id=job_id,
            plugin_instance_id=instance,
            payload=json.loads(payload),
            sequence_id=sequence_id,
            sequence_index=sequence_index,
            timestamp=timestamp,
        )

    def _change(self, job: Job) -> None:
        if job.status.terminal:
            job = replace(job, args=(), kwargs={})
            request = self._requests[job.id]
            self._requests[job.id] = replace(request, args=(), kwargs={}, before_start=None, on_progress=None)
        self._jobs[job.id] = job

    def _forget(self, job_id: str) -> None:
        if self._jobs.pop(job_id, None) is None:
            return
        del self._requests[job_id], self._origins[job_id]
        count = self._event_counts.pop(job_id, 0)
        for number in range(1, count + 1):
            del self._events[job_id, number]
        self._forgotten += count
        if self._forgotten * 2 > len(self._timeline):
            self._timeline = [place for place in self._timeline if place[1] in self._jobs]
            self._forgotten = 0


def matches(job: Job, wanted: JobFilter) -> bool:
    """Whether a job is meant."""
    return (
        (not wanted.statuses or job.status in wanted.statuses)
        and wanted.plugin_instance_id in ("", job.plugin_instance_id)
        and wanted.owner in ("", job.owner)
    )


def with_job_results(sequence: JobSequence, job_of: Callable[[str], KeptJob | None]) -> JobSequence:
    """Return the sequence with what its jobs gave."""

    def filled(step: StepResult) -> StepResult:
        kept = job_of(step.job_id) if step.success else None
        return step if kept is None else replace(step, result=kept.job.result)

    return replace(sequence, results=tuple(filled(step) for step in sequence.results))
