"""The policy in force, as an immutable, content-addressed value."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

from plm_shared.idempotency import compute_content_hash
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.documents import load_document
from plm_engine_core.control_plane.vocabulary import ActionTier, AutonomyLevel, BudgetUnit, CapabilityMode, RiskLevel


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RateLimit(_Frozen):
    """A token bucket: `per_second` tokens are added each second, up to `burst`."""

    per_second: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    burst: float = Field(default=30.0, ge=1, allow_inf_nan=False)


class BudgetDefaults(_Frozen):
    """Limits for a run that asks for none, and for a tenant without its own; amounts per unit."""

    run: Mapping[BudgetUnit, Amount]
    tenant: Mapping[BudgetUnit, Amount]

    @field_validator("run", "tenant")
    @classmethod
    def _every_unit(cls, limits: Mapping[BudgetUnit, Decimal]) -> Mapping[BudgetUnit, Decimal]:
        missing = [unit.value for unit in BudgetUnit if unit not in limits]
        if missing:
            raise ValueError(f"a limit is missing for {', '.join(missing)}; a unit without a limit cannot be spent")
        return limits


class ApprovalRule(_Frozen):
    """Who may approve, and how long there is to do it."""

    timeout_seconds: float = Field(default=3600.0, gt=0, le=30 * 86400)
    required_scope: str = Field(default="plm.hitl.resolve", min_length=1)


class PolicySnapshot(_Frozen):
    """What may run, how, and with whose consent. Equal content has an equal `digest`."""

    version: str = Field(min_length=1)
    tiers: Mapping[str, ActionTier] = Field(default_factory=dict)
    tier_by_mode: Mapping[CapabilityMode, ActionTier]
    guidance: Mapping[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    auto_approve_max_risk: RiskLevel = RiskLevel.LOW
    risk_by_mode: Mapping[CapabilityMode, RiskLevel]
    autonomy_ceiling: AutonomyLevel = AutonomyLevel.L2
    rate_limit: RateLimit = RateLimit()
    approval: ApprovalRule = ApprovalRule()
    budgets: BudgetDefaults
    max_eur_per_call: Amount | None = None
    grant_seconds: float = Field(default=300.0, gt=0, le=86400)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, table in (("tier_by_mode", self.tier_by_mode), ("risk_by_mode", self.risk_by_mode)):
            missing = [mode.value for mode in CapabilityMode if mode not in table]
            if missing:
                raise ValueError(f"{name} has no entry for {', '.join(missing)}")
        if ActionTier.STEER in self.tier_by_mode.values():
            raise ValueError("tier_by_mode cannot steer: guidance is given per capability, so steer it under tiers")
        unguided = [key for key, tier in self.tiers.items() if tier is ActionTier.STEER and key not in self.guidance]
        if unguided:
            raise ValueError(f"guidance is missing for the steered capabilities {', '.join(sorted(unguided))}")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical content, lower-case hex."""
        return compute_content_hash(self.model_dump(mode="json"))

    def tier_of(self, capability_id: str, mode: CapabilityMode) -> ActionTier:
        """The tier a capability falls in: its own, else that of its mode."""
        return self.tiers.get(capability_id, self.tier_by_mode[mode])


def load_policy(path: Path) -> PolicySnapshot:
    """Read a policy from YAML.

    Raises:
        InvalidRequest: naming the file and the entry that is missing, unknown, doubled or wrong.
    """
    return load_document(path, PolicySnapshot, "policy")
