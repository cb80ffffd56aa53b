"""Where a database stands against this installation's migrations, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plm_engine_core.migrations as engine
import plm_shared.migrations as kernel
import psycopg
import pytest
from alembic.script import ScriptDirectory
from plm_engine_core.cli import build_app
from plm_engine_core.cli.chains import Chain, SchemaAhead, SchemaBehind, upgrade_all
from plm_engine_core.testing.old_server import old_server
from plm_shared.addresses import DatabaseUrls
from plm_shared.provisioning import provision
from plm_shared.server_version import ServerTooOld
from plm_shared.testing.databases import TemplateDatabases
from psycopg import sql
from typer.testing import CliRunner

CHAINS = {"10-plm-shared": kernel, "20-plm-engine-core": engine}


def stand_at(owner: psycopg.Connection[Any], provider: Any, revision: str) -> None:
    table = sql.Identifier(provider.VERSION_TABLE)
    owner.execute(sql.SQL("UPDATE {} SET version_num = {}").format(table, revision))


@pytest.mark.parametrize("provider", CHAINS.values(), ids=CHAINS.keys())
def test_the_known_revisions_are_those_that_alembic_runs(provider: Any) -> None:
    scripts = ScriptDirectory(str(Path(provider.__file__).parent))
    assert provider.revisions() == [script.revision for script in reversed(list(scripts.walk_revisions()))]


@pytest.mark.parametrize(("name", "provider"), CHAINS.items())
def test_the_application_sees_that_the_schema_is_current_behind_or_ahead(
    engine_database: DatabaseUrls, name: str, provider: Any
) -> None:
    chain = Chain(name=name, provider=provider)
    chain.require_current(engine_database.app)
    known = provider.revisions()
    with psycopg.connect(engine_database.owner, autocommit=True) as owner:
        stand_at(owner, provider, known[-2])
        with pytest.raises(SchemaBehind, match=rf"{known[-2]} of {name}.* {known[-1]}; run `plm-cli db upgrade`"):
            chain.require_current(engine_database.app)
        stand_at(owner, provider, "9999")
        with pytest.raises(SchemaAhead, match=rf"9999 of {name}.* {known[-1]}"):
            chain.require_current(engine_database.app)
        owner.execute(f"REVOKE ALL ON {provider.VERSION_TABLE} FROM plm_engine_writer".encode())
        with pytest.raises(SchemaBehind, match="unknown"):
            chain.require_current(engine_database.app)


def test_a_newer_database_is_upgraded_by_nobody_and_both_revisions_are_named(engine_database: DatabaseUrls) -> None:
    with psycopg.connect(engine_database.owner, autocommit=True) as owner:
        stand_at(owner, engine, "9999")
        stand_at(owner, kernel, "0001")
    result = CliRunner().invoke(build_app(), ["db", "upgrade"], env={"PG_ADMIN_DSN": engine_database.owner})
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "9999" in result.stderr
    assert engine.revisions()[-1] in result.stderr
    assert kernel.current(engine_database.owner) == "0001", "no other chain was touched either"


def test_a_login_that_may_not_make_tables_is_told_whose_address_is_needed(
    template_databases: TemplateDatabases,
) -> None:
    database = template_databases.create("no_rights")
    try:
        for variable in ("PG_ADMIN_DSN", "PG_DSN"):
            result = CliRunner().invoke(build_app(), ["db", "upgrade"], env={variable: database.app})
            assert (result.exit_code, result.stdout) == (1, "")
            assert len(result.stderr.splitlines()) == 1
            assert "set PG_ADMIN_DSN to the owner's address" in result.stderr
        upgrade_all(database.owner)
    finally:
        template_databases.drop(database)


def test_a_login_that_may_not_make_roles_is_told_to_be_a_superuser(template_databases: TemplateDatabases) -> None:
    database = template_databases.create("no_superuser")
    try:
        command = ["db", "provision", "--database", "another"]
        result = CliRunner().invoke(build_app(), command, env={"PG_SUPERUSER_DSN": database.owner})
        assert (result.exit_code, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1
        assert "use a superuser's" in result.stderr
    finally:
        template_databases.drop(database)


def test_a_server_that_is_too_old_is_refused_before_a_statement_is_sent() -> None:
    with old_server("14.9") as address:
        for act in (upgrade_all, lambda dsn: provision(dsn, "plm")):
            with pytest.raises(ServerTooOld, match=r"PostgreSQL 14\.9, and 15 is the oldest") as caught:
                act(address)
            assert caught.value.version == 140009
        for command, variable in (("upgrade", "PG_ADMIN_DSN"), ("provision", "PG_SUPERUSER_DSN")):
            result = CliRunner().invoke(build_app(), ["db", command], env={variable: address})
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.startswith("plm-cli: the server is PostgreSQL 14.9")
            assert len(result.stderr.splitlines()) == 1
