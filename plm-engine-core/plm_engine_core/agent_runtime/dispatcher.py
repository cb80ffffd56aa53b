"""Carries one grant from `begin` to a settled outcome."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from plm_shared.canonical_json import storable_json

from plm_engine_core.agent_runtime.executor import OUTPUT_REFUSED, Call, Executor, Progress
from plm_engine_core.agent_runtime.hold import Hold
from plm_engine_core.control_plane.admission.grants import Begun, Grant
from plm_engine_core.control_plane.admission.proposal import Proposal
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, Reason
from plm_engine_core.control_plane.why import not_begun

logger = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 16 * 1024 * 1024
MAX_ERROR_BYTES = 256 * 1024


class Dispatcher:
    """Makes the call of a grant through an executor and turns whatever happens into an outcome."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def call(
        self, hold: Hold, grant: Grant, executor: Executor, proposal: Proposal, capability: CapabilityDescriptor
    ) -> Outcome:
        """Have the call made by the definition it was granted under, and answer what became of it.

        It never raises for what an executor does.
        """
        began = False

        async def begin() -> Begun:
            nonlocal began
            begun = await self._control_plane.begin(
                grant, fencing_token=hold.fencing_token, actor=proposal.principal.actor
            )
            if begun.accepted and not hold.surely_held:
                # This process was away: another may hold the run by now, and this call would be beside its books.
                begun = not_begun(Reason.LEASE_EXPIRED, "the lease ran out before the call could leave the host")
            began = began or begun.accepted
            return begun

        call = Call(
            tenant_id=grant.tenant_id,
            run_id=grant.run_id,
            step_id=proposal.step_id,
            step_key=grant.step_key,
            capability=capability,
            resource=proposal.resource,
            arguments=proposal.arguments,
            traceparent=f"00-{hold.run.trace_id}-{grant.span_id}-01",
            trace_id=hold.run.trace_id,
            begin=begin,
        )
        try:
            outcome = await executor.execute(call, grant, self._progress(grant, proposal.step_id))
        except Exception as error:  # an executor's defect becomes the outcome of its call
            logger.exception("the executor failed", extra={"grant_id": str(grant.id)})
            # A call may leave the host only after `begin` accepted; from then on its effect cannot be excluded.
            status = OutcomeStatus.OUTCOME_UNKNOWN if began else OutcomeStatus.NOT_STARTED
            if began and call.capability.idempotent:
                status = OutcomeStatus.SUPERSEDED
            outcome = Outcome(status=status, error={"category": "executor_failed", "message": str(error)})
        return _storable(outcome)

    def _progress(self, grant: Grant, step_id: str) -> Progress:
        async def report(fraction: float, message: str) -> None:
            await self._control_plane.signals.progress(
                grant.tenant_id,
                grant.run_id,
                {"step": grant.step_index, "step_id": step_id, "fraction": fraction, "message": message[:500]},
            )

        return report


def _storable(outcome: Outcome) -> Outcome:
    """The outcome, or in place of a result that the books cannot hold, the failure that says so.

    The effect happened all the same, so what it used is kept.
    """
    problem = _problem(outcome.output, "output", MAX_OUTPUT_BYTES) or _problem(outcome.error, "error", MAX_ERROR_BYTES)
    if not problem:
        return outcome
    failed = outcome.status is OutcomeStatus.SUCCEEDED
    return replace(
        outcome,
        status=OutcomeStatus.FAILED if failed else outcome.status,
        output=None,
        error={"category": OUTPUT_REFUSED, "message": f"the plugin's {problem}"},
        artifacts=(),
    )


def _problem(value: Any, name: str, most: int) -> str:
    try:
        size = len(storable_json(value, root=name).encode())
    except (ValueError, RecursionError) as error:
        return str(error)
    return f"{name} has {size} bytes, at most {most} are kept; return large results as files" if size > most else ""
