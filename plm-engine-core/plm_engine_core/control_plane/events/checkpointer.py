"""Takes checkpoints as long as it runs; any number of processes may do so at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head, next_checkpoint
from plm_engine_core.control_plane.events.signing import Signer
from plm_engine_core.control_plane.identity import SystemIdentities
from plm_engine_core.control_plane.storage.ports import CheckpointStore
from plm_engine_core.control_plane.sweeping import sweep_until_cancelled
from plm_engine_core.control_plane.vocabulary import SystemActor

logger = logging.getLogger(__name__)


class Checkpointer:
    """Signs the heads of every tenant in which something has happened.

    A pass acts in each tenant as `system:checkpoints` of `identities`; without any, nothing of that is recorded.
    """

    def __init__(
        self,
        store: CheckpointStore,
        signer: Signer,
        *,
        every_seconds: float = 60.0,
        identities: SystemIdentities | None = None,
    ) -> None:
        self._store = store
        self._signer = signer
        self._every_seconds = every_seconds
        self._identities = identities or SystemIdentities(None)

    async def take(self, tenant_id: UUID) -> Checkpoint | None:
        """Take a checkpoint of one tenant now; None when nothing has happened since the one before."""

        def make(
            previous: Checkpoint | None, heads: Sequence[Head], changed: Sequence[Head], now: datetime
        ) -> Checkpoint:
            return next_checkpoint(previous, tenant_id, heads, changed, taken_at=now, signer=self._signer)

        return await self._store.take(tenant_id, make)

    async def sweep(self) -> int:
        """One pass over all tenants; answers how many checkpoints were taken. One that fails holds up no other."""
        taken = 0
        for tenant_id in await self._store.tenants():
            try:
                async with self._identities.acting(SystemActor.CHECKPOINTS, tenant_id):
                    taken += await self.take(tenant_id) is not None
            except StorageUnavailable as error:
                logger.warning("the checkpoint of tenant %s has to wait: %s", tenant_id, error)
            except Exception:
                logger.exception("what happened in tenant %s could not be signed; the others go on", tenant_id)
        return taken

    async def run(self) -> None:
        """Sweep until cancelled; a failed pass is logged, and the next one covers what it missed."""
        await sweep_until_cancelled(
            self.sweep, every_seconds=self._every_seconds, name="the pass that takes checkpoints", logger=logger
        )
