"""How the calls of governed functions are opened, held and closed, each as a run of its own."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from plm_engine_core.agent_runtime.current_call import CallInProgress, pass_on
from plm_engine_core.agent_runtime.governor import Governor
from plm_engine_core.agent_runtime.hold import Hold, held, moment
from plm_engine_core.agent_runtime.refusals import CallDenied, CallPending, CallSteered
from plm_engine_core.control_plane.admission.admit import Admission, Denied, Granted, Pending, Steered
from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.proposal import Proposal
from plm_engine_core.control_plane.admission.settle import Outcome
from plm_engine_core.control_plane.admission.withheld import Withheld
from plm_engine_core.control_plane.errors import Conflict, ControlPlaneError, StorageUnavailable
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.runs import Lease, Run
from plm_engine_core.control_plane.runs.request import RunRequest
from plm_engine_core.control_plane.vocabulary import ExecutorKind, OutcomeStatus, Reason, RunKind, RunState
from plm_engine_core.control_plane.why import halts_over, lifting_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[ControlPlane], Coroutine[Any, Any, None]]

_PAUSES = (0.05, 0.2, 1.0)  # seconds; asking and settling again are safe


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A call that may be made now, once."""

    run: Run
    lease: Lease
    grant: Grant
    capability: CapabilityDescriptor
    call: CallInProgress
    keeping: AsyncExitStack


