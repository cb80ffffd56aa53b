"""Who is calling, and where the running task finds it. Identity only: no trace data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict


class ActorKind(StrEnum):
    """What kind of caller it is; the database's enum of the same name."""

    HUMAN = "human"
    AGENT = "agent"
    SYSTEM = "system"  # the platform itself, for work that no caller asked for


class IdentityContext(BaseModel):
    """An established identity; it says who and for how long, and is never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: UUID
    tenant_id: UUID
    actor_kind: ActorKind
    scopes: frozenset[str]
    session_id: str | None = None
    issued_at: AwareDatetime
    expires_at: AwareDatetime


class _Block:
    """The block for which an identity is bound; tasks and threads that were started in it may outlive it."""

    def __init__(self, identity: IdentityContext) -> None:
        self.identity: IdentityContext | None = identity


_block: ContextVar[_Block | None] = ContextVar("plm_identity_block", default=None)


def get_current_identity() -> IdentityContext | None:
    """The identity of the running task, or None outside any, and in what outlives the block that it was bound for."""
    block = _block.get()
    return None if block is None else block.identity


def require_identity() -> IdentityContext:
    """The identity of the running task.

    Raises:
        LookupError: none is bound; the code runs outside the identity middleware.
    """
    identity = get_current_identity()
    if identity is None:
        raise LookupError("no identity is bound; call this behind IdentityMiddleware or inside with_system_identity")
    return identity


@contextmanager
def identity_bound(identity: IdentityContext) -> Iterator[IdentityContext]:
    """Bind an identity for the length of a block, and put back what was bound before."""
    block = _Block(identity)
    entered = _block.set(block)
    try:
        yield identity
    finally:
        block.identity = None
        _block.reset(entered)


def new_identity(
    *,
    tenant_id: UUID,
    user_id: UUID | None,
    actor_kind: ActorKind,
    scopes: Iterable[str],
    session_id: str | None,
    lifetime: timedelta,
) -> IdentityContext:
    """An identity from now on; a random user where none is named."""
    now = datetime.now(UTC)
    return IdentityContext(
        user_id=user_id or uuid4(),
        tenant_id=tenant_id,
        actor_kind=actor_kind,
        scopes=frozenset(scopes),
        session_id=session_id,
        issued_at=now,
        expires_at=now + lifetime,
    )


def make_test_identity(
    *,
    tenant_id: UUID | None = None,
    user_id: UUID | None = None,
    actor_kind: ActorKind = ActorKind.HUMAN,
    scopes: Iterable[str] = (),
    session_id: str | None = None,
) -> IdentityContext:
    """An identity for tests, good for one hour; nothing is signed and nothing is bound."""
    return new_identity(
        tenant_id=tenant_id or uuid4(),
        user_id=user_id,
        actor_kind=actor_kind,
        scopes=scopes,
        session_id=session_id,
        lifetime=timedelta(hours=1),
    )
