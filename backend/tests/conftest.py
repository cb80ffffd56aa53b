"""A real `plm-cli serve` on a real database, with plugins in their own environments; tests speak HTTP to it.

`platform` serves the plugins and agents of `tests/platform/`, `bom_platform` those of `dev/`. Both live as long as the
test run; a test that stops, kills or configures a server starts its own with `launch`.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import psycopg
import pytest
import yaml
from plm_backend.database import upgrade_all
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import TemplateDatabases, create_tenants

# A shell makes its background jobs, and all that they start, deaf to SIGINT; what the tests interrupt must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
TEST_PLATFORM = Path(__file__).parent / "platform"
SECRET = secrets.token_hex(32)
ALL_SCOPES = ("plm.runs.create", "plm.halt", "bom.read", "bom.write", "probe.write")
PATIENCE = 60.0
LONG_PATIENCE = 100.0  # longer than the minute for which a role lets a paused session keep its locks


def until(condition: Callable[[], Any], what: str) -> Any:
    """What a condition answers once it holds; a failure that says what did not come true."""
    deadline = time.monotonic() + LONG_PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"in {LONG_PATIENCE:g} s it did not come true: {what}"
        time.sleep(0.02)
    return answer


@dataclass(frozen=True)
class Tokens:
    """Signs tokens as an identity provider would."""

    provider: Hs256JwtIdentityProvider = field(default_factory=lambda: Hs256JwtIdentityProvider(active_secret=SECRET))

    def issue(
        self, tenant: uuid.UUID, *, user: uuid.UUID | None = None, scopes: tuple[str, ...] = ALL_SCOPES, **claims: Any
    ) -> str:
        now = int(time.time())
        return self.provider.issue_token(
            {
                "sub": str(user or uuid.uuid4()),
                "tenant_id": str(tenant),
                "actor_kind": "human",
                "scopes": list(scopes),
                "iat": now,
                "exp": now + 3600,
                **claims,
            }
        )


class Client(httpx.Client):
    """One identity at one server. Every answer is compared with the OpenAPI document."""

    def __init__(self, url: str, token: str = "", *, contract: Contract | None = None, **headers: str) -> None:
        if token:
            headers["Authorization"] = f"Bearer {token}"
        hooks: dict[str, list[Callable[..., Any]]] = {"response": [contract.check] if contract else []}
        super().__init__(base_url=url, headers=headers, timeout=PATIENCE, event_hooks=hooks)

    def run(self, agent: str, *, files: Mapping[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
        """Create a run; it must be accepted."""
        answer = self.post("/v1/runs", json={"agent": agent, "inputs": inputs, "files": files or {}})
        assert answer.status_code == 202, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def events(self, run_id: str, *, after: int | str | None = None) -> Iterator[httpx_sse.ServerSentEvent]:
        """The messages of a run's event stream, to its end; heartbeats are left out."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with httpx_sse.connect_sse(self, "GET", f"/v1/runs/{run_id}/events", headers=headers) as source:
            assert source.response.status_code == 200, source.response.read()
            yield from (message for message in source.iter_sse() if message.data)

    def wait(self, run_id: str, *kinds: str) -> dict[str, Any]:
        """The payload of the first event of one of these kinds, by default of a terminal one."""
        wanted = kinds or ("run_succeeded", "run_failed", "run_cancelled")
        for message in self.events(run_id):
            if message.event in wanted:
                payload: dict[str, Any] = json.loads(message.data)["payload"]
                return payload
        pytest.fail(f"run {run_id} ended without {wanted}")

    def finished(self, run_id: str) -> dict[str, Any]:
        """The run's document once it has ended."""
        self.wait(run_id)
        document: dict[str, Any] = self.get(f"/v1/runs/{run_id}").json()
        return document


