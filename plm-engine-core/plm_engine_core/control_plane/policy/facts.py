"""What a decision is made from, beside the policy: the proposal as it would be carried out, and gathered facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from plm_shared.ledger import uuid_text

from plm_engine_core.control_plane.policy.run_risk import RunSoFar
from plm_engine_core.control_plane.registry.agents import AgentDescriptor
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, EvaluationStatus, TenantAccess


class Proposed(Protocol):
    """What is proposed, as far as a policy looks at it."""

    @property
    def capability(self) -> str:
        """The capability's id, as the agent wrote it."""
        ...

    @property
    def resource(self) -> str:
        """What the call is for."""
        ...

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments that would be carried out, JSON values."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluator answered; `metadata` is what it told beside, a small JSON object that nothing decides by."""

    name: str
    status: EvaluationStatus
    reason: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def allows(self) -> bool | None:
        """True, false, or None when there is no answer."""
        return {EvaluationStatus.ALLOWED: True, EvaluationStatus.DENIED: False}.get(self.status)

    def to_json(self) -> dict[str, Any]:
        """The stored form; metadata that says nothing is left out."""
        record: dict[str, Any] = {"name": self.name, "status": self.status.value, "reason": self.reason}
        if self.metadata:
            record["metadata"] = dict(self.metadata)
        return record

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Evaluation:
        """Back from the stored form."""
        return cls(
            name=stored["name"],
            status=EvaluationStatus(stored["status"]),
            reason=stored["reason"],
            metadata=stored.get("metadata", {}),
        )


def described(capability: CapabilityDescriptor) -> dict[str, Any]:
    """A capability as paths see it."""
    return {
        "id": capability.id,
        "version": capability.version,
        "mode": capability.mode.value,
        "plugin": capability.plugin,
        "certified": capability.certified,
        "idempotent": capability.idempotent,
    }


def stored_capability(capability: CapabilityDescriptor) -> dict[str, Any]:
    """The stored form of a capability, which stands in the record of every call: what is as by default is left out.

    Sets have no order of their own, and it has to be the same each time. Which tenants it names is left out too: a
    tenant's record names no others, and `Facts.tenant_access` says what came of it.
    """
    record = capability.model_dump(mode="json", exclude_defaults=True, exclude={"allowed_tenants", "denied_tenants"})
    if capability.required_scopes:
        record["required_scopes"] = sorted(capability.required_scopes)
    if capability.network:  # it has to say what it costs, be that nothing
        record["cost"] = capability.cost.model_dump(mode="json")
    return record


WHO_MAY = frozenset({"status", "description", "required_scopes"})
"""Members of a stored capability that say who may call it, and how it is called in words, and nothing of the call."""


def calls_alike(one: Any, other: Any) -> bool:
    """Whether a call means the same under two stored capabilities: they differ in words, or in who may call, at most.

    What is no definition, as where none is on record, is like no other. What is as by default may be said or not.
    """
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    mine, others = (
        {key: value for key, value in _in_full(each).items() if key not in WHO_MAY} for each in (one, other)
    )
    return mine == others


_UNSAID: Mapping[str, Any] = {
    "version": "1",
    "certified": False,
    "idempotent": False,
    "stateless": False,
    "network": False,
    "approval": False,
    "security_relevant": [],
    "model_argument": "",
    "timeout_seconds": 300.0,
}
_UNSAID_COST: Mapping[str, Any] = {"max_eur": "0", "eur_per_unit": {}, "max_usage": {}}
"""What earlier releases stored although it is as by default; members that came later were never stored so."""


