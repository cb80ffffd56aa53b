"""Halts: stop a run, a tenant or the system, and lift that again."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from fastapi import APIRouter

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import HaltCreate, HaltDocument, halt_document

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
            caller.tenant_id, body.scope, body.scope_id, reason=body.reason, by=caller.principal
        )
    )


@router.delete("/{halt_id}", operation_id="liftHalt", response_model=HaltDocument, responses=documented(*DOORS, 404))
async def lift(halt_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """Lift a halt; the runs it parked go on. Lifting twice answers the same."""
    return halt_document(await platform.control_plane.lift(caller.tenant_id, halt_id, by=caller.principal))
