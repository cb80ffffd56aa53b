"""A policy compiled for one capability: everything that is the same for each of its proposals, worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from plm_engine_core.control_plane.matching import Match, Matcher, any_of
from plm_engine_core.control_plane.policy.approval import Demand
from plm_engine_core.control_plane.policy.compiled import Test, compile_condition
from plm_engine_core.control_plane.policy.conditions import EvaluatorSays, leaves
from plm_engine_core.control_plane.policy.decision import Decision, StageResult
from plm_engine_core.control_plane.policy.facts import described, stored_capability
from plm_engine_core.control_plane.policy.rules import Effect, Rule
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    AutonomyLevel,
    BudgetUnit,
    CapabilityMode,
    EvaluationPhase,
    RiskLevel,
    RoutingResolutionStep,
    Stage,
)

if TYPE_CHECKING:
    from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledRule:
    """A rule with its condition as a closure; without one it always applies. `asks` are the evaluators it names."""

    rule: Rule
    at: str
    test: Test | None
    asks: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the policy says of one capability before any proposal of it is seen."""

    capability: CapabilityDescriptor
    fields: Mapping[str, Any]
    stored: Mapping[str, Any]
    """The capability as it is recorded with each of its decisions."""
    tier: ActionTier
    tier_at: str
    tier_step: RoutingResolutionStep
    risk: RiskLevel
    rank: int
    rules: Mapping[Effect, tuple[CompiledRule, ...]]
    gates: tuple[str, ...]
    looks: bool
    """Whether any condition has to be tested, or the run looked at."""
    settled: dict[tuple[AutonomyLevel, str], Decision]
    """Without conditions and gates every proposal of a level and claimed risk gets the same decision: kept here."""
    autonomy: Mapping[AutonomyLevel, StageResult]
    classified: Mapping[RiskLevel, StageResult]
    reserve: Mapping[str, Decimal]
    cost: StageResult


class Plans:
    """The plans of a policy, made when a capability is first proposed and kept with it."""

    def __init__(self, policy: PolicySnapshot) -> None:
        self._policy = policy
        self._rules = [(any_of(rule.capabilities, Match.GLOB), _compiled(rule)) for rule in policy.rules]
        self._gates = _gates(policy, EvaluationPhase.CALL)
        self._output_gates = _gates(policy, EvaluationPhase.OUTPUT)
        self.examines_output = bool(self._output_gates)
        """Whether any evaluator is asked about what calls gave back."""
        self.input_gates = tuple(name for _, name in _gates(policy, EvaluationPhase.INPUT))
        """The evaluators that are asked about what a run is given."""
        self.auto_approve_rank = policy.auto_approve_max_risk.rank
        tree = policy.auto_approve_when
        self.auto_approve = compile_condition(tree, "auto_approve_when") if tree is not None else None
        self.auto_approve_asks = frozenset(
            leaf.evaluator_name
            for leaf in (leaves(tree) if tree is not None else ())
            if isinstance(leaf, EvaluatorSays)
        )
        self._plans: dict[str, Plan] = {}
        self._demands: dict[tuple[ActionTier | None, RiskLevel | None], Demand] = {}

    def of(self, capability: CapabilityDescriptor) -> Plan:
        """The plan for this capability as it is described; another description of the same id gets a new one."""
        plan = self._plans.get(capability.id)
        if plan is None or (plan.capability is not capability and plan.capability != capability):
            plan = self._plans[capability.id] = self._make(capability)
        return plan

    def output_gates(self, capability_id: str) -> tuple[str, ...]:
        """The evaluators that are asked about what a call of this capability gave back, whatever its tier is.

        A tier says what may be done without being asked; what comes back of it is another question.
        """
        return tuple(name for matches, name in self._output_gates if matches(capability_id))

    def gates_of(self, phase: EvaluationPhase, capability_id: str) -> tuple[str, ...]:
        """The evaluators that are asked in the phase `input`, or in `output` about this capability."""
        return self.input_gates if phase is EvaluationPhase.INPUT else self.output_gates(capability_id)

    def demand(self, tier: ActionTier | None, risk: RiskLevel | None) -> Demand:
        """What a ticket of this tier and risk needs."""
        demand = self._demands.get((tier, risk))
        if demand is None:
            demand = self._demands[tier, risk] = self._policy.approval.demand(tier, risk)
        return demand

    def _make(self, capability: CapabilityDescriptor) -> Plan:
        policy, mode = self._policy, capability.mode
        own = capability.id in policy.tiers
        tier = policy.tier_of(capability.id, mode)
        marked = capability.approval and tier in (ActionTier.AUTO_APPROVE, ActionTier.UNRESTRICTED)
        if marked:
            tier = ActionTier.ALWAYS_APPROVE
        rules = [rule for matches, rule in self._rules if matches(capability.id)]
        reserve = {BudgetUnit.EUR: capability.cost.max_eur, BudgetUnit.CALLS: Decimal(1), **capability.cost.max_usage}
        risk = _risk(policy, capability)
        return Plan(
            capability=capability,
            fields=described(capability),
            stored=stored_capability(capability),
            tier=tier,
            tier_at="capability.approval"
            if marked
            else f"tiers.{capability.id}"
            if own
            else f"tier_by_mode.{mode.value}",
            tier_step=RoutingResolutionStep.POLICY_LIST_MATCH if own else RoutingResolutionStep.RISK_TIER_MATCH,
            risk=risk,
            rank=risk.rank,
            settled={},
            rules={effect: tuple(each for each in rules if each.rule.then is effect) for effect in Effect},
            gates=()
            if tier in (ActionTier.UNRESTRICTED, ActionTier.STEER, ActionTier.BLOCKED)
            else tuple(name for matches, name in self._gates if matches(capability.id)),
            looks=any(rule.test is not None for rule in rules)
            or (tier is ActionTier.AUTO_APPROVE and self.auto_approve is not None)
            or policy.run_risk is not None,
            autonomy={level: _autonomy(policy, capability, tier, level) for level in AutonomyLevel},
            classified={
                risk: StageResult(stage=Stage.CLASSIFY, passed=True, detail=f"{risk.value} risk, {tier.value}")
                for risk in RiskLevel
            },
            reserve=MappingProxyType(reserve),
            cost=_cost(policy, reserve),
        )


