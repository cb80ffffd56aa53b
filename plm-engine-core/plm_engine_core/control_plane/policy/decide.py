"""The decision: a pure function of proposal, policy and facts, so any recorded one can be replayed exactly."""

from __future__ import annotations

from plm_engine_core.control_plane.policy.decision import Decision, Needs, RoutingDecision, StageResult, Verdict
from plm_engine_core.control_plane.policy.facts import Facts, Proposed
from plm_engine_core.control_plane.policy.models import ModelRule
from plm_engine_core.control_plane.policy.plan import Plan
from plm_engine_core.control_plane.policy.routing import claimed_risk, routed, view_of
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.registry.agents import AgentDescriptor
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    CapabilityStatus,
    Reason,
    RoutingResolutionStep,
    Stage,
    TenantAccess,
)

_RATE_OK = StageResult(stage=Stage.RATE_LIMIT, passed=True)
_AUTHORIZED = StageResult(stage=Stage.AUTHORIZATION, passed=True)
_VERDICTS = {ActionTier.STEER: Verdict.STEER, ActionTier.ALWAYS_APPROVE: Verdict.ASK}


def decide(proposal: Proposed, policy: PolicySnapshot, facts: Facts) -> Decision | Needs:
    """Walk the stages in their locked order and stop at the first refusal.

    rate_limit, authorization, autonomy_gating, classify (risk, tier, conditions, evaluators), cost_budget. The same
    proposal, policy and facts always give the same answer. `Needs` comes only while the facts hold no evaluations.
    """
    if not facts.rate_allowed:
        return _rate_limited(facts)
    capability = facts.capability
    if capability is None:
        return _unregistered()
    refusal = _unauthorized(capability, facts)
    if refusal is not None:
        return refusal
    plan = policy.plans.of(capability)
    if policy.models is not None and capability.model_argument:
        refused = _model_refused(proposal, policy.models, capability, plan.tier, facts)
        if refused is not None:
            return refused
    autonomy = plan.autonomy[facts.autonomy]
    if not autonomy.passed:
        return _refused(
            (_RATE_OK, _AUTHORIZED),
            Stage.AUTONOMY_GATING,
            Reason.AUTONOMY_TOO_LOW,
            autonomy.detail,
            rule="autonomy_ceiling",
            unblock="a higher autonomy of agent and policy, or for a certified write a tier that asks a human",
        )
    if facts.registration is not None and plan.tier not in facts.registration.tiers:
        return _beyond_agent(facts.registration, f"use what is {plan.tier.value}", autonomy)
    if plan.looks or plan.gates:
        return _classified(proposal, policy, plan, facts)
    key = (facts.autonomy, claimed_risk(facts.claims))
    decision = plan.settled.get(key)
    if decision is None:
        made = _classified(proposal, policy, plan, facts)
        if isinstance(made, Needs):
            return made
        decision = plan.settled[key] = made
    return decision


def _model_refused(
    proposal: Proposed, models: ModelRule, capability: CapabilityDescriptor, tier: ActionTier, facts: Facts
) -> Decision | None:
    model = proposal.arguments.get(capability.model_argument)
    named = model if isinstance(model, str) else None
    refusal = models.refuses(named, tier=tier, user=facts.requester)
    if refusal is None:
        return None
    what = f"the model {named!r}" if named is not None else "a call that names no model"
    return _refused(
        (_RATE_OK,),
        Stage.AUTHORIZATION,
        Reason.MODEL_NOT_ALLOWED,
        f"{what} is not among the models that the policy allows; {capability.id} names it in"
        f" {capability.model_argument}",
        rule=refusal.rule,
        unblock=refusal.unblock,
    )


def _unauthorized(capability: CapabilityDescriptor, facts: Facts) -> Decision | None:
    """Why this principal and this agent may not propose this capability at all; None when they may."""
    if (
        facts.tenant_access is not None
        or capability.allowed_tenants is not None
        or capability.denied_tenants is not None
    ):
        refusal = _not_for_tenant(capability, facts.access)
        if refusal is not None:
            return refusal
    if capability.inactive and not _draft_for_tenant(capability, facts.access):
        return _unauthorized_as(
            Reason.CAPABILITY_INACTIVE, capability.inactive, "an active version of the capability", "capability.status"
        )
    if not capability.required_scopes <= facts.principal_scopes:
        names = ", ".join(sorted(capability.required_scopes - facts.principal_scopes))
        words = f"the run's principal lacks the OAuth scopes {names}"
        return _unauthorized_as(Reason.MISSING_SCOPES, words, f"a principal that holds {names}", "required_scopes")
    if facts.principal_until is not None and (facts.at is None or facts.at >= facts.principal_until):
        words = f"the delegation under which it would act ended at {facts.principal_until.isoformat()}"
        return _unauthorized_as(Reason.DELEGATION_EXPIRED, words, "a new delegation", "delegation.expires_at")
    if facts.unregistered:
        words = f"agent {facts.agent or 'without a name'} is not registered; ask the operator to register it"
        return _unauthorized_as(Reason.AGENT_INACTIVE, words, "registering the agent", "agents")
    agent = facts.registration
    if agent is None:
        return None
    if agent.inactive:
        return _unauthorized_as(Reason.AGENT_INACTIVE, agent.inactive, "an active version of the agent", "agent.status")
    if agent.capabilities is not None and capability.id not in agent.capabilities:
        return _beyond_agent(agent, f"use {capability.id}")
    return None


