"""The migrations of every installed package, and whether a database stands where they end.

RuntimeError
├── SchemaPlanMissing a package's migrations can be run, and not be printed
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


class SchemaPlanMissing(RuntimeError):
    """A package's migrations can be run, and not be printed."""


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
    """One package's migrations: a callable that upgrades, or a module.

    A module has ``upgrade(dsn)``, ``current(dsn)``, ``revisions()`` and ``sql_for(since=)``. A callable is asked to
    upgrade each time, and says nothing about where the database stands.
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

    def sql(self, *, since: str | None) -> str:
        """The statements that bring a database from a revision, or from the chains before this one, to the head.

        Raises:
            SchemaPlanMissing: the package only upgrades, and shows nobody how.
        """
        sql_for: Callable[..., str] | None = getattr(self.provider, "sql_for", None)
        if sql_for is None:
            raise SchemaPlanMissing(f"{self.name} does not tell its statements; run `plm-cli db upgrade` instead")
        return sql_for(since=since)

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


def plan_all(dsn: str | None) -> str:
    """What `upgrade_all` would run on a database, or on a new one, for psql; empty where all is applied.

    Raises:
        SchemaAhead: the database is newer than this installation.
        SchemaPlanMissing: a package does not tell its statements.
    """
    chains = installed_chains()
    found = {chain.name: chain.require_known(dsn) if dsn else None for chain in chains}
    return "\n".join(filter(None, (chain.sql(since=found[chain.name]) for chain in chains)))


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
