"""Roles and databases: repeatable, least rights, no password in clear."""

from __future__ import annotations

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls, driver_dsn, sqlalchemy_url
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import ProvisioningRefused, provision
from plm_shared.testing.databases import TemplateDatabases

pytestmark = pytest.mark.every_postgres


def test_twice_is_the_same_and_given_passwords_stay(
    postgres_cluster: EmbeddedPostgres, template_databases: TemplateDatabases
) -> None:
    first = template_databases.create("twice 'é\"")
    second = template_databases.create("twice 'é\"")
    assert first == second
    for dsn, name in ((second.owner, "plm_owner"), (second.app, "plm_app")):
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT current_user, current_database()").fetchone() == (name, "twice 'é\"")
    template_databases.drop(first)


def test_the_roles_hold_exactly_their_rights(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.app) as connection:
        roles = connection.execute(
            "SELECT rolname, rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
            " FROM pg_roles WHERE rolname LIKE 'plm%' ORDER BY 1"
        ).fetchall()
        members = connection.execute(
            "SELECT member::regrole::text, roleid::regrole::text FROM pg_auth_members"
            " WHERE member::regrole::text LIKE 'plm%' ORDER BY 1, 2"
        ).fetchall()
        owner = connection.execute(
            "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
        ).fetchone()
        timeout = connection.execute("SHOW idle_in_transaction_session_timeout").fetchone()
    nothing = (False,) * 4
    assert roles == [
        ("plm_app", True, *nothing, False),
        ("plm_engine_writer", False, *nothing, False),
        ("plm_kernel_writer", False, *nothing, False),
        ("plm_migrator", False, *nothing, True),
        ("plm_owner", True, *nothing, False),
    ]
    assert members == [
        ("plm_app", "plm_engine_writer"),
        ("plm_app", "plm_kernel_writer"),
        ("plm_owner", "plm_migrator"),
    ]
    assert owner == ("plm_owner",)
    assert timeout == ("1min",)


def test_addresses_never_show_in_a_repr(kernel_database: DatabaseUrls) -> None:
    assert repr(kernel_database) == "DatabaseUrls()"


def test_a_database_of_another_owner_is_left_alone(postgres_cluster: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres_cluster.admin_dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE theirs")
        connection.execute("CREATE ROLE small LOGIN PASSWORD 'small'")
        try:
            with pytest.raises(ProvisioningRefused, match="belongs to 'postgres'"):
                provision(postgres_cluster.admin_dsn, "theirs", owner_password="a", app_password="b")
            host = postgres_cluster.admin_dsn.partition("?")[2]
            with pytest.raises(ProvisioningRefused, match="use a superuser"):
                provision(f"postgresql://small:small@/postgres?{host}", "new")
        finally:
            connection.execute("DROP DATABASE theirs")
            connection.execute("DROP ROLE small")


def test_the_two_spellings_of_an_address_turn_into_each_other() -> None:
    assert driver_dsn("postgresql+psycopg://u:p@h/d?x=1") == "postgresql://u:p@h/d?x=1"
    assert sqlalchemy_url("postgresql://u:p@h/d?x=1") == "postgresql+psycopg://u:p@h/d?x=1"
    assert sqlalchemy_url(sqlalchemy_url("postgres://h/d")) == "postgresql+psycopg://h/d"
    with pytest.raises(ValueError, match="not a PostgreSQL URL") as caught:
        driver_dsn("mysql://u:secret@h/d")
    assert "secret" not in str(caught.value)
