"""Proposals that operators write down, to ask a policy about them: for `explain`, `test` and `diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator

from plm_engine_core.control_plane.documents import Whole
from plm_engine_core.control_plane.policy.decision import Decision, Verdict
from plm_engine_core.control_plane.policy.facts import Evaluation, Facts
from plm_engine_core.control_plane.policy.run_risk import RunSoFar
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, EvaluationStatus, Reason, RiskLevel, TenantAccess

_NOBODY = UUID(int=0)
_A_MONDAY = datetime(2024, 1, 1, 12, tzinfo=UTC)


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EarlierSteps(_Written):
    """What the run did before: the points of its steps, and the capabilities of the last ones, oldest first."""

    points: Whole = Field(default=0, ge=0)
    recent: tuple[str, ...] = ()


class Trial(_Written):
    """A proposal with the facts that a real one would be given.

    Without `scopes` the principal holds what the capability needs. `evaluations` says what each evaluator answers;
    without it the policy's evaluators are asked. Without `at` it is noon of a Monday. Without `tenant_id` the tenant is
    one that may use the capability.
    """

    capability: str
    resource: str = ""
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    agent: str = ""
    autonomy: AutonomyLevel = AutonomyLevel.L3
    scopes: frozenset[str] | None = None
    actor_kind: str = "human"
    user_id: UUID = _NOBODY
    tenant_id: UUID | None = None
    at: datetime = _A_MONDAY
    claims: Mapping[str, Any] = Field(default_factory=dict)
    evaluations: Mapping[str, EvaluationStatus] | None = None
    run: EarlierSteps | None = None

    def facts(self, capability: CapabilityDescriptor | None) -> Facts:
        """The facts of this proposal for a capability, or for one that is not registered."""
        needed = capability.required_scopes if capability is not None else frozenset[str]()
        return Facts(
            capability=capability,
            principal_scopes=needed if self.scopes is None else self.scopes,
            requester=self.user_id,
            autonomy=self.autonomy,
            rate_allowed=True,
            actor_kind=self.actor_kind,
            agent=self.agent,
            claims=self.claims,
            at=self.at if self.at.tzinfo is None else self.at.astimezone(UTC),
            tenant_access=_access(capability, self.tenant_id) if capability is not None else None,
            evaluations=None
            if self.evaluations is None
            else tuple(Evaluation(name=name, status=status) for name, status in self.evaluations.items()),
            run=None if self.run is None else RunSoFar(points=self.run.points, recent=self.run.recent),
        )


def _access(capability: CapabilityDescriptor, tenant_id: UUID | None) -> TenantAccess | None:
    if tenant_id is not None:
        return capability.access_of(tenant_id)
    if not capability.names_tenants:
        return None
    return TenantAccess.ALLOWED if capability.allowed_tenants is not None else TenantAccess.NOT_DENIED


class Expected(_Written):
    """What a case expects of its decision; what is left out is not compared."""

    outcome: Verdict
    reason: Reason | None = None
    rule: str | None = None
    risk: RiskLevel | None = None

    def mismatches(self, decision: Decision) -> dict[str, tuple[Any, Any]]:
        """By member: what was expected and what was decided."""
        given = [name for name in type(self).model_fields if name in self.model_fields_set]
        pairs = {name: (getattr(self, name), getattr(decision, name)) for name in given}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


class Case(_Written):
    """One proposal and what is to become of it."""

    name: str = Field(min_length=1)
    given: Trial
    expect: Expected


class CaseFile(_Written):
    """A file of cases."""

    cases: Annotated[tuple[Case, ...], Field(min_length=1)]

    @field_validator("cases")
    @classmethod
    def _named_once(cls, cases: tuple[Case, ...]) -> tuple[Case, ...]:
        doubled = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
        if doubled:
            raise ValueError(f"two cases are named {doubled[0]!r}; one would hide the other")
        return cases
