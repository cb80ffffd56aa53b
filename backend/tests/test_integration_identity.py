"""The page about identity providers: its commands run as they stand, and a real server lets an issuer's people in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from plm_engine_core.control_plane.identity.oidc import OidcIdentityProvider
from plm_engine_core.testing.issuer import LocalIssuer, local_issuer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "integration_identity.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.+?)```", PAGE, re.DOTALL)


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[LocalIssuer]:
    with local_issuer(tmp_path / "issuer") as issuer:
        issuer.key = issuer.make_key()  # type: ignore[attr-defined]
        issuer.publish(issuer.key)  # type: ignore[attr-defined]
        yield issuer


def test_the_commands_of_the_page_run_in_their_order(environment: Any, issuer: Any, platform: Any) -> None:
    script = "\n".join(COMMANDS).replace("https://id.example.com/realms/plm", issuer.url)
    token = issuer.token(issuer.key, aud="https://plm.example.com")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = environment(ENVIRONMENT="development", PATH=path, TENANT=str(platform.tenant), OIDC_TOKEN=token)
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "IDENTITY_INVALID_SIGNATURE" in done.stderr
    assert '"provider": "oidc"' in done.stdout


def test_the_page_names_every_setting_of_the_provider() -> None:
    named = set(re.findall(r"``(PLM_\w+)``", str(OidcIdentityProvider.from_environment.__doc__)))
    assert len(named) >= 7
    assert {name for name in named if f"`{name}`" not in PAGE and name not in "\n".join(COMMANDS)} == set()


def test_a_server_lets_the_issuers_people_in_and_nobody_else(launch: Any, platform: Any, issuer: Any) -> None:
    settings = {
        "ENVIRONMENT": "development",
        "PLM_OIDC_ISSUER": issuer.url,
        "PLM_OIDC_AUDIENCE": issuer.audience,
        "PLM_RUN_CONCURRENCY": "0",
    }
    with launch(like=platform, **settings) as server:
        tenant = str(platform.tenant)

        def status(token: str) -> int:
            url, headers = f"{server.url}/v1/runs", {"Authorization": f"Bearer {token}"}
            return httpx.get(url, headers=headers, timeout=60).status_code

        good = issuer.token(issuer.key, tenant_id=tenant)
        assert status(good) == 200
        assert status(platform.tokens.issue(platform.tenant)) == 401  # a shared secret's token is nobody's here
        assert status(issuer.token(issuer.key, tenant_id=tenant, aud="another")) == 401
        issuer.end()
        assert status(good) == 200
        assert status(issuer.token(issuer.make_key(), tenant_id=tenant)) in {401, 503}
        with psycopg.connect(platform.environment["PG_ADMIN_DSN"]) as owner:
            owner.execute("SELECT set_config('app.tenant_id', %s, false)", [tenant])
            kinds = owner.execute(
                "SELECT event_type, payload ->> 'reason' FROM audit_log WHERE payload ->> 'provider' = 'oidc'"
            ).fetchall()
        assert sorted(set(kinds), key=str) == [("identity.bind", None), ("identity.reject", "wrong_audience")]
