"""What every storage writes when a lease is given back or taken from nobody."""

from __future__ import annotations

from plm_engine_core.control_plane.vocabulary import EventKind, RunState

RECOVERY = "system:recovery"
"""The actor of what happens because time has passed."""

FINISH_KINDS = {
    RunState.QUEUED: EventKind.RUN_RESUMED,
    RunState.HALTED: EventKind.RUN_PARKED,
    RunState.SUCCEEDED: EventKind.RUN_SUCCEEDED,
    RunState.FAILED: EventKind.RUN_FAILED,
    RunState.CANCELLED: EventKind.RUN_CANCELLED,
}
