"""Jobs in memory: for as long as the process runs, and as many as the queue's retention says."""

from __future__ import annotations

import asyncio
import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from plugin_substrate.queue.job import Job, JobEvent
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.sequences import JobSequence, StepResult
from plugin_substrate.queue.store import (
    Asked,
    Change,
    ChangedJob,
    Forget,
    ForgetSequence,
    JobFilter,
    KeptJob,
    Leftover,
    NewEvent,
    NewJob,
    PutSequence,
)


class InMemoryJobStore:
    """Keeps everything but the arguments of ended jobs, which may be large."""

    durable = False
    keeps_arguments = False

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, KeptJob] = OrderedDict()
        self._events: dict[str, list[JobEvent]] = {}
        self._sequences: dict[str, JobSequence] = {}
        self._timeline: list[JobEvent] = []  # of all jobs, with those of forgotten jobs until they are half of it
        self._forgotten = 0

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
                    self._events[event.job_id].append(event)
                    self._timeline.append(event)
                case ChangedJob(job):
                    self._change(job)
                case NewJob(kept):
                    self._jobs[kept.job.id] = kept
                    self._events[kept.job.id] = []
                case PutSequence(sequence):
                    self._sequences[sequence.id] = sequence
                case Forget(job_id):
                    self._jobs.pop(job_id, None)
                    self._forgotten += len(self._events.pop(job_id, ()))
                case ForgetSequence(sequence_id):
                    self._sequences.pop(sequence_id, None)
        if self._forgotten * 2 > len(self._timeline):
            self._timeline = [event for event in self._timeline if event.job_id in self._jobs]
            self._forgotten = 0
        return None

    def job(self, job_id: str) -> KeptJob | None:
        """Return a kept job."""
        return self._jobs.get(job_id)

    def jobs(self, wanted: JobFilter, limit: int) -> list[Job]:
        """Return kept jobs, those submitted last first."""
        found: list[Job] = []
        for kept in reversed(self._jobs.values()):
            if len(found) == limit:
                break
            if matches(kept.job, wanted):
                found.append(kept.job)
        return found

    def sequence(self, sequence_id: str) -> JobSequence | None:
        """Return a kept sequence."""
        sequence = self._sequences.get(sequence_id)
        return None if sequence is None else with_job_results(sequence, self.job)

    def job_events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Return events of a job."""
        events = self._events.get(job_id, [])
        return events[max(0, after) : max(0, after) + limit]  # numbers are dense and start at 1

    def queue_events(self, after: int, limit: int, sequence_id: str | None = None) -> list[JobEvent]:
        """Return events of one sequence or of all jobs."""
        first = bisect.bisect_right(self._timeline, after, key=attrgetter("position"))
        found: list[JobEvent] = []
        for index in range(first, len(self._timeline)):
            event = self._timeline[index]
            if len(found) == limit:
                break
            if event.job_id in self._jobs and sequence_id in (None, event.sequence_id):
                found.append(event)
        return found

    def watch(self, news: Callable[[], object]) -> None:
        """Do nothing: nobody outside can reach this memory."""

    def asked(self) -> list[Asked]:
        """Return nothing."""
        return []

    async def close(self) -> None:
        """Do nothing: memory needs no end."""

    def _change(self, job: Job) -> None:
        kept = self._jobs[job.id]
        request = kept.request
        if job.status.terminal:
            job = replace(job, args=(), kwargs={})
            request = replace(request, args=(), kwargs={}, before_start=None, on_progress=None)
        self._jobs[job.id] = replace(kept, job=job, request=request)


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
