"""The migrations of every installed package, and whether a database stands where they end.

RuntimeError
└── SchemaMismatch    database and installation do not fit together; nothing was changed
    ├── SchemaBehind      migrations are waiting: run ``plm-cli db upgrade``
    └── SchemaAhead       a newer installation was here: install that one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import psycopg
from plm_shared.addresses import driver_dsn
from plm_shared.server_version import require_supported_server

MIGRATIONS_GROUP = "plm.migrations"


class SchemaMismatch(RuntimeError):
    """The database stands at another revision than this installation needs."""

    def __init__(self, sentence: str, *, chain: str, found: str | None, newest: str) -> None:
        super().__init__(sentence)
        self.chain = chain
        self.found = found
        self.newest = newest


class SchemaBehind(SchemaMismatch):
    """Migrations are waiting."""


class SchemaAhead(SchemaMismatch):
    """The database is at a revision that this installation does not know."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One package's migrations: a module with ``upgrade(dsn)``, ``current(dsn)`` and ``revisions()``, or ``upgrade``.

    A callable that only upgrades is asked to each time, and says nothing about where the database stands.
    """

    name: str
    provider: Any

    def upgrade(self, dsn: str) -> None:
        """Bring the database up to this chain's head."""
        upgrade: Callable[[str], None] = getattr(self.provider, "upgrade", self.provider)
        upgrade(dsn)

    def current(self, dsn: str) -> str | None:
        """The revision the database stands at, or None before the first or where the chain does not say."""
        current: Callable[[str], str | None] | None = getattr(self.provider, "current", None)
        return current(dsn) if current else None

    def revisions(self) -> Sequence[str]:
        """Every revision this installation has, oldest first; empty where the chain does not say."""
        revisions: Callable[[], Sequence[str]] | None = getattr(self.provider, "revisions", None)
        return revisions() if revisions else ()

    def require_known(self, dsn: str) -> str | None:
        """The revision the database stands at.

        Raises:
            SchemaAhead: this installation does not have it.
        """
        known, found = self.revisions(), self.current(dsn)
        if known and found is not None and found not in known:
            raise SchemaAhead(
                f"the database is at revision {found} of {self.name}, and this installation knows none after "
                f"{known[-1]}; use the newer installation that migrated it",
                chain=self.name,
                found=found,
                newest=known[-1],
            )
        return found

    def require_current(self, dsn: str) -> None:
        """Nothing, when the database stands at the newest revision; a login that may not look was never granted it.

        Raises:
            SchemaBehind: migrations are waiting.
            SchemaAhead: the database is at a revision this installation does not have.
        """
        known = self.revisions()
        if not known:
            return
        try:
            found = self.require_known(dsn)
        except psycopg.errors.InsufficientPrivilege:
            found = None
        if found != known[-1]:
            raise SchemaBehind(
                f"the database is at revision {found or 'unknown'} of {self.name}, and this installation needs "
                f"{known[-1]}; run `plm-cli db upgrade` with its owner's address in PG_ADMIN_DSN",
                chain=self.name,
                found=found,
                newest=known[-1],
            )


def installed_chains() -> list[Chain]:
    """The migrations of every installed package, in the order of their names, which is that of the floors."""
    found = sorted(entry_points(group=MIGRATIONS_GROUP), key=lambda entry: entry.name)
    return [Chain(name=entry.name, provider=entry.load()) for entry in found]


def upgrade_all(owner_dsn: str) -> None:
    """Run every installed package's migrations; where all is applied nothing happens.

    Raises:
        ServerTooOld: the server cannot hold the schema.
        SchemaAhead: the database is newer than this installation. Neither touches anything.
    """
    with psycopg.connect(driver_dsn(owner_dsn)) as connection:
        require_supported_server(connection.info.server_version)
    chains = installed_chains()
    for chain in chains:
        chain.require_known(owner_dsn)
    for chain in chains:
        chain.upgrade(owner_dsn)
