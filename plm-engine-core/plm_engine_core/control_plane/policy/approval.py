"""Who may approve what: how many people, with which OAuth scopes, by when, and what they may leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from plm_engine_core.control_plane.documents import Flag, Number, Whole
from plm_engine_core.control_plane.policy.frozen import Table
from plm_engine_core.control_plane.vocabulary import ActionTier, RiskLevel

_MONTH = 30 * 86400
Seconds = Annotated[Number, Field(gt=0, le=_MONTH, allow_inf_nan=False)]
OAuthScope = Annotated[str, Field(min_length=1, max_length=200)]  # its form is looked at before a policy is activated

ADDED = ("quorum", "by_tier", "by_risk", "escalation", "standing", "input")
"""Members that the first form did not have: while they say nothing a policy's digest leaves them out."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ApprovalDemand(_Frozen):
    """What calls of one tier or one risk demand on top of the rest."""

    required_scope: OAuthScope | None = None
    quorum: Whole = Field(default=1, ge=1, le=20)
    timeout_seconds: Seconds | None = None


class Escalation(_Frozen):
    """Who is asked, once, when nobody decided in time, and how long they have; without it the call is then denied."""

    required_scope: OAuthScope
    timeout_seconds: Seconds = 3600.0


class StandingApproval(_Frozen):
    """The widest approval scope that approvers may leave behind."""

    max_uses: Whole = Field(ge=1, le=10_000)
    max_seconds: Seconds
    max_risk: RiskLevel = RiskLevel.LOW
    any_resource: Flag = False


class InputRule(_Frozen):
    """How agents may ask humans for an input, and who gives it: one answer, which allows, spends and reserves nothing.

    Without a scope or a time of its own an ask has those of an approval. Who a run works for may answer what it asks,
    as nobody's consent is asked for; `by_requester: false` has somebody else answer. With `failures` a human is also
    asked before a run fails because a step is exhausted or its agent's autonomy is too low.
    """

    required_scope: OAuthScope | None = None
    timeout_seconds: Seconds | None = None
    by_requester: Flag = True
    max_per_run: Whole = Field(default=10, ge=1, le=1000)
    failures: Flag = True


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one ticket needs: `quorum` words by different people who each hold all of `scopes`."""

    scopes: tuple[str, ...]
    quorum: int
    timeout_seconds: float


class ApprovalRule(_Frozen):
    """Who may approve, and how long there is to do it. Of all that applies to a call the strictest counts."""

    timeout_seconds: Seconds = 3600.0
    required_scope: str = Field(default="plm.hitl.resolve", min_length=1)
    quorum: Whole = Field(default=1, ge=1, le=20)
    by_tier: Table[ActionTier, ApprovalDemand] = Field(default_factory=lambda: MappingProxyType({}))
    by_risk: Table[RiskLevel, ApprovalDemand] = Field(default_factory=lambda: MappingProxyType({}))
    escalation: Escalation | None = None
    standing: StandingApproval | None = None
    input: InputRule | None = None

    def demand(self, tier: ActionTier | None, risk: RiskLevel | None, *, escalated: bool = False) -> Demand:
        """What a ticket of this tier and risk needs; an `escalated` one needs the wider circle's OAuth scope."""
        found = [self.by_tier.get(tier) if tier else None, self.by_risk.get(risk) if risk else None]
        demands = [each for each in found if each is not None]
        scopes = (self.required_scope, *(each.required_scope for each in demands if each.required_scope))
        if escalated and self.escalation is not None:
            scopes = (self.escalation.required_scope,)
        return Demand(
            scopes=tuple(dict.fromkeys(scopes)),
            quorum=max([self.quorum, *(each.quorum for each in demands)]),
            timeout_seconds=min(
                [self.timeout_seconds, *(each.timeout_seconds for each in demands if each.timeout_seconds)]
            ),
        )

    def input_demand(self, *, escalated: bool = False) -> Demand:
        """What an ask needs; where the policy lets no agent ask, who may approve may still deny one from before."""
        rule = self.input or InputRule()
        scope = rule.required_scope or self.required_scope
        if escalated and self.escalation is not None:
            scope = self.escalation.required_scope
        return Demand(scopes=(scope,), quorum=1, timeout_seconds=rule.timeout_seconds or self.timeout_seconds)

    @property
    def scopes(self) -> dict[str, str]:
        """Every OAuth scope that is asked for, by its place in the rule."""
        demands = {f"by_tier.{tier.value}": each for tier, each in self.by_tier.items()}
        demands |= {f"by_risk.{risk.value}": each for risk, each in self.by_risk.items()}
        asked = {
            f"{place}.required_scope": each.required_scope for place, each in demands.items() if each.required_scope
        }
        if self.escalation is not None:
            asked["escalation.required_scope"] = self.escalation.required_scope
        if self.input is not None and self.input.required_scope:
            asked["input.required_scope"] = self.input.required_scope
        return {"required_scope": self.required_scope, **asked}

    @property
    def escalate_seconds(self) -> float | None:
        """How long the wider circle has; None where a ticket is not handed on."""
        return self.escalation.timeout_seconds if self.escalation is not None else None

    @property
    def asks_on_failure(self) -> bool:
        """Whether a human is asked before a run fails because a step is exhausted or autonomy is too low."""
        return self.input is not None and self.input.failures

    def unsaid(self) -> Mapping[str, Any]:
        """The members that the first form did not have and that say nothing here."""
        silent = ApprovalRule()
        unsaid: dict[str, Any] = {name: True for name in ADDED if getattr(self, name) == getattr(silent, name)}
        return {"input": {"failures": True}, **unsaid} if self.asks_on_failure else unsaid
