"""Several processes of the platform over one database of their own, and the test's hand on each of them."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from plm_backend.database import upgrade_all
from plm_engine_core.testing.crash_points import CrashPoints
from plm_shared.addresses import DatabaseUrls
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.testing.databases import TemplateDatabases, create_tenants

HERE = Path(__file__).parent
PLATFORM = HERE / "platform"
LEASE_SECONDS = 2.0
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(kw_only=True, eq=False)
class Node:
    """One process: `serve` (the API, with a run worker unless the cluster says otherwise) or `worker`."""

    role: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass(kw_only=True, eq=False)
class Journal:
    """A folder in which plugins leave their effects, and which holds calls up at their gates."""

    folder: Path

    def close(self, label: str) -> None:
        (self.folder / f"{label}.closed").touch()

    def open(self, label: str) -> None:
        (self.folder / f"{label}.closed").unlink(missing_ok=True)

    def entered(self, label: str) -> bool:
        return (self.folder / f"{label}.entered").exists()

    def effects(self) -> Counter[str]:
        return Counter(path.name.partition(".")[0] for path in self.folder.glob("*.effect.*"))


@dataclass(kw_only=True)
class Cluster:
    """API processes and run workers that share a database; tests strike them down, and `repair` starts new ones."""

    postgres: EmbeddedPostgres
    environment: Mapping[str, str]
    tenant: Any
    points: CrashPoints
    folder: Path
    until: Callable[[Callable[[], Any], str], Any]
    requester: str
    approver: str
    nodes: list[Node] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    books: psycopg.Connection[Any] | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    # -- processes

    def start(self, *roles: str) -> list[Node]:
        """Start processes side by side and wait until each is ready."""
        started = [self._launch(role) for role in roles]
        for node in started:
            self._wait_ready(node)
        self.nodes += started
        return started

    def repair(self) -> None:
        """Start anew whatever was killed."""
        dead = [node for node in self.nodes if not node.alive]
        self.nodes = [node for node in self.nodes if node not in dead]  # asked once: one may die in between
        self.start(*(node.role for node in dead))

    def kill(self, pid: int) -> None:
        """Kill one of the processes, and start another like it; one that is dead already is only replaced."""
        for node in self.nodes:
            if node.process.pid == pid:
                node.process.kill()
                node.process.wait()
        self.repair()

    def stop(self) -> None:
        """End every process."""
        for node in self.nodes:
            if node.alive:
                node.process.send_signal(signal.SIGCONT)
                node.process.terminate()
        for node in self.nodes:
            try:
                node.process.wait(20)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
        self.nodes = []
        if self.books is not None:
            self.books.close()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `plm-cli`, with crash points like every other process."""
        command = [sys.executable, HERE / "process.py", *arguments]
        return subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, timeout=120, check=False
        )

    def _launch(self, role: str) -> Node:
        number = next(self._numbers)
        log, ready = self.folder / f"{role}-{number}.log", self.folder / f"{role}-{number}.json"
        arguments = ["serve", "--port", "0", "--ready-file", str(ready)] if role != "worker" else ["worker"]
        concurrency = {"PLM_RUN_CONCURRENCY": "0"} if role == "api" else {}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, HERE / "process.py", *arguments],
                env={**self.environment, **concurrency},
                stdout=output,
                stderr=output,
            )
        return Node(role=role, process=process, log=log, url=str(ready))

    def _wait_ready(self, node: Node) -> None:
        def ready() -> bool:
            if node.role == "worker":
                return "working" in node.log.read_text() or not node.alive
            return Path(node.url).exists() or not node.alive

        self.until(ready, f"a {node.role} starts")
        assert node.alive, node.log.read_text()
        if node.role != "worker":
            node.url = json.loads(Path(node.url).read_text())["url"]

    # -- asking, as a client that does not give up

    def ask(self, method: str, path: str, *, token: str = "", **options: Any) -> httpx.Response:
        """Ask until some API process answers; a connection that breaks and a 503 are asked again."""
        headers = {"Authorization": f"Bearer {token or self.requester}", **options.pop("headers", {})}
        answers: list[httpx.Response] = []

        def answered() -> bool:
            for node in self.nodes:
                if node.role == "worker" or not node.alive or node.process.pid in self.stopped:
                    continue
                try:
                    answer = httpx.request(method, node.url + path, headers=headers, timeout=5, **options)
                except httpx.TransportError:
                    continue
                assert answer.status_code != 500, f"{answer.text}\n{node.log.read_text()[-3000:]}"
                if answer.status_code != 503:
                    answers.append(answer)
                    return True
            return False

        self.until(answered, f"an answer to {method} {path}")
        return answers[0]

    def create(self, agent: str, *, key: str, budget: Mapping[str, str] | None = None, **inputs: Any) -> str:
        """The id of a run, however often its request has to be repeated."""
        request = {"agent": agent, "inputs": inputs, "budget": budget or {}}
        answer = self.ask("POST", "/v1/runs", json=request, headers={"Idempotency-Key": key})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["run_id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """The run's document."""
        answer = self.ask("GET", f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def decide(self, run_id: str, word: str = "approve") -> None:
        """Approve or deny what the run waits for; to find it already decided is as good."""
        for ticket in self.ask("GET", "/v1/approvals?state=pending&limit=200").json()["items"]:
            if ticket["run_id"] == run_id:
                path = f"/v1/approvals/{ticket['ticket_id']}/decision"
                answer = self.ask("POST", path, token=self.approver, json={"decision": word})
                assert answer.status_code in (200, 409), answer.text

    def reconcile(self, run_id: str, journal: Journal, label: str = "act") -> None:
        """Say whether the effect of this label is in the journal."""
        word = "--happened" if journal.effects()[label] else "--did-not"
        arguments = ["run", "reconcile", run_id, "--tenant-id", str(self.tenant), word]
        if word == "--happened":
            output = journal.folder / "output.json"
            output.write_text(json.dumps({"label": label}), encoding="utf-8")
            arguments += ["--output", str(output)]
        done = self.cli(*arguments)
        assert done.returncode == 0 or "outcome_unknown" in done.stderr, done.stderr

    def finish(self, run_id: str, journal: Journal) -> tuple[dict[str, Any], list[str]]:
        """See the run to its end as its people would; answers its document and the states somebody had to act on."""
        acted: list[str] = []

        def ended() -> dict[str, Any] | None:
            document = self.run(run_id)
            if document["state"] == "awaiting_approval":
                acted.append("awaiting_approval")
                self.decide(run_id)
            elif document["state"] == "outcome_unknown":
                acted.append("outcome_unknown")
                self.reconcile(run_id, journal)
            return document if document["state"] in ENDED else None

        document: dict[str, Any] = self.until(ended, f"run {run_id} ends")
        return document, acted

    # -- the books, as the owner sees them

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a query, on a connection that is opened anew when the database went away."""
        for _ in range(2):
            try:
                if self.books is None or self.books.closed:
                    self.books = psycopg.connect(self.environment["PG_ADMIN_DSN"], autocommit=True)
                    self.books.execute("SELECT set_config('app.tenant_id', %s, false)", [str(self.tenant)])
                return self.books.execute(statement, parameters).fetchall()
            except psycopg.OperationalError:
                if self.books is not None:
                    self.books.close()
        return []

    def holder(self, run_id: str) -> int:
        """The process that took the run last."""
        taken = "SELECT actor FROM events WHERE stream = %s AND kind = 'run_taken' ORDER BY seq DESC LIMIT 1"
        rows = self.query(taken, f"run/{run_id}")
        return int(rows[0][0].rpartition("/")[2]) if rows else 0

    def report(self) -> str:
        """What stands in the way of a run that nobody takes, as far as the database and the logs know."""
        questions = {
            "runs": "SELECT run_id, state, lease_owner, lease_expires_at, updated_at, now() FROM run_states "
            "WHERE finished_at IS NULL",
            "jobs": "SELECT id, status, worker_id, args FROM delivery.procrastinate_jobs",
            "sessions": "SELECT pid, state, wait_event, now() - state_change, pg_blocking_pids(pid), left(query, 100) "
            "FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'",
        }
        found = [f"{name}: {self.query(question)}" for name, question in questions.items()]
        return "\n".join([*found, *(f"{node.log}: {node.log.read_text()[-1500:]}" for node in self.nodes)])

    def story(self, run_id: str) -> str:
        """What is on record of a run, an event a line; for a test that did not expect its end."""
        events = "SELECT occurred_at, kind, actor, left(payload::text, 400) FROM events WHERE stream = %s ORDER BY seq"
        return "\n".join(" ".join(map(str, event)) for event in self.query(events, f"run/{run_id}"))

    def consistent(self) -> None:
        """Every event chain of the tenant holds, and nothing is reserved for a call that has ended."""
        done = self.cli("events", "verify", "--tenant-id", str(self.tenant), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(stream["consistent"] for stream in json.loads(done.stdout)["streams"])
        uncharged = "SELECT count(*) FROM grants WHERE state = 'settled' AND (reserved IS NULL OR charged IS NULL)"
        assert self.query(uncharged) == [(0,)]


@pytest.fixture(scope="session")
def crash_plugins_dir(tmp_path_factory: pytest.TempPathFactory, install_test_plugins: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("crash-plugins")
    install_test_plugins(PLATFORM / "plugins.yaml", folder)
    return folder


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[Callable[[], tuple[EmbeddedPostgres, DatabaseUrls]]]:
    """A server that tests may kill, so it is as durable as one in use; each call makes a migrated database on it."""
    with tempfile.TemporaryDirectory(prefix="plm-test-pg-") as folder:
        Path(folder).chmod(0o711)  # the server's account must pass through it when root runs the tests
        server = EmbeddedPostgres(Path(folder))
        server.start()
        templates = TemplateDatabases(server)

        def new() -> tuple[EmbeddedPostgres, DatabaseUrls]:
            return server, templates.clone(templates.template("plm_crash", lambda urls: upgrade_all(urls.owner)))

        try:
            yield new
        finally:
            server.start()  # a test that failed may have left it dead
            server.remove()


@pytest.fixture(scope="session")
def open_cluster(
    own_postgres: Callable[[], tuple[EmbeddedPostgres, DatabaseUrls]],
    crash_plugins_dir: Path,
    settings_of: Callable[..., dict[str, str]],
    tokens: Any,
    until: Callable[[Callable[[], Any], str], Any],
) -> Callable[..., Any]:
    """Opens a cluster of processes with these roles (`serve`, `api`, `worker`) for the length of a block."""

    @contextmanager
    def opened(*roles: str, **settings: str) -> Iterator[Cluster]:
        server, database = own_postgres()
        (tenant,) = create_tenants(database, "struck")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plm-crash-")))  # a short path
            points = stack.enter_context(CrashPoints(folder / "points").listening())
            cluster = Cluster(
                postgres=server,
                environment={
                    **settings_of(database),
                    "ENVIRONMENT": "development",  # elsewhere an embedded server that keeps its data is refused
                    "PLM_PLUGINS_DIR": str(crash_plugins_dir),
                    "PLM_POLICY": str(PLATFORM / "policy.yaml"),
                    "PLM_CAPABILITIES": str(PLATFORM / "capabilities.yaml"),
                    "PLM_AGENTS": str(PLATFORM / "agents"),
                    "PLM_LEASE_SECONDS": str(LEASE_SECONDS),
                    "PLM_RECOVERY_SECONDS": "0.2",
                    "PLM_PATIENCE_SECONDS": "1",
                    "PLM_RUN_CONCURRENCY": "4",  # so that all of them find room on the one server
                    "CRASH_POINTS": str(points.socket_path),
                    **settings,
                },
                tenant=tenant,
                points=points,
                folder=folder,
                until=until,
                requester=tokens.issue(tenant, scopes=("plm.runs.create", "plm.halt")),
                approver=tokens.issue(tenant, scopes=("plm.hitl.resolve",)),
            )
            stack.callback(cluster.stop)
            stack.callback(points.release_all)
            cluster.start(*roles)
            yield cluster

    return opened


@pytest.fixture
def journal(tmp_path: Path) -> Callable[[str], Journal]:
    """Makes journals; their gates are opened at the end of the test."""

    def made(name: str) -> Journal:
        folder = tmp_path / name
        folder.mkdir()
        return Journal(folder=folder)

    return made
