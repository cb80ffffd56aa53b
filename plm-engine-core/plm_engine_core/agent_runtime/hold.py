"""A run's lease while it is held: renewed in the background, which is also how cancels and halts are heard of."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.halts import CANCEL_SECONDS
from plm_engine_core.control_plane.runs.run import Heartbeat, Lease, Run
from plm_engine_core.control_plane.storage.ports import RunStore

logger = logging.getLogger(__name__)

_BEATS_PER_LEASE = 3
_LONGEST_BEAT = CANCEL_SECONDS / 3  # however long the lease: a halt is heard of in time to end the call


def beat_of(lease_seconds: float, cancel_seconds: float = CANCEL_SECONDS) -> float:
    """Seconds between two renewals of a lease, in which a halt or a cancel is heard of at the latest.

    A third of `cancel_seconds` at the most: what a halt's record promises leaves time to end the call.
    """
    return min(lease_seconds / _BEATS_PER_LEASE, cancel_seconds / 3, _LONGEST_BEAT)


def moment() -> float:
    """Seconds on a clock that nobody sets, and that counts on while the machine is suspended where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(kw_only=True)
class Hold:
    """A lease and what its heartbeat heard; `stop` is set while there is a reason to stop the call in progress.

    Up to the moment `valid_until` nobody else can have taken the run.
    """

    lease: Lease
    valid_until: float
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    given_back: bool = False
    cancel_requested: bool = False
    halt: Mapping[str, Any] | None = None

    @property
    def run(self) -> Run:
        """The run as it was when the lease was taken."""
        return self.lease.run

    @property
    def fencing_token(self) -> int:
        """What every write presents."""
        return self.lease.fencing_token

    @property
    def surely_held(self) -> bool:
        """Whether nobody else can hold the run now; a process or machine that stood still meanwhile finds out here.

        It may stand still right after it asked: then only the fencing token keeps it from writing.
        """
        return not self.lost and moment() < self.valid_until

    def hear(self, beat: Heartbeat) -> None:
        """Take in what a renewal answered."""
        self.lost = not beat.held
        self.cancel_requested = beat.cancel_requested
        self.halt = beat.halt
        if self.lost or self.cancel_requested or self.halt is not None:
            self.stop.set()
        else:
            self.stop.clear()

    async def pause(self, seconds: float) -> None:
        """Wait, but no longer than until there is a reason to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return


@asynccontextmanager
async def held(
    runs: RunStore,
    lease: Lease,
    *,
    seconds: float,
    asked_at: float,
    wake: asyncio.Event,
    cancel_seconds: float = CANCEL_SECONDS,
) -> AsyncIterator[Hold]:
    """Keep a lease of `seconds` alive until the block ends; `wake` makes the next heartbeat due at once.

    `asked_at` is the moment in which the lease was asked for: the database's count began later. Halts and cancels are
    heard of in time to end a call within `cancel_seconds`.
    """
    hold = Hold(lease=lease, valid_until=asked_at + seconds)
    beating = _heartbeat(runs, hold, seconds, wake, beat_of(seconds, cancel_seconds))
    task = asyncio.create_task(beating, name=f"lease of {lease.run.id}")
    try:
        yield hold
    finally:
        hold.given_back = True  # a cancel can get lost, in the rollback of a database that is going away
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _heartbeat(runs: RunStore, hold: Hold, seconds: float, wake: asyncio.Event, beat: float) -> None:
    while not (hold.lost or hold.given_back):
        with suppress(TimeoutError):  # the usual case: nothing interrupts, and the heartbeat is due
            async with asyncio.timeout(beat):
                await wake.wait()
        wake.clear()
        asked_at = moment()
        try:
            hold.hear(
                await runs.renew(hold.run.tenant_id, hold.run.id, fencing_token=hold.fencing_token, seconds=seconds)
            )
            hold.valid_until = asked_at + seconds
        except StorageUnavailable:
            logger.warning("the lease could not be renewed", extra={"run_id": str(hold.run.id)})
        except Exception:
            logger.exception("the lease is given up", extra={"run_id": str(hold.run.id)})
            hold.hear(Heartbeat(held=False))
