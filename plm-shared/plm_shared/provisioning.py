"""Roles and databases: the only statements that need a superuser.

After ``provision`` every migration runs as ``plm_owner``, which is no superuser. The roles belong to the whole
cluster:

=====================  ========  ==============================================================
``plm_owner``          login     owns databases and tables; may become ``plm_migrator``
``plm_app``            login     the application; member of the two writer groups, nothing else
``plm_kernel_writer``  group     what the application may do with plm-shared's tables
``plm_engine_writer``  group     the same for the engine's tables
``plm_migrator``       group     BYPASSRLS: work that spans tenants, only by narrow functions
=====================  ========  ==============================================================
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from plm_shared.addresses import DatabaseUrls, build_dsn, driver_dsn
from plm_shared.server_version import OLDEST_MAJOR, require_supported_server

__all__ = [
    "APP",
    "ENGINE_WRITER",
    "KERNEL_WRITER",
    "MIGRATOR",
    "OWNER",
    "ProvisioningRefused",
    "database_urls",
    "provision",
    "script_for",
    "secure_database",
]

OWNER = "plm_owner"
APP = "plm_app"
KERNEL_WRITER = "plm_kernel_writer"
ENGINE_WRITER = "plm_engine_writer"
MIGRATOR = "plm_migrator"

_LOCK = 0x706C6D01  # one provisioning per cluster at a time; any constant number serves
_IDLE_IN_TRANSACTION = "60s"  # a forgotten transaction would hold back every feed across streams
_RESTRICTED = "NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION"
_ROLES = {
    OWNER: "LOGIN NOBYPASSRLS",
    APP: "LOGIN NOBYPASSRLS",
    KERNEL_WRITER: "NOLOGIN NOBYPASSRLS",
    ENGINE_WRITER: "NOLOGIN NOBYPASSRLS",
    MIGRATOR: "NOLOGIN BYPASSRLS",
}
_MEMBERSHIPS = ((KERNEL_WRITER, APP), (ENGINE_WRITER, APP), (MIGRATOR, OWNER))
# Nothing for everybody: neither the public schema nor functions that the owner will create.
_SECURE_SCHEMA = (
    "REVOKE ALL ON SCHEMA public FROM PUBLIC",
    f"ALTER DEFAULT PRIVILEGES FOR ROLE {OWNER} REVOKE ALL ON FUNCTIONS FROM PUBLIC",
    f"ALTER DEFAULT PRIVILEGES FOR ROLE {OWNER} REVOKE ALL ON TYPES FROM PUBLIC",
)
_REFUSE_OLD_SERVER = (
    f"DO $$ BEGIN IF current_setting('server_version_num')::int < {OLDEST_MAJOR}0000 "
    f"THEN RAISE 'PostgreSQL {OLDEST_MAJOR} is the oldest that can hold the schema'; END IF; END $$"
)

Cursor = psycopg.Cursor[tuple[Any, ...]]


class ProvisioningRefused(RuntimeError):
    """Nothing was changed in the database named; the message says who must do what."""


def provision(
    admin_dsn: str, database: str, *, owner_password: str | None = None, app_password: str | None = None
) -> DatabaseUrls:
    """Create the roles and the database where they are absent, and answer the three addresses.

    A password that is not given is made at random, which replaces an existing role's: pass the old ones to keep them.
    Passwords reach the server only as scram verifiers.

    Raises:
        ProvisioningRefused: the login may not create roles, or the database exists and belongs to another role.
        ServerTooOld: the server's major version is below 15.
        psycopg.OperationalError: the server cannot be reached.
    """
    owner_password = owner_password or secrets.token_hex(24)
    app_password = app_password or secrets.token_hex(24)
    address = conninfo_to_dict(driver_dsn(admin_dsn))
    try:
        with _cursor(address) as cursor:
            require_supported_server(cursor.connection.info.server_version)
            cursor.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
            _execute(cursor, _roles())
            _make_database(cursor, database)
            _set_password(cursor, OWNER, owner_password)
            _set_password(cursor, APP, app_password)
            secure_database(cursor, database)
        with _cursor({**address, "dbname": database}) as cursor:
            _execute(cursor, _SECURE_SCHEMA)
    except psycopg.errors.InsufficientPrivilege as error:
        raise ProvisioningRefused(
            f"the login of the admin address may not do this ({error.diag.message_primary}); use a superuser's"
        ) from error
    return database_urls(admin_dsn, database, owner_password=owner_password, app_password=app_password)


def database_urls(admin_dsn: str, database: str, *, owner_password: str, app_password: str) -> DatabaseUrls:
    """The three addresses of a database on the server that ``admin_dsn`` names."""
    address = {key: str(value) for key, value in conninfo_to_dict(driver_dsn(admin_dsn)).items()}
    address["dbname"] = database
    return DatabaseUrls(
        admin=build_dsn(address),
        owner=build_dsn({**address, "user": OWNER, "password": owner_password}),
        app=build_dsn({**address, "user": APP, "password": app_password}),
    )


def secure_database(cursor: Cursor, database: str) -> None:
    """Let only the owner and the application connect; a copy of a database does not inherit this."""
    _execute(cursor, _secure(sql.Identifier(database).as_string()))


def script_for(database: str) -> str:
    """What ``provision`` does for a database that is not there yet, for psql as a superuser; no password is in it.

    Raises:
        ValueError: the name is not 1 to 63 letters, digits, '_' and '-', beginning with a letter or '_'.
    """
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_-]{0,62}", database):
        raise ValueError(f"{database!r:.80} is no name: 1 to 63 letters, digits, '_' and '-', a letter or '_' first")
    name = sql.Identifier(database).as_string()
    before = (_REFUSE_OLD_SERVER, *_roles(), f"CREATE DATABASE {name} OWNER {OWNER}", *_secure(name))
    return "".join(f"{each};\n" for each in before) + f"\\connect {name}\n" + "".join(f"{e};\n" for e in _SECURE_SCHEMA)


def _execute(cursor: Cursor, statements: Iterable[str]) -> None:
    for each in statements:
        cursor.execute(each.encode())


def _secure(name: str) -> Iterator[str]:
    yield f"REVOKE ALL ON DATABASE {name} FROM PUBLIC"
    yield f"GRANT CONNECT ON DATABASE {name} TO {APP}"


def _roles() -> Iterator[str]:
    for role, wanted in _ROLES.items():
        yield f"DO $$ BEGIN CREATE ROLE {role}; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
        yield f"ALTER ROLE {role} {wanted} {_RESTRICTED}"
    for group, member in _MEMBERSHIPS:
        yield f"GRANT {group} TO {member}"
    for role in (OWNER, APP):
        yield f"ALTER ROLE {role} SET idle_in_transaction_session_timeout = '{_IDLE_IN_TRANSACTION}'"


def _set_password(cursor: Cursor, role: str, password: str) -> None:
    verifier = cursor.connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
    cursor.execute(
        sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier.decode("ascii")))
    )


def _make_database(cursor: Cursor, database: str) -> None:
    row = cursor.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s", (database,)).fetchone()
    if row is None:
        cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), sql.Identifier(OWNER)))
    elif row[0] != OWNER:
        raise ProvisioningRefused(
            f"database {database!r} exists and belongs to {row[0]!r}; give it to {OWNER} or choose another name"
        )


@contextmanager
def _cursor(address: dict[str, Any]) -> Iterator[Cursor]:
    with psycopg.connect(**address, autocommit=True) as connection, connection.cursor() as cursor:
        yield cursor
