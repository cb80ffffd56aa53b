"""The audit log: who authenticated and who was refused, written before the request goes on; and reloads of nodes.

AuditError
├── AuditUnavailable      nothing was written: try again later
└── AuditTenantUnknown    the record names a tenant that does not exist
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol
from uuid import UUID

import psycopg
from plm_shared.cancellation import kept_cancel
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool
from pydantic import TypeAdapter, ValidationError

from plm_engine_core.control_plane.identity.context import ActorKind, IdentityContext
from plm_engine_core.control_plane.identity.errors import IdentityValidationError
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import SystemActor

_REQUIRED: Final = "PLM_AUDIT_REQUIRED"


class AuditEvent(StrEnum):
    """What an audit record tells."""

    IDENTITY_BIND = "identity.bind"  # an identity was established
    IDENTITY_REJECT = "identity.reject"  # a token was refused
    CAPABILITIES_RELOAD = "capabilities.reload"  # a node was asked to read its capability file anew


class Surface(StrEnum):
    """Where a token was shown."""

    HTTP = "http"
    WEBSOCKET = "websocket"
    CLI = "plm-cli"


def audit_required(environ: Mapping[str, str] = os.environ) -> bool:
    """``PLM_AUDIT_REQUIRED``: whether nothing goes on whose audit record cannot be written; yes where it is not set.

    Raises:
        ValueError: the setting is neither true nor false.
    """
    given = environ.get(_REQUIRED, "")
    try:
        return TypeAdapter(bool).validate_python(given) if given else True
    except ValidationError:
        raise ValueError(f"{_REQUIRED} is {given[:100]!r}; set it to true or false") from None


class AuditError(Exception):
    """The record was not written; `tenant_id` is whose record it was, None for the installation's."""

    code = "AUDIT_UNAVAILABLE"

    def __init__(self, message: str, *, tenant_id: UUID | None) -> None:
        super().__init__(message)
        self.tenant_id = tenant_id


class AuditUnavailable(AuditError):
    """The audit log could not be reached, refused the record or was too slow."""


class AuditTenantUnknown(AuditError):
    """No tenant has this id."""


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """One row of the audit log, of the installation's where there is no tenant; the database adds the time."""

    tenant_id: UUID | None
    user_id: UUID | None
    actor_kind: ActorKind
    event_type: AuditEvent
    payload: Mapping[str, Any]
    id: UUID = field(default_factory=new_id)


class AuditSink(Protocol):
    """Where audit records go."""

    async def write(self, record: AuditRecord) -> None:
        """Return when the record is stored for good.

        Raises:
            AuditUnavailable: it is not stored.
            AuditTenantUnknown: it cannot be stored, for its tenant does not exist.
        """


def bind_record(
    identity: IdentityContext, *, provider: str, surface: Surface | None = None, actor: SystemActor | None = None
) -> AuditRecord:
    """The record of an identity that was established: by a token shown at `surface`, or of the platform as `actor`."""
    facts: dict[str, Any] = {
        "provider": provider,
        "scopes": sorted(identity.scopes),
        "session_id": identity.session_id,
    }
    named = {"surface": surface, "actor": actor}
    return AuditRecord(
        tenant_id=identity.tenant_id,
        user_id=identity.user_id,
        actor_kind=identity.actor_kind,
        event_type=AuditEvent.IDENTITY_BIND,
        payload=facts | {key: each.value for key, each in named.items() if each is not None},
    )


def reject_record(
    tenant_id: UUID, error: IdentityValidationError, *, provider: str, surface: Surface, omitted: int = 0
) -> AuditRecord:
    """The record of a refusal; the tenant must come from a verified signature, never from an unverified claim.

    Before it, `omitted` others were not recorded.
    """
    facts = _refused(error, provider, surface)
    return AuditRecord(
        tenant_id=tenant_id,
        user_id=None,
        actor_kind=ActorKind.SYSTEM,
        event_type=AuditEvent.IDENTITY_REJECT,
        payload={**facts, "omitted": omitted} if omitted else facts,
    )


def anonymous_record(
    error: IdentityValidationError, *, provider: str, surface: Surface, client: str, omitted: int
) -> AuditRecord:
    """The record of a refusal that proves no tenant; before it, `omitted` others were not recorded."""
    facts = {**_refused(error, provider, surface), "client": client}
    return AuditRecord(
        tenant_id=None,
        user_id=None,
        actor_kind=ActorKind.SYSTEM,
        event_type=AuditEvent.IDENTITY_REJECT,
        payload={**facts, "omitted": omitted},
    )


def _refused(error: IdentityValidationError, provider: str, surface: Surface) -> dict[str, Any]:
    """What is told of a refused token; never the token, nor the sentence, which may quote from it."""
    return {"provider": provider, "reason": error.reason.value, "code": error.code, "surface": surface.value}


def reload_record(facts: Mapping[str, Any]) -> AuditRecord:
    """The record of a reload of a node's capability file, which belongs to the installation."""
    return AuditRecord(
        tenant_id=None,
        user_id=None,
        actor_kind=ActorKind.SYSTEM,
        event_type=AuditEvent.CAPABILITIES_RELOAD,
        payload=facts,
    )


class InMemoryAuditSink:
    """Keeps records in a list; for tests and for trying things out."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    async def write(self, record: AuditRecord) -> None:
        """Append the record."""
        self.records.append(record)


class PostgresAuditSink:
    """Writes to ``audit_log``, and what has no tenant to ``audit_log_system``, as the application's login.

    One transaction and one network round trip per record. At most half of the pool's connections write at once, so that
    an audit log that is slow keeps nobody else from the database.
    """

    def __init__(
        self, pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]], *, timeout_seconds: float = 5.0
    ) -> None:
        self._pool = pool
        self._timeout = timeout_seconds
        self._writing = asyncio.Semaphore(max(1, pool.max_size // 2))

    async def write(self, record: AuditRecord) -> None:
        """See `AuditSink.write`; waits at most `timeout_seconds`, connection and commit included."""
        with kept_cancel():
            try:
                async with asyncio.timeout(self._timeout), self._writing:
                    await self._insert(record)
            except psycopg.errors.ForeignKeyViolation:
                raise AuditTenantUnknown(
                    f"tenant {record.tenant_id} does not exist", tenant_id=record.tenant_id
                ) from None
            except (psycopg.Error, TimeoutError) as error:
                raise AuditUnavailable(
                    f"the audit log could not be written ({type(error).__name__})", tenant_id=record.tenant_id
                ) from error

    async def _insert(self, record: AuditRecord) -> None:
        if record.tenant_id is None:
            async with self._pool.connection() as connection, connection.transaction():
                await connection.execute(
                    "INSERT INTO audit_log_system (id, event_type, payload) VALUES (%s, %s, %s)",
                    (record.id, record.event_type.value, Jsonb(dict(record.payload))),
                )
            return
        async with self._pool.connection() as connection, connection.pipeline(), connection.transaction():
            await connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(record.tenant_id),))
            await connection.execute(
                "INSERT INTO audit_log (tenant_id, id, user_id, actor_kind, event_type, payload) "
                "VALUES (%s, %s, %s, %s, %s, %s)",
                (
                    record.tenant_id,
                    record.id,
                    record.user_id,
                    record.actor_kind.value,
                    record.event_type.value,
                    Jsonb(dict(record.payload)),
                ),
            )
