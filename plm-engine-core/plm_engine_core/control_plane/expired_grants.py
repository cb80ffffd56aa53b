"""Grants that run out before their call begins: what they hold comes back, also in a run that somebody holds."""

from __future__ import annotations

import logging
from typing import Final
from uuid import UUID

from plm_engine_core.control_plane.admission.abandoned import capability_of, grant_of
from plm_engine_core.control_plane.admission.settle import Outcome, expire
from plm_engine_core.control_plane.storage.leasing import RECOVERY
from plm_engine_core.control_plane.storage.ports import Storage
from plm_engine_core.control_plane.sweeping import InTenant
from plm_engine_core.control_plane.turns import Turns
from plm_engine_core.control_plane.vocabulary import Evidence, OutcomeStatus, Reason, StepState

logger = logging.getLogger(__name__)

_BATCH = 200
_LOOK: Final = 10_000  # runs of which a batch is chosen; only their ids are read
_RAN_OUT = "its grant expired before the call began"


class ExpiredGrants:
    """Closes grants that nobody used in time as `not_started`.

    A call whose grant expired cannot begin, so none can be under way, and who holds the run is asked nothing. A call
    that began is never touched: what became of it is for its holder to say. Nor is a run that is parked, where nothing
    is settled until it goes on.
    """

    def __init__(self, storage: Storage, in_tenant: InTenant) -> None:
        self._storage = storage
        self._in_tenant = in_tenant
        self._turns = Turns(_BATCH)

    async def close(self) -> None:
        """Close what is found; what began or was settled meanwhile is left as it is."""
        for tenant_id, run_id in self._turns.choose(await self._storage.runs.expired(_LOOK)):
            try:
                async with self._in_tenant(tenant_id):
                    await self._close(tenant_id, run_id)
            except Exception:  # a record of another release, or a damaged one
                self._turns.failed(run_id)
                words = "what an unused grant holds could not be given back yet"
                logger.warning(words, extra={"run_id": str(run_id)}, exc_info=True)

    async def _close(self, tenant_id: UUID, run_id: UUID) -> None:
        run = await self._storage.runs.get(tenant_id, run_id)
        for step in await self._storage.runs.steps(tenant_id, run_id):
            if step.state is not StepState.GRANTED:
                continue
            error = {"category": Reason.GRANT_EXPIRED.value, "message": f"{step.capability}: {_RAN_OUT}"}
            await expire(
                grant_of(run, step),
                Outcome(status=OutcomeStatus.NOT_STARTED, evidence=Evidence.REPORTED, error=error),
                fencing_token=run.fencing_token,
                capability=capability_of(step),
                trace_id=run.trace_id,
                actor=RECOVERY,
                storage=self._storage.admission,
            )
