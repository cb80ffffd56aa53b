"""Proposals that operators write down, to ask a policy about them: for `explain`, `test` and `diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from plm_engine_core.control_plane.documents import Whole
from plm_engine_core.control_plane.policy.decision import Decision, Verdict
from plm_engine_core.control_plane.policy.facts import Evaluation, Facts, document_of_input, document_of_output, who
from plm_engine_core.control_plane.policy.run_risk import RunSoFar
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    AutonomyLevel,
    EvaluationPhase,
    EvaluationStatus,
    Reason,
    RiskLevel,
    TenantAccess,
)

_NOBODY = UUID(int=0)
_A_MONDAY = datetime(2024, 1, 1, 12, tzinfo=UTC)
_ALWAYS = frozenset({"phase", "evaluations"})
_WHO = frozenset({"agent", "actor_kind", "scopes", "user_id"})
_OF_CALL = frozenset({"capability", "resource", "arguments", "autonomy", "tenant_id", "at", "claims", "run"})
_GIVEN = {
    EvaluationPhase.INPUT: _ALWAYS | _WHO | {"input"},
    EvaluationPhase.CALL: _ALWAYS | _WHO | _OF_CALL,
    EvaluationPhase.OUTPUT: _ALWAYS | {"capability", "output", "error"},
}
"""By phase, the members of a trial that say something."""


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EarlierSteps(_Written):
    """What the run did before: the points of its steps, and the capabilities of the last ones, oldest first."""

    points: Whole = Field(default=0, ge=0)
    recent: tuple[str, ...] = ()


class Trial(_Written):
    """A proposal with the facts that a real one would be given, or with `phase` what else evaluators are asked about.

    In the phase `input` that is a run that `agent` would be given `input` in; in the phase `output` what a call of
    `capability` gave back: `output`, or `error` where it failed.

    Without `scopes` the principal holds what the capability needs. `evaluations` says what each evaluator answers;
    without it the policy's evaluators are asked. Without `at` it is noon of a Monday. Without `tenant_id` the tenant is
    one that may use the capability.
    """

    phase: EvaluationPhase = EvaluationPhase.CALL
    capability: str = ""
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
    input: Mapping[str, Any] = Field(default_factory=dict)
    output: Any = None
    error: Mapping[str, Any] | None = None

    @model_validator(mode="after")
    def _of_its_phase(self) -> Self:
        if self.phase is not EvaluationPhase.INPUT and not self.capability:
            raise ValueError(f"in the phase {self.phase} it needs a capability")
        if self.error is not None and self.output is not None:
            raise ValueError("a call gives back an output, or an error where it failed; leave one of them out")
        useless = sorted(self.model_fields_set - _GIVEN[self.phase])
        if useless:
            raise ValueError(f"{useless[0]} says nothing in the phase {self.phase}; leave it out")
        return self

    def examined(self, capability: CapabilityDescriptor | None) -> dict[str, Any]:
        """What evaluators are shown in the phase `output` of a capability, and without one in `input`."""
        if capability is None:
            return document_of_input(self.agent, self.input, who(self.user_id, self.actor_kind, self.scopes or ()))
        given: dict[str, Any] = {"error": self.error} if self.error is not None else {"output": self.output}
        return document_of_output(capability, given)

    def answers(self) -> tuple[Evaluation, ...] | None:
        """What each evaluator is said to answer; None where they are to be asked."""
        if self.evaluations is None:
            return None
        return tuple(Evaluation(name=name, status=status) for name, status in self.evaluations.items())

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
            evaluations=self.answers(),
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
