"""`plm-cli doctor tenancy`: what lets tenants see each other is named with the statement that mends it."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from plm_engine_core.cli import build_app
from plm_shared.addresses import DatabaseUrls, sqlalchemy_url
from plm_shared.testing.databases import create_tenants
from typer.testing import CliRunner


def tenancy(*arguments: str, admin: str | None = None, app: str | None = None) -> Any:
    return CliRunner().invoke(
        build_app(), ["doctor", "tenancy", *arguments], env={"PG_ADMIN_DSN": admin, "PG_DSN": app}
    )


def test_a_database_of_every_package_is_healthy(engine_database: DatabaseUrls) -> None:
    create_tenants(engine_database, "first", "second")
    said = tenancy(admin=engine_database.owner, app=sqlalchemy_url(engine_database.app))
    assert (said.exit_code, said.stdout) == (0, "every tenant is kept apart\n"), said.stdout + said.stderr
    assert json.loads(tenancy("--json", admin=engine_database.owner, app=engine_database.app).stdout) == {
        "healthy": True,
        "found": [],
    }


def test_the_applications_address_alone_is_enough(engine_database: DatabaseUrls) -> None:
    assert tenancy(app=engine_database.app).exit_code == 0


def test_what_is_wrong_ends_with_1_and_its_remedy_heals_it(engine_database: DatabaseUrls) -> None:
    with psycopg.connect(engine_database.owner, autocommit=True) as connection:
        connection.execute("ALTER TABLE runs NO FORCE ROW LEVEL SECURITY")
        connection.execute("DROP INDEX ix_llm_calls_run_id")
        text = tenancy(admin=engine_database.owner, app=engine_database.app)
        assert text.exit_code == 1
        assert "row-level security: runs row-level security is not both enabled and forced" in text.stdout
        said = tenancy("--json", admin=engine_database.owner, app=engine_database.app)
        assert said.exit_code == 1
        answer = json.loads(said.stdout)
        assert answer["healthy"] is False
        assert {each["rule"] for each in answer["found"]} == {"row-level security", "foreign key index"}
        for each in answer["found"]:
            for statement in each["remedy"].split("; "):
                connection.execute(statement.encode())
    assert tenancy(admin=engine_database.owner, app=engine_database.app).exit_code == 0


@pytest.mark.parametrize(
    "admin", [None, "postgresql://plm_owner:hunter2@127.0.0.1:1/none", "mysql://a:hunter2@host/db"]
)
def test_without_the_applications_address_it_ends_with_3(admin: str | None) -> None:
    for app in (None, "mysql://user:hunter2@host/db"):
        said = tenancy(admin=admin, app=app)
        assert (said.exit_code, said.stdout, said.stderr.count("\n")) == (3, "", 1)
        assert "hunter2" not in said.stderr


def test_an_unreachable_server_is_one_sentence_without_the_password() -> None:
    address = "postgresql://plm_app:hunter2@127.0.0.1:1/none"
    said = tenancy(admin=address, app=address)
    assert (said.exit_code, said.stdout, said.stderr.count("\n")) == (1, "", 1)
    assert "hunter2" not in said.stderr
