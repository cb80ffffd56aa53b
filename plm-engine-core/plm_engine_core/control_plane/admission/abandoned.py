"""Calls whose holder is gone: what their grants were, read back from the record of their steps."""

from __future__ import annotations

import logging
from typing import Final

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.vocabulary import CapabilityMode, Evidence, OutcomeStatus, StepState

logger = logging.getLogger(__name__)

ABANDONED: Final = "abandoned"
"""The category of the error of a step that somebody else closed, because its holder was lost."""

_UNREADABLE: Final = "unreadable"

OPEN = frozenset({StepState.GRANTED, StepState.RUNNING})
"""The states of a step whose grant is not settled."""


def capability_of(step: Step) -> CapabilityDescriptor:
    """The capability of a granted step as it was decided on; it may not be registered any more.

    Where the record cannot be read, one that may not be repeated and of whose costs nothing is known: what its call did
    is then for somebody to say, and what it had reserved beside EUR and calls stays spent.
    """
    try:
        return CapabilityDescriptor.model_validate(step.decision["facts"]["capability"])
    except (LookupError, TypeError, ValueError):
        logger.exception("what was decided of a call cannot be read", extra={"grant_id": str(step.grant_id)})
    return CapabilityDescriptor(
        id=step.capability, description=_UNREADABLE, mode=CapabilityMode.EXECUTE_WRITE, plugin=_UNREADABLE
    )


def grant_of(run: Run, step: Step) -> Grant:
    """The grant of a recorded step, as the new holder of its run needs it to close it."""
    if step.grant_id is None or step.span_id is None or step.grant_expires_at is None:
        raise ValueError(f"attempt {step.attempt} of step {step.step_index} of run {run.id} has no grant")
    return Grant(
        id=step.grant_id,
        tenant_id=run.tenant_id,
        run_id=run.id,
        step_index=step.step_index,
        attempt=step.attempt,
        step_key=step.step_key,
        fencing_token=run.fencing_token,
        span_id=step.span_id,
        expires_at=step.grant_expires_at,
    )


def outcome_of(step: Step, status: OutcomeStatus, message: str) -> Outcome:
    """How the call of an open step is closed by somebody who did not make it."""
    error = {"category": ABANDONED, "message": f"{step.capability}: {message}"}
    return Outcome(status=status, evidence=Evidence.REPORTED, error=error)
