"""The database as the application sees it: one engine, and sessions bound to one tenant."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from plm_shared.addresses import DatabaseUrls, driver_dsn, sqlalchemy_url
from plm_shared.provisioning import ProvisioningRefused, provision

__all__ = [
    "DatabaseUrls",
    "ProvisioningRefused",
    "async_tenant_scoped_session",
    "driver_dsn",
    "get_async_engine",
    "get_engine",
    "get_sessionmaker",
    "provision",
    "reset_async_engine",
    "reset_engine",
    "sqlalchemy_url",
    "tenant_scoped_session",
]

_lock = threading.Lock()
_engine: Engine | None = None
_async_engines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = weakref.WeakKeyDictionary()
# SET LOCAL takes no parameters; set_config(..., is_local => true) is the same and does.
_BIND = text("SELECT set_config('app.tenant_id', :tenant, true)")


def get_engine() -> Engine:
    """The process's engine on the database named by ``PG_DSN``; made at the first call, connected anew after a fork.

    Raises:
        RuntimeError: ``PG_DSN`` is not set.
    """
    global _engine  # noqa: PLW0603 - the documented surface of this module is one engine per process
    with _lock:
        if _engine is None:
            _engine = create_engine(_url(), pool_pre_ping=True)
        return _engine


def get_async_engine() -> AsyncEngine:
    """The same for coroutines of the running loop; an engine belongs to the loop that made it.

    Raises:
        RuntimeError: ``PG_DSN`` is not set, or no loop runs.
    """
    loop = asyncio.get_running_loop()
    with _lock:
        if loop not in _async_engines:
            _async_engines[loop] = create_async_engine(_url(), pool_pre_ping=True)
        return _async_engines[loop]


async def reset_async_engine() -> None:
    """Close the running loop's connections and forget its engine; call it before the loop ends."""
    with _lock:
        engine = _async_engines.pop(asyncio.get_running_loop(), None)
    if engine is not None:
        await engine.dispose()


def get_sessionmaker() -> sessionmaker[Session]:
    """Makes sessions on ``get_engine()``; objects stay readable after a commit."""
    return sessionmaker(get_engine(), expire_on_commit=False)


def reset_engine() -> None:
    """Close the engine's connections and forget it, so that the next call reads ``PG_DSN`` anew."""
    global _engine  # noqa: PLW0603 - see get_engine
    with _lock:
        if _engine is not None:
            _engine.dispose()
        _engine = None


@contextmanager
def tenant_scoped_session(tenant_id: str | uuid.UUID) -> Iterator[Session]:
    """One transaction in which row-level security shows this tenant's rows and no others.

    Commits when the block ends well, rolls back when it raises. The setting ends with the transaction, so a pooled
    connection never carries a tenant over.

    Raises:
        ValueError: the tenant id is no UUID; refused before a connection is taken.
        RuntimeError: ``PG_DSN`` is not set.
    """
    tenant = str(uuid.UUID(str(tenant_id)))
    with get_sessionmaker().begin() as session:
        session.execute(_BIND, {"tenant": tenant})
        yield session


@asynccontextmanager
async def async_tenant_scoped_session(tenant_id: str | uuid.UUID) -> AsyncIterator[AsyncSession]:
    """``tenant_scoped_session`` for coroutines, with the same promises and errors."""
    tenant = str(uuid.UUID(str(tenant_id)))
    async with async_sessionmaker(get_async_engine(), expire_on_commit=False).begin() as session:
        await session.execute(_BIND, {"tenant": tenant})
        yield session


def _url() -> str:
    address = os.environ.get("PG_DSN")
    if not address:
        raise RuntimeError("PG_DSN is not set; set it to postgresql+psycopg://user:password@host:5432/database")
    return sqlalchemy_url(address)


def _after_fork_in_child() -> None:
    """The connections are the parent's: the child opens its own, and closes none of those."""
    global _lock  # noqa: PLW0603 - another thread of the parent's may have held it
    _lock = threading.Lock()
    if _engine is not None:
        _engine.dispose(close=False)


os.register_at_fork(after_in_child=_after_fork_in_child)
