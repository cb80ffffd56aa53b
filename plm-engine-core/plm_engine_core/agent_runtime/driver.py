"""The driver: moves one run forward, recorded step by recorded step.

It takes the run's lease, looks at the history, asks the agent, admits, dispatches and settles, and gives the lease
back. It holds nothing that is not in a row: killed at any point, another driver continues from what was recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from plm_engine_core.agent_runtime.agent import Agent, Finish, History, Propose, is_open, refusal
from plm_engine_core.agent_runtime.dispatcher import Dispatcher
from plm_engine_core.agent_runtime.executor import Executor
from plm_engine_core.agent_runtime.retry import MAX_ATTEMPTS, MAX_PROPOSALS, classify
from plm_engine_core.agent_runtime.selector import Selector
from plm_engine_core.control_plane.admission.admit import Denied, Granted, Pending
from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.proposal import Proposal
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.errors import FencingLost, StorageUnavailable
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.runs.run import Lease, Run, Step
from plm_engine_core.control_plane.vocabulary import Evidence, OutcomeStatus, Reason, RunState, StepState

logger = logging.getLogger(__name__)

AgentFactory = Callable[[Run], Agent]
"""Makes the agent of a run from what the run recorded of it."""


@dataclass(kw_only=True)
class _Hold:
    """A lease while it is held, and what its heartbeat heard."""

    lease: Lease
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    cancel_requested: bool = False
    halt: Mapping[str, Any] | None = None

    @property
    def run(self) -> Run:
        return self.lease.run


class Driver:
    """Drives runs of this node, one call of `drive` each; any number may work at once."""

    def __init__(
        self,
        *,
        control_plane: ControlPlane,
        agents: AgentFactory,
        selector: Selector,
        owner: str,
        lease_seconds: float = 30.0,
    ) -> None:
        self._control_plane = control_plane
        self._agents = agents
        self._selector = selector
        self._dispatcher = Dispatcher(control_plane)
        self._owner = owner
        self._lease_seconds = lease_seconds

    async def drive(self, tenant_id: UUID, run_id: UUID) -> RunState | None:
        """Move a run as far as it goes now: to an end, or to where it is parked.

        Answers the state it was left in, or None when there was nothing to do or another driver took over. A doubled
        call is harmless: the lease decides.

        Raises:
            StorageUnavailable: the database could not be reached; the lease runs out and another driver continues.
        """
        lease = await self._control_plane.storage.runs.take(
            tenant_id, run_id, owner=self._owner, seconds=self._lease_seconds
        )
        if lease is None:
            return None
        try:
            async with self._held(lease) as hold:
                await self._close_abandoned(hold)
                return await self._advance(hold)
        except FencingLost:
            logger.warning("another run worker took the run over", extra={"run_id": str(run_id)})
            return None

    @asynccontextmanager
    async def _held(self, lease: Lease) -> AsyncIterator[_Hold]:
        """Renews the lease in the background, and hears of cancels and halts on the way."""
        hold = _Hold(lease=lease)
        task = asyncio.create_task(self._heartbeat(hold), name=f"lease of {lease.run.id}")
        try:
            yield hold
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _heartbeat(self, hold: _Hold) -> None:
        while not hold.lost:
            await asyncio.sleep(self._lease_seconds / 3)
            try:
                beat = await self._control_plane.storage.runs.renew(
                    hold.run.tenant_id,
                    hold.run.id,
                    fencing_token=hold.lease.fencing_token,
                    seconds=self._lease_seconds,
                )
            except StorageUnavailable:
                logger.warning("the lease could not be renewed", extra={"run_id": str(hold.run.id)})
                continue
            hold.lost = not beat.held
            hold.cancel_requested = beat.cancel_requested
            hold.halt = beat.halt
            if hold.lost or hold.cancel_requested or hold.halt is not None:
                hold.stop.set()

    async def _close_abandoned(self, hold: _Hold) -> None:
        """Close the grant of a driver that is gone, without guessing what its call did."""
        steps = await self._steps(hold)
        last = steps[-1] if steps else None
        if last is None or last.grant_id is None or last.state not in (StepState.GRANTED, StepState.RUNNING):
            return
        if last.state is StepState.GRANTED:
            outcome = Outcome(
                status=OutcomeStatus.NOT_STARTED, error={"category": "abandoned", "message": "never begun"}
            )
        elif self._control_plane.capability(last.capability).idempotent:
            outcome = Outcome(
                status=OutcomeStatus.SUPERSEDED,
                error={"category": "abandoned", "message": "its run worker was lost; the step is repeated"},
            )
        else:
            outcome = Outcome(
                status=OutcomeStatus.OUTCOME_UNKNOWN,
                evidence=Evidence.REPORTED,
                error={
                    "category": "abandoned",
                    "message": f"the run worker was lost during {last.capability}; it may have had its effect",
                },
            )
        await self._settle(hold, _grant(hold.run, last), outcome, last.capability)

    async def _advance(self, hold: _Hold) -> RunState:
        agent = self._agents(hold.run)
        while True:
            current = await self._control_plane.storage.runs.get(hold.run.tenant_id, hold.run.id)
            if current.state is not RunState.RUNNING:
                return current.state  # settlement parked it
            if current.cancel_requested:
                return await self._finish(hold, RunState.CANCELLED, reason="cancelled", message="cancelled on request")
            history = History(run=current, steps=await self._steps(hold))
            move = agent.next(history)
            if isinstance(move, Finish):
                return await self._finish(
                    hold,
                    RunState.SUCCEEDED if move.succeeded else RunState.FAILED,
                    reason=move.reason,
                    message=move.message,
                    result=move.result,
                )
            parked = await self._step(hold, history, move)
            if parked is not None:
                return parked

    async def _step(self, hold: _Hold, history: History, move: Propose) -> RunState | None:
        """Admit and carry out one proposal; answers a state when the run is to be left there."""
        proposal, exhausted = self._proposal(hold, history, move)
        if exhausted:
            return await self._finish(hold, RunState.FAILED, reason="attempts_exhausted", message=exhausted)
        capability = self._control_plane.registry.get(move.capability)
        executor = self._selector.select(capability) if capability is not None else None
        if capability is not None and executor is None:
            return await self._finish(
                hold,
                RunState.FAILED,
                reason="capability_unavailable",
                message=f"no plugin of this node offers {move.capability}",
            )
        admission = await self._admit(proposal)
        match admission:
            case Pending():
                return RunState.AWAITING_APPROVAL
            case Denied(reason=Reason.HALTED):
                return await self._finish(hold, RunState.HALTED, reason=Reason.HALTED.value, message=admission.message)
            case Denied():
                await self._wait_before_retry(admission, proposal.attempt)
            case Granted(grant=grant) if executor is not None:
                await self._carry_out(hold, grant, executor, proposal)
        return None

    async def _admit(self, proposal: Proposal) -> Any:
        """Admit; while storage is busy nothing was booked, so the same command is sent again."""
        attempt = 1
        while True:
            admission = await self._control_plane.admit(proposal)
            if not (isinstance(admission, Denied) and admission.reason is Reason.STORAGE_BUSY):
                return admission
            decision = classify(admission.reason.value, attempt)
            if not decision.retry:
                raise StorageUnavailable(admission.message)
            await asyncio.sleep(decision.backoff_ms / 1000)
            attempt += 1

    async def _wait_before_retry(self, denied: Denied, attempt: int) -> None:
        decision = classify(denied.reason.value, attempt, retry_after_ms=denied.retry_after_ms)
        if decision.retry:
            await asyncio.sleep(decision.backoff_ms / 1000)

    async def _carry_out(self, hold: _Hold, grant: Grant, executor: Executor, proposal: Proposal) -> None:
        step = {"step_id": proposal.step_id, "resource": proposal.resource, "arguments": proposal.arguments}
        call = asyncio.create_task(
            self._dispatcher.call(hold.lease, grant, executor, proposal.capability, step, hold.run.principal.actor)
        )
        stop = asyncio.create_task(hold.stop.wait())
        try:
            await asyncio.wait({call, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                await executor.cancel(grant)
            outcome = await call
        finally:
            stop.cancel()
            call.cancel()
        await self._settle(hold, grant, outcome, proposal.capability)

    async def _settle(self, hold: _Hold, grant: Grant, outcome: Outcome, capability_id: str) -> None:
        """Settle; a lost reply is answered by settling again, which changes nothing the second time."""
        attempt = 1
        while True:
            try:
                await self._control_plane.settle(
                    grant,
                    outcome,
                    capability_id=capability_id,
                    fencing_token=hold.lease.fencing_token,
                    trace_id=hold.run.trace_id,
                    actor=hold.run.principal.actor,
                )
            except StorageUnavailable:
                decision = classify(Reason.STORAGE_BUSY.value, attempt)
                if not decision.retry:
                    raise
                await asyncio.sleep(decision.backoff_ms / 1000)
                attempt += 1
            else:
                return

    async def _finish(
        self,
        hold: _Hold,
        state: RunState,
        *,
        reason: str | None = None,
        message: str | None = None,
        result: Any = None,
    ) -> RunState:
        await self._control_plane.finish(
            hold.run,
            fencing_token=hold.lease.fencing_token,
            state=state,
            actor=f"worker:{self._owner}",
            reason=reason,
            message=message,
            result=result,
        )
        return state

    async def _steps(self, hold: _Hold) -> list[Step]:
        return list(await self._control_plane.storage.runs.steps(hold.run.tenant_id, hold.run.id))

    def _proposal(self, hold: _Hold, history: History, move: Propose) -> tuple[Proposal, str]:
        """The proposal with its place in the run, and a sentence when that step was tried too often."""
        last = history.steps[-1] if history.steps else None
        index, attempt, ticket = 0, 1, None
        if last is not None:
            repeats = is_open(last) or last.state in (StepState.DENIED, StepState.STEERED)
            index = last.step_index if repeats else last.step_index + 1
            waiting = last.state is StepState.AWAITING_APPROVAL
            attempt = last.attempt + (0 if waiting else 1) if repeats else 1
            ticket = last.ticket_id if waiting else None
        return (
            Proposal(
                tenant_id=hold.run.tenant_id,
                run_id=hold.run.id,
                fencing_token=hold.lease.fencing_token,
                step_index=index,
                attempt=attempt,
                step_id=move.step_id,
                capability=move.capability,
                resource=move.resource,
                arguments=move.arguments,
                principal=hold.run.principal,
                ticket_id=ticket,
            ),
            _exhausted(history, index, attempt, move),
        )


def _exhausted(history: History, index: int, attempt: int, move: Propose) -> str:
    tries = [step for step in history.steps if step.step_index == index and step.attempt < attempt]
    refused = [step for step in tries if step.state in (StepState.DENIED, StepState.STEERED) and not is_open(step)]
    if len(refused) < MAX_PROPOSALS and len(tries) < MAX_ATTEMPTS:
        return ""
    _, message = refusal(tries[-1])
    return f"step {move.step_id} was refused or came to nothing {len(tries)} times; the last time: {message}"


def _grant(run: Run, step: Step) -> Grant:
    """The grant of a recorded step, as its new holder needs it to close it."""
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
