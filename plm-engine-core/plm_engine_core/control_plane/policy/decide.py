"""The decision: a pure function of proposal, policy and facts, so any recorded one can be replayed exactly."""

from __future__ import annotations

from plm_engine_core.control_plane.policy.decision import Decision, Needs, RoutingDecision, StageResult, Verdict
from plm_engine_core.control_plane.policy.facts import Facts, Proposed
from plm_engine_core.control_plane.policy.models import ModelRule
from plm_engine_core.control_plane.policy.plan import Plan
from plm_engine_core.control_plane.policy.routing import claimed_risk, routed, view_of
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import ActionTier, Reason, RoutingResolutionStep, Stage

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
        return _refused(
            (_RATE_OK,),
            Stage.AUTHORIZATION,
            Reason.CAPABILITY_UNKNOWN,
            "the capability is not registered; ask the operator to register it",
            rule="capabilities",
            unblock="registering the capability",
            resolution_step=RoutingResolutionStep.CAPABILITY_MATCH,
        )
    if not capability.required_scopes <= facts.principal_scopes:
        names = ", ".join(sorted(capability.required_scopes - facts.principal_scopes))
        words = f"the run's principal lacks the OAuth scopes {names}"
        return _refused(
            (_RATE_OK,),
            Stage.AUTHORIZATION,
            Reason.MISSING_SCOPES,
            words,
            rule="required_scopes",
            unblock=f"a principal that holds {names}",
        )
    if policy.models is not None and capability.model_argument:
        refused = _model_refused(proposal, policy.models, capability)
        if refused is not None:
            return refused
    plan = policy.plans.of(capability)
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


def _model_refused(proposal: Proposed, models: ModelRule, capability: CapabilityDescriptor) -> Decision | None:
    model = proposal.arguments.get(capability.model_argument)
    if isinstance(model, str) and models.allows(model):
        return None
    named = f"the model {model!r}" if isinstance(model, str) else "a call that names no model"
    return _refused(
        (_RATE_OK,),
        Stage.AUTHORIZATION,
        Reason.MODEL_NOT_ALLOWED,
        f"{named} is not among the models that the policy allows; {capability.id} names it in"
        f" {capability.model_argument}",
        rule="models.allowed",
        unblock=f"a model that the policy allows: {', '.join(models.allowed) or 'none'}",
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
