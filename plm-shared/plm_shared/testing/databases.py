"""Clusters that end with the test run, and databases copied from a prepared template."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres, PostgresUnavailable, find_servers
from plm_shared.provisioning import OWNER, database_urls, provision, secure_database

__all__ = ["ClusterPool", "TemplateDatabases", "create_tenants"]

_PREFIX: Final = "plm-test-pg-"
_IN_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux has a file system in memory
_ROOM: Final = 3 << 30  # bytes: the databases and the log of a long run of tests, with some to spare
_SURELY_STARTED: Final = 120  # seconds after which a folder without a user is a killed run's, not one being made


class TemplateDatabases:
    """Prepares a database once and copies it for each test."""

    def __init__(self, cluster: EmbeddedPostgres) -> None:
        self._admin_dsn = cluster.admin_dsn
        self._passwords = {"owner_password": secrets.token_hex(12), "app_password": secrets.token_hex(12)}
        self._templates: set[str] = set()

    def template(self, name: str, prepare: Callable[[DatabaseUrls], None]) -> str:
        """Make the template unless it exists, and answer its name; ``prepare`` must close its connections."""
        if name not in self._templates:
            prepare(self.create(name))
            self._templates.add(name)
        return name

    def create(self, name: str) -> DatabaseUrls:
        """An empty provisioned database of this name."""
        return provision(self._admin_dsn, name, **self._passwords)

    def clone(self, template: str) -> DatabaseUrls:
        """A copy of the template under a fresh name, until the cluster ends or ``drop`` or ``cloned`` ends it."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self._admin_dsn, autocommit=True) as connection, connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {} STRATEGY file_copy").format(
                    sql.Identifier(name), sql.Identifier(template), sql.Identifier(OWNER)
                )
            )
            secure_database(cursor, name)
        return database_urls(self._admin_dsn, name, **self._passwords)

    def drop(self, database: DatabaseUrls) -> None:
        """Drop the database, cutting connections that are still open."""
        name = str(conninfo_to_dict(database.admin)["dbname"])
        with psycopg.connect(self._admin_dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextmanager
    def cloned(self, template: str) -> Iterator[DatabaseUrls]:
        """``clone`` for the length of a block."""
        database = self.clone(template)
        try:
            yield database
        finally:
            self.drop(database)


class ClusterPool:
    """The clusters of one test run, at most one per major version, without fsync; ``close`` removes them.

    They are in memory where the system has a file system with 3 GiB of room for it, otherwise in the temporary folder.
    """

    def __init__(self) -> None:
        _sweep()
        self._clusters: dict[int, tuple[EmbeddedPostgres, TemplateDatabases]] = {}

    def cluster(self, major: int | None = None) -> EmbeddedPostgres:
        """The running cluster of this major version, by default of the newest at hand."""
        wanted = major or find_servers()[0].major
        if wanted not in self._clusters:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_place()))
            folder.chmod(0o711)  # ours, and new: the server's account must pass through it when root runs the tests
            cluster = EmbeddedPostgres(folder, major=wanted, durable=False)
            try:
                cluster.start()
            except BaseException:
                shutil.rmtree(folder)
                raise
            self._clusters[wanted] = (cluster, TemplateDatabases(cluster))
        return self._clusters[wanted][0]

    def templates_of(self, cluster: EmbeddedPostgres) -> TemplateDatabases:
        """The template databases of a cluster of this pool."""
        return self._clusters[cluster.major][1]

    def close(self) -> None:
        """Stop and delete every cluster."""
        for cluster, _ in self._clusters.values():
            cluster.remove()
        self._clusters.clear()


def create_tenants(database: DatabaseUrls, *names: str) -> tuple[uuid.UUID, ...]:
    """Insert tenants as the owner and answer their ids, in order."""
    ids = tuple(uuid.uuid4() for _ in names)
    with psycopg.connect(database.owner) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO tenants (id, name) VALUES (%s, %s)", list(zip(ids, names, strict=True)))
    return ids


def _place() -> Path:
    """Where a new cluster goes: a disk takes many times as long for the several hundred files of a database."""
    roomy = os.access(_IN_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_IN_MEMORY).free >= _ROOM
    return _IN_MEMORY if roomy else Path(tempfile.gettempdir())


def _sweep() -> None:
    """Remove the clusters of test runs that were killed before they could."""
    places = (_IN_MEMORY, Path(tempfile.gettempdir()))
    for folder in itertools.chain.from_iterable(place.glob(f"{_PREFIX}*") for place in places):
        try:
            state = folder.stat()
            old = time.time() - state.st_mtime > _SURELY_STARTED
            if old and state.st_uid == os.geteuid() and (folder / "users").exists():
                EmbeddedPostgres(folder).remove()
        except (PostgresUnavailable, FileNotFoundError):
            continue  # in use, or another run is removing it
