"""The job queue: many callers, few workers, and jobs that may outlive the host."""

from __future__ import annotations

from plugin_substrate.queue.job import BlockReason, CancelPhase, Job, JobEvent, JobEventType, JobStatus, QueueStats
from plugin_substrate.queue.job_queue import JobQueue
from plugin_substrate.queue.memory_store import InMemoryJobStore
from plugin_substrate.queue.request import JobRequest, RetryPolicy
from plugin_substrate.queue.resources import MachineResources
from plugin_substrate.queue.results import ResultFile
from plugin_substrate.queue.sequences import FromStep, JobSequence, SequenceStatus, SequenceStep, StepResult
from plugin_substrate.queue.store import JobStore

__all__ = [
    "BlockReason",
    "CancelPhase",
    "FromStep",
    "InMemoryJobStore",
    "Job",
    "JobEvent",
    "JobEventType",
    "JobQueue",
    "JobRequest",
    "JobSequence",
    "JobStatus",
    "JobStore",
    "MachineResources",
    "QueueStats",
    "ResultFile",
    "RetryPolicy",
    "SequenceStatus",
    "SequenceStep",
    "StepResult",
]
