"""Calls whose holder is gone: what their grants were, read back from the record of their steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.storage.ports import AdmissionStore, Connection
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
        stored = step.decision["facts"]["capability"]
    except (LookupError, TypeError):
        stored = None
    return read_capability(stored, capability_id=step.capability, grant_id=step.grant_id)


def read_capability(stored: Any, *, capability_id: str, grant_id: UUID | None) -> CapabilityDescriptor:
    """The same from what the record of the decision says of the capability."""
    try:
        return CapabilityDescriptor.model_validate(stored)
    except ValueError:
        logger.exception("what was decided of a call cannot be read", extra={"grant_id": str(grant_id)})
    return CapabilityDescriptor(
        id=capability_id, description=_UNREADABLE, mode=CapabilityMode.EXECUTE_WRITE, plugin=_UNREADABLE
    )


async def decided_capability(
    grant: Grant, *, storage: AdmissionStore, connection: Connection | None = None
) -> CapabilityDescriptor:
    """The same of a grant, read from the record of its decision.

    Raises:
        InvalidRequest: there is no such record, or none of a capability.
        StorageUnavailable: it cannot be read now.
    """
    stored = await storage.decided_on(
        grant.tenant_id, grant.run_id, grant.step_index, grant.attempt, connection=connection
    )
    if not isinstance(stored, Mapping):
        words = f"nothing is recorded of what grant {grant.id} was given for, so its call cannot be settled"
        raise InvalidRequest(words, field="grant")
    return read_capability(stored, capability_id=str(stored.get("id", "")), grant_id=grant.id)


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
