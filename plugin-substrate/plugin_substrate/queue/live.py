"""A job that has not ended, as the queue that runs it sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

from plugin_substrate.interface import CallContext
from plugin_substrate.queue.folding import Folded, fold, job_of, only_waits, request_of
from plugin_substrate.queue.job import Job
from plugin_substrate.queue.request import JobRequest


@dataclass(kw_only=True, eq=False, slots=True)
class LiveJob:
    """A job that has not ended, with what only the queue needs to know of it.

    Neither ``job`` nor ``request`` is asked for the arguments: they are ``arguments``, as the store packs them.
    """

    job: Job
    request: JobRequest
    arguments: bytes
    order: int
    idempotent: bool = False
    events: int = 0
    recoveries: int = 0
    sent: bool = False
    stalled: bool = False
    forced: bool = False
    met_shortage: bool = False
    began: float = 0.0
    again_after: float | None = None
    not_before: datetime | None = None
    log_lines: int = 0
    reports: int = 0
    untold_progress: bool = False
    task: asyncio.Task[None] | None = None
    snapshots: asyncio.Task[None] | None = None
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _done: asyncio.Event | None = field(default=None, init=False)

    @property
    def done(self) -> asyncio.Event:
        """Set when it has ended and its end is kept."""
        if self._done is None:
            self._done = asyncio.Event()
        return self._done

    @property
    def only_waits(self) -> bool:
        """Whether it can be made anew from what was asked for, as nothing was begun and nobody waits for its end."""
        started = self.task or self.timers or self._done or self.not_before or self.recoveries or self.reports
        return not started and only_waits(self.job)

    @property
    def context(self) -> CallContext:
        """What its calls are told of themselves: the same for each attempt, under whichever host."""
        call = self.request.call or CallContext(call_id=self.job.id, step_key=self.job.id)
        deadline = self.deadline
        return call if deadline == call.deadline else replace(call, deadline=deadline)

    @property
    def tenant_id(self) -> str:
        """Whose call it is; nothing when it is nobody's."""
        call = self.request.call
        return call.tenant_id if call is not None else ""

    @property
    def deadline(self) -> float | None:
        """The Unix time by which it must have ended: its own deadline or its call's, whichever is first."""
        own, call = self.request.deadline_seconds, self.request.call
        of_call = call.deadline if call is not None else None
        if own is None:
            return of_call
        deadline = self.job.submitted_at.timestamp() + own
        return min(deadline, of_call or deadline)

    def set_timer(self, name: str, seconds: float, what: Callable[[], object]) -> None:
        """Do something later, once, unless it is set anew or stopped."""
        self.stop_timer(name)
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, what)

    def stop_timer(self, name: str) -> None:
        """Give up a timer, if there is one."""
        if (timer := self.timers.pop(name, None)) is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Give up every timer and the snapshots."""
        for name in list(self.timers):
            self.stop_timer(name)
        if self.snapshots is not None:
            self.snapshots.cancel()


class LiveJobs:
    """The live jobs of a queue, by id. One that only waits is a plain tuple until somebody asks for it."""

    def __init__(self) -> None:
        self._awake: dict[str, LiveJob] = {}
        self._folded: dict[str, Folded] = {}

    def __len__(self) -> int:
        return len(self._awake) + len(self._folded)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._awake or job_id in self._folded

    def __getitem__(self, job_id: str) -> LiveJob:
        return self._awake.get(job_id) or self._wake(job_id)

    def get(self, job_id: str) -> LiveJob | None:
        """Return a live job, None when there is none."""
        return self._awake.get(job_id) or (self._wake(job_id) if job_id in self._folded else None)

    def add(self, live: LiveJob) -> None:
        """Have a job be live."""
        self._awake[live.job.id] = live

    def remove(self, job_id: str) -> None:
        """Have it be live no longer."""
        if self._awake.pop(job_id, None) is None:
            del self._folded[job_id]

    def let_wait(self, live: LiveJob) -> None:
        """Fold a job that does nothing but wait, and is watched by nobody; another stays as it is."""
        if live.only_waits and self._awake.pop(live.job.id, None) is not None:
            self._folded[live.job.id] = fold(
                live.job, live.request, live.arguments, live.order, idempotent=live.idempotent, events=live.events
            )

    def awake(self) -> Collection[LiveJob]:
        """Return those that are no tuples: all that run, and some that wait."""
        return self._awake.values()

    def folded(self) -> Iterable[Folded]:
        """Return those that are tuples."""
        return self._folded.values()

    def _wake(self, job_id: str) -> LiveJob:
        folded = self._folded.pop(job_id)
        *_, arguments, order, idempotent, events = folded
        live = self._awake[job_id] = LiveJob(
            job=job_of(folded),
            request=request_of(folded),
            arguments=arguments,
            order=order,
            idempotent=idempotent,
            events=events,
        )
        return live