def _in_full(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    cost = stored.get("cost", {})
    return {**_UNSAID, **stored, "cost": {**_UNSAID_COST, **cost} if isinstance(cost, Mapping) else cost}


def who(user_id: UUID, actor_kind: str, scopes: Iterable[str]) -> dict[str, Any]:
    """A principal as paths see it."""
    return {"user_id": str(user_id), "actor_kind": actor_kind, "scopes": sorted(scopes)}


def document_of_input(agent: str, given: Mapping[str, Any], principal: Mapping[str, Any]) -> dict[str, Any]:
    """The roots of paths in the phase `input`."""
    return {"agent": agent, "input": given, "principal": principal}


def document_of_output(capability: CapabilityDescriptor, given_back: Mapping[str, Any]) -> dict[str, Any]:
    """The roots of paths in the phase `output`; `given_back` has `output`, `error` and `artifacts`, or some of them."""
    return {"capability": described(capability), **given_back}


def document_of(proposal: Proposed, facts: Facts, capability: Mapping[str, Any]) -> dict[str, Any]:
    """The roots that paths start from, for conditions and evaluators alike."""
    return {
        "agent": facts.agent,
        "arguments": proposal.arguments,
        "autonomy": facts.autonomy.value,
        "capability": capability,
        "claims": facts.claims,
        "principal": who(facts.requester, facts.actor_kind, facts.principal_scopes),
        "resource": proposal.resource,
    }


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything `decide` may look at beside proposal and policy; stored with the decision.

    `claims` is what the agent says of its proposal (`risk`, `weight`, `score`); it never lowers a risk. `at` is when
    the facts were gathered, in UTC. `evaluations` is None until the evaluators were asked; `run` is what the policy's
    `run_risk` needs of the run's earlier steps. `registration` is the agent's, where agents are registered at all, and
    `unregistered` says that this one is not. `principal_until` is when a delegation ends. `tenant_access` is how a
    capability that names tenants stands to the one of the call.
    """

    capability: CapabilityDescriptor | None
    principal_scopes: frozenset[str]
    requester: UUID
    autonomy: AutonomyLevel
    rate_allowed: bool
    retry_after_ms: int = 0
    rate_dimension: str = ""
    actor_kind: str = ""
    agent: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)
    at: datetime | None = None
    evaluations: tuple[Evaluation, ...] | None = None
    run: RunSoFar | None = None
    registration: AgentDescriptor | None = None
    unregistered: bool = False
    principal_until: datetime | None = None
    tenant_access: TenantAccess | None = None

    @property
    def access(self) -> TenantAccess | None:
        """`tenant_access`; where the capability names tenants and nobody said of which one the call is, a refusal."""
        if self.tenant_access is None and self.capability is not None and self.capability.names_tenants:
            return TenantAccess.NOT_ALLOWED
        return self.tenant_access

    def to_json(self, *, capability: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The stored form, from which to decide again; `capability` is its own in that form, where at hand."""
        access = self.tenant_access
        if capability is None and self.capability is not None:
            capability, access = stored_capability(self.capability), self.access
        record: dict[str, Any] = {
            "capability": capability,
            "principal_scopes": sorted(self.principal_scopes),
            "requester": uuid_text(self.requester),
            "autonomy": str(self.autonomy),
            "rate_allowed": self.rate_allowed,
            "retry_after_ms": self.retry_after_ms,
        }
        if self.rate_dimension:
            record["rate_dimension"] = self.rate_dimension
        if self.actor_kind:
            record["actor_kind"] = self.actor_kind
        if self.agent:
            record["agent"] = self.agent
        if self.claims:
            record["claims"] = dict(self.claims)
        if self.at is not None:
            record["at"] = self.at.isoformat()
        if self.evaluations is not None:
            record["evaluations"] = [each.to_json() for each in self.evaluations]
        if self.run is not None:
            record["run"] = self.run.to_json()
        if self.registration is not None:
            record["registration"] = _registration_to_json(self.registration)
        if self.unregistered:
            record["unregistered"] = True
        if self.principal_until is not None:
            record["principal_until"] = self.principal_until.isoformat()
        if access is not None:
            record["tenant_access"] = access.value
        return record

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], *, capability: CapabilityDescriptor | None = None) -> Facts:
        """Back from the stored form; `capability` spares reading the stored one again when the caller has it."""
        recorded, at, evaluations = stored["capability"], stored.get("at"), stored.get("evaluations")
        run = stored.get("run")
        if capability is None and recorded is not None:
            capability = CapabilityDescriptor.model_validate(recorded)
        return cls(
            capability=capability,
            principal_scopes=frozenset(stored["principal_scopes"]),
            requester=UUID(stored["requester"]),
            autonomy=AutonomyLevel(stored["autonomy"]),
            rate_allowed=stored["rate_allowed"],
            retry_after_ms=stored["retry_after_ms"],
            rate_dimension=stored.get("rate_dimension", ""),
            actor_kind=stored.get("actor_kind", ""),
            agent=stored.get("agent", ""),
            claims=stored.get("claims", {}),
            at=datetime.fromisoformat(at) if at is not None else None,
            evaluations=tuple(map(Evaluation.from_json, evaluations)) if evaluations is not None else None,
            run=RunSoFar.from_json(run) if run is not None else None,
            registration=AgentDescriptor.model_validate(stored["registration"]) if "registration" in stored else None,
            unregistered=stored.get("unregistered", False),
            principal_until=datetime.fromisoformat(stored["principal_until"]) if "principal_until" in stored else None,
            tenant_access=TenantAccess(stored["tenant_access"]) if "tenant_access" in stored else None,
        )


def _registration_to_json(agent: AgentDescriptor) -> dict[str, Any]:
    """Sets have no order of their own, and what is stored has to be the same each time."""
    record = agent.model_dump(mode="json")
    return {name: sorted(value) if isinstance(value, list) else value for name, value in record.items()}
