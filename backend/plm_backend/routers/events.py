"""Events: everything that happened in a tenant, across its runs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from plm_engine_core.control_plane.errors import NotFound

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import DOORS, documented
from plm_backend.schemas import EventPage, VerificationDocument, event_document, verification_document
from plm_backend.storable import StorableText

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


@router.get(
    "/verification",
    operation_id="verifyEvents",
    response_model=VerificationDocument,
    responses=documented(*DOORS, 404),
)
async def verify_events(
    platform: ThePlatform,
    caller: TheCaller,
    stream: Annotated[
        StorableText | None, Query(min_length=1, max_length=200, description="Only this stream, such as run/<id>.")
    ] = None,
) -> Any:
    """Check the hash chains of the tenant, or one of them, and name the first bad event of each that is broken.

    "Consistent" is what a database can say of itself: that nobody rewrote a whole chain is shown by exports that were
    kept elsewhere (`plm-cli events verify`). One verification at a time is made; others wait for their turn.
    """
    async with platform.verifying:
        streams = await platform.control_plane.verify_events(caller.tenant_id, stream=stream)
    if stream is not None and not streams:
        raise NotFound("stream", stream)
    return verification_document(streams)
