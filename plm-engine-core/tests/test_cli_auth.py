"""`plm-cli auth issue-token`: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from typer.testing import CliRunner

SECRET = "a-secret-for-tests-of-forty-characters!!"
OLDER = "the-secret-before-that-one-of-40-letters"
ACTIVE = "PLM_IDENTITY_HS256_SECRET_ACTIVE"
TENANT, USER = uuid.UUID(int=2), uuid.UUID(int=1)
UNSET = dict.fromkeys(
    [
        "PLM_IDENTITY_HS256_SECRET",
        "PLM_IDENTITY_HS256_SECRET_PREVIOUS",
        "ENVIRONMENT",
        "IDENTITY_PROVIDER_MODE",
        "PLM_IDENTITY_ISSUER",
        "PLM_IDENTITY_AUDIENCE",
    ]
)


def issue(*arguments: str, **environment: str) -> Any:
    command = ["auth", "issue-token", "--tenant-id", str(TENANT), *arguments]
    return CliRunner().invoke(build_app(), command, env={**UNSET, ACTIVE: SECRET, **environment})


def test_stdout_is_the_bare_token_and_nothing_else() -> None:
    result = issue("--user-id", str(USER), "--scope", "plm.runs.read", "--scope", "plm.runs.create", "--ttl", "90s")
    assert result.exit_code == 0
    identity = Hs256JwtIdentityProvider(active_secret=SECRET).validate(result.stdout.rstrip("\n"))
    assert (identity.tenant_id, identity.user_id, identity.actor_kind) == (TENANT, USER, "human")
    assert identity.scopes == {"plm.runs.read", "plm.runs.create"}
    assert (identity.expires_at - identity.issued_at).total_seconds() == 90
    assert str(USER) in result.stderr


def test_json_holds_token_claims_and_expiry() -> None:
    answer = json.loads(issue("--json", "--actor-kind", "agent", "--session-id", "s-1").stdout)
    identity = Hs256JwtIdentityProvider(active_secret=SECRET).validate(answer["token"])
    assert set(answer) == {"token", "claims", "expires_at"}
    assert (identity.actor_kind, identity.session_id) == ("agent", "s-1")
    assert answer["claims"]["sub"] == str(identity.user_id)
    assert answer["expires_at"] == identity.expires_at.isoformat()


def test_the_active_secret_signs_even_where_a_previous_one_is_set() -> None:
    result = issue(PLM_IDENTITY_HS256_SECRET_PREVIOUS=OLDER)
    assert Hs256JwtIdentityProvider(active_secret=SECRET).validate(result.stdout.strip())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tenant-id", "acme"],
        ["--user-id", "nobody"],
        ["--actor-kind", "root"],
        ["--actor-kind", "system"],
        ["--ttl", "0"],
        ["--ttl", "-1h"],
        ["--ttl", "25h"],
        ["--ttl", "86401"],
        ["--ttl", "1 week"],
        ["--ttl", "nan"],
        ["--scope", "two words"],
        ["--session-id", "a b"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_2_and_print_no_token(arguments: list[str]) -> None:
    result = issue(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_a_system_token_needs_its_own_flag() -> None:
    assert issue("--actor-kind", "system", "--allow-system").exit_code == 0


@pytest.mark.parametrize(
    "environment",
    [{ACTIVE: ""}, {ACTIVE: "short"}, {"ENVIRONMENT": "production"}, {"IDENTITY_PROVIDER_MODE": "oidc"}],
    ids=str,
)
def test_without_a_usable_provider_it_ends_with_3(environment: dict[str, str]) -> None:
    result = issue(**environment)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.count("\n") == 1


def test_the_installed_command_works_as_a_process() -> None:
    command = [Path(sys.executable).with_name("plm-cli"), "auth", "issue-token", "--tenant-id", str(TENANT)]
    clean = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(command, env={**clean, ACTIVE: SECRET}, capture_output=True, text=True, check=True)
    assert Hs256JwtIdentityProvider(active_secret=SECRET).validate(done.stdout.strip()).tenant_id == TENANT
    assert SECRET not in done.stderr
