"""Events: everything that happened in a tenant, across its runs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import DOORS, documented
from plm_backend.schemas import EventPage, event_document

router = APIRouter(prefix="/v1/events", tags=["events"], route_class=JsonRoute)


@router.get("", operation_id="listEvents", response_model=EventPage, responses=documented(*DOORS, 409))
async def list_events(
    platform: ThePlatform,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500, description="`next` of the page before")] = None,
) -> Any:
    """Events of every stream of the tenant, each at least once and none left out; within a stream in order.

    `next` is always there: ask again with it, also after an empty page. `held_back` tells of events that are committed
    and will be shown once an older transaction has ended. Without a cursor it begins with the oldest that is kept; a
    reader that its retention has overtaken is told so, once (409, `feed_pruned`), with the `cursor` to go on with.
    """
    page = await platform.control_plane.feed(caller.tenant_id, cursor=cursor, limit=limit)
    held_back = page.held_back
    return {
        "items": [event_document(event) for event in page.events],
        "next": page.cursor.encode(),
        "held_back": held_back and {"events": held_back.events, "since": held_back.since},
    }