def _gates(policy: PolicySnapshot, phase: EvaluationPhase) -> list[tuple[Matcher, str]]:
    """The gates of a phase, with which capabilities each is about."""
    return [
        (any_of(spec.capabilities, Match.GLOB), spec.name)
        for spec in policy.evaluators
        if spec.gate and spec.phase is phase
    ]


def _compiled(rule: Rule) -> CompiledRule:
    at = f"rules.{rule.id}"
    tree = rule.when
    return CompiledRule(
        rule=rule,
        at=at,
        test=compile_condition(tree, f"{at}.when") if tree is not None else None,
        asks=frozenset(
            leaf.evaluator_name
            for leaf in (leaves(tree) if tree is not None else ())
            if isinstance(leaf, EvaluatorSays)
        ),
    )


def _risk(policy: PolicySnapshot, capability: CapabilityDescriptor) -> RiskLevel:
    """The capability's own risk, else its mode's; never under the mode's floor."""
    rated = policy.risk_by_capability.get(capability.id, policy.risk_by_mode[capability.mode])
    return max(rated, policy.risk_floor.get(capability.mode, RiskLevel.LOW), key=lambda each: each.rank)


def _autonomy(
    policy: PolicySnapshot, capability: CapabilityDescriptor, tier: ActionTier, level: AutonomyLevel
) -> StageResult:
    ceilings = (policy.autonomy_ceiling, policy.autonomy_ceiling_by_capability.get(capability.id, AutonomyLevel.L3))
    level = min(level, *ceilings, key=lambda each: each.rank)
    reaches = {
        AutonomyLevel.L1: capability.mode is CapabilityMode.READ,
        AutonomyLevel.L2: capability.mode is not CapabilityMode.EXECUTE_WRITE
        or (
            capability.certified
            # Blocked and steered never run, and the policy says better why.
            and tier in (ActionTier.ALWAYS_APPROVE, ActionTier.STEER, ActionTier.BLOCKED)
        ),
        AutonomyLevel.L3: True,
    }[level]
    words = f"{capability.id} is {capability.mode.value}; autonomy {level.value} does not reach that far"
    return StageResult(stage=Stage.AUTONOMY_GATING, passed=reaches, detail=level.value if reaches else words)


def _cost(policy: PolicySnapshot, reserve: Mapping[str, Decimal]) -> StageResult:
    cap, needed = policy.max_eur_per_call, reserve[BudgetUnit.EUR]
    if cap is not None and needed > cap:
        words = f"one call may cost {needed} EUR; the policy allows {cap} EUR per call"
        return StageResult(stage=Stage.COST_BUDGET, passed=False, detail=words)
    words = ", ".join(f"{amount} {unit}" for unit, amount in reserve.items())
    return StageResult(stage=Stage.COST_BUDGET, passed=True, detail=words)
