"""Jobs, events and sequences as rows of SQLite, and back. What a row cannot mean is a `StoreError`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from plugin_substrate.errors import ErrorCategory, JobError, ResourceShortfall, StoreError, WireValueError
from plugin_substrate.interface import CallContext
from plugin_substrate.queue.job import BlockReason, CancelPhase, Job, JobEvent, JobEventType, JobStatus
from plugin_substrate.queue.request import JobRequest, RetryPolicy
from plugin_substrate.queue.results import ResultFile, from_bytes, to_bytes
from plugin_substrate.queue.sequences import FromStep, JobSequence, SequenceStatus, SequenceStep, StepResult
from plugin_substrate.queue.store import ChangedJob, KeptJob, NewJob
from plugin_substrate.telemetry import ResourceSnapshot
from plugin_substrate.worker.frames import MAX_FRAME_BYTES

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    ord INTEGER NOT NULL UNIQUE,
    instance TEXT NOT NULL,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    completed_at REAL,
    sequence_id TEXT,
    request TEXT NOT NULL,
    arguments BLOB NOT NULL,
    state TEXT NOT NULL,
    result BLOB,
    result_size INTEGER
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, ord);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (completed_at) WHERE completed_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    instance TEXT NOT NULL,
    sequence_id TEXT,
    sequence_index INTEGER,
    type TEXT NOT NULL,
    at TEXT NOT NULL,
    payload TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS events_by_job ON events (job_id, number);
CREATE INDEX IF NOT EXISTS events_by_sequence ON events (sequence_id, position) WHERE sequence_id IS NOT NULL;
CREATE TABLE IF NOT EXISTS sequences (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL,
    completed_at REAL,
    steps BLOB NOT NULL,
    state TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    verb TEXT NOT NULL,
    arguments BLOB NOT NULL,
    answer TEXT
);
"""

