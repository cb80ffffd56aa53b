"""The platform's own identity, for work that no caller asked for. Who may import this is checked by guardrail BL6."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

from plm_engine_core.control_plane.identity.audit import AuditSink, bind_record
from plm_engine_core.control_plane.identity.claims import MAX_LIFETIME_SECONDS
from plm_engine_core.control_plane.identity.context import ActorKind, IdentityContext, identity_bound, new_identity

PROVIDER = "internal"


@asynccontextmanager
async def with_system_identity(
    *,
    tenant_id: UUID,
    audit: AuditSink,
    user_id: UUID | None = None,
    scopes: Iterable[str] | None = None,
    session_id: str | None = None,
    lifetime: timedelta = timedelta(minutes=5),
) -> AsyncIterator[IdentityContext]:
    """Act as the platform in one tenant for the length of a block; the audit record is written first.

    Raises:
        ValueError: the lifetime is not more than zero and at most a day.
        AuditError: the record was not written; the block does not run.
    """
    if not timedelta(0) < lifetime <= timedelta(seconds=MAX_LIFETIME_SECONDS):
        raise ValueError(f"lifetime must be more than zero and at most a day; got {lifetime}")
    identity = new_identity(
        tenant_id=tenant_id,
        user_id=user_id,
        actor_kind=ActorKind.SYSTEM,
        scopes=scopes or (),
        session_id=session_id,
        lifetime=lifetime,
    )
    await audit.write(bind_record(identity, provider=PROVIDER))
    with identity_bound(identity):
        yield identity
