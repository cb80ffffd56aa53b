"""What a job is: a call that waits its turn, what happens to it, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from secrets import token_hex
from typing import Any

from plugin_substrate.errors import JobError
from plugin_substrate.telemetry import ResourceSnapshot

_EPOCH = datetime.fromtimestamp(0, UTC)


def new_id(submitted_at: datetime) -> str:
    """Return an id for what was submitted then: 32 hexadecimal digits, of which the last 18 are chance.

    The ids of what comes later are greater, so that a store adds them to the end of its indices. Chance alone would
    have it write another page for each, and the more pages the more jobs there are.
    """
    return f"{(submitted_at - _EPOCH) // timedelta(microseconds=1):014x}{token_hex(9)}"


class JobStatus(StrEnum):
    """Where a job stands."""

    PENDING = "pending"  #: waiting; nothing has been sent, or it will be sent again
    RUNNING = "running"  #: its call is in a worker
    COMPLETED = "completed"  #: the plugin returned a result
    FAILED = "failed"  #: it ended with an error; ``error.outcome_known`` says whether its effect is known
    CANCELLED = "cancelled"  #: somebody asked for its end; a result that came too late is kept in ``result``
    NOT_STARTED = "not_started"  #: ``before_start`` said no or failed; nothing was sent
    INTERRUPTED = "interrupted"  #: the host died under it, and nobody knows what it did; ``progress`` is the last known

    @property
    def terminal(self) -> bool:
        """Whether a job stays in this state."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING)


class CancelPhase(StrEnum):
    """How far the cancelling of a running job is."""

    COOPERATIVE = "cooperative"  #: the plugin was asked
    FORCE = "force"  #: it did not end within the grace: its worker is being killed
    RELOADING = "reloading"  #: the worker is gone; the next call of its tenant finds another
    COMPLETED = "completed"  #: the job has ended


class JobEventType(StrEnum):
    """What an event tells."""

    STATE_TRANSITION = "state_transition"  #: payload: from, to
    PROGRESS_CHANGED = "progress_changed"  #: payload: progress, status_message
    LOG_APPENDED = "log_appended"  #: payload: line
    BLOCK_REASON_CHANGED = "block_reason_changed"  #: payload: the fields of a `BlockReason`
    CANCEL_PHASE_CHANGED = "cancel_phase_changed"  #: payload: from, to
    RETRY_STARTED = "retry_started"  #: payload: attempt, exception_repr, exception_category, wait_seconds
    SEQUENCE_ADVANCED = "sequence_advanced"  #: payload: prior_job_id, prior_step_index, prior_success
    RESOURCE_SNAPSHOT = "resource_snapshot"  #: payload: snapshot
    EVENTS_LIMITED = "events_limited"  #: payload: limit; more log lines than that are only in the instance's log


@dataclass(frozen=True, kw_only=True)
class BlockReason:
    """Why a job waits: which resource, how much of it, how much there is, and which jobs hold it.

    Resources are ``slots``, ``cpu_slots``, ``memory_mb``, ``gpu_memory_mb``, ``device:NAME`` and ``token:NAME``; what
    is no resource is ``queue`` (not started), ``retry`` (a pause before the next attempt) or ``start`` (its worker is
    being made ready, or the call waits to be allowed). ``jobs_ahead`` counts those of the same worker that go first.
    """

    resource: str
    text: str
    needed: float = 0.0
    available: float = 0.0
    holders: tuple[str, ...] = ()
    jobs_ahead: int = 0

    def __str__(self) -> str:
        return self.text

    def payload(self) -> dict[str, Any]:
        """Return its fields as JSON values, for an event or an answer."""
        return {
            "resource": self.resource,
            "text": self.text,
            "needed": self.needed,
            "available": self.available,
            "holders": list(self.holders),
            "jobs_ahead": self.jobs_ahead,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job at one moment. ``started_at`` is None as long as, and if ever, its call was not sent.

    ``retry_count`` counts the attempts before this one. An ended job has its arguments only where the store keeps them.
    A ``result`` over the store's limit is a `ResultFile`.
    """

    id: str
    plugin_instance_id: str
    plugin_name: str = ""
    owner: str = ""
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
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
    sequence_id: str | None = None
    sequence_index: int | None = None
    cancel_requested_at: datetime | None = None
    cancel_phase: CancelPhase | None = None
    block_reason: BlockReason | None = None
    retry_count: int = 0
    last_resource_snapshot: ResourceSnapshot | None = None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Something that happened to a job.

    ``number`` counts the events of the job from 1 without a gap, ``position`` those of the queue in their order.
    """

    number: int
    position: int
    type: JobEventType
    job_id: str
    plugin_instance_id: str
    payload: dict[str, Any]
    sequence_id: str | None = None
    sequence_index: int | None = None
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, kw_only=True)
class QueueStats:
    """How many jobs wait and run, and how the retained ones ended."""

    total_pending: int = 0
    total_running: int = 0
    total_completed: int = 0
    total_failed: int = 0
    total_cancelled: int = 0
    total_not_started: int = 0
    total_interrupted: int = 0