class GovernedCalls:
    """The calls of functions under a governor: opens each with a proposal, holds it while it is made, and closes it."""

    def __init__(self, by: Governor) -> None:
        self._by = by

    def require(self, capability: str) -> None:
        """Refuse a capability that is not registered: InvalidRequest."""

        async def look(core: ControlPlane) -> None:
            core.capability(capability)

        self._by.plane.thread.block(lambda: self._by.plane.on_core(look))

    def wait(
        self, work: Callable[[ControlPlane], Coroutine[Any, Any, T]], *, unheard: Callable[[T], Work] | None = None
    ) -> T:
        """Do `work` on the core, waiting. It is done whoever is interrupted, and `unheard` with what nobody is told."""
        return self._by.plane.thread.run(lambda: self._by.plane.on_core(work), unheard=self._on_core(unheard))

    async def away(
        self, work: Callable[[ControlPlane], Coroutine[Any, Any, T]], *, unheard: Callable[[T], Work] | None = None
    ) -> T:
        """The same from another event loop."""
        return await self._by.plane.thread.away(lambda: self._by.plane.on_core(work), unheard=self._on_core(unheard))

    def _on_core(self, unheard: Callable[[T], Work] | None) -> Callable[[T], Coroutine[Any, Any, None]]:
        async def nothing(core: ControlPlane) -> None:
            """Nobody needs to hear of it."""

        return lambda result: self._by.plane.on_core(nothing if unheard is None else unheard(result))

    def never_made(self, opened: Opened) -> Work:
        """Close a call that nobody makes: who asked for it was interrupted before it was told that it may."""

        async def close(core: ControlPlane) -> None:
            try:
                await self.close_call(core, opened, Outcome(status=OutcomeStatus.NOT_STARTED))
            except ControlPlaneError:
                logger.warning("recovery has to close a call that was never made", extra={"run_id": str(opened.run.id)})

        return close

    async def open_call(
        self, core: ControlPlane, capability: str, resource: str, arguments: Mapping[str, Any]
    ) -> Opened:
        """Propose one call as a run of its own, and begin it where that is granted.

        Its run is given nothing; what the call is given are its arguments.

        Raises:
            InputRefused: an evaluator does not let a run be created with nothing as its input.
            CallRefused: it is not.
        """
        request = RunRequest(
            tenant_id=self._by.tenant_id,
            run_id=new_id(),
            agent={"name": self._by.agent},
            input={},
            trace_id=secrets.token_hex(16),
            run_group_id=self._by.run_group_id,
            kind=RunKind.EXTERNAL,
        )
        run, _ = await core.create_run(request, principal=self._by.principal)
        return await self.propose(core, run, capability, resource, arguments, ticket_id=None)

    async def propose(
        self,
        core: ControlPlane,
        run: Run,
        capability: str,
        resource: str,
        arguments: Mapping[str, Any],
        *,
        ticket_id: UUID | None,
    ) -> Opened:
        """Propose the call of a run, for the first time or with the ticket that was opened then."""
        asked_at = moment()
        lease = await core.storage.runs.take(
            run.tenant_id, run.id, owner=self._by.agent, seconds=self._by.lease_seconds, kind=RunKind.EXTERNAL
        )
        if lease is None:
            raise await self._not_takeable(core, run, resumed=ticket_id is not None)
        proposal = Proposal(
            tenant_id=run.tenant_id,
            run_id=run.id,
            fencing_token=lease.fencing_token,
            step_index=0,
            attempt=1,
            step_id="call",
            capability=capability,
            resource=resource,
            arguments=arguments,
            principal=self._by.principal,
            executor_kind=ExecutorKind.EXTERNAL,
            ticket_id=ticket_id,
            agent=self._by.agent,
        )
        async with AsyncExitStack() as keeping:
            hold = await keeping.enter_async_context(
                held(
                    core.storage.runs,
                    lease,
                    seconds=self._by.lease_seconds,
                    asked_at=asked_at,
                    wake=asyncio.Event(),
                    cancel_seconds=core.cancel_seconds,
                )
            )
            admission = await self._admitted(core, lease, proposal)
            if isinstance(admission, Granted):
                call = CallInProgress(run.id)
                await keeping.enter_async_context(_passed_on(hold, call))
                opened = Opened(
                    run=lease.run,
                    lease=lease,
                    grant=admission.grant,
                    capability=admission.capability,
                    call=call,
                    keeping=keeping.pop_all(),
                )
                return await self._held_still(core, hold, opened)
            if not isinstance(admission, Pending):
                reason = admission.reason if isinstance(admission, Denied) else Reason.STEERED
                with suppress(Conflict):  # a grant of which nobody was told is open; recovery closes it
                    await self._finish(core, lease, RunState.FAILED, reason=reason.value, message=admission.message)
            raise _refusal(run, admission)

    async def _admitted(self, core: ControlPlane, lease: Lease, proposal: Proposal) -> Admission:
        """The answer to a proposal, whose grant it uses up; it is asked for again where it may have got lost.

        The run is held all along, and the call not made yet: with a grant that began unheard of it still may be.
        """
        try:
            for pause in (*_PAUSES, None):
                admission = await core.admit(proposal, begin=True)
                if pause is None or not (isinstance(admission, Denied) and admission.reason is Reason.STORAGE_BUSY):
                    break
                await asyncio.sleep(pause)
        except StorageUnavailable:  # it may have been granted; recovery closes what is open
            raise
        except ControlPlaneError as error:
            await self._finish(core, lease, RunState.FAILED, reason=error.code, message=str(error))
            raise
        if isinstance(admission, Granted) and not admission.begun:
            raise TypeError("an admission that begins leaves no grant to be begun")
        return admission

    async def _held_still(self, core: ControlPlane, hold: Hold, opened: Opened) -> Opened:
        """The call, unless this process was away: another may hold the run by now, and it would be beside its books."""
        if hold.surely_held:
            return opened
        await self.close_call(core, opened, Outcome(status=OutcomeStatus.NOT_STARTED))
        words = "the lease ran out before the call could be made"
        raise CallDenied(words, run_id=opened.run.id, reason=Reason.LEASE_EXPIRED, unblock="calling the function anew")

    async def _not_takeable(self, core: ControlPlane, run: Run, *, resumed: bool) -> Exception:
        """Why the run of a call cannot be taken up: a halt stands, nobody has decided yet, or it was made already.

        A call that a halt refused does not come back when the halt is lifted, unless somebody approved it before.
        """
        current = await core.storage.runs.get(run.tenant_id, run.id)
        if current.state is RunState.AWAITING_APPROVAL:
            return await _undecided(core, run)
        if current.state is RunState.HALTED:
            steps = await core.storage.runs.steps(run.tenant_id, run.id)
            halts = await halts_over(core.storage, current, steps[-1] if steps else None)
            if not resumed:
                await core.cancel(run.tenant_id, run.id, by=self._by.principal)
            words = current.message or "a halt stands"
            unblock = lifting_of(halts) if halts else "calling the function anew"  # it was lifted just now
            return CallDenied(words, run_id=run.id, reason=Reason.HALTED, unblock=unblock)
        words = f"run {run.id} is {current.state.value}, so its call cannot be made"
        return CallDenied(words, run_id=run.id, reason=Reason.APPROVAL_MISMATCH, unblock="calling the function anew")

    async def close_call(
        self, core: ControlPlane, opened: Opened, outcome: Outcome, *, opaque: bool = False
    ) -> Withheld | None:
        """Record what became of a call; a run whose outcome is unknown stays parked until somebody reconciles it.

        Answers what was withheld of it, which its caller must not be told then. `opaque` says that what it gave back is
        not in the outcome, as it is no JSON.

        Raises:
            StorageUnavailable: it could not be recorded; recovery parks the run as unknown.
            FencingLost: recovery did so already, as this process had stood still for longer than its lease.
        """
        async with opened.keeping:
            withheld = await self._settle(core, opened, outcome, opaque=opaque)
            if outcome.status is not OutcomeStatus.OUTCOME_UNKNOWN:
                done = outcome.status is OutcomeStatus.SUCCEEDED
                told = str((outcome.error or {}).get("message") or "")
                message = (withheld.message if withheld is not None else told) or None
                state = RunState.SUCCEEDED if done else RunState.FAILED
                await self._finish(
                    core, opened.lease, state, reason=None if done else outcome.status.value, message=message
                )
            return withheld

    async def _settle(self, core: ControlPlane, opened: Opened, outcome: Outcome, *, opaque: bool) -> Withheld | None:
        for pause in (*_PAUSES, None):
            try:
                settlement = await core.settle(
                    opened.grant,
                    outcome,
                    capability=opened.capability,
                    fencing_token=opened.lease.fencing_token,
                    trace_id=opened.run.trace_id,
                    actor=self._by.principal.actor,
                    opaque=opaque,
                )
            except StorageUnavailable:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                return settlement.withheld
        raise AssertionError("the last try answers or raises")

    async def _finish(
        self, core: ControlPlane, lease: Lease, state: RunState, *, reason: str | None, message: str | None
    ) -> None:
        await core.finish(
            lease.run,
            fencing_token=lease.fencing_token,
            state=state,
            actor=self._by.principal.actor,
            reason=reason,
            message=message,
        )


