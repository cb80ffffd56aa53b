"""The decision: a pure function of proposal, policy and facts, so any recorded one can be replayed exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    AutonomyLevel,
    BudgetUnit,
    CapabilityMode,
    Reason,
    RiskLevel,
    Stage,
)


class Verdict(StrEnum):
    """What a decision says; only `allow` may lead to a grant."""

    ALLOW = "allow"
    ASK = "ask"  # a human decides
    STEER = "steer"  # refused, with guidance
    DENY = "deny"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything `decide` may look at beside the policy; stored with the decision."""

    capability: CapabilityDescriptor | None
    principal_scopes: frozenset[str]
    requester: UUID
    autonomy: AutonomyLevel
    rate_allowed: bool
    retry_after_ms: int = 0

    def to_json(self) -> dict[str, Any]:
        """The stored form, from which the decision can be made again."""
        capability = self.capability.model_dump(mode="json") if self.capability is not None else None
        if capability is not None:
            capability["required_scopes"] = sorted(capability["required_scopes"])
        return {
            "capability": capability,
            "principal_scopes": sorted(self.principal_scopes),
            "requester": str(self.requester),
            "autonomy": self.autonomy.value,
            "rate_allowed": self.rate_allowed,
            "retry_after_ms": self.retry_after_ms,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Facts:
        """Back from the stored form."""
        capability = stored["capability"]
        return cls(
            capability=CapabilityDescriptor.model_validate(capability) if capability is not None else None,
            principal_scopes=frozenset(stored["principal_scopes"]),
            requester=UUID(stored["requester"]),
            autonomy=AutonomyLevel(stored["autonomy"]),
            rate_allowed=stored["rate_allowed"],
            retry_after_ms=stored["retry_after_ms"],
        )


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one stage said."""

    stage: Stage
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict with its reasons.

    `reserve` holds the amount per unit that an allowed call needs; the conditional reservation in the database is the
    last word of the cost stage.
    """

    outcome: Verdict
    reason: Reason | None = None
    message: str = ""
    mode: CapabilityMode | None = None
    tier: ActionTier | None = None
    risk: RiskLevel | None = None
    guidance: str = ""
    retry_after_ms: int = 0
    stages: tuple[StageResult, ...] = ()
    reserve: Mapping[BudgetUnit, Decimal] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The stored form: JSON values only, empty ones left out."""
        record = {key: value for key, value in asdict(self).items() if value not in (None, "", 0, (), {})}
        if self.reserve:
            record["reserve"] = {unit.value: str(amount) for unit, amount in self.reserve.items()}
        return record


class _Refused(Exception):  # control flow inside this module, never seen outside
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def decide(policy: PolicySnapshot, facts: Facts) -> Decision:
    """Walk the stages in their locked order and stop at the first refusal.

    rate_limit, authorization, autonomy_gating, classify (risk, tier), cost_budget. The same policy and facts always
    give the same decision.
    """
    stages: list[StageResult] = []

    def passes(stage: Stage, check: Callable[[], str]) -> Decision | None:
        try:
            detail = check()
        except _Refused as refusal:
            stages.append(StageResult(stage=stage, passed=False, detail=refusal.message))
            return Decision(
                outcome=Verdict.DENY,
                reason=refusal.reason,
                message=refusal.message,
                stages=tuple(stages),
                retry_after_ms=facts.retry_after_ms if stage is Stage.RATE_LIMIT else 0,
            )
        stages.append(StageResult(stage=stage, passed=True, detail=detail))
        return None

    for stage, check in (
        (Stage.RATE_LIMIT, lambda: _rate_limit(facts)),
        (Stage.AUTHORIZATION, lambda: _authorization(facts)),
        (Stage.AUTONOMY_GATING, lambda: _autonomy(policy, facts)),
    ):
        refused = passes(stage, check)
        if refused is not None:
            return refused
    capability = _known(facts)
    risk = policy.risk_by_mode[capability.mode]
    tier = policy.tier_of(capability.id, capability.mode)
    refused = passes(Stage.CLASSIFY, lambda: _classify(capability, tier, risk))
    if refused is not None:
        return refused
    reserve = {BudgetUnit.EUR: capability.cost.max_eur, BudgetUnit.CALLS: Decimal(1)}
    refused = passes(Stage.COST_BUDGET, lambda: _cost(policy, reserve))
    if refused is not None:
        return refused
    return _answer(policy, capability, tier, risk, tuple(stages), reserve)


def _rate_limit(facts: Facts) -> str:
    if not facts.rate_allowed:
        raise _Refused(
            Reason.RATE_LIMIT_EXCEEDED,
            f"the tenant proposes faster than its policy allows; try again in {facts.retry_after_ms} ms",
        )
    return ""


def _known(facts: Facts) -> CapabilityDescriptor:
    if facts.capability is None:
        raise _Refused(Reason.CAPABILITY_UNKNOWN, "the capability is not registered; ask the operator to register it")
    return facts.capability


def _authorization(facts: Facts) -> str:
    missing = sorted(_known(facts).required_scopes - facts.principal_scopes)
    if missing:
        raise _Refused(Reason.MISSING_SCOPES, f"the run's principal lacks the OAuth scopes {', '.join(missing)}")
    return ""


def _autonomy(policy: PolicySnapshot, facts: Facts) -> str:
    capability = _known(facts)
    level = min(facts.autonomy, policy.autonomy_ceiling, key=lambda each: each.rank)
    allowed = {
        AutonomyLevel.L1: capability.mode is CapabilityMode.READ,
        AutonomyLevel.L2: capability.mode is not CapabilityMode.EXECUTE_WRITE
        or (
            capability.certified
            # Blocked and steered never run, and the policy says better why.
            and policy.tier_of(capability.id, capability.mode)
            in (ActionTier.ALWAYS_APPROVE, ActionTier.STEER, ActionTier.BLOCKED)
        ),
        AutonomyLevel.L3: True,
    }[level]
    if not allowed:
        raise _Refused(
            Reason.AUTONOMY_TOO_LOW,
            f"{capability.id} is {capability.mode.value}; autonomy {level.value} does not reach that far",
        )
    return level.value


def _classify(capability: CapabilityDescriptor, tier: ActionTier, risk: RiskLevel) -> str:
    if tier is ActionTier.BLOCKED:
        raise _Refused(Reason.CAPABILITY_BLOCKED, f"the policy blocks {capability.id}")
    return f"{risk.value} risk, {tier.value}"


def _cost(policy: PolicySnapshot, reserve: Mapping[BudgetUnit, Decimal]) -> str:
    cap = policy.max_eur_per_call
    if cap is not None and reserve[BudgetUnit.EUR] > cap:
        raise _Refused(
            Reason.BUDGET_EXCEEDED,
            f"one call may cost {reserve[BudgetUnit.EUR]} EUR; the policy allows {cap} EUR per call",
        )
    return ", ".join(f"{amount} {unit.value}" for unit, amount in reserve.items())


def _answer(
    policy: PolicySnapshot,
    capability: CapabilityDescriptor,
    tier: ActionTier,
    risk: RiskLevel,
    stages: tuple[StageResult, ...],
    reserve: Mapping[BudgetUnit, Decimal],
) -> Decision:
    asks = tier is ActionTier.ALWAYS_APPROVE or (
        tier is ActionTier.AUTO_APPROVE and risk.rank > policy.auto_approve_max_risk.rank
    )
    if tier is ActionTier.STEER:
        return Decision(
            outcome=Verdict.STEER,
            reason=Reason.STEERED,
            message=f"the policy steers {capability.id}: {policy.guidance[capability.id]}",
            guidance=policy.guidance[capability.id],
            mode=capability.mode,
            tier=tier,
            risk=risk,
            stages=stages,
        )
    if asks:
        return Decision(
            outcome=Verdict.ASK,
            reason=Reason.APPROVAL_REQUIRED,
            message=f"{capability.id} needs the approval of a human ({tier.value}, {risk.value} risk)",
            mode=capability.mode,
            tier=tier,
            risk=risk,
            stages=stages,
            reserve=reserve,
        )
    return Decision(outcome=Verdict.ALLOW, mode=capability.mode, tier=tier, risk=risk, stages=stages, reserve=reserve)
