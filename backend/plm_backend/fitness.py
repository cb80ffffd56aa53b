"""Whether the database that the operator names can be used as it is; found out before the first request."""

from __future__ import annotations

import psycopg
from plm_engine_core.cli.chains import SchemaMismatch, installed_chains
from plm_engine_core.cli.db import driver_words
from plm_shared.addresses import driver_dsn
from plm_shared.embedded_postgres import SERVER_NAME
from plm_shared.provisioning import ENGINE_WRITER, KERNEL_WRITER
from plm_shared.server_version import ServerTooOld, require_supported_server

from plm_backend.errors import SetupError
from plm_backend.settings import Settings

_CONNECT_SECONDS = 10
# The login itself counts, not only the role it has set: it may take that back at any time.
_LOGIN = """
WITH owners AS (
    SELECT relowner AS oid FROM pg_class WHERE relnamespace::regnamespace::text IN ('public', 'delivery')
    UNION SELECT datdba FROM pg_database WHERE datname = current_database()
)
SELECT current_setting('cluster_name') = %(embedded)s,
       EXISTS (SELECT FROM pg_roles AS r WHERE pg_has_role(session_user, r.oid, 'MEMBER')
                   AND (r.rolsuper OR r.rolbypassrls OR r.oid IN (SELECT oid FROM owners))),
       EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = ANY (%(groups)s)
                   AND NOT pg_has_role(current_user, r.oid, 'USAGE'))
"""


def check_database(settings: Settings, dsn: str) -> None:
    """Refuse a database that the application must not use, or cannot.

    Raises:
        SetupError: it is not reachable or too old, its schema is not the one of this installation, its login is one
            that row-level security does not bind or has not the application's rights, or it is the embedded one outside
            development.
    """
    try:
        with psycopg.connect(driver_dsn(dsn), connect_timeout=_CONNECT_SECONDS) as connection:
            require_supported_server(connection.info.server_version)
            _check_login(settings, connection)
        for chain in installed_chains():
            chain.require_current(dsn)
    except ValueError as error:
        raise SetupError(f"PG_DSN is {error}") from error
    except (ServerTooOld, SchemaMismatch) as error:
        raise SetupError(f"the database that PG_DSN names cannot be used: {error}") from error
    except psycopg.Error as error:
        raise SetupError(f"the database that PG_DSN names cannot be used: {driver_words(error)}") from error


def _check_login(settings: Settings, connection: psycopg.Connection[tuple[bool, bool, bool]]) -> None:
    parameters = {"embedded": SERVER_NAME, "groups": [KERNEL_WRITER, ENGINE_WRITER]}
    embedded, unbound, stranger = connection.execute(_LOGIN, parameters).fetchone() or (True, True, True)
    if embedded and not settings.development:
        raise SetupError(
            f"PG_DSN names an embedded database and ENVIRONMENT is {settings.environment!r}; embedded ones are for "
            "development, so name a server of your own"
        )
    if unbound:
        raise SetupError(
            "the login of PG_DSN is a superuser, an owner or exempt from row-level security, so tenants would not be "
            "kept apart; name the application's login, plm_app"
        )
    if stranger:
        raise SetupError(
            "the login of PG_DSN has not the application's rights; name plm_app, or make it a member of "
            f"{KERNEL_WRITER} and {ENGINE_WRITER}"
        )
