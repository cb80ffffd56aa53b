"""A job that has not ended, as the queue that runs it sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from plugin_substrate.interface import CallContext
from plugin_substrate.queue.job import Job
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.resources import NO_DEMAND, Demand
from plugin_substrate.queue.waiting import LaneKey


@dataclass(kw_only=True, eq=False, slots=True)
class LiveJob:
    """A job that has not ended, with what only the queue needs to know of it.

    A long queue is many of these, and the collector of garbage goes over each: what a waiting job has no use for yet is
    made when it is needed, and what many can share is shared.
    """

    job: Job
    request: JobRequest
    lane: LaneKey
    order: int
    demand: Demand = NO_DEMAND
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
