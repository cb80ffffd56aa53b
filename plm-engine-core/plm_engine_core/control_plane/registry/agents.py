"""Agents: who may propose, with the ceilings that the operator set for each, whatever a policy would allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.documents import Whole, load_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Unit
from plm_engine_core.control_plane.vocabulary import ActionTier, AgentStatus, AutonomyLevel


class AgentDescriptor(BaseModel):
    """One registered version of an agent.

    `autonomy`, `tiers` and `budget` are ceilings: a policy may give less and never more. `capabilities` are the only
    ones it may use; None means any. `delegations` is how many hands its work may pass through after it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1, max_length=120)
    version: str = Field(default="1", min_length=1, max_length=60)
    owner: str = Field(min_length=1, max_length=200)
    status: AgentStatus = AgentStatus.ACTIVE
    autonomy: AutonomyLevel = AutonomyLevel.L3
    tiers: frozenset[ActionTier] = frozenset(ActionTier)
    budget: Mapping[Unit, Amount] = Field(default_factory=dict)
    capabilities: frozenset[str] | None = None
    delegations: Whole = Field(default=0, ge=0, le=16)

    @property
    def inactive(self) -> str:
        """Why it may propose nothing; empty when it may."""
        if self.status is AgentStatus.ACTIVE:
            return ""
        return f"agent {self.id} is {self.status.value}; {self.owner} owns it"

    def within(self, limits: Mapping[str, Decimal]) -> dict[str, Decimal]:
        """The limits of a run, none above the ceiling."""
        return {unit: min(limit, self.budget.get(unit, limit)) for unit, limit in limits.items()}


class AgentRegistry:
    """An immutable set of agents; whoever needs it is handed it.

    Several versions of one agent may stand in it; at most one of them is active, and that is the one which counts.
    """

    def __init__(self, agents: Iterable[AgentDescriptor]) -> None:
        self._all = tuple(agents)
        self._by_id: dict[str, AgentDescriptor] = {}
        seen = set()
        for agent in self._all:
            if (agent.id, agent.version) in seen:
                raise InvalidRequest(
                    f"version {agent.version} of agent {agent.id} is registered twice; remove one", field="agents"
                )
            seen.add((agent.id, agent.version))
            before = self._by_id.get(agent.id)
            if before is not None and not before.inactive and not agent.inactive:
                raise InvalidRequest(
                    f"versions {before.version} and {agent.version} of agent {agent.id} are both active; retire one",
                    field="agents",
                )
            if before is None or before.inactive:
                self._by_id[agent.id] = agent

    def __iter__(self) -> Iterator[AgentDescriptor]:
        return iter(self._all)

    def get(self, agent_id: str) -> AgentDescriptor | None:
        """The active version of an agent, else the last one registered, else None."""
        return self._by_id.get(agent_id)


class _AgentFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    agents: tuple[AgentDescriptor, ...]


def load_agents(path: Path) -> AgentRegistry:
    """Read the operator's register of agents (`agents:` a list of descriptors).

    Raises:
        InvalidRequest: naming the file and the entry that is missing, unknown, doubled or wrong.
    """
    return AgentRegistry(load_document(path, _AgentFile, "agent file").agents)
