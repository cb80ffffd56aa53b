"""Halts: stop a run, run group, agent, capability, tenant or the system, and lift that again."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query

from plm_backend.dependencies import TheCaller, ThePlatform, TheWindow
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import HaltCreate, HaltDocument, HaltPage, halt_document

router = APIRouter(prefix="/v1/halts", tags=["halts"], route_class=JsonRoute)


@router.post(
    "",
    status_code=201,
    operation_id="triggerHalt",
    response_model=HaltDocument,
    responses=documented(*DOORS, *BODIES, 404),
)
async def trigger(body: HaltCreate, platform: ThePlatform, caller: TheCaller) -> Any:
    """Halt. When this answers, no grant is issued and no call begins in the scope until the halt is lifted."""
    return halt_document(
        await platform.control_plane.halt(
            caller.tenant_id, body.scope, body.scope_id, subject=body.subject, reason=body.reason, by=caller.principal
        )
    )


@router.get("", operation_id="listHalts", response_model=HaltPage, responses=documented(*DOORS))
async def list_halts(
    platform: ThePlatform,
    caller: TheCaller,
    window: TheWindow,
    standing: Annotated[bool, Query(description="Only halts that were not lifted.")] = False,
) -> Any:
    """Halts of the tenant and of the system, newest first."""
    halts = await platform.control_plane.storage.halts.list(
        caller.tenant_id, limit=window.wanted, before=window.after, standing=standing
    )
    return window.page(halts, halt_document)


@router.get("/{halt_id}", operation_id="getHalt", response_model=HaltDocument, responses=documented(*DOORS, 404))
async def get_halt(halt_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """One halt, with what became of the calls it met."""
    return halt_document(await platform.control_plane.storage.halts.get(caller.tenant_id, halt_id))


@router.delete("/{halt_id}", operation_id="liftHalt", response_model=HaltDocument, responses=documented(*DOORS, 404))
async def lift(halt_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """Lift a halt; the runs it parked go on. Lifting twice answers the same."""
    return halt_document(await platform.control_plane.lift(caller.tenant_id, halt_id, by=caller.principal))
