"""The platform's own identity, for work that no caller asked for. Who may reach this is checked by guardrail BL6."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from plm_engine_core.control_plane.identity.audit import AuditRecord, AuditSink, AuditUnavailable, bind_record
from plm_engine_core.control_plane.identity.claims import MAX_LIFETIME_SECONDS
from plm_engine_core.control_plane.identity.context import ActorKind, IdentityContext, identity_bound, new_identity
from plm_engine_core.control_plane.vocabulary import SystemActor

PROVIDER = "internal"

_LIFETIME: Final = timedelta(seconds=MAX_LIFETIME_SECONDS)
_LEFT: Final = timedelta(hours=1)  # longer than whatever is done in one tenant at a time

_log = logging.getLogger(__name__)


@asynccontextmanager
async def with_system_identity(
    *,
    tenant_id: UUID,
    audit: AuditSink,
    user_id: UUID | None = None,
    scopes: Iterable[str] | None = None,
    session_id: str | None = None,
    lifetime: timedelta = timedelta(minutes=5),
    actor: SystemActor | None = None,
) -> AsyncIterator[IdentityContext]:
    """Act as the platform in one tenant for the length of a block; the audit record is written first.

    The record names the `actor`, as the events of what is done do.

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
    await audit.write(bind_record(identity, provider=PROVIDER, actor=actor))
    with identity_bound(identity):
        yield identity


class SystemIdentities:
    """Those that a process works with over and over: one for each actor and tenant.

    The first time that an actor comes to a tenant its identity is established by `with_system_identity`, so its audit
    record is written before anything is done there. It stands for a day, and then the next pass establishes another.
    So the audit log of a tenant tells once a day which processes work in it and as whom, and events tell what they did.
    The record's `session_id` names the process, as ``host/pid``.

    Where a record cannot be written, nothing is done in that tenant until it can. Unless `required`, that is logged,
    and the work goes on. Without an audit log (None) identities are bound, and nothing is recorded.
    """

    def __init__(self, audit: AuditSink | None, *, required: bool = True) -> None:
        self._audit = audit or _Unrecorded()
        self._required = required
        self._process = f"{socket.gethostname()}/{os.getpid()}"
        self._standing: dict[tuple[SystemActor, UUID], IdentityContext] = {}
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def acting(self, actor: SystemActor, tenant_id: UUID) -> AsyncIterator[IdentityContext]:
        """Act as one of the platform's actors in one tenant for the length of a block.

        Raises:
            AuditUnavailable: its record is required and was not written; the block does not run.
            AuditTenantUnknown: there is no such tenant.
        """
        identity = await self._established(actor, tenant_id)
        with identity_bound(identity):
            yield identity

    async def _established(self, actor: SystemActor, tenant_id: UUID) -> IdentityContext:
        async with self._one_at_a_time:
            standing = self._standing.get((actor, tenant_id))
            if standing is not None and datetime.now(UTC) < standing.expires_at - _LEFT:
                return standing
            try:
                identity = await self._new(self._audit, actor, tenant_id)
            except AuditUnavailable:
                if self._required:
                    raise
                _log.exception("identity.bind of %s in tenant %s is not in the audit log", actor.value, tenant_id)
                return await self._new(_Unrecorded(), actor, tenant_id)  # the next time is recorded, if it can be
            self._standing[actor, tenant_id] = identity
            return identity

    async def _new(self, audit: AuditSink, actor: SystemActor, tenant_id: UUID) -> IdentityContext:
        async with with_system_identity(
            tenant_id=tenant_id, audit=audit, session_id=self._process, lifetime=_LIFETIME, actor=actor
        ) as identity:
            return identity


class _Unrecorded:
    """Keeps nothing: of a program that has no audit log."""

    async def write(self, record: AuditRecord) -> None:
        """Drop the record."""
