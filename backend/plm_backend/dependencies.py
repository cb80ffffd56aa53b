"""What a request handler asks for: the platform, the caller, a cursor."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query, Request
from plm_engine_core.control_plane import Principal
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.identity import require_identity
from plm_shared.trace_context import TraceContext, current_context, new_root_context

from plm_backend.wiring import Platform


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


ThePlatform = Annotated[Platform, Depends(_platform)]
TheCaller = Annotated[Caller, Depends(_caller)]
Limit = Annotated[int, Query(ge=1, le=200)]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before")]


def encode_cursor(at: datetime, identifier: UUID) -> str:
    """An opaque position in a listing."""
    return base64.urlsafe_b64encode(json.dumps([at.isoformat(), str(identifier)]).encode()).decode()


def decode_cursor(cursor: str | None) -> tuple[datetime, UUID] | None:
    """The position of a cursor of ours.

    Raises:
        InvalidRequest: it is not one.
    """
    if cursor is None:
        return None
    try:
        at, identifier = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return datetime.fromisoformat(at), UUID(identifier)
    except (ValueError, TypeError, AttributeError, binascii.Error) as error:
        raise InvalidRequest("this is not a cursor of this API; leave it out to begin anew", field="cursor") from error
