"""What a job is: a call that waits its turn, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from plugin_substrate.errors import JobError


class JobStatus(StrEnum):
    """Where a job stands."""

    PENDING = "pending"  #: waiting; nothing has been sent
    RUNNING = "running"  #: its call is in a worker
    COMPLETED = "completed"  #: the plugin returned a result
    FAILED = "failed"  #: it ended with an error; ``error.outcome_known`` says whether its effect is known
    CANCELLED = "cancelled"  #: somebody asked for its end; a result that came too late is kept in ``result``
    NOT_STARTED = "not_started"  #: ``before_start`` said no or failed; nothing was sent

    @property
    def terminal(self) -> bool:
        """Whether a job stays in this state."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING)


class JobEventType(StrEnum):
    """What an event tells."""

    STATE_TRANSITION = "state_transition"  #: payload: from, to
    PROGRESS_CHANGED = "progress_changed"  #: payload: progress, status_message
    LOG_APPENDED = "log_appended"  #: payload: line


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job at one moment. ``started_at`` is None as long as, and if ever, its call was not sent."""

    id: str
    plugin_instance_id: str
    owner: str = ""
    status: JobStatus = JobStatus.PENDING
    priority: int = 0
    submitted_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    started_at: datetime | None = None
    completed_at: datetime | None = None
    progress: float = 0.0
    status_message: str = ""
    result: Any = None
    usage: dict[str, float] = field(default_factory=dict)
    error: JobError | None = None
    cancel_requested_at: datetime | None = None
    block_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Something that happened to a job. ``number`` grows within the job; of progress and logs only some are kept."""

    number: int
    type: JobEventType
    job_id: str
    plugin_instance_id: str
    payload: dict[str, Any]
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, kw_only=True)
class QueueStats:
    """How many jobs wait and run, and how the retained ones ended."""

    total_pending: int
    total_running: int
    total_completed: int
    total_failed: int
    total_cancelled: int
    total_not_started: int
