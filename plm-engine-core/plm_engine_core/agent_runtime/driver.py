"""The driver: moves one run forward, recorded step by recorded step.

It takes the run's lease, looks at the history, asks the agent, admits, dispatches and settles, and gives the lease
back. It holds nothing that is not in a row: killed at any point, another driver continues from what was recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from uuid import UUID

from plm_engine_core.agent_runtime.agent import Agent, AskInput, Finish, History, Propose, is_open
from plm_engine_core.agent_runtime.attempts import Place, claims_of, exhausted, lost_calls, next_place, repeats
from plm_engine_core.agent_runtime.dispatcher import Dispatcher
from plm_engine_core.agent_runtime.escalation import (
    ATTEMPTS_EXHAUSTED,
    Escalation,
    end_of,
    escalates,
    of_denied,
    of_exhausted,
    proposed_again,
)
from plm_engine_core.agent_runtime.executor import Executor
from plm_engine_core.agent_runtime.hold import Hold, held, moment
from plm_engine_core.agent_runtime.retry import TRANSIENT, patiently, pause_seconds
from plm_engine_core.agent_runtime.selector import Selector
from plm_engine_core.control_plane.admission.abandoned import OPEN, capability_of
from plm_engine_core.control_plane.admission.admit import Admission, Denied, Granted, Pending
from plm_engine_core.control_plane.admission.ask import InputRequest
from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.proposal import Proposal
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.events.signals import Interrupts, NoSignals
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.limits.leases import check_seconds
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.vocabulary import LockHolder, OutcomeStatus, Reason, RunState, StepState

logger = logging.getLogger(__name__)

AgentFactory = Callable[[Run], Agent]
"""Makes the agent of a run from what the run recorded of it."""

_AGENT_FAILED = "agent_failed"
_CAME_TO_NOTHING = (OutcomeStatus.NOT_STARTED, OutcomeStatus.SUPERSEDED)
_NOT_REPEATED = (
    "its run worker was lost in a call that may have had its effect, and as the capability is defined now it cannot be "
    "repeated safely; look at what it acts on, then start a new run"
)
_UNKNOWN_MS = 20_000  # somebody has to say first what became of the call that holds the resource
_NOT_NOW = (Reason.STORAGE_BUSY, Reason.POLICY_MISSING, Reason.POLICY_CHANGED)  # nothing was booked


class Driver:
    """Drives runs of this node, one call of `drive` each; any number may work at once.

    Raises:
        InvalidRequest: `lease_seconds` is no time that a lease can last.
    """

    def __init__(
        self,
        *,
        control_plane: ControlPlane,
        agents: AgentFactory,
        selector: Selector,
        owner: str,
        lease_seconds: float = 30.0,
        interrupts: Interrupts | None = None,
    ) -> None:
        check_seconds(lease_seconds)
        self._interrupts: Interrupts = interrupts or NoSignals()
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
        runs = self._control_plane.storage.runs
        asked_at = moment()
        lease = await runs.take(tenant_id, run_id, owner=self._owner, seconds=self._lease_seconds)
        if lease is None:
            return None
        try:
            with self._interrupts.interrupts(tenant_id, run_id) as wake:
                holding = held(
                    runs,
                    lease,
                    seconds=self._lease_seconds,
                    asked_at=asked_at,
                    wake=wake,
                    cancel_seconds=self._control_plane.cancel_seconds,
                )
                async with holding as hold:
                    await self._close_abandoned(hold)
                    return await self._advance(hold)
        except FencingLost:
            logger.warning("another run worker took the run over", extra={"run_id": str(run_id)})
            return None

    async def _close_abandoned(self, hold: Hold) -> None:
        """Close the grant of a driver that is gone, without guessing what its call did."""
        steps = await self._control_plane.storage.runs.steps(hold.run.tenant_id, hold.run.id)
        last = steps[-1] if steps else None
        if last is None or last.state not in OPEN:
            return
        decided_on = capability_of(last)
        if last.state is StepState.GRANTED:
            status, message = OutcomeStatus.NOT_STARTED, "its run worker was lost before the call began"
        elif repeats(self._control_plane.registry.get(last.capability), decided_on):
            status, message = OutcomeStatus.SUPERSEDED, "its run worker was lost; the step is repeated"
        else:
            status, message = OutcomeStatus.OUTCOME_UNKNOWN, "its run worker was lost; it may have had its effect"
        await patiently(
            lambda: self._control_plane.close_abandoned(
                hold.run, last, status, message, fencing_token=hold.fencing_token
            )
        )

    async def _advance(self, hold: Hold) -> RunState:
        runs = self._control_plane.storage.runs
        steps: list[Step] = []
        while True:
            current = await runs.get(hold.run.tenant_id, hold.run.id)
            if current.state is not RunState.RUNNING:
                return current.state  # settlement parked it
            if current.cancel_requested:
                end = Finish(succeeded=False, reason="cancelled", message="cancelled on request")
                return await self._finish(hold, RunState.CANCELLED, end)
            last = steps[-1].step_index if steps else 0  # under this lease nothing before it can change
            steps = [step for step in steps if step.step_index < last]
            steps += await runs.steps(current.tenant_id, current.id, since=last)
            history = History(run=current, steps=tuple(steps))
            move = self._next(history)
            left = await self._end(hold, move) if isinstance(move, Finish) else await self._step(hold, history, move)
            if left is not None:
                return left

    def _next(self, history: History) -> Propose | AskInput | Escalation | Finish:
        """What is open, or escalated, is repeated exactly as it was recorded; else the agent says what comes next."""
        last = history.steps[-1] if history.steps else None
        failure = escalates(last) if last is not None else None
        if last is not None and failure is not None:
            if last.state is not StepState.SUCCEEDED:
                return end_of(last, failure)
            return _as_recorded(history, proposed_again(history.steps, failure) or last)
        if last is not None and is_open(last):
            return _as_recorded(history, last)
        move = self._turn(history)
        if isinstance(move, Finish) and not move.succeeded and move.reason != _AGENT_FAILED:
            raised = of_denied(history.steps)
            return raised if raised is not None and self._escalates() else move
        return move

    def _turn(self, history: History) -> Propose | AskInput | Finish:
        """What the agent says comes next."""
        own = replace(history, steps=tuple(step for step in history.steps if escalates(step) is None))
        try:
            move = self._agents(history.run).next(own)
            if not isinstance(move, Propose | AskInput | Finish):
                raise TypeError(f"an agent proposes, asks or finishes, this one answered {type(move).__name__}")  # noqa: TRY301  # the handler is the answer
        except Exception as error:  # an agent's defect ends its run
            logger.exception("the agent failed", extra={"run_id": str(history.run.id)})
            return Finish(succeeded=False, reason=_AGENT_FAILED, message=f"{type(error).__name__}: {error}")
        return move

    def _escalates(self) -> bool:
        """Whether humans are asked before a run fails, by the policy that decides now.

        Raises:
            StorageUnavailable: this process cannot load it.
        """
        return self._control_plane.policy.approval.asks_on_failure

    async def _step(self, hold: Hold, history: History, move: Propose | AskInput | Escalation) -> RunState | None:
        """Admit and carry out one proposal, or ask; answers a state when the run is to be left there."""
        place = next_place(history.steps[-1] if history.steps else None)
        problem = exhausted(history.steps, place) if not isinstance(move, Escalation) else ""
        if problem:
            raised = of_exhausted(history.steps, problem) if self._escalates() else None
            if raised is None:
                return await self._fail(hold, ATTEMPTS_EXHAUSTED, f"step {move.step_id}: {problem}")
            move = raised
        try:
            if isinstance(move, AskInput | Escalation):
                return await self._ask(hold, place, move)
            proposal = _proposal(hold, place, move)
            capability = self._control_plane.registry.get(proposal.capability)
            executor = self._selector.select(capability) if capability is not None else None
            lost = lost_calls(history.steps, place)
            if not all(repeats(capability, each) for each in lost):
                return await self._fail(hold, "capability_changed", f"step {move.step_id}: {_NOT_REPEATED}")
            if capability is not None and executor is None:
                problem = f"no plugin of this node offers {proposal.capability}"
                return await self._fail(hold, "capability_unavailable", problem)
            admission = await self._admit(proposal)
        except InvalidRequest as error:
            return await self._fail(hold, "invalid_proposal", f"step {move.step_id}: {error}")
        match admission:
            case Pending():
                return RunState.AWAITING_APPROVAL
            case Denied(reason=Reason.HALTED):
                return await self._park_halted(hold, admission)
            case Denied(reason=Reason.RATE_LIMIT_EXCEEDED as reason, retry_after_ms=wait):
                await hold.pause(pause_seconds(reason.value, place.attempt, retry_after_ms=wait))
            case Denied(reason=Reason.RESOURCE_LOCKED) as locked:
                return await self._wait_for_resource(hold, place, locked)
            case Granted(grant=grant, capability=decided_on):
                if decided_on is not capability:  # it was defined anew meanwhile
                    repeatable = all(repeats(decided_on, each) for each in lost)
                    executor = self._selector.select(decided_on) if repeatable else None
                outcome = await self._carry_out(hold, grant, executor, proposal, decided_on)
                if outcome.status in _CAME_TO_NOTHING:
                    await hold.pause(pause_seconds(TRANSIENT, place.attempt))
        return None

    async def _ask(self, hold: Hold, place: Place, move: AskInput | Escalation) -> RunState | None:
        """Put a question to humans; what ends its ticket ends the step, so that it is not asked again."""
        request = _question(hold, place, move)
        answer = await patiently(lambda: _booked(self._control_plane.ask(request)))
        if isinstance(answer, Denied):
            return await self._park_halted(hold, answer) if answer.reason is Reason.HALTED else None
        return RunState.AWAITING_APPROVAL

    async def _park_halted(self, hold: Hold, refusal: Denied) -> RunState:
        halted = Finish(succeeded=False, reason=Reason.HALTED.value, message=refusal.message)
        return await self._finish(hold, RunState.HALTED, halted)

    async def _wait_for_resource(self, hold: Hold, place: Place, refusal: Denied) -> RunState | None:
        """Give the run's place to others meanwhile, as to the run that holds the resource and whose worker was lost."""
        if hold.stop.is_set():
            return None
        unknown = refusal.lock.get("held") == LockHolder.UNKNOWN
        least = max(refusal.retry_after_ms, _UNKNOWN_MS if unknown else 0)
        wait = pause_seconds(refusal.reason.value, place.attempt, retry_after_ms=least)
        waiting = Finish(succeeded=False, reason=refusal.reason.value, message=refusal.message)
        return await self._finish(hold, RunState.QUEUED, waiting, again_after_seconds=wait)

    async def _admit(self, proposal: Proposal) -> Admission:
        return await patiently(lambda: _booked(self._control_plane.admit(proposal)))

    async def _carry_out(
        self, hold: Hold, grant: Grant, executor: Executor | None, proposal: Proposal, capability: CapabilityDescriptor
    ) -> Outcome:
        """Have the call made, stop it when the run must stop, and settle."""
        if executor is None:
            problem = f"{proposal.capability} was defined anew, and cannot be carried out here as it was granted"
            error = {"category": "capability_changed", "message": problem}
            outcome = Outcome(status=OutcomeStatus.NOT_STARTED, error=error)
            await self._settle(hold, grant, outcome, capability)
            return outcome
        if hold.halt is not None:  # admission has just seen that it was lifted
            hold.halt = None
            hold.stop.clear()
        call = asyncio.create_task(self._dispatcher.call(hold, grant, executor, proposal, capability))
        stop = asyncio.create_task(hold.stop.wait())
        halted = False
        try:
            await asyncio.wait({call, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                halted = hold.halt is not None
                await executor.cancel(grant)
            outcome = await call
        finally:
            for task in (call, stop):
                task.cancel()
            await asyncio.gather(call, stop, return_exceptions=True)
        if halted and outcome.status is OutcomeStatus.CANCELLED and capability.idempotent:
            outcome = replace(outcome, error={**(outcome.error or {}), "reason": Reason.HALTED.value})
        await self._settle(hold, grant, outcome, capability)
        return outcome

    async def _settle(self, hold: Hold, grant: Grant, outcome: Outcome, capability: CapabilityDescriptor) -> None:
        await patiently(
            lambda: self._control_plane.settle(
                grant,
                outcome,
                capability=capability,
                fencing_token=hold.fencing_token,
                trace_id=hold.run.trace_id,
                actor=hold.run.principal.actor,
            )
        )

    async def _end(self, hold: Hold, end: Finish) -> RunState:
        try:
            return await self._finish(hold, RunState.SUCCEEDED if end.succeeded else RunState.FAILED, end)
        except InvalidRequest as error:
            return await self._fail(hold, "result_refused", f"the agent's result cannot be kept: {error}")

    async def _fail(self, hold: Hold, reason: str, message: str) -> RunState:
        return await self._finish(hold, RunState.FAILED, Finish(succeeded=False, reason=reason, message=message))

    async def _finish(self, hold: Hold, state: RunState, end: Finish, *, again_after_seconds: float = 0.0) -> RunState:
        return await patiently(
            lambda: self._control_plane.finish(
                hold.run,
                fencing_token=hold.fencing_token,
                state=state,
                actor=f"worker:{self._owner}",
                reason=end.reason,
                message=_printable(end.message),
                result=end.result,
                again_after_seconds=again_after_seconds,
            )
        )


async def _booked(answering: Awaitable[Admission]) -> Admission:
    """The answer, once there is one in the books.

    Raises:
        StorageUnavailable: nothing was booked, or nobody knows; the same may be said again.
    """
    answer = await answering
    if isinstance(answer, Denied) and answer.reason in _NOT_NOW:
        raise StorageUnavailable(answer.message)
    return answer


def _as_recorded(history: History, step: Step) -> Propose | Finish:
    """The same proposal as that of an attempt, word for word."""
    claims = claims_of(step)
    if claims is None:
        problem = f"what was decided of attempt {step.attempt} of step {step.step_id} cannot be read any more"
        logger.error("a record cannot be read", extra={"run_id": str(history.run.id)})
        return Finish(succeeded=False, reason="record_damaged", message=problem)
    return Propose(
        step_id=step.step_id,
        capability=step.capability,
        resource=step.resource,
        arguments=step.arguments,
        claims=claims,
    )


def _question(hold: Hold, place: Place, move: AskInput | Escalation) -> InputRequest:
    """What the agent asks, or the driver before it fails the run, at its place in the run."""
    return InputRequest(
        tenant_id=hold.run.tenant_id,
        run_id=hold.run.id,
        fencing_token=hold.fencing_token,
        step_index=place.step_index,
        attempt=place.attempt,
        step_id=move.step_id,
        question=move.question,
        schema=move.schema,
        principal=hold.run.principal,
        agent=str(hold.run.agent.get("name", "")),
        escalates=move.failure if isinstance(move, Escalation) else None,
    )


def _proposal(hold: Hold, place: Place, move: Propose) -> Proposal:
    """What the agent would like, at its place in the run and on behalf of the run's principal."""
    return Proposal(
        tenant_id=hold.run.tenant_id,
        run_id=hold.run.id,
        fencing_token=hold.fencing_token,
        step_index=place.step_index,
        attempt=place.attempt,
        ticket_id=place.ticket_id,
        step_id=move.step_id,
        capability=move.capability,
        resource=move.resource,
        arguments=move.arguments,
        principal=hold.run.principal,
        agent=str(hold.run.agent.get("name", "")),
        claims=move.claims,
    )


def _printable(text: str | None) -> str | None:
    """Text that can be stored, whatever an agent or plugin put into it."""
    return text and text.encode(errors="backslashreplace").decode().replace("\x00", "\\x00")
