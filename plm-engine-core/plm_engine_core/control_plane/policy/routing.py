"""Classifying and routing: how risky a proposal is, and how the policy treats it. Pure, like everything here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from plm_engine_core.control_plane.policy.compiled import Finding, View
from plm_engine_core.control_plane.policy.decision import Needs, RoutingDecision
from plm_engine_core.control_plane.policy.facts import Evaluation, Facts, Proposed, document_of
from plm_engine_core.control_plane.policy.gates import first_refusal
from plm_engine_core.control_plane.policy.plan import CompiledRule, Plan
from plm_engine_core.control_plane.policy.rules import Effect
from plm_engine_core.control_plane.policy.run_risk import RunSoFar
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    EvaluationPhase,
    Reason,
    RiskLevel,
    RoutingResolutionStep,
)

_LEVELS = tuple(RiskLevel)
_BY_CLAIM = {level.value: level.rank for level in RiskLevel}
_NOTHING = Finding(holds=True, leaves=())


@dataclass(frozen=True, slots=True)
class _Applied:
    """A rule that applies: its condition holds, or cannot be decided."""

    rule: CompiledRule
    found: Finding


def classify(proposal: Proposed, policy: PolicySnapshot, facts: Facts) -> RiskLevel:
    """The risk of a proposal: its capability's, raised by rules and by what the agent itself claims; never lowered.

    Raises:
        ValueError: the facts name no capability.
    """
    plan = _plan(policy, facts)
    view = view_of(proposal, plan, facts)
    rated(policy, plan, facts, view)
    return _LEVELS[view.risk]


def route(proposal: Proposed, policy: PolicySnapshot, facts: Facts) -> RoutingDecision | Needs:
    """How the policy treats a proposal; `Needs` only while the facts hold no evaluations.

    Raises:
        ValueError: the facts name no capability.
    """
    plan = _plan(policy, facts)
    return routed(policy, plan, facts, view_of(proposal, plan, facts))


def _plan(policy: PolicySnapshot, facts: Facts) -> Plan:
    if facts.capability is None:
        raise ValueError("a capability that is not registered has no risk and no route; decide() refuses it")
    return policy.plans.of(facts.capability)


def view_of(proposal: Proposed, plan: Plan, facts: Facts) -> View:
    """What conditions look at; without any to test, as little as possible."""
    if not plan.looks:
        return View({"claims": facts.claims}, evaluations={})
    return View(
        document_of(proposal, facts, plan.fields),
        at=facts.at,
        evaluations={each.name: each.allows for each in facts.evaluations or ()},
    )


def rated(policy: PolicySnapshot, plan: Plan, facts: Facts, view: View) -> tuple[str, ...]:
    """Rate the risk into the view, for the conditions that look at it; answers what raised it above the plan's."""
    raises: list[tuple[RiskLevel, str]] = []
    if plan.looks or facts.claims or plan.rules[Effect.RAISE_RISK]:
        raises.extend(_raises(policy, plan, facts, view))
    view.risk = max([plan.rank, *(level.rank for level, _ in raises)])
    return tuple(place for level, place in raises if level.rank > plan.rank)


def _raises(policy: PolicySnapshot, plan: Plan, facts: Facts, view: View) -> Iterator[tuple[RiskLevel, str]]:
    """Each reason for a risk of at least this level, with its place."""
    claimed = claimed_risk(facts.claims)
    if claimed:
        yield RiskLevel(claimed), "claims.risk"
    for rule in plan.rules[Effect.RAISE_RISK]:
        if (rule.test is None or rule.test(view).holds is not False) and rule.rule.risk is not None:
            yield rule.rule.risk, rule.at
    if policy.run_risk is not None:
        yield from policy.run_risk.raised(facts.run or RunSoFar(), plan.capability.id, plan.risk)


def claimed_risk(claims: Mapping[str, Any]) -> str:
    """The risk that the agent itself claims, or nothing; whatever else stands there is no claim."""
    claimed = claims.get("risk")
    return claimed if isinstance(claimed, str) and claimed in _BY_CLAIM else ""


def routed(policy: PolicySnapshot, plan: Plan, facts: Facts, view: View) -> RoutingDecision | Needs:
    """Route over a view, after its risk was rated."""
    raised_by = rated(policy, plan, facts, view)
    way = _routed(policy, plan, facts, view)
    return replace(way, raised_by=raised_by) if raised_by and isinstance(way, RoutingDecision) else way


def _routed(policy: PolicySnapshot, plan: Plan, facts: Facts, view: View) -> RoutingDecision | Needs:
    """From the strictest answer to the most permissive."""
    risk = _LEVELS[view.risk]
    if plan.tier is ActionTier.BLOCKED:
        return _blocked(plan, risk)
    asked = facts.evaluations is not None
    refused = _refused_by_gate(plan, risk, facts.evaluations) if facts.evaluations is not None else None
    if refused is not None:
        return refused
    pending: set[str] = set()
    denial = _strictest(plan.rules[Effect.DENY], view, pending, asked=asked)
    if denial is not None:
        return _by_rule(plan, risk, denial, ActionTier.BLOCKED)
    if not pending:
        steering = _strictest(plan.rules[Effect.STEER], view, pending, asked=asked)
        if steering is not None and not pending:
            return _by_rule(plan, risk, steering, ActionTier.STEER)
        if plan.tier is ActionTier.STEER and not pending:
            return _steered(policy, plan, risk)
    approval = _approval(policy, plan, risk, view, pending, asked=asked)
    pending.update(plan.gates)
    if not asked and pending:
        return Needs(evaluators=tuple(spec.name for spec in policy.evaluators if spec.name in pending))
    return approval


