"""Why a run, an attempt, a ticket or a budget stands where it stands."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import DOORS, documented
from plm_backend.schemas import WhyDocument

router = APIRouter(prefix="/v1/why", tags=["why"], route_class=JsonRoute)

_FORMS = "RUN, TICKET, RUN/STEP[/ATTEMPT], RUN/UNIT, TENANT/UNIT, or SCOPE/NAME/UNIT[/PERIOD] for any budget."


@router.get(
    "",
    operation_id="explain",
    response_model=WhyDocument,
    response_model_exclude_defaults=True,
    responses=documented(*DOORS, 404),
)
async def explain(
    platform: ThePlatform,
    caller: TheCaller,
    asked: Annotated[str, Query(alias="id", min_length=1, max_length=400, description=_FORMS)],
) -> Any:
    """What was decided, at which stage, by which rule or limit, and what would unblock it; from the records alone."""
    return (await platform.control_plane.why(caller.tenant_id, asked)).to_json()
