"""`plm-cli auth`: what it prints where, and how it ends."""

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
from plm_engine_core.testing.issuer import local_issuer
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
        "PLM_IDENTITY_LEEWAY_SECONDS",
        "PLM_OIDC_ISSUER",
        "PLM_OIDC_AUDIENCE",
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


def test_a_scope_that_no_token_can_carry_is_told_with_its_form() -> None:
    result = issue("--scope", "plm.runs.create bom.read")
    assert result.exit_code == 2
    assert "claim 'scopes'" in result.stderr
    assert "without blanks, and for a second scope the option is repeated" in result.stderr
    assert "got --scope ['plm.runs.create bom.read']" in result.stderr


def test_a_system_token_needs_its_own_flag() -> None:
    assert issue("--actor-kind", "system", "--allow-system").exit_code == 0


@pytest.mark.parametrize(
    "environment",
    [
        {ACTIVE: ""},
        {ACTIVE: "short"},
        {"ENVIRONMENT": "production"},
        {"ENVIRONMENT": "live"},
        {"ENVIRONMENT": " Staging "},
        {"IDENTITY_PROVIDER_MODE": "oidc"},
    ],
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


def inspect(given: str, *arguments: str, **environment: str) -> Any:
    command = ["auth", "inspect", *arguments]
    return CliRunner().invoke(build_app(), command, input=given, env={**UNSET, ACTIVE: SECRET, **environment})


def test_a_good_token_is_inspected_and_its_text_is_not_repeated() -> None:
    token = issue("--user-id", str(USER), "--scope", "plm.halt", "--session-id", "s-1").stdout.strip()
    for given in (token, f"Bearer {token}\n"):
        result = inspect(given)
        assert result.exit_code == 0
        assert str(USER) in result.stdout
        assert "plm.halt" in result.stdout
        assert token not in result.stdout
    answer = json.loads(inspect(token, "--json").stdout)
    assert (answer["provider"], answer["user_id"], answer["tenant_id"]) == ("hs256", str(USER), str(TENANT))
    assert (answer["scopes"], answer["session_id"], answer["actor_kind"]) == (["plm.halt"], "s-1", "human")


def test_a_token_that_is_refused_is_one_sentence_with_its_code_and_status_1() -> None:
    token = issue().stdout.strip()
    for given, environment, word in (
        ("garbage", {}, "IDENTITY_MALFORMED (malformed_token)"),
        (token, {ACTIVE: OLDER}, "IDENTITY_INVALID_SIGNATURE (bad_signature)"),
        (token, {"PLM_IDENTITY_ISSUER": "https://issuer"}, "IDENTITY_MALFORMED (missing_claim)"),
    ):
        result = inspect(given, **environment)
        assert (result.exit_code, result.stdout) == (1, "")
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert token not in result.stderr


def test_a_refused_token_is_told_to_programs_too(tmp_path: Path) -> None:
    refused = inspect("garbage", "--json")
    assert refused.exit_code == 1
    told = json.loads(refused.stdout)
    assert (told["refused"], told["reason"]) == ("IDENTITY_MALFORMED", "malformed_token")
    assert told["message"]
    away = {"PLM_OIDC_ISSUER": "http://127.0.0.1:9/", "PLM_OIDC_AUDIENCE": "us"}
    with local_issuer(tmp_path / "issuer") as issuer:
        token = issuer.token(issuer.make_key())
    refused = inspect(token, "--json", **away)
    assert (refused.exit_code, json.loads(refused.stdout)["reason"]) == (1, "IDENTITY_PROVIDER_UNAVAILABLE")


def test_a_command_without_a_standard_input_is_given_no_token() -> None:
    command = f"{Path(sys.executable).with_name('plm-cli')} auth inspect <&-"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "on standard input" in done.stderr


def test_inspecting_nothing_or_without_a_provider_is_told_apart() -> None:
    assert inspect("").exit_code == 2
    assert inspect("x", **{ACTIVE: ""}).exit_code == 3
    assert inspect("x", IDENTITY_PROVIDER_MODE="off").exit_code == 3


def test_with_an_issuer_tokens_are_inspected_by_its_keys_and_never_issued_here(tmp_path: Path) -> None:
    with local_issuer(tmp_path / "issuer") as issuer:
        key = issuer.make_key()
        issuer.publish(key)
        settings = {"PLM_OIDC_ISSUER": issuer.url, "PLM_OIDC_AUDIENCE": issuer.audience}
        answer = json.loads(inspect(issuer.token(key), "--json", **settings).stdout)
        assert (answer["provider"], answer["scopes"]) == ("oidc", ["plm.halt", "plm.runs.create"])
        refused = issue(**settings)
        assert (refused.exit_code, refused.stdout) == (3, "")
        issuer.end()
        unreachable = inspect(issuer.token(key), **settings)
        assert (unreachable.exit_code, unreachable.stdout) == (1, "")
        assert "IDENTITY_PROVIDER_UNAVAILABLE" in unreachable.stderr
