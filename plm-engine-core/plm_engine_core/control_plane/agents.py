"""Registered agents as they stand in a tenant, and how a person changes that.

What an agent is stands in the register, a file of the operator. That it may not work for now is said by a halt over it:
an act of somebody, with a reason and a record, that stops what the agent has begun too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.errors import Conflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.halts import Halt, KillSwitch
from plm_engine_core.control_plane.registry import AgentDescriptor, AgentRegistry
from plm_engine_core.control_plane.storage.ports import HaltStore
from plm_engine_core.control_plane.texts import word_of
from plm_engine_core.control_plane.vocabulary import AgentStatus, HaltScope

_MOST_HALTS = 10_000


@dataclass(frozen=True, kw_only=True)
class StandingAgent:
    """One registered version of an agent, with the halt that suspends it in the tenant where one stands."""

    descriptor: AgentDescriptor
    halt: Halt | None = None

    @property
    def status(self) -> AgentStatus:
        """What it is in this tenant: suspended under a halt, else as registered."""
        if self.halt is not None and not self.descriptor.inactive:
            return AgentStatus.SUSPENDED
        return self.descriptor.status


class AgentDesk:
    """Where registered agents are looked at, suspended and let work again."""

    def __init__(self, store: HaltStore, *, agents: AgentRegistry | None, kill_switch: KillSwitch) -> None:
        self._store = store
        self._agents = agents
        self._kill_switch = kill_switch

    async def list(self, tenant_id: UUID) -> Sequence[StandingAgent]:
        """Every registered version, in the order of the register; nothing where agents are not registered."""
        halts = await self._halts(tenant_id)
        return [StandingAgent(descriptor=each, halt=halts.get(each.id)) for each in self._agents or ()]

    async def set_status(
        self, tenant_id: UUID, agent_id: str, status: AgentStatus, *, reason: str, by: Principal
    ) -> StandingAgent:
        """Suspend an agent in this tenant, or let it work again; asking twice answers the same.

        Suspending halts it: its runs are parked, unused grants are revoked and calls in flight cancelled. The act is an
        event of the tenant's stream. To retire an agent, or to suspend it everywhere, change the register.

        Raises:
            Forbidden: the caller lacks `plm.halt`.
            InvalidRequest: a status that only the register can give, or no reason to suspend.
            NotFound: no such agent is registered.
            Conflict: `agent_inactive`: the register itself says that it may not work.
        """
        check_principal(by, field="by")
        status = word_of(AgentStatus, status, field="status")
        registered = self._agents.get(agent_id) if self._agents is not None else None
        if registered is None:
            raise NotFound("agent", agent_id)
        if status is AgentStatus.SUSPENDED:
            halt = await self._kill_switch.trigger(
                tenant_id, HaltScope.AGENT, None, subject=agent_id, reason=reason, by=by
            )
            return StandingAgent(descriptor=registered, halt=halt)
        if status is not AgentStatus.ACTIVE:
            raise InvalidRequest("an agent is retired in the register, for good and everywhere", field="status")
        if registered.inactive:
            raise Conflict(f"{registered.inactive}; change the register", reason="agent_inactive")
        standing = (await self._halts(tenant_id)).get(agent_id)
        if standing is not None:
            await self._kill_switch.lift(tenant_id, standing.id, by=by)
        return StandingAgent(descriptor=registered)

    async def _halts(self, tenant_id: UUID) -> dict[str, Halt]:
        standing = await self._store.list(tenant_id, limit=_MOST_HALTS, before=None, standing=True)
        return {each.subject: each for each in standing if each.scope is HaltScope.AGENT and each.subject is not None}
