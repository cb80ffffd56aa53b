"""Expiry of idempotency records: what answered the commands of a run goes a while after the run ended, batch by batch.

None of them can do twice what it did once. An admission of an ended run is refused by its state, with a record or
without; and a run has no open lease, grant or ticket any more when that while begins. A correction of a budget has no
run, and would be booked again: its record stays for ever, and so does that of a marker, whose command names no run.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final
from uuid import UUID

from plm_engine_core.control_plane.sweeping import ExpiredBatch, InTenant, remove_in_batches

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import Storage

logger = logging.getLogger(__name__)

KEEP_SECONDS: Final = 30 * 86_400.0
SHORTEST_SECONDS: Final = 86_400.0
_BATCH: Final = 1000


class RecordExpiry:
    """Removes them, tenant by tenant, each a batch in its turn; safe to run anywhere any number of times.

    `keep_seconds` counts from the end of a run, by the database's clock. For so long a creation that is sent again with
    its key answers the run that there is; later it makes a new one.
    """

    def __init__(self, storage: Storage, in_tenant: InTenant, *, keep_seconds: float) -> None:
        self._storage = storage
        self._in_tenant = in_tenant
        self._keep = keep_seconds

    async def sweep(self) -> int:
        """Go on until nothing is due; answers how many records went. What fails is left to the next pass."""
        return await remove_in_batches(
            self._storage, self._expire, self._in_tenant, name="idempotency records", logger=logger
        )

    async def _expire(self, tenant_id: UUID) -> ExpiredBatch:
        return await self._storage.idempotency.expire(tenant_id, keep_seconds=self._keep, limit=_BATCH)
