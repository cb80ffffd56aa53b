"""Jobs and their events as text for people, and as JSON. What a plugin wrote holds no control characters here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from plugin_substrate.errors import JobError
from plugin_substrate.queue.job import BlockReason, Job, JobEvent, JobEventType, JobStatus
from plugin_substrate.queue.results import ResultFile
from plugin_substrate.stores.job_rows import as_json as row_as_json

_VALUES = ("args", "kwargs", "result", "usage")

_HEADER = ("id", "status", "done", "instance", "owner", "submitted (UTC)", "why it waits, or what it says")


def job_table(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a list of jobs as lines of a table with its header."""
    rows = [_HEADER, *map(_row, jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def job_lines(job: Job) -> Iterator[str]:
    """Yield what there is to say about a job, a field a line, and the plugin's traceback."""
    for each in fields(job):
        value = getattr(job, each.name)
        if value not in (None, "", (), {}):
            yield f"{each.name:22} {printable(_json(value) if each.name in _VALUES else _text(value))}"
    for line in job.error.traceback.splitlines() if job.error else ():
        yield f"  {printable(line)}"


def event_line(event: JobEvent) -> str:
    """Return an event as one line."""
    match event.type:
        case JobEventType.STATE_TRANSITION:
            what = f"{event.payload['from']} -> {event.payload['to']}"
        case JobEventType.PROGRESS_CHANGED:
            what = f"{percent(event.payload['progress'])} {printable(event.payload['status_message'])}"
        case JobEventType.LOG_APPENDED:
            what = f"| {printable(event.payload['line'])}"
        case JobEventType.BLOCK_REASON_CHANGED:
            what = f"waits: {printable(event.payload['text'])}"
        case JobEventType.CANCEL_PHASE_CHANGED:
            what = f"cancelling: {event.payload['to']}"
        case _:
            what = f"{event.type.value} {printable(json.dumps(event.payload))}"
    return f"{event.timestamp:%H:%M:%S} {what}"


def end_line(job: Job) -> str:
    """Return how a job ended as one line."""
    words = job.error.message if job.error else _json(job.result)
    return f"{job.id}: {job.status.value}  {printable(words)}"


def job_as_json(job: Job) -> dict[str, Any]:
    """Return a job as JSON values; what has no JSON form stands there as its text."""
    return dict(json.loads(_json(job)))


def event_as_json(event: JobEvent) -> dict[str, Any]:
    """Return an event as JSON values."""
    return {**vars(event), "type": event.type.value, "timestamp": event.timestamp.isoformat()}


def percent(progress: float) -> str:
    """Return progress as text; below 0 the plugin does not know."""
    return f"{progress:.0%}" if progress >= 0 else "?"


def printable(text: str) -> str:
    """Return text without what a terminal would take for a command."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _row(job: Job) -> tuple[str, ...]:
    return (
        job.id,
        job.status.value,
        percent(job.progress).rjust(4),
        job.plugin_instance_id,
        job.owner or "-",
        f"{job.submitted_at:%Y-%m-%d %H:%M:%S}",
        printable(_words(job)),
    )


def _words(job: Job) -> str:
    if job.error is not None:
        return job.error.message
    return job.block_reason.text if job.block_reason and job.status is JobStatus.PENDING else job.status_message


def _text(value: Any) -> str:
    match value:
        case str():
            return str(value)
        case JobError():
            unknown = "" if value.outcome_known else " (what it did is not known)"
            return f"{value.error_type or value.category.value}: {value.message}{unknown}"
        case BlockReason():
            return value.text
        case datetime():
            return value.isoformat(sep=" ", timespec="milliseconds")
        case _:
            return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, ResultFile):
        return {"file": str(value.path), "size": value.size}
    try:
        return row_as_json(value)
    except TypeError:
        return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
