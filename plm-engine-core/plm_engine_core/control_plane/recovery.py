"""Recovery: brings back what nobody drives although somebody should. Safe to run anywhere, any number of times."""

from __future__ import annotations

import asyncio
import logging

from plm_engine_core.control_plane.errors import ControlPlaneError, StorageUnavailable
from plm_engine_core.control_plane.storage.ports import Storage

logger = logging.getLogger(__name__)

_BATCH = 200


class Recovery:
    """The one sweeper of everything that time or a death leaves open.

    It finds runs whose worker is gone, whose job was lost, whose ticket ran out of time or whose halt was lifted, and
    has them driven again; and tenants in which a halt could not end everything at once. It decides nothing itself:
    whoever then takes a lease closes the abandoned grant, and parks what nobody can know. An enqueued run that nobody
    took for `patience_seconds` counts as lost on its way and is enqueued once more.
    """

    def __init__(self, storage: Storage, *, every_seconds: float = 10.0, patience_seconds: float = 30.0) -> None:
        self._storage = storage
        self._every_seconds = every_seconds
        self._patience = patience_seconds

    async def sweep(self) -> int:
        """One pass; answers how many runs were enqueued. What fails for one row or tenant is left to the next pass."""
        await self._end_halted()
        revived = 0
        runs = self._storage.runs
        for tenant_id, run_id in await runs.abandoned(_BATCH, patience_seconds=self._patience):
            try:
                revived += await runs.revive(tenant_id, run_id, patience_seconds=self._patience)
            except ControlPlaneError:
                logger.warning("a run could not be brought back yet", extra={"run_id": str(run_id)}, exc_info=True)
        return revived

    async def _end_halted(self) -> None:
        """Finish what the trigger of a halt could not."""
        halts = self._storage.halts
        for tenant_id in await halts.unfinished(_BATCH):
            try:
                await halts.end_halted(tenant_id)
            except ControlPlaneError:
                logger.warning("a halt is not finished yet", extra={"tenant_id": str(tenant_id)}, exc_info=True)

    async def run(self) -> None:
        """Sweep until cancelled; a failed pass is logged and the next one tries again."""
        while True:
            try:
                await self.sweep()
            except StorageUnavailable as error:
                logger.warning("a recovery pass has to wait: %s", error)
            except Exception:
                logger.exception("a recovery pass failed; the next one tries again")
            await asyncio.sleep(self._every_seconds)
