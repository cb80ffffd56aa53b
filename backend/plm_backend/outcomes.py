"""What became of a call: a job of the queue as an outcome of the control plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from plm_engine_core.agent_runtime.executor import OUTPUT_REFUSED
from plm_engine_core.control_plane import Begun, Outcome
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import OutcomeStatus
from plugin_substrate.errors import JobError, WireValueError
from plugin_substrate.queue import Job, JobStatus

_MOST_USAGE = Decimal(10) ** 9
_MOST_UNITS = 100
_LONGEST_UNIT = 100


def not_started(category: str, message: str) -> Outcome:
    """The call never left the host: nothing happened and nothing is charged."""
    return Outcome(status=OutcomeStatus.NOT_STARTED, error={"category": category, "message": message})


def outcome_of(
    capability: CapabilityDescriptor, job: Job, *, refusal: Begun | None, timed_out: bool, layers: Sequence[str]
) -> Outcome:
    """The outcome of an ended job; files in its output are still to be stored.

    A result counts even when it came after a cancel. A call whose end nobody saw is superseded by a repeat under the
    same step key when its capability is idempotent; otherwise its outcome is unknown until somebody says.
    """
    if refusal is not None:
        return not_started(refusal.reason.value if refusal.reason else "refused", refusal.message)
    if job.started_at is None:
        return not_started("not_started", job.error.message if job.error else "the call never left the host")
    usage = _usage(job.usage)
    if job.status is JobStatus.COMPLETED or job.result is not None:
        return Outcome(status=OutcomeStatus.SUCCEEDED, output=job.result, usage=usage, layers=layers)
    error = _error(job.error)
    if job.error is not None and job.error.error_type == WireValueError.__name__ and not job.error.outcome_known:
        # The plugin returned, so the call is over; repeating it would only bring the same result again.
        error = {**error, "category": OUTPUT_REFUSED, "message": f"the plugin's {job.error.message}"}
        return Outcome(status=OutcomeStatus.FAILED, error=error, usage=usage, layers=layers)
    if timed_out:
        sentence = f"{capability.id} did not end within its {capability.timeout_seconds:g} s"
        error = {**error, "category": "timeout", "message": sentence}
    if job.error is not None and not job.error.outcome_known:
        status = _unknown(capability)
    elif job.status is JobStatus.CANCELLED and not timed_out:
        status = OutcomeStatus.CANCELLED
    else:
        status = OutcomeStatus.FAILED
    return Outcome(status=status, error=error, usage=usage, layers=layers)


def result_lost(capability: CapabilityDescriptor, outcome: Outcome, error: Exception) -> Outcome:
    """The outcome of a call that succeeded, but whose files could not be kept."""
    message = f"the files that {capability.id} returned could not be stored: {error}"
    return replace(
        outcome,
        status=_unknown(capability),
        output=None,
        artifacts=(),
        error={"category": "artifact_store_failed", "message": message},
    )


def _unknown(capability: CapabilityDescriptor) -> OutcomeStatus:
    return OutcomeStatus.SUPERSEDED if capability.idempotent else OutcomeStatus.OUTCOME_UNKNOWN


def _usage(reported: Mapping[str, float]) -> dict[str, Decimal] | None:
    """What the plugin measured, or None when it reports what cannot be: then the reservation is charged."""
    if len(reported) > _MOST_UNITS:
        return None
    usage = {unit: Decimal(str(amount)) for unit, amount in reported.items()}
    for unit, amount in usage.items():
        if len(unit) > _LONGEST_UNIT or not unit.isprintable():
            return None
        if not (amount.is_finite() and 0 <= amount <= _MOST_USAGE):
            return None
    return usage


def _error(error: JobError | None) -> dict[str, Any]:
    if error is None:
        return {"category": "fatal", "message": "the plugin gave no reason"}
    return {
        "category": error.category.value,
        "message": error.message,
        "plugin": error.plugin_name or error.plugin_instance_id,
        "retriable": error.retriable,
        "fields_invalid": list(error.fields_invalid),
    }
