"""`plm-cli db`, and how other packages add commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import plm_engine_core.cli as package
import psycopg
import pytest
import typer
from plm_engine_core.cli import build_app
from plm_shared.addresses import DatabaseUrls, sqlalchemy_url
from plm_shared.testing.databases import TemplateDatabases
from typer.testing import CliRunner

TENANT = uuid.UUID(int=2)


def run(*arguments: str, admin: str | None = None, app: str | None = None) -> Any:
    return CliRunner().invoke(build_app(), ["db", *arguments], env={"PG_ADMIN_DSN": admin, "PG_DSN": app})


@pytest.fixture
def empty(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    database = template_databases.create("cli_upgrading")
    yield database
    template_databases.drop(database)


def test_upgrade_runs_every_package_in_floor_order_and_again_changes_nothing(empty: DatabaseUrls) -> None:
    for dsn in (empty.owner, sqlalchemy_url(empty.owner)):
        result = run("upgrade", "--json", admin=dsn)
        assert result.exit_code == 0, result.stderr
        revisions = json.loads(result.stdout)["revisions"]
        assert list(revisions)[:2] == ["10-plm-shared", "20-plm-engine-core"]
        assert revisions["10-plm-shared"] == "0012"
    text = run("current", app=empty.owner)
    assert text.stdout.splitlines()[0].split() == ["10-plm-shared", "0012"]


def test_an_empty_database_has_no_revisions_and_no_place_for_a_tenant(empty: DatabaseUrls) -> None:
    shown = json.loads(run("current", "--json", admin=empty.owner).stdout)["revisions"]
    assert shown["10-plm-shared"] is shown["20-plm-engine-core"] is None
    refused = run("create-tenant", "--name", "Acme", admin=empty.owner)
    assert refused.exit_code == 1
    assert "run `plm-cli db upgrade` first" in refused.stderr


def test_create_tenant_prints_the_id_and_repeats_harmlessly(engine_database: DatabaseUrls) -> None:
    first = run("create-tenant", "--name", " Acme ", admin=engine_database.owner)
    assert first.exit_code == 0, first.stderr
    again = run(
        "create-tenant", "--name", "Acme", "--tenant-id", first.stdout.strip(), "--json", admin=engine_database.owner
    )
    assert json.loads(again.stdout) == {"tenant_id": first.stdout.strip(), "name": "Acme", "created": False}
    other = run("create-tenant", "--name", "Other", "--tenant-id", first.stdout.strip(), admin=engine_database.owner)
    assert (other.exit_code, other.stdout) == (1, "")
    with psycopg.connect(engine_database.owner) as connection:
        assert connection.execute("SELECT id::text, name FROM tenants").fetchall() == [(first.stdout.strip(), "Acme")]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 201])
def test_a_tenant_needs_a_name_that_people_can_read(engine_database: DatabaseUrls, name: str) -> None:
    assert run("create-tenant", "--name", name, admin=engine_database.owner).exit_code == 2


def test_the_applications_login_is_refused_with_the_remedy(engine_database: DatabaseUrls) -> None:
    result = run("create-tenant", "--name", "Acme", app=engine_database.app)
    assert result.exit_code == 1
    assert "set PG_ADMIN_DSN to the owner's address" in result.stderr


@pytest.mark.parametrize("command", [["upgrade"], ["current"], ["create-tenant", "--name", "Acme"]])
def test_without_an_address_every_command_ends_with_3(command: list[str]) -> None:
    for address in (None, "mysql://user:hunter2@host/db"):
        result = run(*command, admin=address)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "PG_ADMIN_DSN" in result.stderr
        assert "hunter2" not in result.stderr


@pytest.mark.parametrize("command", [["upgrade"], ["current"], ["create-tenant", "--name", "Acme"]])
def test_an_unreachable_server_is_one_sentence_without_the_password(command: list[str]) -> None:
    result = run(*command, admin="postgresql://plm_owner:hunter2@127.0.0.1:1/none")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


def test_a_command_waits_for_no_other_s_imports() -> None:
    """What is asked of a database alone loads neither the control plane nor what others bring along."""
    show = "import sys; from plm_engine_core.cli import build_app; build_app(*sys.argv[1:]); print(*sys.modules)"

    def loaded(*word: str) -> set[str]:
        command = [sys.executable, "-c", show, *word]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    others = {"plm_engine_core.cli.events", "plm_engine_core.control_plane.policy"}
    assert loaded("db") & {*others, "sqlalchemy"} == set()
    assert others <= loaded()


def test_other_packages_add_a_group_or_anything_else_and_a_broken_one_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        EntryPoint("broken", "no_such_module:app", package.COMMANDS_GROUP),
        EntryPoint("callable", f"{__name__}:add", package.COMMANDS_GROUP),
        EntryPoint("group", f"{__name__}:group", package.COMMANDS_GROUP),
    ]
    objects = {"callable": add, "group": group}
    monkeypatch.setattr(package, "entry_points", lambda *, group: found)  # noqa: ARG005 - the real one's signature
    load = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda entry: objects.get(entry.name) or load(entry))
    result = CliRunner().invoke(build_app(), ["--help"])
    assert result.exit_code == 0
    for name in ("auth", "db", "added", "group"):
        assert name in result.stdout
    assert CliRunner().invoke(build_app(), ["group", "hello"]).stdout == "hello\n"


group = typer.Typer()


@group.command("hello")
def hello() -> None:
    typer.echo("hello")


def add(app: typer.Typer) -> None:
    app.command("added")(lambda: None)


@pytest.mark.parametrize("place", ["[::1/plm", "no host/plm"])
@pytest.mark.parametrize(
    "command", [["db", "upgrade"], ["db", "current"], ["events", "verify", "--tenant-id", str(TENANT)]]
)
def test_an_address_that_cannot_be_read_is_not_repeated(command: list[str], place: str) -> None:
    address = f"postgresql://plm_app:never shown@{place}"
    done = subprocess.run(
        [Path(sys.executable).with_name("plm-cli"), *command],
        env={**os.environ, "PG_ADMIN_DSN": address, "PG_DSN": address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "percent-encode" in done.stderr
    assert "never shown" not in done.stderr
