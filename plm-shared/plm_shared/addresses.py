"""Database addresses: the driver's form, SQLAlchemy's form, and the three logins of one database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode

__all__ = ["DatabaseUrls", "build_dsn", "driver_dsn", "sqlalchemy_url"]

_DRIVER: Final = "postgresql://"
_SQLALCHEMY: Final = "postgresql+psycopg://"
_OTHER_SPELLINGS: Final = ("postgres://", "postgresql+psycopg2://", "postgresql+asyncpg://")


@dataclass(frozen=True, kw_only=True)
class DatabaseUrls:
    """One database as its three logins reach it, each ``postgresql://…`` with its password.

    ``repr`` shows none of them, so that an error message or a test report cannot leak a password.
    """

    admin: str = field(repr=False)
    """The cluster's superuser: creates databases and roles, and nothing else is done with it."""
    owner: str = field(repr=False)
    """``plm_owner``: runs migrations, creates tenants."""
    app: str = field(repr=False)
    """``plm_app``: what the application uses; row-level security binds it."""


def driver_dsn(url: str) -> str:
    """The form that psycopg itself understands: ``postgresql+psycopg://…`` becomes ``postgresql://…``.

    Raises:
        ValueError: the text is not a PostgreSQL URL; the message does not repeat it, for it may hold a password.
    """
    return _DRIVER + _after_scheme(url)


def sqlalchemy_url(dsn: str) -> str:
    """The form that SQLAlchemy needs to choose psycopg 3: ``postgresql+psycopg://…``.

    Raises:
        ValueError: the text is not a PostgreSQL URL.
    """
    return _SQLALCHEMY + _after_scheme(dsn)


def build_dsn(parts: dict[str, str]) -> str:
    """A ``postgresql://`` URL from connection parameters; a socket folder goes into the query, escaped."""
    rest = dict(parts)
    user, password = quote(rest.pop("user", ""), safe=""), quote(rest.pop("password", ""), safe="")
    database = quote(rest.pop("dbname", ""), safe="")
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    query = f"?{urlencode(rest, quote_via=quote)}" if rest else ""
    return f"{_DRIVER}{login}/{database}{query}"


def _after_scheme(url: str) -> str:
    for scheme in (_DRIVER, _SQLALCHEMY, *_OTHER_SPELLINGS):
        if url.startswith(scheme):
            return url.removeprefix(scheme)
    raise ValueError("not a PostgreSQL URL: it must start with postgresql:// or postgresql+psycopg://")
