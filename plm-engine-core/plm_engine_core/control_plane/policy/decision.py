"""What deciding answers: a decision with every stage's reason, or the evaluators that have to be asked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any

from plm_engine_core.control_plane.policy.compiled import LeafResult
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    CapabilityMode,
    Reason,
    RiskLevel,
    RoutingResolutionStep,
    Stage,
)


class Verdict(StrEnum):
    """What a decision says; only `allow` may lead to a grant."""

    ALLOW = "allow"
    ASK = "ask"  # a human decides
    STEER = "steer"  # refused, with guidance
    DENY = "deny"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What one stage said."""

    stage: Stage
    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingDecision:
    """How the policy treats one proposal, budgets left aside.

    `tier` is the one in effect: a rule that denies makes it `blocked`, one that asks `always_approve`. `rule` is the
    place in the policy that settled it, `leaves` the conditions that did. `refusal` is set where the tier is `blocked`.
    """

    tier: ActionTier
    risk_level: RiskLevel
    reason: str
    resolution_step: RoutingResolutionStep
    rule: str
    steering: str = ""
    refusal: Reason | None = None
    unblock: str = ""
    leaves: tuple[LeafResult, ...] = ()
    raised_by: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """No decision yet: these evaluators have to be asked, once, and their answers added to the facts."""

    evaluators: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict with its reasons.

    `tier` is the one the policy assigns; `rule` is the place in the policy that settled the verdict, `leaves` the
    conditions that did, `raised_by` the places that raised the risk above the capability's own, and `unblock` what
    would change the verdict. `reserve` holds the amount per unit that an allowed call
    needs; the conditional reservation in the database is the last word of the cost stage.
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
    reserve: Mapping[str, Decimal] = field(default_factory=dict)
    rule: str = ""
    unblock: str = ""
    resolution_step: RoutingResolutionStep | None = None
    leaves: tuple[LeafResult, ...] = ()
    raised_by: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The stored form: JSON values only, empty ones left out. What is within it is not to be changed."""
        return dict(self._stored)

    @cached_property
    def _stored(self) -> dict[str, Any]:
        """Made once: a decision that no condition has a part in is recorded with every call of its capability."""
        record: dict[str, Any] = {"outcome": self.outcome.value}
        for name in ("reason", "mode", "tier", "risk", "resolution_step"):
            value = getattr(self, name)
            if value is not None:
                record[name] = value.value
        for name in ("message", "guidance", "retry_after_ms", "rule", "unblock"):
            value = getattr(self, name)
            if value:
                record[name] = value
        if self.stages:
            record["stages"] = [
                {"stage": each.stage.value, "passed": each.passed, "detail": each.detail} for each in self.stages
            ]
        if self.reserve:
            record["reserve"] = {str(unit): str(amount) for unit, amount in self.reserve.items()}
        if self.leaves:
            record["leaves"] = [each.to_json() for each in self.leaves]
        if self.raised_by:
            record["raised_by"] = list(self.raised_by)
        return record
