"""A real PostgreSQL server without an installation step, for laptops, demos and tests.

POSIX only. The server listens on a Unix socket in a folder that only its own account may enter, never on TCP, and
asks every login for a scram password: peer authentication would make each process of the user a superuser.
"""

from __future__ import annotations

from plm_shared.embedded_postgres.binaries import ServerBinaries, find_servers
from plm_shared.embedded_postgres.errors import (
    LocationUnsuitable,
    PostgresUnavailable,
    ServerAccountMissing,
    ServerNotFound,
    ServerStartFailed,
    ServerVersionMismatch,
)
from plm_shared.embedded_postgres.server import SERVER_NAME, EmbeddedPostgres

__all__ = [
    "SERVER_NAME",
    "EmbeddedPostgres",
    "LocationUnsuitable",
    "PostgresUnavailable",
    "ServerAccountMissing",
    "ServerBinaries",
    "ServerNotFound",
    "ServerStartFailed",
    "ServerVersionMismatch",
    "find_servers",
]
