"""The database as the application sees it: one engine, and sessions bound to one tenant."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from plm_shared.addresses import DatabaseUrls, driver_dsn, sqlalchemy_url
from plm_shared.provisioning import ProvisioningRefused, provision

__all__ = [
    "DatabaseUrls",
    "ProvisioningRefused",
    "driver_dsn",
    "get_engine",
    "get_sessionmaker",
    "provision",
    "reset_engine",
    "sqlalchemy_url",
    "tenant_scoped_session",
]

_lock = threading.Lock()
_engine: Engine | None = None


def get_engine() -> Engine:
    """The process's engine on the database named by ``PG_DSN``; made at the first call.

    Raises:
        RuntimeError: ``PG_DSN`` is not set.
    """
    global _engine  # noqa: PLW0603 - the documented surface of this module is one engine per process
    with _lock:
        if _engine is None:
            address = os.environ.get("PG_DSN")
            if not address:
                raise RuntimeError("PG_DSN is not set; set it to postgresql+psycopg://user:password@host:5432/database")
            _engine = create_engine(sqlalchemy_url(address), pool_pre_ping=True)
        return _engine


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
        # SET LOCAL takes no parameters; set_config(..., is_local => true) is the same and does.
        session.execute(text("SELECT set_config('app.tenant_id', :tenant, true)"), {"tenant": tenant})
        yield session
