"""The in-memory job queue: many callers, few workers."""

from __future__ import annotations

from plugin_substrate.queue.job import Job, JobEvent, JobEventType, JobStatus, QueueStats
from plugin_substrate.queue.job_queue import JobQueue

__all__ = ["Job", "JobEvent", "JobEventType", "JobQueue", "JobStatus", "QueueStats"]
