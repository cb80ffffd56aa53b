"""The control plane as one object: what hosts, run workers and APIs call.

One module although it is long: it is one object, most of it is what its operations promise, and each hands on to the
module that does the work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.activation import Activation, PolicyDesk
from plm_engine_core.control_plane.admission.abandoned import (
    OPEN,
    capability_of,
    decided_capability,
    grant_of,
    outcome_of,
)
from plm_engine_core.control_plane.admission.admit import Admission, Denied, Pending, admit
from plm_engine_core.control_plane.admission.ask import InputRequest, ask
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.admission.expected import Expectations
from plm_engine_core.control_plane.admission.grants import Begun, Grant
from plm_engine_core.control_plane.admission.phases import NOTHING_ASKED, Kept, keep, keep_nothing
from plm_engine_core.control_plane.admission.proposal import Principal, Proposal, check_principal
from plm_engine_core.control_plane.admission.settle import Outcome, Settlement, settle
from plm_engine_core.control_plane.admission.withheld import Withheld, withheld_of
from plm_engine_core.control_plane.agents import AgentDesk, StandingAgent
from plm_engine_core.control_plane.errors import (
    ControlPlaneError,
    InvalidRequest,
    PolicyMissing,
)
from plm_engine_core.control_plane.events import (
    BEGINNING,
    FeedCursor,
    FeedPage,
    RunAsOf,
    Verification,
    as_of,
    verify_tenant,
)
from plm_engine_core.control_plane.events.signals import NoSignals, Signals
from plm_engine_core.control_plane.halts import CANCEL_SECONDS, Halt, HaltDrill, KillSwitch, check_cancel_seconds
from plm_engine_core.control_plane.hitl import ApprovalGate, ApprovalTicket, ScopeTerms
from plm_engine_core.control_plane.in_force import PolicyInForce, PolicyKeeper
from plm_engine_core.control_plane.limits import Budget, BudgetKey
from plm_engine_core.control_plane.limits.desk import BudgetDesk
from plm_engine_core.control_plane.limits.leases import ResourceLease, check_seconds, check_terms
from plm_engine_core.control_plane.markers import Marker, mark
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.policy.lint import require_known_names
from plm_engine_core.control_plane.registry import (
    AgentRegistry,
    CapabilityDescriptor,
    CapabilityRegistry,
    Delegation,
    RegistryChanges,
    changes,
)
from plm_engine_core.control_plane.registry.written import Written, registry_of
from plm_engine_core.control_plane.run_desk import RunDesk
from plm_engine_core.control_plane.runs.request import RunRequest
from plm_engine_core.control_plane.runs.run import Run, Step
from plm_engine_core.control_plane.storage.commands import held_token
from plm_engine_core.control_plane.storage.leasing import FINISH_KINDS
from plm_engine_core.control_plane.storage.ports import Connection, Storage
from plm_engine_core.control_plane.vocabulary import (
    AgentStatus,
    HaltScope,
    OutcomeStatus,
    PolicyRole,
    Reason,
    RunState,
    TicketDecision,
)
from plm_engine_core.control_plane.why import Why, not_begun, why

_log = logging.getLogger(__name__)

_LOOK_AGAIN_MS = 5_000


class ControlPlane:
    """Decides and keeps the books. It never performs an effect itself.

    `registry` is what is registered until a `reload`. `policy` decides until one is activated; while its `keeper` is
    entered, this process is kept in step with that. `evaluators` are the kinds that the policy may use; without them,
    the built-in ones. With `agents` only those may propose, and none beyond its ceilings; without them every agent may
    do what policy and principal allow.
    `cancel_seconds` is the bound within which whoever drives runs ends their calls after a halt; its record states it.

    Raises:
        InvalidRequest: the policy declares an evaluator that is not there, or configures one wrongly; or
            `cancel_seconds` is no bound.
    """

    def __init__(
        self,
        *,
        policy: PolicySnapshot,
        registry: CapabilityRegistry,
        storage: Storage,
        signals: Signals | None = None,
        evaluators: EvaluatorRegistry | None = None,
        agents: AgentRegistry | None = None,
        cancel_seconds: float = CANCEL_SECONDS,
    ) -> None:
        check_cancel_seconds(cancel_seconds)
        self._evaluators = evaluators or EvaluatorRegistry()
        self.in_force = PolicyInForce(policy, self._evaluators, registry)
        self.keeper = PolicyKeeper(self.in_force, storage.policies, file=policy)
        self.agents = agents
        self.storage = storage
        self.signals: Signals = signals or NoSignals()
        self.cancel_seconds = cancel_seconds
        self._expectations = Expectations()
        self._reloading = asyncio.Lock()

    @property
    def registry(self) -> CapabilityRegistry:
        """The capabilities that are registered now; `reload` exchanges them as a whole."""
        return self.in_force.registry

    @property
    def _kill_switch(self) -> KillSwitch:
        return KillSwitch(
            self.storage.halts,
            registry=self.registry,
            agents=self.agents,
            signals=self.signals,
            cancel_seconds=self.cancel_seconds,
        )

    @property
    def _agent_desk(self) -> AgentDesk:
        return AgentDesk(self.storage.halts, agents=self.agents, kill_switch=self._kill_switch)

    @property
    def _run_desk(self) -> RunDesk:
        return RunDesk(self.storage.runs, in_force=self.in_force, agents=self.agents)

    @property
    def policy(self) -> PolicySnapshot:
        """The policy that decides now.

        Raises:
            PolicyMissing: the activated one cannot be loaded by this process.
        """
        return self.in_force.now.policy

    @property
    def approvals(self) -> ApprovalGate:
        """The gate through which humans decide, by the policy that decides now.

        Raises:
            PolicyMissing: as for `policy`.
        """
        return ApprovalGate(store=self.storage.approvals, policy=self.policy)

    async def activate_policy(
        self,
        tenant_id: UUID,
        policy: PolicySnapshot | None,
        *,
        role: PolicyRole = PolicyRole.ACTIVE,
        previous: str | None,
        reason: str,
        by: Principal,
    ) -> Activation:
        """Give a policy a role, for all tenants and processes; see `PolicyDesk.activate`."""
        desk = PolicyDesk(self.storage.policies, registry=self.registry, evaluators=self._evaluators)
        return await desk.activate(tenant_id, policy, role=role, previous=previous, reason=reason, by=by)

    async def reload(
        self,
        capabilities: Written | CapabilityRegistry,
        *,
        record: Callable[[RegistryChanges], Awaitable[None]] | None = None,
    ) -> RegistryChanges:
        """Register these capabilities in place of those that are, as one, and answer what is different.

        A path is read as a capability file. From then on every decision of this control plane goes by the new registry;
        what was decided before is carried out and settled by the definition that was decided on. Other processes have
        files of their own. `record` is awaited with the changes before anything is exchanged, so that nothing is that
        could not be recorded.

        Raises:
            InvalidRequest: naming what is missing, unknown or wrong, or what the policy that decides names and would
                not be registered any more. What was registered still is, and all of it. So it is with whatever else is
                raised, by `record` too.
        """
        async with self._reloading:
            registry = await asyncio.to_thread(registry_of, capabilities)
            made = changes(self.registry, registry)
            await self._look_at_policies()  # the one that was just activated counts
            recorded = record is None
            while True:
                policy = self.in_force.policy
                if policy is not None:
                    source = f"the active policy {policy.digest[:12]}, version {policy.version}"
                    await asyncio.to_thread(require_known_names, policy, registry, source=source)
                if record is not None and not recorded:
                    await record(made)
                    recorded = True
                if self.in_force.policy is policy:  # nothing is awaited between this look and the exchange
                    break
            self.in_force.register(registry)
        _log.info("the capabilities were registered anew: %s", made)
        return made

    def capability(self, capability_id: str) -> CapabilityDescriptor:
        """A capability as it is registered now, which is not by what a call that was granted earlier is settled.

        Raises:
            InvalidRequest: it is not registered.
        """
        found = self.registry.get(capability_id)
        if found is None:
            raise InvalidRequest(f"capability {capability_id} is not registered", field="capability")
        return found

    async def create_run(self, request: RunRequest, *, principal: Principal) -> tuple[Run, bool]:
        """Create a run and let some run worker drive it; the flag says it existed already. See `RunDesk.create`."""
        run, replayed = await self._run_desk.create(request, principal=principal)
        await self.signals.changed(run.tenant_id, run.id)
        return run, replayed

    async def delegate(self, parent: Run, delegation: Delegation, request: RunRequest) -> tuple[Run, bool]:
        """Create a run that acts for the principal of `parent`; see `RunDesk.delegate`."""
        run, replayed = await self._run_desk.delegate(parent, delegation, request)
        await self.signals.changed(run.tenant_id, run.id)
        return run, replayed

    async def admit(
        self, proposal: Proposal, *, begin: bool = False, connection: Connection | None = None
    ) -> Admission:
        """Decide one proposal and book the answer; see `admission.admit`.

        With `begin` a grant is used up with it, for who makes the call at once and where no `ResourceLease` is needed.
        """
        try:
            deciding = self.in_force.now
        except PolicyMissing as error:
            return await self._without_policy(error)
        admission = await admit(
            proposal,
            policy=deciding.policy,
            registry=deciding.registry,
            storage=self.storage.admission,
            evaluators=deciding.evaluators,
            shadow=deciding.shadow,
            agents=self.agents,
            expectations=self._expectations,
            begin=begin,
            connection=connection,
        )
        if isinstance(admission, Denied) and admission.reason is Reason.POLICY_CHANGED:
            await self._look_at_policies()
        if connection is None:
            await self.signals.changed(proposal.tenant_id, proposal.run_id)
        return admission

    async def ask(self, request: InputRequest) -> Pending | Denied:
        """Ask humans for an input, in place of a proposal; see `admission.ask`."""
        try:
            policy = self.policy
        except PolicyMissing as error:
            return await self._without_policy(error)
        answer = await ask(request, policy=policy, storage=self.storage, agents=self.agents)
        if isinstance(answer, Denied) and answer.reason is Reason.POLICY_CHANGED:
            await self._look_at_policies()
        await self.signals.changed(request.tenant_id, request.run_id)
        return answer

    async def _without_policy(self, error: PolicyMissing) -> Denied:
        await self._look_at_policies()
        return Denied(
            reason=Reason.POLICY_MISSING,
            message=str(error),
            rule="policy",
            unblock="activating a policy that this process can load",
            retry_after_ms=_LOOK_AGAIN_MS,
        )

    async def _look_at_policies(self) -> None:
        """So that the next proposal is decided by what is active now, also where nobody entered the keeper."""
        with suppress(ControlPlaneError):  # what the keeper could not load, the next answer says
            await self.keeper.refresh()

    async def begin(self, grant: Grant, *, fencing_token: int, actor: str, lease: ResourceLease | None = None) -> Begun:
        """Use a grant up, as the last act before its call leaves the host.

        With `lease`, the call is about a resource that its maker has to hold.

        Raises:
            FencingLost: another run worker holds the run; or somebody else the resource.
            StorageUnavailable: unknown whether it began; the caller must not make the call.
        """
        if lease is not None:
            await self.storage.leases.require(lease)
        token = held_token(grant.run_id, fencing_token)
        answer = await self.storage.admission.begin(grant, fencing_token=token, actor=actor)
        if answer["status"] != "begun":
            return not_begun(Reason(answer["reason"]), answer["message"])
        await self.signals.changed(grant.tenant_id, grant.run_id)
        return Begun(accepted=True)

    async def settle(
        self,
        grant: Grant,
        outcome: Outcome,
        *,
        capability: CapabilityDescriptor | None = None,
        fencing_token: int,
        trace_id: str,
        actor: str,
        opaque: bool = False,
        connection: Connection | None = None,
    ) -> Settlement:
        """Close a grant with what its call did; see `admission.settle`.

        `capability` is the definition that was decided on, as `Granted` has it; without it, the record of the decision
        is read for it.

        The evaluators of the phase `output` are asked first, of the policy that decides in this process now, whichever
        one decided the call. What they do not allow is withheld, and so is everything while the active policy cannot be
        loaded here; `Settlement.withheld` says so. The grant is settled all the same, after their longest time.
        `opaque` says that the call gave back what is no JSON, so that it is not in the outcome: where somebody would
        have to be asked about it, it is withheld.
        """
        if capability is None:
            capability = await decided_capability(grant, storage=self.storage.admission, connection=connection)
        kept = await self._kept(capability, outcome, opaque=opaque)
        settlement = await settle(
            grant,
            outcome,
            fencing_token=fencing_token,
            capability=capability,
            trace_id=trace_id,
            actor=actor,
            storage=self.storage.admission,
            withheld=kept.withheld,
            evaluations=kept.evaluations,
            connection=connection,
        )
        if settlement.replayed:  # what was said then counts, whatever is said now
            settlement = replace(settlement, withheld=await self._withheld(grant, said=kept.withheld))
        if connection is None:
            await self.signals.changed(grant.tenant_id, grant.run_id)
        return settlement

    async def close_abandoned(
        self, run: Run, step: Step, status: OutcomeStatus, message: str, *, fencing_token: int
    ) -> Settlement:
        """Close the grant of a step whose holder is gone, for who holds its run now.

        Nothing of what its call gave back is known, so no evaluator is asked; `message` says why it is closed.

        Raises:
            FencingLost: another run worker holds the run.
            StorageUnavailable: nothing was written; closing it again is safe.
        """
        settlement = await settle(
            grant_of(run, step),
            outcome_of(step, status, message),
            fencing_token=fencing_token,
            capability=capability_of(step),
            trace_id=run.trace_id,
            actor=run.principal.actor,
            storage=self.storage.admission,
        )
        await self.signals.changed(run.tenant_id, run.id)
        return settlement

    async def _kept(self, capability: CapabilityDescriptor, outcome: Outcome, *, opaque: bool) -> Kept:
        """What may be booked of an outcome."""
        try:
            deciding = self.in_force.now
        except PolicyMissing as error:
            return keep_nothing(capability, outcome, str(error), opaque=opaque)
        if not deciding.policy.plans.examines_output:
            return NOTHING_ASKED
        return await keep(deciding.policy, deciding.evaluators, capability, outcome, opaque=opaque)

    async def _withheld(self, grant: Grant, *, said: Withheld | None) -> Withheld | None:
        """What is on record as withheld of a settled grant, or `said` now where a transaction still hides that."""
        steps = await self.storage.runs.steps(grant.tenant_id, grant.run_id, since=grant.step_index)
        settled = (step for step in steps if step.grant_id == grant.id and step.state not in OPEN)
        return next(map(withheld_of, settled), said)

    async def finish(
        self,
        run: Run,
        *,
        fencing_token: int,
        state: RunState,
        actor: str,
        reason: str | None = None,
        message: str | None = None,
        result: Any = None,
        again_after_seconds: float = 0.0,
    ) -> RunState:
        """Give a run's lease back with the run in `state`, and answer where it stands now.

        A run that is to be parked as halted is queued again when no halt stands any more. A queued one is driven again,
        and not before `again_after_seconds`.

        Raises:
            FencingLost: another run worker holds the run.
            Conflict: the run is to end, and a call of it is not settled.
            InvalidRequest: no run is given back in this state.
        """
        if state not in FINISH_KINDS:
            named = ", ".join(FINISH_KINDS)
            raise InvalidRequest(f"a run is given back as {named}, not as {state}", field="state")
        left = await self.storage.runs.finish(
            run.tenant_id,
            run.id,
            fencing_token=held_token(run.id, fencing_token),
            state=state,
            actor=actor,
            reason=reason,
            message=message,
            result=result,
            again_after_seconds=again_after_seconds,
        )
        await self.signals.changed(run.tenant_id, run.id)
        return left

    async def cancel(self, tenant_id: UUID, run_id: UUID, *, by: Principal) -> Run:
        """Cancel a run: at once where it is parked, else as soon as its worker hears of it.

        Raises:
            NotFound: no such run in this tenant.
            Conflict: it already ended otherwise, or the outcome of a step is unknown.
        """
        check_principal(by, field="by")
        run = await self.storage.runs.request_cancel(tenant_id, run_id, actor=by.actor)
        await self.signals.interrupt(tenant_id, run_id)
        await self.signals.changed(tenant_id, run_id)
        return run

    async def mark(
        self,
        tenant_id: UUID,
        run_id: UUID,
        name: str,
        *,
        command_id: str,
        by: Principal,
        details: Mapping[str, Any] | None = None,
    ) -> Marker:
        """Put a named marker into the stream of a run; see `markers.mark`."""
        marker = await mark(self.storage.runs, tenant_id, run_id, name, command_id=command_id, by=by, details=details)
        await self.signals.changed(tenant_id, run_id)
        return marker

    async def decide(
        self,
        tenant_id: UUID,
        ticket_id: UUID,
        decision: TicketDecision,
        *,
        approver: Principal,
        comment: str = "",
        scope: ScopeTerms | None = None,
        as_read: str | None = None,
    ) -> ApprovalTicket:
        """Approve or deny a ticket; see `ApprovalGate.decide`."""
        ticket = await self.approvals.decide(
            tenant_id, ticket_id, decision, approver=approver, comment=comment, scope=scope, as_read=as_read
        )
        await self.signals.changed(tenant_id, ticket.run_id)
        return ticket

    async def provide_input(
        self,
        tenant_id: UUID,
        ticket_id: UUID,
        value: Any,
        *,
        approver: Principal,
        comment: str = "",
        as_read: str | None = None,
    ) -> ApprovalTicket:
        """Give the input that a ticket asks for; see `ApprovalGate.provide_input`."""
        ticket = await self.approvals.provide_input(
            tenant_id, ticket_id, value, approver=approver, comment=comment, as_read=as_read
        )
        await self.signals.changed(tenant_id, ticket.run_id)
        return ticket

    async def acquire_lease(
        self, tenant_id: UUID, name: str, *, owner: str, seconds: float, by: Principal
    ) -> ResourceLease | None:
        """Take the lease of a named resource of the tenant for `seconds`; None while somebody holds it.

        Nobody is asked whether the name means anything. Its holder renews the lease for as long as it lives; one that
        ran out is anybody's. `owner` is what others read.

        Raises:
            InvalidRequest: name, owner or seconds cannot be those of a lease.
            NotFound: the tenant does not exist.
        """
        check_principal(by, field="by")
        check_terms(name, owner, seconds)
        return await self.storage.leases.acquire(tenant_id, name, owner=owner, seconds=seconds, actor=by.actor)

    async def renew_lease(self, lease: ResourceLease, *, seconds: float) -> ResourceLease:
        """Let a lease last `seconds` from now on: the heartbeat of its holder.

        Raises:
            FencingLost: it was released, or ran out and somebody took it.
            InvalidRequest: it cannot last so long.
        """
        check_seconds(seconds)
        return await self.storage.leases.renew(lease, seconds=seconds)

    async def release_lease(self, lease: ResourceLease, *, by: Principal) -> None:
        """Give a lease back before its end; doing so again changes nothing.

        Raises:
            FencingLost: somebody took it since.
        """
        check_principal(by, field="by")
        await self.storage.leases.release(lease, actor=by.actor)

    async def require_lease(self, lease: ResourceLease, *, connection: Connection | None = None) -> None:
        """Refuse a holder that is none any more, as the last act before the resource is touched.

        On a `connection` of the caller's nobody can take the lease until the transaction ends, so that what it writes
        is written by the holder or not at all.

        Raises:
            FencingLost: the lease ran out, was released, or somebody took it.
            InvalidRequest: `connection` holds no READ COMMITTED transaction, or one of another tenant.
        """
        await self.storage.leases.require(lease, connection=connection)

    async def set_budget(self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, by: Principal) -> Budget:
        """Set the limit of a budget that the policy in force counts; see `BudgetDesk.set_limit`.

        Raises:
            PolicyMissing: as for `policy`.
        """
        plan = self.policy.budget_plan
        return await BudgetDesk(self.storage.budgets).set_limit(tenant_id, key, limit, plan=plan, by=by)

    async def correct_budget(
        self, tenant_id: UUID, key: BudgetKey, amount: Decimal, *, reason: str, command_id: str, by: Principal
    ) -> Budget:
        """Correct what a budget has spent by a counter-entry; see `BudgetDesk.correct`."""
        desk = BudgetDesk(self.storage.budgets)
        return await desk.correct(tenant_id, key, amount, reason=reason, command_id=command_id, by=by)

    async def halt(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None = None,
        *,
        reason: str,
        by: Principal,
        subject: str | None = None,
    ) -> Halt:
        """Halt a run, run group, agent, capability, tenant or the system; see `KillSwitch.trigger`."""
        return await self._kill_switch.trigger(tenant_id, scope, scope_id, subject=subject, reason=reason, by=by)

    async def drill(
        self,
        tenant_id: UUID,
        scope: HaltScope,
        scope_id: UUID | None = None,
        *,
        by: Principal,
        subject: str | None = None,
    ) -> HaltDrill:
        """Say what a halt would stop now, and stop nothing; see `KillSwitch.drill`."""
        return await self._kill_switch.drill(tenant_id, scope, scope_id, subject=subject, by=by)

    async def lift(self, tenant_id: UUID, halt_id: UUID, *, by: Principal) -> Halt:
        """Lift a halt; see `KillSwitch.lift`."""
        return await self._kill_switch.lift(tenant_id, halt_id, by=by)

    async def registered_agents(self, tenant_id: UUID) -> Sequence[StandingAgent]:
        """Every registered version of every agent, as it stands in a tenant; see `AgentDesk.list`."""
        return await self._agent_desk.list(tenant_id)

    async def set_agent_status(
        self, tenant_id: UUID, agent_id: str, status: AgentStatus, *, reason: str, by: Principal
    ) -> StandingAgent:
        """Suspend an agent in a tenant, or let it work again; see `AgentDesk.set_status`."""
        return await self._agent_desk.set_status(tenant_id, agent_id, status, reason=reason, by=by)

    async def why(self, tenant_id: UUID, asked: str) -> Why:
        """Why a run, attempt, ticket or budget stands where it stands; see `why.why`."""
        return await why(self.storage, tenant_id, asked)

    async def feed(self, tenant_id: UUID, *, cursor: str | None = None, limit: int = 500) -> FeedPage:
        """Events of every stream of a tenant after a cursor, each at least once and none left out.

        Without a cursor, from the oldest that is kept; go on with `page.cursor.encode()`, also after an empty page.

        Raises:
            FeedPruned: events after the cursor were pruned; it carries the cursor to go on with.
            InvalidRequest: the cursor is none, or of another database or tenant; or the limit is less than 1.
            Conflict: the events are of another server, whose transactions had higher ids.
        """
        if type(limit) is not int or limit < 1:
            raise InvalidRequest(f"a page of the feed has 1 event or more, not {limit!r:.80}", field="limit")
        after = FeedCursor.decode(cursor) if cursor is not None else BEGINNING
        return await self.storage.events.feed(tenant_id, after=after, limit=limit)

    async def as_of(self, tenant_id: UUID, run_id: UUID, moment: datetime | int) -> RunAsOf:
        """A run with its tickets and budgets as of a time, or of a sequence of its stream; see `events.as_of`."""
        return await as_of(self.storage, tenant_id, run_id, moment)

    async def verify_events(self, tenant_id: UUID, *, stream: str | None = None) -> list[Verification]:
        """Check every stream of a tenant, or one of them if it is there, from its first event to its head."""
        return await verify_tenant(self.storage, tenant_id, stream=stream)
