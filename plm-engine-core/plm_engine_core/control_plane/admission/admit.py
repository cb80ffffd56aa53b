"""Admission: from a proposal to Denied, Steered, Pending or Granted, in one transaction."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.abandoned import read_capability
from plm_engine_core.control_plane.admission.evaluators import ParallelPolicyEvaluator
from plm_engine_core.control_plane.admission.expected import Expectations
from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.prepare import gathered, prepare
from plm_engine_core.control_plane.admission.proposal import Proposal, check_claims, content_hash, proposal_digest
from plm_engine_core.control_plane.errors import IdempotencyConflict, StorageUnavailable
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.limits import Assumed, Prepared, Reserve, Subjects
from plm_engine_core.control_plane.policy import Decision, Facts, Needs, PolicySnapshot, Proposed, Verdict, decide
from plm_engine_core.control_plane.policy.facts import stored_capability
from plm_engine_core.control_plane.policy.models import normal
from plm_engine_core.control_plane.policy.shadow import shadow_record
from plm_engine_core.control_plane.registry import AgentRegistry, CapabilityDescriptor, CapabilityRegistry
from plm_engine_core.control_plane.storage.ports import AdmissionStore, AdmitCommand, Connection
from plm_engine_core.control_plane.vocabulary import Reason

AGAIN_MS = 200


@dataclass(frozen=True, kw_only=True)
class Denied:
    """Refused, with what refused it and what would change that.

    `rule` is the place in the policy, or the book, that refused; `unblock` what would let the call pass. `limit` names
    the budget that was too small, when one was, with its figures. `lock` names the call that holds the resource, when
    one does: its `run_id` and `step`, the lock's `scope` and `resource`, and how it is `held`, as `LockHolder` has it.
    `docs/reasons.md` lists the reasons.
    """

    reason: Reason
    message: str
    rule: str = ""
    unblock: str = ""
    retry_after_ms: int = 0
    limit: Mapping[str, Any] = field(default_factory=dict)
    lock: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Refused with guidance on what to propose instead; `rule` is the place in the policy that steers."""

    guidance: str
    message: str
    reason: Reason = Reason.STEERED
    rule: str = ""
    unblock: str = ""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Parked until somebody decides the ticket; nothing is reserved meanwhile.

    `rule` is the place in the policy that asks, `unblock` says whose approval lets the call pass.
    """

    ticket_id: UUID
    deadline: datetime
    message: str
    reason: Reason = Reason.APPROVAL_REQUIRED
    rule: str = ""
    unblock: str = ""


@dataclass(frozen=True, kw_only=True)
class Granted:
    """Allowed once; the budget is reserved.

    `capability` is the definition that was decided on. The call is carried out, priced and settled by it, whatever is
    registered meanwhile.

    Where `begun`, the grant was used up with the admission: its call may leave the host at once, without `begin`. Asked
    for again, that is still the answer. Then only one may make the call: whoever has held the run with this fencing
    token all along, and did not make the call before. To any other holder the answer is FencingLost, and once the grant
    is settled it is Denied.
    """

    grant: Grant
    capability: CapabilityDescriptor
    begun: bool = False


Admission = Denied | Steered | Pending | Granted


async def admit(
    proposal: Proposal,
    *,
    policy: PolicySnapshot,
    registry: CapabilityRegistry,
    storage: AdmissionStore,
    evaluators: ParallelPolicyEvaluator,
    agents: AgentRegistry | None = None,
    shadow: PolicySnapshot | None = None,
    expectations: Expectations,
    begin: bool = False,
    connection: Connection | None = None,
) -> Admission:
    """Decide one proposal and book the answer.

    The same proposal admitted again, after a lost reply, answers the same and reserves nothing more, also where its
    capability was defined anew in between. An approval counts for the definition that was asked about. On the caller's
    `connection`, one of psycopg's, nothing is committed here. What `shadow` would have decided is recorded beside, and
    changes nothing. Where `expectations` know the run, the books are not asked before they are written, unless an
    evaluator has to be asked or they are not as expected.

    With `begin` a grant is used up in the same transaction: for who makes the call at once, in this process and after
    the commit, and asks `Granted.begun` whether it may. Where the run is being cancelled nothing is granted. Asked for
    again with the other value of `begin`, the answer is the one that was booked; `begin` may still follow it. When it
    is denied as STORAGE_BUSY, an answer may have been booked and lost, so a grant may have begun. The caller then has
    not made the call and must not, unless asking again says that it may; what stays open is closed by recovery.

    Raises:
        InvalidRequest: the proposal holds what is no JSON; or `connection` holds no READ COMMITTED transaction, or one
            of another tenant, or one in which nothing can be written.
        FencingLost: the caller no longer holds the run; it must stop.
        IdempotencyConflict: this attempt was already proposed with other content; or on the caller's `connection`,
            under another definition of its capability: roll back, and ask without one.
        StorageUnavailable: the database did not answer on the caller's `connection`; roll back and do it all again.
    """
    check_claims(proposal.claims)
    capability = registry.get(proposal.capability)
    admitting = _Admitting(
        proposal=proposal,
        capability=capability,
        digest=proposal_digest(proposal, capability),
        policy=policy,
        registry=registry,
        storage=storage,
        evaluators=evaluators,
        agents=agents,
        shadow=shadow,
        begin=begin,
    )
    try:
        answer = await admitting.answer(expectations, connection)
        if answer.get("replayed") and answer["status"] == "granted":
            await admitting.recall(answer, connection)
    except StorageUnavailable as error:
        if connection is not None:  # its transaction can only be rolled back, and an answer might be committed
            raise
        # Nothing was booked, or the reply was lost. A driver may ask again with the same command.
        return Denied(
            reason=Reason.STORAGE_BUSY,
            message=str(error),
            rule="storage",
            unblock="asking again, once the database answers",
            retry_after_ms=AGAIN_MS,
        )
    return _admission(proposal, answer, admitting.capability)


async def decided(
    proposal: Proposed, policy: PolicySnapshot, facts: Facts, evaluators: ParallelPolicyEvaluator
) -> tuple[Decision, Facts]:
    """The decision, with the facts that it was made from; evaluators are asked only when it needs them."""
    answer = decide(proposal, policy, facts)
    if isinstance(answer, Needs):
        facts = replace(facts, evaluations=await evaluators.evaluate_all(answer.evaluators, proposal, facts))
        answer = decide(proposal, policy, facts)
    if isinstance(answer, Needs):
        raise TypeError("a decision asks its evaluators once")
    return answer, facts


@dataclass(kw_only=True, slots=True)
class _Admitting:
    """One proposal, and what it is decided and booked with."""

    proposal: Proposal
    capability: CapabilityDescriptor | None
    digest: str
    policy: PolicySnapshot
    registry: CapabilityRegistry
    storage: AdmissionStore
    evaluators: ParallelPolicyEvaluator
    agents: AgentRegistry | None
    shadow: PolicySnapshot | None
    begin: bool

    async def answer(self, expectations: Expectations, connection: Connection | None) -> Mapping[str, Any]:
        """What is booked, or was when this was asked before."""
        proposal = self.proposal
        expected = expectations.of(proposal.tenant_id, proposal.run_id) if connection is None else None
        try:
            answer = await self.as_expected(expected) if expected is not None else None
            return answer if answer is not None else await self.as_asked(expectations, connection)
        except IdempotencyConflict:
            # What is asked for is told apart by the definition, too: it may have been another one the first time.
            if connection is not None or not await self._as_defined_then():
                raise
        return await self.as_asked(expectations, connection)

    async def _as_defined_then(self) -> bool:
        """Go by the definition under which the attempt was decided; false where that is the one of now."""
        stored, name = await self._decided_on(None), self.proposal.capability
        then = read_capability(stored, capability_id=name, grant_id=None) if stored is not None else None
        digest = proposal_digest(self.proposal, then)
        changed = digest != self.digest
        self.capability, self.digest = then, digest
        return changed

    async def recall(self, answer: Mapping[str, Any], connection: Connection | None) -> None:
        """Take the definition by which a grant was given, that is answered once more."""
        stored = await self._decided_on(connection)
        if self.capability is None or stored_capability(self.capability) != stored:
            grant_id = UUID(answer["grant_id"])
            self.capability = read_capability(stored, capability_id=self.proposal.capability, grant_id=grant_id)

    async def _decided_on(self, connection: Connection | None) -> Any:
        proposal = self.proposal
        return await self.storage.decided_on(
            proposal.tenant_id, proposal.run_id, proposal.step_index, proposal.attempt, connection=connection
        )

    async def as_expected(self, expected: Prepared) -> Mapping[str, Any] | None:
        """What is booked when the books are as `expected`; None, and nothing is, when they have to be asked."""
        facts = await gathered(
            self.proposal,
            expected,
            policy=self.policy,
            registry=self.registry,
            storage=self.storage,
            agents=self.agents,
        )
        decision = decide(self.proposal, self.policy, facts)
        if isinstance(decision, Needs):
            return None
        assumed = Assumed(buckets=self.policy.buckets, at=expected.at)
        answer = await self.storage.admit_as_assumed(self._command(decision, facts, expected.subjects), assumed)
        return answer if answer["status"] != "not_as_assumed" else None

    async def as_asked(self, expectations: Expectations, connection: Connection | None) -> Mapping[str, Any]:
        """What is booked after the books were asked; the next proposal of the run may expect the same of them."""
        proposal, policy = self.proposal, self.policy
        facts, prepared = await prepare(
            proposal, policy=policy, registry=self.registry, storage=self.storage, agents=self.agents
        )
        expectations.learn(proposal.tenant_id, proposal.run_id, prepared)
        decision, facts = await decided(proposal, policy, facts, self.evaluators)
        return await self.storage.admit(self._command(decision, facts, prepared.subjects), connection=connection)

    def _command(self, decision: Decision, facts: Facts, subjects: Subjects | None) -> AdmitCommand:
        proposal, policy = self.proposal, self.policy
        stored = policy.plans.of(facts.capability).stored if facts.capability is not None else None
        record = {**decision.to_json(), "facts": facts.to_json(capability=stored)}
        if self.shadow is not None:
            record["shadow"] = shadow_record(proposal, self.shadow, facts, decision, active=policy)
        return AdmitCommand(
            tenant_id=proposal.tenant_id,
            run_id=proposal.run_id,
            fencing_token=proposal.fencing_token,
            command_id=proposal.command_id,
            command_digest=content_hash(
                [self.digest, dict(proposal.arguments), proposal.step_id], known_as=("payload[1]", "arguments")
            ),
            step_index=proposal.step_index,
            attempt=proposal.attempt,
            step_id=proposal.step_id,
            step_key=proposal.step_key,
            capability=proposal.capability,
            resource=proposal.resource,
            arguments=proposal.arguments,
            digest=self.digest,
            policy_digest=policy.digest,
            executor_kind=proposal.executor_kind,
            requester=proposal.principal.user_id,
            actor=proposal.principal.actor,
            decision=record,
            ticket_id=proposal.ticket_id,
            new_ticket_id=new_id(),
            ticket_seconds=policy.plans.demand(decision.tier, decision.risk).timeout_seconds,
            escalate_seconds=policy.approval.escalate_seconds,
            grant_id=new_id(),
            grant_seconds=policy.grant_seconds,
            span_id=os.urandom(8).hex(),
            reserve=self._reserve(decision, facts, subjects),
            begin=self.begin,
            lock=facts.capability.lock if facts.capability is not None else None,
        )

    def _reserve(self, decision: Decision, facts: Facts, subjects: Subjects | None) -> tuple[Reserve, ...]:
        """What the call sets aside, should it be granted."""
        if decision.outcome not in (Verdict.ALLOW, Verdict.ASK):
            return ()
        return self.policy.budget_plan.of(
            decision.reserve,
            tenant_id=self.proposal.tenant_id,
            run_id=self.proposal.run_id,
            subjects=subjects,
            model=_model(self.proposal, facts),
        )


def _model(proposal: Proposal, facts: Facts) -> str | None:
    """The language model that the call names, where its capability says which argument does."""
    named = facts.capability.model_argument if facts.capability is not None else ""
    model = proposal.arguments.get(named) if named else None
    return normal(model) if isinstance(model, str) else None


def policy_changed(answer: Mapping[str, Any]) -> Denied:
    """How it is said that another policy was activated meanwhile; nothing was booked."""
    return Denied(
        reason=Reason.POLICY_CHANGED,
        message=answer["message"],
        rule="policy",
        unblock="proposing it again, to be decided by the policy that is active now",
        retry_after_ms=AGAIN_MS,
    )


def _admission(proposal: Proposal, answer: Mapping[str, Any], capability: CapabilityDescriptor | None) -> Admission:
    match answer["status"]:
        case "granted":
            if capability is None:
                raise TypeError(f"nothing of capability {proposal.capability} is granted where it is not known")
            return Granted(
                grant=Grant(
                    id=UUID(answer["grant_id"]),
                    tenant_id=proposal.tenant_id,
                    run_id=proposal.run_id,
                    step_index=proposal.step_index,
                    attempt=proposal.attempt,
                    step_key=proposal.step_key,
                    fencing_token=proposal.fencing_token,
                    span_id=answer["span_id"],
                    expires_at=datetime.fromisoformat(answer["expires_at"]),
                ),
                capability=capability,
                begun=answer.get("begun", False),
            )
        case "pending":
            return Pending(
                ticket_id=UUID(answer["ticket_id"]),
                deadline=datetime.fromisoformat(answer["deadline"]),
                message=answer["message"] or "",
                rule=answer.get("rule") or "",
                unblock=answer.get("unblock") or "",
            )
        case "policy_changed":
            return policy_changed(answer)
        case "steered":
            return Steered(
                guidance=answer["guidance"],
                message=answer["message"],
                rule=answer.get("rule") or "",
                unblock=answer.get("unblock") or "",
            )
        case _:
            return Denied(
                reason=Reason(answer["reason"]),
                message=answer["message"],
                rule=answer.get("rule") or "",
                unblock=answer.get("unblock") or "",
                retry_after_ms=answer.get("retry_after_ms") or 0,
                limit=answer.get("limit") or {},
                lock=answer.get("lock") or {},
            )