INSERT_JOB = (
    "INSERT INTO jobs (id, ord, instance, owner, status, priority, sequence_id, request, arguments, state) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
UPDATE_JOB = "UPDATE jobs SET status = ?, priority = ?, completed_at = ?, state = ? WHERE id = ?"
END_JOB = (
    "UPDATE jobs SET status = ?, priority = ?, completed_at = ?, state = ?, result = ?, result_size = ? WHERE id = ?"
)
INSERT_EVENT = (
    "INSERT INTO events (position, job_id, number, instance, sequence_id, sequence_index, type, at, payload) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_SEQUENCE = "INSERT INTO sequences (status, completed_at, state, id, steps) VALUES (?, ?, ?, ?, ?)"
UPDATE_SEQUENCE = "UPDATE sequences SET status = ?, completed_at = ?, state = ? WHERE id = ?"
JOBS = (
    "SELECT id, ord, instance, owner, status, priority, sequence_id, request, arguments, state, result, result_size "
    "FROM jobs "
)
EVENTS = "SELECT position, job_id, number, instance, sequence_id, sequence_index, type, at, payload FROM events "


def new_job_row(new: NewJob) -> tuple[Any, ...]:
    """Return the values for `INSERT_JOB`."""
    kept = new.kept
    job, request = kept.job, kept.request
    static = {
        "plugin_name": job.plugin_name,
        "submitted_at": job.submitted_at,
        "sequence_index": job.sequence_index,
        "idempotent": kept.idempotent,
        "call": request.call,
        "deadline_seconds": request.deadline_seconds,
        "no_progress_seconds": request.no_progress_seconds,
        "retry": request.retry,
    }
    return (
        job.id,
        kept.order,
        job.plugin_instance_id,
        job.owner,
        job.status.value,
        job.priority,
        job.sequence_id,
        _json(static),
        arguments_to_bytes(request.args, request.kwargs) if new.arguments is None else new.arguments,
        _state(ChangedJob(job)),
    )


def arguments_to_bytes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """Return the arguments of a call as bytes; a `WireValueError` names what of them cannot be kept."""
    both = [list(args), dict(kwargs)]
    try:
        packed = to_bytes(both, "arguments")
    except WireValueError:
        for value, name in zip(both, ("args", "kwargs"), strict=True):
            to_bytes(value, name)  # so that the error names the place as the caller does
        raise
    if len(packed) > MAX_FRAME_BYTES:
        reason = f"{len(packed)} bytes are over the limit of {MAX_FRAME_BYTES} for a call; use files for large data"
        raise WireValueError(f"the arguments: {reason}", path="arguments")
    return packed


def changed_job_row(change: ChangedJob) -> tuple[Any, ...]:
    """Return the values for `UPDATE_JOB`."""
    job = change.job
    return job.status.value, job.priority, _seconds(job.completed_at), _state(change), job.id


def event_row(event: JobEvent) -> tuple[Any, ...]:
    """Return the values for `INSERT_EVENT`."""
    return (
        event.position,
        event.job_id,
        event.number,
        event.plugin_instance_id,
        event.sequence_id,
        event.sequence_index,
        event.type.value,
        event.timestamp.isoformat(),
        _json(event.payload),
    )


def new_sequence_row(sequence: JobSequence) -> tuple[Any, ...]:
    """Return the values for `INSERT_SEQUENCE`."""
    steps = [
        {
            "plugin_instance_id": step.plugin_instance_id,
            "args": _with_marks(list(step.args)),
            "kwargs": _with_marks(dict(step.kwargs)),
            "priority": step.priority,
        }
        for step in sequence.steps
    ]
    return *changed_sequence_row(sequence), to_bytes(steps, "steps")


def changed_sequence_row(sequence: JobSequence) -> tuple[Any, ...]:
    """Return the values for `UPDATE_SEQUENCE`. The results of steps are not in it: they are their jobs'."""
    state = {
        "priority": sequence.priority,
        "owner": sequence.owner,
        "fail_fast": sequence.fail_fast,
        "current_job_id": sequence.current_job_id,
        "cancel_requested": sequence.cancel_requested,
        "submitted_at": sequence.submitted_at,
        "completed_at": sequence.completed_at,
        "results": [{"job_id": each.job_id, "success": each.success, "error": each.error} for each in sequence.results],
    }
    return sequence.status.value, _seconds(sequence.completed_at), _json(state), sequence.id


def kept_job(row: tuple[Any, ...], results: Path) -> KeptJob:
    """Read a row of `JOBS`."""
    job_id, order, instance, owner, status, priority, sequence_id, request, arguments, state, result, size = row
    try:
        static, now = json.loads(request), json.loads(state)
        args, kwargs = from_bytes(arguments, f"the arguments of job {job_id}")
        job = Job(
            id=job_id,
            plugin_instance_id=instance,
            plugin_name=static["plugin_name"],
            owner=owner,
            args=tuple(args),
            kwargs=kwargs,
            status=JobStatus(status),
            priority=priority,
            submitted_at=_time(static["submitted_at"]) or datetime.now(UTC),
            started_at=_time(now["started_at"]),
            completed_at=_time(now["completed_at"]),
            progress=now["progress"],
            status_message=now["status_message"],
            result=_result(job_id, result, size, results),
            usage=now["usage"],
            error=_error(now["error"]),
            sequence_id=sequence_id,
            sequence_index=static["sequence_index"],
            cancel_requested_at=_time(now["cancel_requested_at"]),
            cancel_phase=CancelPhase(now["cancel_phase"]) if now["cancel_phase"] else None,
            block_reason=_block_reason(now["block_reason"]),
            retry_count=now["retry_count"],
            last_resource_snapshot=_snapshot(now["last_resource_snapshot"]),
        )
        return KeptJob(
            job=job,
            request=_request(job, static),
            order=order,
            idempotent=static["idempotent"],
            recoveries=now["recoveries"],
            not_before=_time(now["not_before"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"job {job_id!r} cannot be read: {error!r}") from error


def event_of(row: tuple[Any, ...]) -> JobEvent:
    """Read a row of `EVENTS`."""
    position, job_id, number, instance, sequence_id, sequence_index, kind, at, payload = row
    try:
        return JobEvent(
            number=number,
            position=position,
            type=JobEventType(kind),
            job_id=job_id,
            plugin_instance_id=instance,
            payload=json.loads(payload),
            sequence_id=sequence_id,
            sequence_index=sequence_index,
            timestamp=datetime.fromisoformat(at),
        )
    except (TypeError, ValueError) as error:
        raise StoreError(f"event {position} of job {job_id!r} cannot be read: {error!r}") from error


def sequence_of(row: tuple[Any, ...]) -> JobSequence:
    """Read a row (id, status, steps, state)."""
    sequence_id, status, steps, state = row
    try:
        now = json.loads(state)
        return JobSequence(
            id=sequence_id,
            steps=tuple(
                SequenceStep(
                    plugin_instance_id=step["plugin_instance_id"],
                    args=tuple(_without_marks(step["args"])),
                    kwargs=_without_marks(step["kwargs"]),
                    priority=step["priority"],
                )
                for step in from_bytes(steps, f"the steps of sequence {sequence_id}")
            ),
            status=SequenceStatus(status),
            priority=now["priority"],
            owner=now["owner"],
            fail_fast=now["fail_fast"],
            results=tuple(
                StepResult(job_id=each["job_id"], success=each["success"], error=_error(each["error"]))
                for each in now["results"]
            ),
            current_job_id=now["current_job_id"],
            cancel_requested=now["cancel_requested"],
            submitted_at=_time(now["submitted_at"]) or datetime.now(UTC),
            completed_at=_time(now["completed_at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"sequence {sequence_id!r} cannot be read: {error!r}") from error


def as_json(value: Any) -> Any:
    """Return times, enums, sets, paths and dataclasses as JSON values; for `json.dumps(default=...)`."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


_json = json.JSONEncoder(default=as_json, separators=(",", ":")).encode


def _state(change: ChangedJob) -> str:
    job = change.job
    return _json(
        {
            "started_at": job.started_at,
            "completed_at": job.completed_at,
            "progress": job.progress,
            "status_message": job.status_message,
            "usage": job.usage,
            "error": job.error,
            "cancel_requested_at": job.cancel_requested_at,
            "cancel_phase": job.cancel_phase,
            "block_reason": job.block_reason,
            "retry_count": job.retry_count,
            "last_resource_snapshot": job.last_resource_snapshot and asdict(job.last_resource_snapshot),
            "recoveries": change.recoveries,
            "not_before": change.not_before,
        }
    )


def _request(job: Job, static: dict[str, Any]) -> JobRequest:
    retry = static["retry"]
    if retry is not None:
        categories = frozenset(ErrorCategory(each) for each in retry["categories"])
        retry = RetryPolicy(**{**retry, "categories": categories})
    return JobRequest(
        plugin_instance_id=job.plugin_instance_id,
        args=job.args,
        kwargs=job.kwargs,
        priority=job.priority,
        owner=job.owner,
        call=None if static["call"] is None else CallContext(**static["call"]),
        deadline_seconds=static["deadline_seconds"],
        no_progress_seconds=static["no_progress_seconds"],
        retry=retry,
    )


def _result(job_id: str, result: bytes | None, size: int | None, results: Path) -> Any:
    if size is not None:
        return ResultFile(path=results / job_id, size=size)
    return None if result is None else from_bytes(result, f"the result of job {job_id}")


def _error(data: dict[str, Any] | None) -> JobError | None:
    if data is None:
        return None
    shortfall = data["resource_shortfall"]
    return JobError(
        **{
            **data,
            "category": ErrorCategory(data["category"]),
            "fields_invalid": tuple(data["fields_invalid"]),
            "log_tail": tuple(data["log_tail"]),
            "resource_shortfall": ResourceShortfall(**shortfall) if shortfall else None,
            "occurred_at": datetime.fromisoformat(data["occurred_at"]),
        }
    )


def _block_reason(data: dict[str, Any] | None) -> BlockReason | None:
    return None if data is None else BlockReason(**{**data, "holders": tuple(data["holders"])})


def _snapshot(data: dict[str, Any] | None) -> ResourceSnapshot | None:
    return (
        None if data is None else ResourceSnapshot(**{**data, "timestamp": datetime.fromisoformat(data["timestamp"])})
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _seconds(when: datetime | None) -> float | None:
    return None if when is None else when.timestamp()


def _with_marks(value: Any) -> Any:
    """Put a `FromStep` into a form that can be kept; what a user's own dict looks like is not mistaken for one."""
    if isinstance(value, FromStep):
        return {"from_step": [value.index, list(value.path)]}
    if isinstance(value, Mapping):
        return {"dict": {key: _with_marks(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return type(value)(_with_marks(item) for item in value)
    return value


def _without_marks(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "from_step" in value:
            index, path = value["from_step"]
            return FromStep(index, *path)
        return {key: _without_marks(item) for key, item in value["dict"].items()}
    if type(value) in (list, tuple):
        return type(value)(_without_marks(item) for item in value)
    return value
