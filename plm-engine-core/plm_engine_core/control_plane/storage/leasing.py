"""What every storage writes when a lease is given back or taken from nobody."""

from __future__ import annotations

from uuid import UUID

from plm_engine_core.control_plane.errors import Conflict
from plm_engine_core.control_plane.vocabulary import EventKind, RunState, SystemActor

RECOVERY = SystemActor.RECOVERY.value
"""The actor of what happens because time has passed."""

FINISH_KINDS = {
    RunState.QUEUED: EventKind.RUN_RESUMED,
    RunState.HALTED: EventKind.RUN_PARKED,
    RunState.SUCCEEDED: EventKind.RUN_SUCCEEDED,
    RunState.FAILED: EventKind.RUN_FAILED,
    RunState.CANCELLED: EventKind.RUN_CANCELLED,
}


def open_call(run_id: UUID, grant_id: UUID) -> Conflict:
    """Why a run cannot end yet: what its call had reserved would never come back."""
    return Conflict(
        f"the call of grant {grant_id} of run {run_id} is not settled; settle it first, or let the lease run out",
        reason="call_open",
    )