@dataclass(frozen=True)
class Contract:
    """The server's own OpenAPI document, which every answer must keep to."""

    document: Mapping[str, Any]

    def check(self, response: httpx.Response) -> None:
        """Fail on an answer that the document does not announce, and on an error that is no problem document."""
        operation = self._operation(response.request)
        if operation is None:
            return
        statuses = set(operation["responses"])
        assert str(response.status_code) in statuses, f"{operation['operationId']}: {response.status_code} undocumented"
        if response.is_error and response.request.url.path != "/v1/health/ready":
            response.read()
            problem = response.json()
            assert response.headers["content-type"] == "application/problem+json", response.text
            assert problem.keys() >= {"type", "title", "status", "detail", "code"}, problem
            assert problem["status"] == response.status_code

    def _operation(self, request: httpx.Request) -> Mapping[str, Any] | None:
        for template, operations in self.document["paths"].items():
            pattern = re.sub(r"\{[^}]+\}", "[^/]+", template)
            if re.fullmatch(pattern, request.url.path) and request.method.lower() in operations:
                found: Mapping[str, Any] = operations[request.method.lower()]
                return found
        return None


@dataclass(kw_only=True)
class Server:
    """A running `plm-cli serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    environment: Mapping[str, str]
    tenant: uuid.UUID
    other_tenant: uuid.UUID
    tokens: Tokens
    stack: ExitStack
    contract: Contract | None = None

    def client(self, *, tenant: uuid.UUID | None = None, user: uuid.UUID | None = None, **options: Any) -> Client:
        """A client of a new identity, of the first tenant unless another is given."""
        token = self.tokens.issue(tenant or self.tenant, user=user, **options)
        return self.stack.enter_context(Client(self.url, token, contract=self.contract))

    def anonymous(self, token: str = "", **headers: str) -> Client:
        """A client with any token, or none."""
        return self.stack.enter_context(Client(self.url, token, contract=self.contract, **headers))

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `plm-cli` with this server's settings."""
        return run_cli(*arguments, environment=self.environment)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def database(self) -> psycopg.Connection[Any]:
        """A connection of the owner, bound to the first tenant."""
        connection = self.stack.enter_context(psycopg.connect(self.environment["PG_ADMIN_DSN"], autocommit=True))
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(self.tenant)])
        return connection


