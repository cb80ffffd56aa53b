"""The run state machine: which moves are legal."""

from __future__ import annotations

from collections.abc import Mapping

from plm_engine_core.control_plane.vocabulary import RunState

TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.HALTED, RunState.CANCELLED}),
    RunState.RUNNING: frozenset(
        {
            RunState.RUNNING,  # taken over from a worker whose lease ran out
            RunState.QUEUED,  # handed back
            RunState.AWAITING_APPROVAL,
            RunState.HALTED,
            RunState.OUTCOME_UNKNOWN,
            RunState.SUCCEEDED,
            RunState.FAILED,
            RunState.CANCELLED,
        }
    ),
    RunState.AWAITING_APPROVAL: frozenset({RunState.QUEUED, RunState.CANCELLED}),
    RunState.HALTED: frozenset({RunState.QUEUED, RunState.CANCELLED}),
    RunState.OUTCOME_UNKNOWN: frozenset({RunState.QUEUED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
}


def sources_of(target: RunState) -> tuple[RunState, ...]:
    """The states from which `target` may be reached; every transition is a conditional update on these."""
    return tuple(state for state in RunState if target in TRANSITIONS[state])
