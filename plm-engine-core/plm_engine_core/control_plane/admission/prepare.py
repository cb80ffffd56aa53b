"""Gathers the facts a decision needs. Everything slow or outside happens here, before the books are opened."""

from __future__ import annotations

from plm_engine_core.control_plane.admission.proposal import Proposal
from plm_engine_core.control_plane.limits import Prepared
from plm_engine_core.control_plane.policy import Facts, PolicySnapshot
from plm_engine_core.control_plane.policy.run_risk import MOST_ATTEMPTS, RunRisk, RunSoFar
from plm_engine_core.control_plane.registry import AgentRegistry, CapabilityRegistry
from plm_engine_core.control_plane.storage.ports import AdmissionStore
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, RiskLevel


async def prepare(
    proposal: Proposal,
    *,
    policy: PolicySnapshot,
    registry: CapabilityRegistry,
    storage: AdmissionStore,
    agents: AgentRegistry | None = None,
) -> tuple[Facts, Prepared]:
    """Take the rate's tokens and read what one proposal is decided by; beside it, what the books said.

    Raises:
        StorageUnavailable: a fact could not be had; nothing was decided.
    """
    prepared = await storage.prepare(proposal.tenant_id, proposal.run_id, buckets=policy.buckets)
    facts = await gathered(proposal, prepared, policy=policy, registry=registry, storage=storage, agents=agents)
    return facts, prepared


async def gathered(
    proposal: Proposal,
    prepared: Prepared,
    *,
    policy: PolicySnapshot,
    registry: CapabilityRegistry,
    storage: AdmissionStore,
    agents: AgentRegistry | None = None,
) -> Facts:
    """The facts, from what the books said: the rate, the capability, tenant, principal, agent and the run so far.

    Without `agents` no agent has a ceiling of its own.

    Raises:
        StorageUnavailable: a fact could not be had; nothing was decided.
    """
    agent = agents.get(proposal.agent) if agents is not None else None
    capability = registry.get(proposal.capability)
    return Facts(
        capability=capability,
        principal_scopes=proposal.principal.scopes,
        requester=proposal.principal.user_id,
        autonomy=agent.autonomy if agent is not None else AutonomyLevel.L3,
        rate_allowed=prepared.rate.allowed,
        retry_after_ms=prepared.rate.retry_after_ms,
        rate_dimension=prepared.rate.dimension or "",
        actor_kind=proposal.principal.actor_kind,
        agent=proposal.agent,
        claims=proposal.claims,
        at=prepared.at,
        registration=agent,
        unregistered=agents is not None and agent is None,
        principal_until=proposal.principal.expires_at,
        tenant_access=capability.access_of(proposal.tenant_id)
        if registry.names_tenants and capability is not None
        else None,
        run=await _run_so_far(proposal, policy.run_risk, policy=policy, registry=registry, storage=storage)
        if policy.run_risk is not None
        else None,
    )


async def _run_so_far(
    proposal: Proposal,
    run_risk: RunRisk,
    *,
    policy: PolicySnapshot,
    registry: CapabilityRegistry,
    storage: AdmissionStore,
) -> RunSoFar:
    """The run's earlier attempts, for a policy that rates runs; read each time, so that it survives any restart."""
    earlier, older = await storage.history(
        proposal.tenant_id, proposal.run_id, beside=(proposal.step_index, proposal.attempt), limit=MOST_ATTEMPTS
    )

    def risk_of(capability_id: str) -> RiskLevel:
        capability = registry.get(capability_id)
        return policy.plans.of(capability).risk if capability is not None else RiskLevel.HIGH

    return run_risk.project(earlier, risk_of, unseen=older)
