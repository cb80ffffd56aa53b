"""The tables of refusals in docs/api.md: every row is the parameter of a test, every test leaves a server unharmed.

A module names its table in `TABLE` and holds a class `Cases` with one method a row, named after the row's case.
"""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
import yaml
from plm_backend.database import upgrade_all
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plm_shared.testing.databases import create_tenants

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
ENDED = {"succeeded", "failed", "cancelled"}
UNSETTLED = (
    "SELECT count(*) FROM grants WHERE run_id = %s AND (state <> 'settled' OR reserved IS NULL OR charged IS NULL)"
)


@dataclass(frozen=True)
class Row:
    """One row: the case, and what the page says of it."""

    case: str
    cells: dict[str, str]

    @property
    def method(self) -> str:
        """The name of the scenario that asks for it."""
        return re.sub(r"\W+", "_", self.case.lower()).strip("_")

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


def rows_of(table: str) -> list[Row]:
    """The rows under a heading of the page."""
    section = re.search(rf"^### {re.escape(table)}\n(.+?)(?=^###? |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/api.md has no table {table!r}"
    lines = [line.strip("| ").split(" | ") for line in section[1].splitlines() if line.startswith("| ")]
    columns, _, *rows = lines
    return [Row(cells[0], dict(zip(columns, (cell.strip("`") for cell in cells), strict=True))) for cells in rows]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = rows_of(metafunc.module.TABLE)
        metafunc.parametrize("row", rows, ids=[row.method for row in rows])


@pytest.fixture
def unasked(request: pytest.FixtureRequest) -> set[str]:
    """Rows without a scenario and scenarios without a row."""
    scenarios = {name for name in vars(request.module.Cases) if not name.startswith("_")}
    return scenarios ^ {row.method for row in rows_of(request.module.TABLE)}


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    """What a scenario has to undo, after it was looked at."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def unharmed(platform: Any) -> Iterator[None]:
    """Whatever was refused: the server answers the next request, and its log has no error of ours."""
    before = platform.log.stat().st_size
    yield
    assert platform.client().get("/v1/runs?limit=1").status_code == 200
    _without_errors(platform.log.read_text(encoding="utf-8")[before:])


def _without_errors(log: str) -> None:
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line for line in lines if line["level"] in ("error", "critical") or "exception" in line] == []
    assert "Traceback" not in log


@pytest.fixture
def own_server(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Starts a server for one scenario; when it is done, its log and its books are looked at."""

    @contextmanager
    def launched(**options: Any) -> Iterator[Any]:
        with launch(**options) as server:
            yield server
            assert server.client().get("/v1/runs?limit=1").status_code == 200
            consistent(server)
        _without_errors(server.log.read_text(encoding="utf-8"))

    return launched


@pytest.fixture
def altered_policy(platform: Any, tmp_path: Path) -> Callable[..., str]:
    """A copy of the policy with other entries; answers its path."""

    def altered(**entries: Any) -> str:
        policy = yaml.safe_load(Path(platform.environment["PLM_POLICY"]).read_text(encoding="utf-8"))
        path = tmp_path / "policy.yaml"
        path.write_text(yaml.safe_dump({**policy, **entries}), encoding="utf-8")
        return str(path)

    return altered


@pytest.fixture
def mortal_database(settings_of: Callable[..., dict[str, str]]) -> Iterator[tuple[EmbeddedPostgres, SimpleNamespace]]:
    """A database on a server of its own, which the test may stop, with what `launch(like=...)` needs."""
    with tempfile.TemporaryDirectory(prefix="plm-test-pg-") as folder:
        Path(folder).chmod(0o711)  # the server's account must pass through it when root runs the tests
        server = EmbeddedPostgres(Path(folder), durable=False)
        server.start()
        try:
            passwords = {"owner_password": secrets.token_hex(12), "app_password": secrets.token_hex(12)}
            database = provision(server.admin_dsn, "plm", **passwords)
            upgrade_all(database.owner)
            tenant, other = create_tenants(database, "first", "second")
            yield server, SimpleNamespace(tenant=tenant, other_tenant=other, environment=settings_of(database))
        finally:
            server.remove()


def consistent(server: Any) -> None:
    """Every event chain of both tenants holds."""
    for tenant in (server.tenant, server.other_tenant):
        done = server.cli("events", "verify", "--tenant-id", str(tenant))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(name="consistent")
def consistent_fixture() -> Callable[[Any], None]:
    return consistent


@pytest.fixture
def refused() -> Callable[..., None]:
    """Holds an answer against its row; `says` are words of its `detail`: the field, the value, what to do."""

    def check(row: Row, answer: httpx.Response, *says: str) -> None:
        assert answer.status_code == int(row["status"]), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["code"] == row["code"]
        assert problem["type"] == "urn:plm:problem:" + row["code"].replace("/", ":").lower()
        assert (problem["status"], bool(problem["title"])) == (answer.status_code, True)
        for words in says:
            assert words in problem["detail"]
        what, remedy = problem["detail"].rsplit("; ", 1)
        assert what
        assert remedy
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.request.headers.get("authorization", "Bearer -").split(" ")[1] not in problem["detail"]
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0

    return check


@pytest.fixture
def left(until: Callable[[Callable[[], Any], str], Any]) -> Callable[..., None]:
    """Holds a run against its row: parked or ended as the page says, with its reason, nothing reserved or open."""

    def check(row: Row, server: Any, client: Any, run_id: str, *says: str) -> None:
        def settled() -> dict[str, Any] | None:
            document: dict[str, Any] = client.get(f"/v1/runs/{run_id}").json()
            return document if document["state"] in {row["state"], *ENDED} else None

        run = until(settled, "the run ends or is parked")
        assert run["state"] == row["state"], run
        reason, _, of_step = row["reason"].partition("` ")
        told = [run] if not of_step else [step["error"] for step in run["steps"] if step["error"]]
        assert reason in [each["reason"] or "none" for each in told]
        message = told[0]["message"] or ""
        assert bool(message) is (reason != "none")
        for words in says:
            assert words in message
        assert {each["reserved"] for each in run["budgets"] if each["scope"] == "run"} == {"0"}
        assert server.database().execute(UNSETTLED, [run_id]).fetchone() == (0,)

    return check


@pytest.fixture
def signed(platform: Any) -> Callable[..., str]:
    """Signs any claims, also those that no issuer would."""

    def sign(*, key: str | None = None, algorithm: str = "HS256", **claims: Any) -> str:
        now = int(jwt.decode(platform.tokens.issue(platform.tenant), options={"verify_signature": False})["iat"])
        standard = {"sub": str(platform.tenant), "tenant_id": str(platform.tenant), "actor_kind": "human", "scopes": []}
        times = {name: now + offset for name, offset in claims.pop("times", {"iat": 0, "exp": 600}).items()}
        secret = None if algorithm == "none" else key or platform.environment["PLM_IDENTITY_HS256_SECRET_ACTIVE"]
        return jwt.encode({**standard, **times, **claims}, secret, algorithm)

    return sign
