"""A job that has only waited so far, as one plain tuple of plain values.

A long queue is many of these. The collector of garbage need not look into them, so it takes no longer with a long queue
than with none; only who brings callbacks or a policy for retries brings objects that it must look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from operator import attrgetter
from typing import Any

from plugin_substrate.interface import CallContext
from plugin_substrate.queue.job import BlockReason, Job, JobStatus
from plugin_substrate.queue.request import BeforeStart, JobRequest, OnProgress, RetryPolicy

Folded = tuple[
    str,  # id
    str,  # instance
    str,  # owner
    str,  # plugin
    int,  # priority
    datetime,  # submitted at
    str | None,  # sequence
    int | None,  # index in it
    tuple[Any, ...] | None,  # the reason why it waits
    tuple[Any, ...] | None,  # its call
    float | None,  # seconds until its deadline
    float | None,  # seconds without progress
    RetryPolicy | None,
    BeforeStart | None,
    OnProgress | None,
    bytes,  # the arguments, as its store packs them
    int,  # order
    bool,  # whether it may be repeated
    int,  # events so far
]

_call = attrgetter("call_id", "tenant_id", "run_id", "step_key", "traceparent", "deadline", "confidential")
_reason = attrgetter("resource", "text", "needed", "available", "holders", "jobs_ahead")


def only_waits(job: Job) -> bool:
    """Whether nothing has happened to a job but that it was submitted, and told why it waits."""
    return job.status is JobStatus.PENDING and not (
        job.retry_count
        or job.progress
        or job.status_message
        or job.usage
        or job.cancel_requested_at
        or job.cancel_phase
        or job.started_at
        or job.error
        or job.last_resource_snapshot
    )


def fold(job: Job, request: JobRequest, arguments: bytes, order: int, *, idempotent: bool, events: int = 0) -> Folded:
    """Return a job that `only_waits` as a tuple."""
    call, reason = request.call, job.block_reason
    return (
        job.id,
        job.plugin_instance_id,
        job.owner,
        job.plugin_name,
        job.priority,
        job.submitted_at,
        job.sequence_id,
        job.sequence_index,
        None if reason is None else _reason(reason),
        None if call is None else _call(call),
        request.deadline_seconds,
        request.no_progress_seconds,
        request.retry,
        request.before_start,
        request.on_progress,
        arguments,
        order,
        idempotent,
        events,
    )


def job_of(folded: Folded, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Job:
    """Return the job, with these arguments."""
    job_id, instance, owner, plugin, priority, submitted_at, sequence, index, reason, *_ = folded
    return Job(
        id=job_id,
        plugin_instance_id=instance,
        owner=owner,
        plugin_name=plugin,
        args=args,
        kwargs=kwargs or {},
        priority=priority,
        submitted_at=submitted_at,
        sequence_id=sequence,
        sequence_index=index,
        block_reason=None if reason is None else _reason_of(*reason),
    )


def request_of(folded: Folded) -> JobRequest:
    """Return what was asked for, without its arguments."""
    _, instance, owner, _, priority, _, _, _, _, call, deadline, no_progress, retry, before, on_progress, *_ = folded
    return JobRequest(
        plugin_instance_id=instance,
        owner=owner,
        priority=priority,
        call=None if call is None else CallContext(*call),
        deadline_seconds=deadline,
        no_progress_seconds=no_progress,
        retry=retry,
        before_start=before,
        on_progress=on_progress,
    )


def changed(folded: Folded, job: Job) -> Folded:
    """Return what is kept of a job that `only_waits`, with another priority or reason than before."""
    reason = None if job.block_reason is None else _reason(job.block_reason)
    return (*folded[:4], job.priority, *folded[5:8], reason, *folded[9:])


def without_arguments(folded: Folded) -> Folded:
    """Return what is kept of an ended job's request where its arguments, which may be large, are not."""
    return (*folded[:13], None, None, b"", *folded[16:])


def _reason_of(
    resource: str, text: str, needed: float, available: float, holders: tuple[str, ...], ahead: int
) -> BlockReason:
    return BlockReason(
        resource=resource, text=text, needed=needed, available=available, holders=holders, jobs_ahead=ahead
    )