def _not_for_tenant(capability: CapabilityDescriptor, access: TenantAccess | None) -> Decision | None:
    """Why the tenant of the call may not use it, which does not say who else may; None when it may."""
    if access in (TenantAccess.ALLOWED, TenantAccess.NOT_DENIED):
        return None
    words = f"capability {capability.id} is not for this tenant"
    if access is TenantAccess.DENIED:
        unblock = "taking the tenant off the capability's denied_tenants"
        return _unauthorized_as(Reason.DENIED_TENANT, words, unblock, "capability.denied_tenants")
    unblock = "putting the tenant on the capability's allowed_tenants"
    return _unauthorized_as(Reason.NOT_ALLOWED_TENANT, words, unblock, "capability.allowed_tenants")


def _draft_for_tenant(capability: CapabilityDescriptor, access: TenantAccess | None) -> bool:
    return access is TenantAccess.ALLOWED and capability.status is CapabilityStatus.DRAFT


def _unregistered() -> Decision:
    return _refused(
        (_RATE_OK,),
        Stage.AUTHORIZATION,
        Reason.CAPABILITY_UNKNOWN,
        "the capability is not registered; ask the operator to register it",
        rule="capabilities",
        unblock="registering the capability",
        resolution_step=RoutingResolutionStep.CAPABILITY_MATCH,
    )


def _unauthorized_as(reason: Reason, message: str, unblock: str, rule: str) -> Decision:
    return _refused((_RATE_OK,), Stage.AUTHORIZATION, reason, message, unblock=unblock, rule=rule)


def _beyond_agent(agent: AgentDescriptor, what: str, autonomy: StageResult | None = None) -> Decision:
    """A refusal by the agent's own registration: of the capability, or after its autonomy of the tier."""
    return _refused(
        (_RATE_OK,) if autonomy is None else (_RATE_OK, _AUTHORIZED, autonomy),
        Stage.AUTHORIZATION if autonomy is None else Stage.CLASSIFY,
        Reason.AGENT_CEILING,
        f"version {agent.version} of agent {agent.id} is not registered to {what}",
        rule="agent.capabilities" if autonomy is None else "agent.tiers",
        unblock=f"a wider registration of the agent, by {agent.owner}",
    )


def _classified(proposal: Proposed, policy: PolicySnapshot, plan: Plan, facts: Facts) -> Decision | Needs:
    """Risk, tier, conditions and evaluators, and then the price."""
    way = routed(policy, plan, facts, view_of(proposal, plan, facts))
    if isinstance(way, Needs):
        return way
    autonomy = plan.autonomy[facts.autonomy]
    before = (_RATE_OK, _AUTHORIZED, autonomy)
    if way.tier is ActionTier.BLOCKED:
        return _not_routed(before, way)
    return _priced(policy, plan, way, (*before, plan.classified[way.risk_level], plan.cost))


def _priced(policy: PolicySnapshot, plan: Plan, way: RoutingDecision, stages: tuple[StageResult, ...]) -> Decision:
    """The last stage: what one call may cost."""
    if not plan.cost.passed:
        return Decision(
            outcome=Verdict.DENY,
            reason=Reason.BUDGET_EXCEEDED,
            message=plan.cost.detail,
            stages=stages,
            rule="max_eur_per_call",
            unblock="a higher max_eur_per_call, or a lower cost bound of the capability",
        )
    outcome = _VERDICTS.get(way.tier, Verdict.ALLOW)
    if outcome is Verdict.STEER:
        reason, unblock = Reason.STEERED, "what the guidance says instead"
    elif outcome is Verdict.ASK:
        demand = policy.approval.demand(plan.tier, way.risk_level)
        people = "a person" if demand.quorum == 1 else f"{demand.quorum} people"
        reason = Reason.APPROVAL_REQUIRED
        unblock = f"approval by {people} with {' and '.join(demand.scopes)} within {demand.timeout_seconds:g} s"
    else:
        reason, unblock = None, ""
    return Decision(
        outcome=outcome,
        reason=reason,
        message=way.reason,
        mode=plan.capability.mode,
        tier=plan.tier,
        risk=way.risk_level,
        guidance=way.steering,
        stages=stages,
        reserve={} if outcome is Verdict.STEER else plan.reserve,
        rule=way.rule,
        unblock=unblock,
        resolution_step=way.resolution_step,
        leaves=way.leaves,
        raised_by=way.raised_by,
    )


def _rate_limited(facts: Facts) -> Decision:
    whose = facts.rate_dimension or "tenant"
    words = f"the {whose} proposes faster than its policy allows; try again in {facts.retry_after_ms} ms"
    unblock = f"waiting {facts.retry_after_ms} ms"
    return _refused(
        (),
        Stage.RATE_LIMIT,
        Reason.RATE_LIMIT_EXCEEDED,
        words,
        rule="rate_limit" if whose == "tenant" else f"rate_limit_per_{whose}",
        unblock=unblock,
        retry_after_ms=facts.retry_after_ms,
    )


def _not_routed(before: tuple[StageResult, ...], way: RoutingDecision) -> Decision:
    return Decision(
        outcome=Verdict.DENY,
        reason=way.refusal,
        message=way.reason,
        stages=(*before, StageResult(stage=Stage.CLASSIFY, passed=False, detail=way.reason)),
        rule=way.rule,
        unblock=way.unblock,
        resolution_step=way.resolution_step,
        leaves=way.leaves,
        raised_by=way.raised_by,
    )


def _refused(
    before: tuple[StageResult, ...],
    stage: Stage,
    reason: Reason,
    message: str,
    *,
    unblock: str,
    rule: str = "",
    retry_after_ms: int = 0,
    resolution_step: RoutingResolutionStep | None = None,
) -> Decision:
    return Decision(
        outcome=Verdict.DENY,
        reason=reason,
        message=message,
        stages=(*before, StageResult(stage=stage, passed=False, detail=message)),
        retry_after_ms=retry_after_ms,
        rule=rule,
        unblock=unblock,
        resolution_step=resolution_step,
    )
