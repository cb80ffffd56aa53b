"""What a demo needs before its first request: plugins, a database, a server, a tenant and two identities."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from plm_shared.addresses import driver_dsn

from plm_backend.errors import SetupError
from plm_backend.settings import REPOSITORY, Settings

SAMPLES = (REPOSITORY / "dev" / "samples" / "environment.cdx.json", REPOSITORY / "dev" / "samples" / "assembly.csv")
PLUGINS_FILE = REPOSITORY / "dev" / "plugins.yaml"
TENANT = uuid.uuid5(uuid.NAMESPACE_URL, "urn:plm-platform:demo-tenant")
REQUESTER = uuid.uuid5(TENANT, "requester")
APPROVER = uuid.uuid5(TENANT, "approver")
REQUESTER_SCOPES = ["plm.runs.create", "bom.read", "bom.write"]
APPROVER_SCOPES = ["plm.hitl.resolve"]
_START_SECONDS = 60.0
_NETWORK_SIGNS = ("error sending request", "Failed to fetch")


def install_plugins(settings: Settings) -> dict[str, Any]:
    """Create the plugins' environments with `cjm-ctl install-all`; answers how many bytes they hold, and a note."""
    command = [
        str(Path(sys.executable).with_name("cjm-ctl")),
        "install-all",
        "--plugins",
        str(PLUGINS_FILE),
        "--data-dir",
        str(settings.plugin_root),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(_why_not_installed(done.stdout + done.stderr, settings.plugin_root, command))
    installed = [line.partition(":")[0] for line in done.stdout.splitlines() if not line.endswith(": unchanged")]
    note = f"installed {', '.join(installed)}" if installed else "already installed"
    return {"bytes": folder_size(settings.plugin_root / "envs"), "note": note}


def _why_not_installed(said: str, folder: Path, command: list[str]) -> str:
    if os.strerror(errno.ENOSPC) in said:
        return f"the plugins could not be installed: no space is left in {folder}; make room, then repeat"
    if any(sign in said for sign in _NETWORK_SIGNS):
        return (
            "the plugins could not be installed: the package index cannot be reached; check the network or uv's "
            "settings, then repeat"
        )
    return f"the plugins could not be installed; `{shlex.join(command)}` says why"


def folder_size(folder: Path) -> int:
    """Bytes of all files below, each hard-linked file once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def environment_bill(settings: Settings, folder: Path) -> Path:
    """A bill of the Python environment this runs in, by the CycloneDX tool of bom-reader's environment."""
    target = folder / "environment.cdx.json"
    tool = settings.plugin_root / "envs" / "bom-reader" / "bin" / "cyclonedx-py"
    done = subprocess.run(
        [str(tool), "environment", sys.executable, "--short-PURLs", "--output-file", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SetupError(f"the bill of this environment could not be made: {done.stderr.strip()}")
    return target


def create_tenant(owner_dsn: str) -> None:
    """The demo's tenant, created once by the owner of the database."""
    with psycopg.connect(driver_dsn(owner_dsn)) as connection:
        connection.execute("INSERT INTO tenants (id, name) VALUES (%s, 'demo') ON CONFLICT DO NOTHING", [TENANT])


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Two people: who asks for the run, and who approves its write."""

    requester: str
    approver: str


def issue_tokens() -> Tokens:
    """Tokens for an hour, signed as `plm-cli auth issue-token` would."""
    provider = Hs256JwtIdentityProvider.from_environment()
    now = datetime.now(UTC)

    def token(user: uuid.UUID, scopes: list[str]) -> str:
        return provider.issue_token(
            {
                "sub": str(user),
                "tenant_id": str(TENANT),
                "actor_kind": "human",
                "scopes": scopes,
                "iat": int(now.timestamp()),
                "exp": int((now + timedelta(hours=1)).timestamp()),
            }
        )

    return Tokens(requester=token(REQUESTER, REQUESTER_SCOPES), approver=token(APPROVER, APPROVER_SCOPES))


@contextmanager
def running_server(settings: Settings, app_dsn: str) -> Iterator[str]:
    """`plm-cli serve` in a process of its own on a free port; answers its URL."""
    logs = settings.state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "serve.log"
    ready = settings.state_dir / f"serve-{os.getpid()}.json"
    ready.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("plm-cli")), "serve", "--port", "0", "--ready-file", str(ready)]
    environment = {**os.environ, "PG_DSN": app_dsn, "PLM_STATE_DIR": str(settings.state_dir)}
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield _url_when_ready(server, ready, log)
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            ready.unlink(missing_ok=True)


def _url_when_ready(server: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise SetupError(f"the server did not start ({said[-1] if said else 'it said nothing'}); {log} says why")
        time.sleep(0.05)
    url: str = json.loads(ready.read_text(encoding="utf-8"))["url"]
    return url
