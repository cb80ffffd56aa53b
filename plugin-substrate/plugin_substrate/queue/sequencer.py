"""Moves sequences on: what comes after a step has ended is written together with its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from plugin_substrate.errors import JobError, PluginError
from plugin_substrate.queue.job import Job, JobEventType, JobStatus, new_id
from plugin_substrate.queue.journal import Journal
from plugin_substrate.queue.live import LiveJob
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.sequences import (
    FromStep,
    JobSequence,
    SequenceStatus,
    SequenceStep,
    StepResult,
    check_references,
    resolved,
    result_of,
)
from plugin_substrate.queue.store import Change, ChangedSequence, NewSequence

Make = Callable[..., tuple[LiveJob, list[Change]]]


class Sequencer:
    """The running sequences. ``make(request, sequence_id=…, sequence_index=…)`` makes a job of a step.

    ``check(request)`` refuses a step that could never be one, before the first is made.
    """

    def __init__(self, journal: Journal, make: Make, check: Callable[[JobRequest], object]) -> None:
        self._journal = journal
        self._make = make
        self._check = check
        self.running: dict[str, JobSequence] = {}

    def begin(
        self, steps: tuple[SequenceStep, ...], *, priority: int, owner: str, fail_fast: bool
    ) -> tuple[JobSequence, LiveJob | None, list[Change]]:
        """Return a new sequence, its first job and the changes to write."""
        check_references(steps)
        now = datetime.now(UTC)
        sequence = JobSequence(
            id=new_id(now), steps=steps, priority=priority, owner=owner, fail_fast=fail_fast, submitted_at=now
        )
        for step in steps:
            self._check(_request(sequence, step, lambda _: None))
        begun, live, changes = self._go_on(sequence, None)
        return begun, live, [NewSequence(sequence), *changes]

    def after(self, job: Job) -> tuple[LiveJob | None, list[Change]]:
        """Return what follows the end of a step: the next job, if there is one, and the changes to write."""
        sequence = self.running[job.sequence_id or ""]
        success = job.status is JobStatus.COMPLETED
        step = StepResult(job_id=job.id, success=success, result=job.result if success else None, error=job.error)
        sequence = replace(sequence, results=(*sequence.results, step))
        if job.status is JobStatus.CANCELLED or sequence.cancel_requested:
            return None, self._end(sequence, SequenceStatus.CANCELLED)
        _, live, changes = self._go_on(sequence, job)
        return live, changes

    def take_up(self, sequence: JobSequence) -> None:
        """Go on with a sequence that an earlier host began."""
        self.running[sequence.id] = sequence

    def ask_to_cancel(self, sequence_id: str) -> str:
        """Have no step come after the current one, whose job id is returned; a ValueError when it has ended."""
        sequence = self.running[sequence_id] = replace(self.running[sequence_id], cancel_requested=True)
        self._journal.write([ChangedSequence(sequence)])
        return sequence.current_job_id or ""

    def _go_on(self, sequence: JobSequence, prior: Job | None) -> tuple[JobSequence, LiveJob | None, list[Change]]:
        """Make a job of the next step; one that cannot be made has failed."""
        while True:
            failed = bool(sequence.results) and not sequence.results[-1].success
            if failed and sequence.fail_fast:
                return sequence, None, self._end(sequence, SequenceStatus.FAILED)
            index = len(sequence.results)
            if index == len(sequence.steps):
                return sequence, None, self._end(sequence, SequenceStatus.COMPLETED)
            step = sequence.steps[index]
            try:
                request = _request(sequence, step, partial(result_of, sequence.results))
                live, changes = self._make(request, sequence_id=sequence.id, sequence_index=index)
            except PluginError as error:
                record = JobError.from_exception(error, plugin_instance_id=step.plugin_instance_id)
                sequence = replace(
                    sequence, results=(*sequence.results, StepResult(job_id="", success=False, error=record))
                )
                continue
            sequence = self.running[sequence.id] = replace(sequence, current_job_id=live.job.id)
            changes.append(ChangedSequence(sequence))
            if prior is not None:
                changes.append(self._advanced(live, prior))
            return sequence, live, changes

    def _advanced(self, live: LiveJob, prior: Job) -> Change:
        payload: dict[str, Any] = {
            "prior_job_id": prior.id,
            "prior_step_index": prior.sequence_index,
            "prior_success": prior.status is JobStatus.COMPLETED,
        }
        return self._journal.event(live, JobEventType.SEQUENCE_ADVANCED, payload)

    def _end(self, sequence: JobSequence, status: SequenceStatus) -> list[Change]:
        self.running.pop(sequence.id, None)
        ended = replace(sequence, status=status, completed_at=datetime.now(UTC), current_job_id=None)
        return [ChangedSequence(ended)]


def _request(sequence: JobSequence, step: SequenceStep, resolve: Callable[[FromStep], Any]) -> JobRequest:
    return JobRequest(
        plugin_instance_id=step.plugin_instance_id,
        args=resolved(step.args, resolve),
        kwargs=resolved(dict(step.kwargs), resolve),
        priority=step.priority or sequence.priority,
        owner=sequence.owner,
    )