def _strictest(rules: Iterable[CompiledRule], view: View, pending: set[str], *, asked: bool) -> _Applied | None:
    """The first rule that applies; one that waits for evaluators is noted in `pending` instead."""
    for rule in rules:
        found = rule.test(view) if rule.test is not None else _NOTHING
        if found.holds is False:
            continue
        if found.holds is None and rule.asks and not asked:
            pending.update(rule.asks)
        else:
            return _Applied(rule, found)
    return None


def _approval(
    policy: PolicySnapshot, plan: Plan, risk: RiskLevel, view: View, pending: set[str], *, asked: bool
) -> RoutingDecision:
    """Whether a human is asked, or the call is allowed."""
    asking = _strictest(plan.rules[Effect.ASK], view, pending, asked=asked)
    if asking is not None:
        return _by_rule(plan, risk, asking, ActionTier.ALWAYS_APPROVE)
    if plan.tier is not ActionTier.AUTO_APPROVE:
        return _by_tier(plan, risk, plan.tier, plan.tier_at)
    if view.risk > policy.plans.auto_approve_rank:
        return _by_tier(plan, risk, ActionTier.ALWAYS_APPROVE, "auto_approve_max_risk")
    if policy.plans.auto_approve is None:
        return _by_tier(plan, risk, plan.tier, plan.tier_at)
    found = policy.plans.auto_approve(view)
    if found.holds is None and not asked:
        pending.update(policy.plans.auto_approve_asks)
    tier = ActionTier.AUTO_APPROVE if found.holds else ActionTier.ALWAYS_APPROVE
    return _by_tier(plan, risk, tier, "auto_approve_when", found)


def _refused_by_gate(plan: Plan, risk: RiskLevel, evaluations: Iterable[Evaluation]) -> RoutingDecision | None:
    """The first gate, in declared order, that did not allow; one that was cancelled never hides the one that denied."""
    refusal = first_refusal(plan.gates, evaluations, EvaluationPhase.CALL) if plan.gates else None
    if refusal is None:
        return None
    return RoutingDecision(
        tier=ActionTier.BLOCKED,
        risk_level=risk,
        reason=refusal.message,
        resolution_step=RoutingResolutionStep.EXPLICIT_ASSIGNMENT,
        rule=refusal.rule,
        refusal=refusal.reason,
        unblock=refusal.unblock,
    )


def _by_rule(plan: Plan, risk: RiskLevel, applied: _Applied, tier: ActionTier) -> RoutingDecision:
    rule, capability = applied.rule.rule, plan.capability.id
    why = f": {rule.reason}" if rule.reason else ""
    undecided = "" if applied.found.holds else "; a condition of it could not be decided, which counts against the call"
    words = {
        Effect.DENY: f"the rule {rule.id} denies {capability}{why}{undecided}",
        Effect.STEER: f"the rule {rule.id} steers {capability}: {rule.guidance}",
        Effect.ASK: f"{capability} needs the approval of a human (rule {rule.id}{why}{undecided})",
    }
    return RoutingDecision(
        tier=tier,
        risk_level=risk,
        reason=words[rule.then],
        resolution_step=RoutingResolutionStep.EXPLICIT_ASSIGNMENT,
        rule=applied.rule.at,
        steering=rule.guidance,
        refusal=Reason.RULE_DENIED if tier is ActionTier.BLOCKED else None,
        unblock=f"a proposal to which {applied.rule.at} does not apply" if tier is ActionTier.BLOCKED else "",
        leaves=applied.found.leaves,
    )


def _by_tier(plan: Plan, risk: RiskLevel, tier: ActionTier, at: str, found: Finding = _NOTHING) -> RoutingDecision:
    asks = tier is ActionTier.ALWAYS_APPROVE
    words = f"{plan.capability.id} needs the approval of a human ({plan.tier.value}, {risk.value} risk)" if asks else ""
    return RoutingDecision(
        tier=tier,
        risk_level=risk,
        reason=words,
        resolution_step=plan.tier_step,
        rule=at,
        leaves=found.leaves,
    )


def _blocked(plan: Plan, risk: RiskLevel) -> RoutingDecision:
    return RoutingDecision(
        tier=ActionTier.BLOCKED,
        risk_level=risk,
        reason=f"the policy blocks {plan.capability.id}",
        resolution_step=RoutingResolutionStep.EXPLICIT_ASSIGNMENT,
        rule=plan.tier_at,
        refusal=Reason.CAPABILITY_BLOCKED,
        unblock=f"another tier at {plan.tier_at}",
    )


def _steered(policy: PolicySnapshot, plan: Plan, risk: RiskLevel) -> RoutingDecision:
    guidance = policy.guidance[plan.capability.id]
    return RoutingDecision(
        tier=ActionTier.STEER,
        risk_level=risk,
        reason=f"the policy steers {plan.capability.id}: {guidance}",
        resolution_step=plan.tier_step,
        rule=plan.tier_at,
        steering=guidance,
    )
