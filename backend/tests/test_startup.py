"""What keeps the application from starting is said in one sentence, with exit code 3, and nothing secret in it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import plm_engine_core.migrations as engine
import plm_shared.migrations as kernel
import psycopg
import pytest
import yaml
from plm_backend import delivery
from plm_engine_core.testing.old_server import old_server
from psycopg import sql

SECRET = "a-secret-of-this-test-that-nobody-may-see"


def _refused(done: Any, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip() and "is not installed on this node" not in line]
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("plm-cli: ")
    for word in words:
        assert word in lines[0]
    assert SECRET not in done.stderr


@pytest.fixture
def settings(platform: Any) -> dict[str, str]:
    """Settings with which the server would start."""
    return dict(platform.environment)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PG_DSN": ""}, ("PG_DSN", "test")),
        ({"PG_DSN": f"postgresql://plm_app:{SECRET}@127.0.0.1:1/plm"}, ("PG_DSN", "refused")),
        ({"PG_DSN": f"mysql://plm_app:{SECRET}@localhost/plm"}, ("PG_DSN", "postgresql://")),
        ({"PG_DSN": f"postgresql://plm_app:{SECRET}@[::1/plm"}, ("PG_DSN", "percent-encode")),
        ({"PG_DSN": f"postgresql://plm_app:a {SECRET}@localhost/plm"}, ("PG_DSN", "percent-encode")),
        ({"PLM_IDENTITY_HS256_SECRET_ACTIVE": ""}, ("PLM_IDENTITY_HS256_SECRET_ACTIVE",)),
        ({"PLM_IDENTITY_HS256_SECRET_ACTIVE": SECRET[:20]}, ("PLM_IDENTITY_HS256_SECRET_ACTIVE", "32")),
        ({"PLM_IDENTITY_HS256_SECRET_ACTIVE": "changeme" * 5}, ("PLM_IDENTITY_HS256_SECRET_ACTIVE", "placeholder")),
        ({"ENVIRONMENT": "production"}, ("ENVIRONMENT=production", "hs256")),
        ({"ENVIRONMENT": "prod"}, ("ENVIRONMENT=prod", "hs256")),
        ({"ENVIRONMENT": "prod-eu"}, ("ENVIRONMENT=prod-eu", "hs256", "local", "IDENTITY_PROVIDER_MODE=oidc")),
        ({"ENVIRONMENT": "staging"}, ("ENVIRONMENT=staging", "hs256", "local", "IDENTITY_PROVIDER_MODE=oidc")),
        ({"ENVIRONMENT": " PROD ", "PG_DSN": ""}, ("ENVIRONMENT=PROD", "hs256")),
        ({"IDENTITY_PROVIDER_MODE": "off"}, ("IDENTITY_PROVIDER_MODE", "off")),
        ({"ENVIRONMENT": "production", "PLM_OIDC_ISSUER": "https://id.example"}, ("PLM_OIDC_AUDIENCE",)),
        ({"ENVIRONMENT": "development", "IDENTITY_PROVIDER_MODE": "none"}, ("IDENTITY_PROVIDER_MODE", "none")),
        ({"PLM_POLICY": "/does/not/exist.yaml"}, ("/does/not/exist.yaml",)),
        ({"PLM_AGENTS": "/does/not/exist"}, ("/does/not/exist", "PLM_AGENTS")),
        ({"PLM_AGENTS": __file__}, (__file__, "PLM_AGENTS")),
        ({"ENVIRONMENT": "development", "PG_DSN": "", "PLM_STATE_DIR": __file__}, (__file__, "PLM_STATE_DIR")),
        ({"ENVIRONMENT": "development", "PG_DSN": "", "PLM_STATE_DIR": f"/{'a' * 300}"}, ("PLM_STATE_DIR",)),
        ({"PLM_PORT": "eighty"}, ("PLM_PORT",)),
        ({"PLM_LEASE_SECONDS": "0"}, ("PLM_LEASE_SECONDS",)),
        ({"PLM_EVENTS_KEY": "/does/not/exist.pem"}, ("PLM_EVENTS_KEY", "/does/not/exist.pem")),
        ({"PLM_PLUGIN_REQUIRE": "seccomp, magic"}, ("PLM_PLUGIN_REQUIRE", "'magic' is no layer")),
        ({"PLM_PLUGIN_TENANT_WORKERS": "0"}, ("PLM_PLUGIN_TENANT_WORKERS",)),
        ({"PLM_CORS_ALLOWED_ORIGINS": "*"}, ("PLM_CORS_ALLOWED_ORIGINS", "name the origins")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_setting_is_named(
    cli: Any, settings: dict[str, str], changes: dict[str, str], words: tuple[str, ...]
) -> None:
    _refused(cli("serve", environment={**settings, **changes}), *words)


def test_a_worker_is_as_particular(cli: Any, settings: dict[str, str]) -> None:
    _refused(cli("worker", environment={**settings, "PG_DSN": ""}), "PG_DSN")
    _refused(cli("worker", environment={**settings, "ENVIRONMENT": "prod"}), "ENVIRONMENT=prod", "hs256")


def test_a_run_worker_that_would_drive_nothing_is_refused(cli: Any, settings: dict[str, str]) -> None:
    _refused(cli("worker", environment={**settings, "PLM_RUN_CONCURRENCY": "0"}), "PLM_RUN_CONCURRENCY")


def test_a_port_in_use_is_named(cli: Any, settings: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _refused(cli("serve", "--port", str(port), environment=settings), str(port), "--port")


def test_a_database_that_is_not_migrated_is_named(cli: Any, settings: dict[str, str], template_databases: Any) -> None:
    database = template_databases.create("never_migrated")
    _refused(cli("serve", environment={**settings, "PG_DSN": database.app}), "plm-cli db upgrade")


def test_a_server_that_is_too_old_is_named(cli: Any, settings: dict[str, str]) -> None:
    with old_server("14.9") as address:
        for command in ("serve", "worker"):
            _refused(cli(command, environment={**settings, "PG_DSN": address}), "PostgreSQL 14.9", "15 is the oldest")


@pytest.mark.parametrize("chain", [kernel, engine, delivery], ids=["plm-shared", "plm-engine-core", "delivery"])
@pytest.mark.parametrize(("back", "word"), [(True, "plm-cli db upgrade"), (False, "newer")], ids=["behind", "ahead"])
def test_a_schema_that_is_behind_or_ahead_is_refused_by_server_and_worker(
    cli: Any, settings: dict[str, str], new_database: Any, chain: Any, back: bool, word: str
) -> None:
    database, known = new_database(), ["unknown", *chain.revisions()]
    revision = known[-2] if back else "9999"
    with psycopg.connect(database.owner) as owner:
        if chain is delivery:
            comment = None if back else revision
            owner.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(delivery.SCHEMA), comment))
        else:
            table = sql.Identifier(chain.VERSION_TABLE)
            owner.execute(sql.SQL("UPDATE {} SET version_num = {}").format(table, revision))
    for command in ("serve", "worker"):
        _refused(cli(command, environment={**settings, "PG_DSN": database.app}), revision, word, known[-1])


def test_a_login_that_row_level_security_does_not_bind_is_refused(
    cli: Any, settings: dict[str, str], new_database: Any
) -> None:
    database = new_database()
    pretending = f"{database.admin}&options=-c%20role%3Dplm_app"
    for dsn in (database.owner, database.admin, pretending):
        _refused(cli("serve", environment={**settings, "PG_DSN": dsn}), "row-level security", "plm_app")


def test_a_login_without_the_application_s_rights_is_refused(
    cli: Any, settings: dict[str, str], new_database: Any
) -> None:
    database = new_database()
    with psycopg.connect(database.admin, autocommit=True) as admin:
        admin.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")
        try:
            admin.execute(f"GRANT CONNECT ON DATABASE {admin.info.dbname} TO stranger".encode())
            host = database.admin.partition("@")[2]
            stranger = {**settings, "PG_DSN": f"postgresql://stranger:stranger@{host}"}
            _refused(cli("serve", environment=stranger), "plm_app", "plm_engine_writer")
        finally:
            admin.execute("DROP OWNED BY stranger")
            admin.execute("DROP ROLE stranger")


def _changed(path: str, folder: Path, change: Any) -> str:
    document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    change(document)
    target = folder / Path(path).name
    target.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(target)


def test_a_policy_with_an_unknown_entry_is_refused(cli: Any, settings: dict[str, str], tmp_path: Path) -> None:
    policy = _changed(settings["PLM_POLICY"], tmp_path, lambda document: document.update(surprise=1))
    _refused(cli("serve", environment={**settings, "PLM_POLICY": policy}), policy, "surprise")


def test_a_registration_that_promises_more_than_its_plugin_is_refused(
    cli: Any, settings: dict[str, str], tmp_path: Path
) -> None:
    def promise(document: Any) -> None:
        next(each for each in document["capabilities"] if each["plugin"] == "fragile")["idempotent"] = True

    capabilities = _changed(settings["PLM_CAPABILITIES"], tmp_path, promise)
    _refused(cli("serve", environment={**settings, "PLM_CAPABILITIES": capabilities}), "fragile.append", "idempotent")


def test_a_plan_that_uses_an_unregistered_capability_is_refused(
    cli: Any, settings: dict[str, str], tmp_path: Path
) -> None:
    plan = {"agent": "a", "version": "1", "steps": [{"id": "act", "capability": "nobody.knows"}]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    _refused(cli("serve", environment={**settings, "PLM_AGENTS": str(tmp_path)}), "a.yaml", "nobody.knows")


def test_the_embedded_database_s_addresses_are_not_given_while_it_does_not_run(
    cli: Any, environment: Any, tmp_path: Path
) -> None:
    _refused(cli("local-env", environment=environment(PLM_STATE_DIR=str(tmp_path / "state"))), "plm-cli serve")


def test_no_log_holds_a_secret(platform: Any, client: Any) -> None:
    token = client.headers["Authorization"].removeprefix("Bearer ")
    client.finished(client.run("fail", kind="fatal")["run_id"])
    platform.anonymous(f"{token}x").get("/v1/runs")
    log = platform.log.read_text(encoding="utf-8")
    password = platform.environment["PG_DSN"].partition("plm_app:")[2].partition("@")[0]
    assert password
    for secret in (token, password, platform.environment["PLM_IDENTITY_HS256_SECRET_ACTIVE"]):
        assert secret not in log