@asynccontextmanager
async def _passed_on(hold: Hold, call: CallInProgress) -> AsyncIterator[None]:
    task = asyncio.create_task(pass_on(hold, call))
    try:
        yield
    finally:
        task.cancel()


def _refusal(run: Run, admission: Admission) -> Exception:
    match admission:
        case Denied(reason=reason, message=message, unblock=unblock) as denied:
            return CallDenied(
                message,
                run_id=run.id,
                reason=reason,
                unblock=unblock,
                retry_after_ms=denied.retry_after_ms,
                limit=denied.limit,
                lock=denied.lock,
            )
        case Steered(guidance=guidance, message=message):
            return CallSteered(message, run_id=run.id, guidance=guidance)
        case Pending(ticket_id=ticket_id, deadline=deadline, message=message, unblock=approval):
            unblock = f"{approval}, of ticket {ticket_id}"
            return CallPending(message, run=run, ticket_id=ticket_id, deadline=deadline, unblock=unblock)
        case _:
            raise TypeError(f"a granted call is no refusal: {admission}")


async def _undecided(core: ControlPlane, run: Run) -> Exception:
    """The question that a run still waits for."""
    (step,) = await core.storage.runs.steps(run.tenant_id, run.id)
    assert step.ticket_id is not None  # noqa: S101  # it is what the run waits for
    ticket = await core.storage.approvals.get(run.tenant_id, step.ticket_id)
    unblock = f"{step.decision['unblock']}, of ticket {ticket.id}"
    words = f"nobody has decided ticket {ticket.id} yet"
    return CallPending(words, run=run, ticket_id=ticket.id, deadline=ticket.deadline, unblock=unblock)
