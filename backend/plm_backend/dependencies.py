"""What a request handler asks for: the platform, the caller, the part of a listing."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Protocol, TypeVar
from uuid import UUID

from fastapi import Depends, Query, Request
from plm_engine_core.control_plane import Principal
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.identity import require_identity
from plm_shared.trace_context import TraceContext, current_context, new_root_context

from plm_backend.wiring import Platform

_ONE_VALUED = frozenset({"content-encoding", "content-type", "idempotency-key", "if-match", "last-event-id"})


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The authenticated caller, its tenant, and until when; all come from the token, never from a body."""

    tenant_id: UUID
    principal: Principal
    until: datetime
    trace: TraceContext


def _platform(request: Request) -> Platform:
    platform: Platform = request.app.state.platform
    return platform


def _caller() -> Caller:
    identity = require_identity()
    return Caller(
        tenant_id=identity.tenant_id,
        principal=Principal(
            user_id=identity.user_id, actor_kind=str(identity.actor_kind), scopes=frozenset(identity.scopes)
        ),
        until=identity.expires_at,
        trace=current_context() or new_root_context(tenant_id=str(identity.tenant_id)),
    )


def each_once(request: Request) -> None:
    """Refuse a parameter or header that is sent more than once: only one of them would count, and nobody knows which.

    Raises:
        InvalidRequest: naming it.
    """
    sent = [*(("query", name) for name, _ in request.query_params.multi_items())]
    sent += [("header", name) for name in request.headers if name in _ONE_VALUED]
    for (place, name), times in Counter(sent).items():
        if times > 1:
            raise InvalidRequest(f"{name:.80} was sent {times} times; send it once", field=f"{place}.{name:.80}")


Position = tuple[datetime, UUID]


class Listed(Protocol):
    """A row of a listing, which is in the order of these two."""

    @property
    def id(self) -> UUID:
        """Tells rows of one moment apart."""

    @property
    def created_at(self) -> datetime:
        """When it came to be."""


Row = TypeVar("Row", bound=Listed)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a listing that a request asks for."""

    limit: int
    after: Position | None

    @property
    def wanted(self) -> int:
        """How many rows to ask for: with one more than are shown it is known whether others follow."""
        return self.limit + 1

    def page(self, rows: Sequence[Row], document: Callable[[Row], Any]) -> dict[str, Any]:
        """The answer that shows these rows, of which there are `wanted` when others follow."""
        shown = rows[: self.limit]
        following = _encode_cursor(shown[-1]) if len(rows) > self.limit else None
        return {"items": [document(row) for row in shown], "next": following}


def _window(
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
) -> Window:
    return Window(limit=limit, after=None if cursor is None else _decode_cursor(cursor))


def _encode_cursor(row: Listed) -> str:
    return base64.urlsafe_b64encode(json.dumps([row.created_at.isoformat(), str(row.id)]).encode()).decode()


def _decode_cursor(cursor: str) -> Position:
    try:
        at, identifier = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return datetime.fromisoformat(at), UUID(identifier)
    except (ValueError, TypeError, AttributeError, binascii.Error) as error:
        raise InvalidRequest("this is not a cursor of this API; leave it out to begin anew", field="cursor") from error


ThePlatform = Annotated[Platform, Depends(_platform)]
TheCaller = Annotated[Caller, Depends(_caller)]
TheWindow = Annotated[Window, Depends(_window)]
