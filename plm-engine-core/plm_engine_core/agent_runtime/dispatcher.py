"""Carries one grant from `begin` to a settled outcome."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plm_engine_core.agent_runtime.executor import Call, Executor, Progress
from plm_engine_core.control_plane.admission.grants import Begun, Grant
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.runs.run import Lease
from plm_engine_core.control_plane.vocabulary import OutcomeStatus

logger = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 16 * 1024 * 1024


class Dispatcher:
    """Makes the call of a grant through an executor and turns whatever happens into an outcome."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def call(
        self, lease: Lease, grant: Grant, executor: Executor, capability_id: str, step: Mapping[str, Any], actor: str
    ) -> Outcome:
        """Begin, execute, and answer what became of it; raises only what concerns the run worker itself.

        Raises:
            FencingLost: the run was taken over before the call could begin.
        """
        capability = self._control_plane.capability(capability_id)
        began = False

        async def begin() -> Begun:
            nonlocal began
            began = True  # from here on the effect cannot be excluded, whatever happens to the answer
            begun = await self._control_plane.begin(grant, fencing_token=lease.fencing_token, actor=actor)
            began = begun.accepted
            return begun

        call = Call(
            tenant_id=grant.tenant_id,
            run_id=grant.run_id,
            step_id=step["step_id"],
            step_key=grant.step_key,
            capability=capability,
            resource=step["resource"],
            arguments=step["arguments"],
            traceparent=f"00-{lease.run.trace_id}-{grant.span_id}-01",
            trace_id=lease.run.trace_id,
            begin=begin,
        )
        try:
            outcome = await executor.execute(call, grant, self._progress(grant, step["step_id"]))
        except Exception as error:  # an executor's defect becomes the outcome of its call
            logger.exception("the executor failed", extra={"grant_id": str(grant.id)})
            status = OutcomeStatus.OUTCOME_UNKNOWN if began else OutcomeStatus.NOT_STARTED
            return Outcome(status=status, error={"category": "executor_failed", "message": str(error)})
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

    PostgreSQL's JSON knows neither NUL nor lone surrogates (RFC 8259, section 8.2), and no row should be arbitrarily
    large.
    """
    problem = _problem(outcome.output) or _problem(outcome.error)
    if not problem:
        return outcome
    return replace(
        outcome,
        status=OutcomeStatus.FAILED,
        output=None,
        error={"category": "output_refused", "message": f"the plugin's result {problem}"},
        artifacts=(),
    )


def _problem(value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    if len(text) > MAX_OUTPUT_BYTES:
        return f"has {len(text)} bytes, at most {MAX_OUTPUT_BYTES} are kept; return large results as files"
    return _bad_text(value)


def _bad_text(value: Any) -> str:
    if isinstance(value, str):
        if "\x00" in value:
            return "holds a NUL character"
        return "" if value.isascii() or _encodes(value) else "holds half of a surrogate pair"
    if isinstance(value, Mapping):
        return next((problem for pair in value.items() for each in pair if (problem := _bad_text(each))), "")
    if isinstance(value, list | tuple):
        return next((problem for each in value if (problem := _bad_text(each))), "")
    return ""


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
