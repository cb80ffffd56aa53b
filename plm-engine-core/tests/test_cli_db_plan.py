"""`plm-cli db plan`: what it prints makes, in the hands of an administrator with psql, what `db upgrade` makes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import EntryPoint
from typing import Any

import plm_engine_core.cli.chains as chains
import plm_engine_core.migrations as engine
import plm_shared.migrations as kernel
import psycopg
import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.cli.chains import MIGRATIONS_GROUP, upgrade_all
from plm_shared.addresses import DatabaseUrls, build_dsn
from plm_shared.embedded_postgres import find_servers
from plm_shared.testing.databases import ClusterPool, TemplateDatabases
from psycopg.conninfo import conninfo_to_dict
from typer.testing import CliRunner

BIN = find_servers()[0].bin_dir


def plan(*arguments: str, address: str | None = None) -> Any:
    return CliRunner().invoke(build_app(), ["db", "plan", *arguments], env={"PG_ADMIN_DSN": address, "PG_DSN": None})


def psql(address: str, script: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "psql", "-X", "-q", "-d", address, "-f", "-"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return subprocess.run(
        command, input=script, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def shape(database: DatabaseUrls | str) -> str:
    """Every object of a database with its owner and rights, but what differs between two dumps of the same one."""
    address = database if isinstance(database, str) else database.admin
    done = subprocess.run([BIN / "pg_dump", "-s", "-d", address], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


@pytest.fixture
def empty(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("planned")
    yield database
    template_databases.drop(database)


@pytest.fixture
def upgraded(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("upgraded")
    upgrade_all(database.owner)
    yield database
    template_databases.drop(database)


def test_on_a_server_that_has_nothing_the_script_makes_roles_database_and_schema(upgraded: DatabaseUrls) -> None:
    script = plan("--new-database", "plm-Production").stdout
    scripted, asked = script.split("\n-- Each asks")
    assert [line for line in asked.splitlines() if line.startswith("\\")] == [
        "\\password plm_owner",
        "\\password plm_app",
    ]
    with closing(ClusterPool()) as pool:
        admin = pool.cluster().admin_dsn
        done = psql(admin, scripted)
        assert (done.returncode, done.stderr) == (0, "")
        made = build_dsn({**conninfo_to_dict(admin), "dbname": "plm-Production"})
        assert shape(made) == shape(upgraded)
        with psycopg.connect(made) as connection:
            owner, access = connection.execute(
                "SELECT pg_get_userbyid(datdba), datacl::text[] FROM pg_database WHERE datname = current_database()"
            ).fetchone()  # type: ignore[misc]
        assert owner == "plm_owner"
        assert sorted(access) == ["plm_app=c/plm_owner", "plm_owner=CTc/plm_owner"]
        again = psql(admin, scripted)
        assert again.returncode != 0, "a database that is there is not planned for"


@pytest.mark.parametrize("engine_at", [None, "0014", "0025"])
def test_what_a_database_has_already_is_left_out(
    empty: DatabaseUrls, upgraded: DatabaseUrls, engine_at: str | None
) -> None:
    kernel.upgrade(empty.owner, "head" if engine_at else "0007")
    if engine_at:
        engine.upgrade(empty.owner, engine_at)
    script = plan(address=empty.owner).stdout
    done = psql(empty.admin, script)
    assert (done.returncode, done.stderr) == (0, "")
    assert shape(empty) == shape(upgraded)
    nothing = plan(address=empty.owner)
    assert (nothing.exit_code, nothing.stdout) == (0, "-- Nothing to do: the schema is up to date.\n")
    assert psql(empty.admin, script).returncode != 0, "the second time changes nothing and says so"
    assert shape(empty) == shape(upgraded)


def test_a_name_that_could_be_more_than_a_name_is_refused() -> None:
    for name in ("", "a b", 'a"', "a\n\\! id", "x" * 64, "1a", "é"):
        result = plan("--new-database", name)
        assert (result.exit_code, result.stdout) == (2, ""), name
        assert "--new-database" in result.stderr


def test_a_package_that_only_upgrades_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "entry_points", lambda *, group: [EntryPoint("40-other", "builtins:print", group)])
    result = plan("--new-database", "plm")
    assert MIGRATIONS_GROUP == "plm.migrations"
    assert (result.exit_code, result.stdout) == (1, "")
    assert "40-other does not tell its statements" in result.stderr


def test_without_an_address_it_asks_for_one() -> None:
    result = plan()
    assert (result.exit_code, result.stdout) == (3, "")
    assert "PG_ADMIN_DSN" in result.stderr