def run_cli(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "plm-cli", *arguments], env=dict(environment), capture_output=True, text=True, timeout=120, check=False
    )


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without settings of ours, and these instead."""
    ours = ("PLM_", "PG_", "ENVIRONMENT", "INPUT")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)}, **settings}


@pytest.fixture(scope="session")
def plugins_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugins, installed where `make demo` has them too; what is there already is kept."""
    folder = Path(os.environ.get("PLM_PLUGINS_DIR") or REPOSITORY / ".state" / "plugins")
    _install(REPOSITORY / "dev" / "plugins.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def test_plugins_dir(tmp_path_factory: pytest.TempPathFactory, install_test_plugins: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("Plugins für alle Fälle")
    install_test_plugins(TEST_PLATFORM / "plugins.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def install_test_plugins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], None]:
    """Installs the plugins of a list into a folder; they may write where the tests have their gates and journals."""

    def install(plugins: Path, folder: Path) -> None:
        document = yaml.safe_load(plugins.read_text(encoding="utf-8"))
        for plugin in document["plugins"]:
            plugin["package"] = str(plugins.parent / plugin["package"])
            plugin["isolation"] = {"write_paths": [str(tmp_path_factory.getbasetemp())]}
        granted = tmp_path_factory.mktemp("plugins") / "plugins.yaml"
        granted.write_text(yaml.safe_dump(document), encoding="utf-8")
        _install(granted, folder)

    return install


def _install(plugins: Path, folder: Path) -> None:
    command = [BIN / "cjm-ctl", "install-all", "--plugins", plugins, "--data-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def new_database(template_databases: TemplateDatabases) -> Callable[[], DatabaseUrls]:
    """Makes migrated databases, which live as long as the test run and end with its cluster."""
    template = template_databases.template("plm_platform", lambda urls: upgrade_all(urls.owner))
    return lambda: template_databases.clone(template)


@pytest.fixture(scope="session")
def settings_of(
    tmp_path_factory: pytest.TempPathFactory, test_plugins_dir: Path
) -> Callable[[DatabaseUrls], dict[str, str]]:
    """The environment of a server of the test platform on a database."""

    def settings(database: DatabaseUrls, **more: str) -> dict[str, str]:
        return clean_environment(
            ENVIRONMENT="test",
            PG_DSN=database.app,
            PG_ADMIN_DSN=database.owner,
            PLM_IDENTITY_HS256_SECRET_ACTIVE=SECRET,
            PLM_STATE_DIR=str(tmp_path_factory.mktemp("state")),
            PLM_PLUGINS_DIR=str(test_plugins_dir),
            PLM_POLICY=str(TEST_PLATFORM / "policy.yaml"),
            PLM_CAPABILITIES=str(TEST_PLATFORM / "capabilities.yaml"),
            PLM_AGENTS=str(TEST_PLATFORM / "agents"),
            PLM_PLUGIN_CONCURRENCY="8",
            PLM_LEASE_SECONDS="2",
            PLM_RECOVERY_SECONDS="0.3",
            **more,
        )

    return settings


@pytest.fixture(scope="session")
def launch(
    new_database: Callable[[], DatabaseUrls],
    settings_of: Callable[..., dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Any]:
    """Starts a server for the length of a block, on a new database unless one of another server is given.

    `program` is what runs in place of `plm-cli`.
    """

    @contextmanager
    def launched(
        *, like: Server | None = None, program: Sequence[str | Path] = (BIN / "plm-cli",), **settings: str
    ) -> Iterator[Server]:
        if like is None:
            database = new_database()
            tenant, other = create_tenants(database, "first", "second")
            environment = {**settings_of(database), **settings}
        else:
            tenant, other = like.tenant, like.other_tenant
            environment = {**like.environment, **settings}
        folder = tmp_path_factory.mktemp("serve")
        ready, log = folder / "ready.json", folder / "serve.log"
        with ExitStack() as stack:
            output = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                [*program, "serve", "--port", "0", "--ready-file", ready],
                env=environment,
                stdout=output,
                stderr=output,
            )
            stack.callback(_end, process)
            until(lambda: ready.exists() or process.poll() is not None, "the server starts")
            assert process.poll() is None, log.read_text()
            server = Server(
                process=process,
                url=json.loads(ready.read_text())["url"],
                log=log,
                environment=environment,
                tenant=tenant,
                other_tenant=other,
                tokens=Tokens(),
                stack=stack,
            )
            server.contract = Contract(server.client().get("/openapi.json").json())
            yield server

    return launched


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def platform(launch: Callable[..., Any]) -> Iterator[Server]:
    """A server with the plugins, agents and policy of `tests/platform/`."""
    with launch() as server:
        yield server


@pytest.fixture(scope="session")
def bom_platform(launch: Callable[..., Any], plugins_dir: Path) -> Iterator[Server]:
    """A server with the example plugins, agents and policy of `dev/`."""
    dev = REPOSITORY / "dev"
    with launch(
        PLM_PLUGINS_DIR=str(plugins_dir),
        PLM_POLICY=str(dev / "policy.yaml"),
        PLM_CAPABILITIES=str(dev / "capabilities.yaml"),
        PLM_AGENTS=str(dev / "agents"),
    ) as server:
        yield server


@pytest.fixture
def client(platform: Server) -> Client:
    """Somebody of the first tenant who may create runs and halt them."""
    return platform.client()


@pytest.fixture
def approver(platform: Server) -> Client:
    """Somebody of the first tenant who may decide approvals and nothing else."""
    return platform.client(scopes=("plm.hitl.resolve",))


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    """Signs tokens that the servers of the tests accept."""
    return Tokens()


class Machine:
    """Namespaces: a small disk or no network for a few processes, which no other process of this machine notices.

    Where none can be made a test fails: the hosted runners can.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def without_network(self, *command: str | Path) -> list[str | Path]:
        """The command, on a machine of its own without any network."""
        return ["unshare", *self._as_root(), "--net", *command]

    def small_disk(self, folder: Path) -> SmallDisk:
        """A file system of 1 MB at `folder`, for the length of the test."""
        command = ["unshare", *self._as_root(), "--mount", "sh", "-ec"]
        command += ['mount -t tmpfs -o size=1m,mode=711 small "$1"; echo mounted; exec sleep 600', "sh", folder]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._stack.callback(_end, holder)
        assert holder.stdout is not None
        with holder.stdout:
            assert holder.stdout.readline() == b"mounted\n", "a mount namespace can be made"
        return SmallDisk(holder.pid, folder)

    def as_ordinary_user(self, *command: str | Path) -> list[str | Path]:
        """The command as somebody who is not root.

        Where our interpreter lies in a closed home, that home looks open to this command alone; nothing is changed.
        """
        if os.geteuid() != 0:
            return [*command]
        needed = {path for start in (REPOSITORY, sys.prefix, sys.base_prefix) for path in Path(start).resolve().parents}
        closed = sorted(path for path in needed if not path.stat().st_mode & 0o001)
        script = """
            views=$(mktemp -d); mount -t tmpfs -o mode=755 views "$views"; user=$1 group=$2; shift 2
            while [ "$1" != -- ]; do
                work=$(mktemp -d -p "$views"); mkdir -m 755 "$work/open" "$work/scratch"
                mount -t overlay -o "lowerdir=$1,upperdir=$work/open,workdir=$work/scratch" view "$1"; shift
            done
            shift; exec setpriv --reuid "$user" --regid "$group" --clear-groups -- "$@"
        """
        user = self.ordinary_user
        return ["unshare", "--mount", "sh", "-ec", script, "sh", str(user[0]), str(user[1]), *closed, "--", *command]

    @property
    def ordinary_user(self) -> tuple[int, int]:
        """Uid and gid of `as_ordinary_user`."""
        nobody = pwd.getpwnam("nobody")
        return (nobody.pw_uid, nobody.pw_gid) if os.geteuid() == 0 else (os.geteuid(), os.getegid())

    @staticmethod
    def _as_root() -> list[str]:
        return [] if os.geteuid() == 0 else ["--user", "--map-root-user"]


@dataclass(frozen=True)
class SmallDisk:
    """A disk that only commands started with `here` see."""

    holder: int
    folder: Path

    def here(self, *command: str | Path) -> list[str | Path]:
        """The command where the disk is mounted, as the user who runs the tests."""
        if os.geteuid() == 0:
            return ["nsenter", "--target", str(self.holder), "--mount", "--", *command]
        back = ["unshare", "--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]
        return [*self._entered(), *back, *command]

    def grow(self) -> None:
        """Make room."""
        remount = ["mount", "-o", "remount,size=500m", self.folder]
        subprocess.run([*self._entered(), *remount], check=True)

    def _entered(self) -> list[str | Path]:
        as_root = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.holder), *as_root, "--mount", "--"]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """This machine, with less of something."""
    with ExitStack() as stack:
        yield Machine(stack)


@pytest.fixture
def open_folder(machine: Machine) -> Iterator[Path]:
    """A folder of the ordinary user, who cannot enter pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="plm ordinär "))
    os.chown(folder, *machine.ordinary_user)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[[Callable[[], Any], str], Any]:
    return until


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `plm-cli` in an environment."""
    return run_cli


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    return clean_environment


@dataclass(frozen=True)
class Gate:
    """Where `probe.hold` waits: the call says that it entered, and leaves when the test opens."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def entered(self) -> None:
        until(Path(f"{self.path}.entered").exists, "the plugin's call begins")

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    held = Gate(tmp_path / "gate")
    yield held
    held.open()
