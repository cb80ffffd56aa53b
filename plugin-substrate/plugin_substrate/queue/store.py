"""The port to where jobs are kept. The queue decides; a store only keeps, in the order in which it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from plugin_substrate.queue.job import Job, JobEvent, JobStatus
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.sequences import JobSequence


@dataclass(frozen=True, kw_only=True)
class KeptJob:
    """A job with all that is needed to run it in another process. Callbacks are not kept.

    ``order`` counts submissions, ``events`` the job's events so far, ``recoveries`` how often a host died under it.
    """

    job: Job
    request: JobRequest
    order: int
    idempotent: bool = False
    events: int = 0
    recoveries: int = 0
    not_before: datetime | None = None


@dataclass(frozen=True)
class NewJob:
    """A job was submitted. ``arguments`` is what `JobStore.pack` gave; None where the request still has them."""

    kept: KeptJob
    arguments: bytes | None = None


@dataclass(frozen=True)
class ChangedJob:
    """A job stands otherwise than before. Its request stays."""

    job: Job
    recoveries: int = 0
    not_before: datetime | None = None


@dataclass(frozen=True)
class NewEvent:
    """Something happened to a job that is kept."""

    event: JobEvent


@dataclass(frozen=True)
class NewSequence:
    """A sequence was submitted."""

    sequence: JobSequence


@dataclass(frozen=True)
class ChangedSequence:
    """A sequence stands otherwise than before. Its steps stay; the results of its steps are those of their jobs."""

    sequence: JobSequence


@dataclass(frozen=True)
class Forget:
    """A job, with its events and the file of its result, is no longer kept."""

    job_id: str


@dataclass(frozen=True)
class ForgetSequence:
    """A sequence is no longer kept; its jobs are forgotten by themselves."""

    sequence_id: str


@dataclass(frozen=True)
class Answered:
    """What somebody outside this process asked for was done or refused; ``answer`` is JSON."""

    request_id: str
    answer: Mapping[str, Any]


Change = NewJob | ChangedJob | NewEvent | NewSequence | ChangedSequence | Forget | ForgetSequence | Answered


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A kept job that has ended, as far as retention is concerned."""

    job_id: str
    status: JobStatus
    completed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """What an earlier host left: jobs that wait or ran, by order; running sequences; what has ended, oldest first."""

    live: Sequence[KeptJob] = ()
    sequences: Sequence[JobSequence] = ()
    ended: Sequence[Ended] = ()
    ended_sequences: Sequence[str] = ()
    last_order: int = 0
    last_position: int = 0


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs are meant; an empty field means any."""

    statuses: Collection[JobStatus] = field(default_factory=tuple)
    plugin_instance_id: str = ""
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What somebody outside this process asks of the queue: a verb and its arguments."""

    id: str
    verb: str
    arguments: Mapping[str, Any]


class JobStore(Protocol):
    """Keeps jobs, events and sequences. Belongs to one queue, which calls it on one event loop.

    What cannot be kept or read is a `StoreError`.
    """

    @property
    def durable(self) -> bool:
        """Whether what is kept outlives this process. Only then a start waits until it is kept."""
        ...

    @property
    def keeps_arguments(self) -> bool:
        """Whether an ended job still has its arguments, so that it can be submitted again."""
        ...

    def open(self) -> Leftover:
        """Claim the store for this process and return what is in it; a `StoreError` when another host has it."""
        ...

    def pack(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Return arguments as they are held and kept; a `WireValueError` names what of them cannot be."""
        ...

    def unpack(self, packed: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that `pack` was given; a `StoreError` when the bytes are damaged."""
        ...

    def check_result(self, result: Any) -> None:
        """Raise a `WireValueError` when a result cannot be kept: a plugin made it."""
        ...

    def write(self, changes: Sequence[Change]) -> asyncio.Future[None] | None:
        """Keep changes, all or none, after those written before; the future ends when they are safe, None: they are.

        What a read returns may lack them until then, and holds them afterwards.
        """
        ...

    def job(self, job_id: str) -> KeptJob | None:
        """Return a kept job."""
        ...

    def jobs(self, wanted: JobFilter, limit: int) -> list[Job]:
        """Return kept jobs, those submitted last first."""
        ...

    def sequence(self, sequence_id: str) -> JobSequence | None:
        """Return a kept sequence, with the results of its steps as far as their jobs are kept."""
        ...

    def job_events(self, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Return events of a job whose number is above ``after``, in order."""
        ...

    def queue_events(self, after: int, limit: int, sequence_id: str | None = None) -> list[JobEvent]:
        """Return events whose position is above ``after``, of one sequence or of all jobs, in order."""
        ...

    def watch(self, news: Callable[[], object]) -> None:
        """Call ``news``, on the event loop, whenever somebody outside may have asked for something."""
        ...

    def asked(self) -> list[Asked]:
        """Return what was asked and not answered, in order."""
        ...

    async def close(self) -> None:
        """Have everything written kept, and give the store up."""
        ...
