"""The registers: which capabilities and agents there are, and how an agent stands in the tenant."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import (
    AgentDocument,
    AgentList,
    AgentStatusSet,
    CapabilityList,
    agent_document,
)

router = APIRouter(prefix="/v1", tags=["registers"], route_class=JsonRoute)


@router.get(
    "/capabilities", operation_id="listCapabilities", response_model=CapabilityList, responses=documented(*DOORS)
)
async def list_capabilities(platform: ThePlatform, caller: TheCaller) -> Any:
    """Every version of every capability: life, OAuth scopes, approval, marks, and the most that a call may cost.

    What is not for the caller's tenant is left out, and of the tenants that a capability names no other is shown.
    """
    seen = (each.seen_by(caller.tenant_id) for each in platform.control_plane.registry.versions)
    return CapabilityList(items=[each for each in seen if each is not None])


@router.get("/agents", operation_id="listAgents", response_model=AgentList, responses=documented(*DOORS))
async def list_agents(platform: ThePlatform, caller: TheCaller) -> Any:
    """Every registered version of every agent: owner, ceilings, and how it stands in the tenant."""
    plane = platform.control_plane
    found = await plane.registered_agents(caller.tenant_id)
    return AgentList(registered=plane.agents is not None, items=[agent_document(each) for each in found])


@router.put(
    "/agents/{agent_id}/status",
    operation_id="setAgentStatus",
    response_model=AgentDocument,
    responses=documented(*DOORS, *BODIES, 404, 409),
)
async def set_agent_status(
    agent_id: Annotated[str, Path(min_length=1, max_length=120)],
    body: AgentStatusSet,
    platform: ThePlatform,
    caller: TheCaller,
) -> Any:
    """Suspend an agent in the tenant, which halts all that it does, or let it work again. Needs `plm.halt`."""
    made = await platform.control_plane.set_agent_status(
        caller.tenant_id, agent_id, body.status, reason=body.reason, by=caller.principal
    )
    return agent_document(made)
