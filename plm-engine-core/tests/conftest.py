"""Fixtures over a real database: a control plane for one tenant, and proposals to make to it."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane import (
    Begun,
    ControlPlane,
    Grant,
    Granted,
    Outcome,
    Pending,
    Principal,
    Proposal,
    RunRequest,
    Settlement,
)
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.halts import Halt
from plm_engine_core.control_plane.hitl import ApprovalTicket
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, CostBound
from plm_engine_core.control_plane.runs import Lease, Run
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.storage.ports import Storage
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.gateway import Pool
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    CapabilityMode,
    HaltScope,
    LockScope,
    OutcomeStatus,
    RunState,
    TicketDecision,
)
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from typer.testing import CliRunner

# A shell makes its background jobs, and all that they start, deaf to SIGINT; what the tests interrupt must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ALL_SCOPES = frozenset(
    {"plm.runs.create", "plm.hitl.resolve", "plm.halt", "plm.halt.system", "things.read", "things.write"}
)


class TableDelivery:
    """Writes each job into a table, so that a job of a transaction that was rolled back is not there."""

    TABLE = "CREATE TABLE deliveries (tenant_id uuid, run_id uuid); GRANT INSERT ON deliveries TO plm_engine_writer"

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID, *, after_seconds: float = 0.0) -> None:
        await connection.execute("INSERT INTO deliveries VALUES (%s, %s)", [tenant_id, run_id])


def policy(**changes: Any) -> PolicySnapshot:
    base: dict[str, Any] = {
        "version": "test",
        "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
        "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
        "rate_limit": {"per_second": 1000, "burst": 1000},
        "budgets": {"run": {"EUR": "5", "calls": "50"}, "tenant": {"EUR": "100", "calls": "1000"}},
    }
    return PolicySnapshot.model_validate({**base, **changes})


REGISTRY = CapabilityRegistry(
    [
        CapabilityDescriptor(
            id="thing.read",
            description="Look at a thing",
            mode=CapabilityMode.READ,
            plugin="things",
            idempotent=True,
            required_scopes=frozenset({"things.read"}),
            cost=CostBound(max_eur=Decimal("0.50"), eur_per_unit={"thing": Decimal("0.01")}),
        ),
        CapabilityDescriptor(
            id="thing.write",
            description="Change a thing",
            mode=CapabilityMode.EXECUTE_WRITE,
            certified=True,
            plugin="things",
            idempotent=True,
            required_scopes=frozenset({"things.write"}),
            security_relevant=("name",),
            cost=CostBound(max_eur=Decimal("0.10")),
        ),
        CapabilityDescriptor(
            id="thing.fire",
            description="Change a thing in a way that cannot be repeated",
            mode=CapabilityMode.READ,
            plugin="things",
            cost=CostBound(max_eur=Decimal("0.20")),
        ),
    ]
)


STORAGES = ("postgres", "memory")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module marked `every_storage` runs over each of them, but for its tests that are marked `postgres_only`."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "every_storage" in marks and "postgres_only" not in marks and "bench" in metafunc.fixturenames:
        metafunc.parametrize("storage_kind", STORAGES)


class PostgresBehind:
    """What tests do to a database behind the back of the ports, as its superuser, who sees every tenant."""

    def __init__(self, database: DatabaseUrls) -> None:
        self.database = database
        self.sql(TableDelivery.TABLE)

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database.admin, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def new_tenant(self) -> UUID:
        return create_tenants(self.database, "acme")[0]

    def set_rows(self, table: str, where: dict[str, Any], **values: Any) -> None:
        columns = ", ".join(f"{name} = %s" for name in values)
        put = [Jsonb(value) if isinstance(value, dict) else value for value in values.values()]
        self.sql(f"UPDATE {table} SET {columns} WHERE {self._where(where)}", *put, *where.values())  # noqa: S608  # names from these tests

    def forge(self, table: str, where: dict[str, Any], **values: Any) -> None:
        self.sql(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        self.set_rows(table, where, **values)

    def set_time(self, table: str, column: str, seconds: float, where: dict[str, Any]) -> None:
        change = f"{column} = clock_timestamp() + make_interval(secs => %s)"
        self.sql(f"UPDATE {table} SET {change} WHERE {self._where(where)}", seconds, *where.values())  # noqa: S608  # names from these tests

    def delete_rows(self, table: str, where: dict[str, Any]) -> None:
        self.sql(f"DELETE FROM {table} WHERE {self._where(where)}", *where.values())  # noqa: S608  # names from these tests

    def rows(self, table: str) -> list[dict[str, Any]]:
        with psycopg.connect(self.database.admin, autocommit=True, row_factory=dict_row) as connection:
            return connection.execute(f"SELECT * FROM {table}".encode()).fetchall()  # noqa: S608  # as above

    def deliveries(self, run: Run) -> int:
        ((count,),) = self.sql("SELECT count(*) FROM deliveries WHERE run_id = %s", run.id)
        return int(count)

    def refuse_deliveries(self) -> None:
        self.sql("ALTER TABLE deliveries ADD CHECK (false) NOT VALID")

    async def append(self, storage: Any, tenant: UUID, stream: str, payload: dict[str, Any]) -> None:
        gateway = storage.events._gateway
        async with gateway.transaction(tenant) as connection:
            await gateway.append(connection, tenant, stream, "test", "human:é", payload)

    def _where(self, where: dict[str, Any]) -> str:
        return " AND ".join(f"{name} = %s" for name in where) or "true"


class MemoryBehind:
    """The same for the storage in memory, whose tables have the same columns."""

    def __init__(self) -> None:
        self.jobs: list[UUID] = []
        self.refused = False
        self.storage = MemoryStorage(deliver=self._deliver)

    def _deliver(self, tenant_id: UUID, run_id: UUID) -> None:
        if self.refused:
            raise RuntimeError("deliveries are refused")
        self.jobs.append(run_id)

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        pytest.fail(f"give the bench a word for {query!r}, or mark this test postgres_only")

    def new_tenant(self) -> UUID:
        return self.storage.add_tenant(uuid.uuid4())

    def set_rows(self, table: str, where: dict[str, Any], **values: Any) -> None:
        for rows, key in self._places(table, where):
            rows[key] = {**rows[key], **values}

    def forge(self, table: str, where: dict[str, Any], **values: Any) -> None:
        self.set_rows(table, where, **values)

    def set_time(self, table: str, column: str, seconds: float, where: dict[str, Any]) -> None:
        self.set_rows(table, where, **{column: datetime.now(UTC) + timedelta(seconds=seconds)})

    def delete_rows(self, table: str, where: dict[str, Any]) -> None:
        for rows, key in self._places(table, where):
            del rows[key]

    def rows(self, table: str) -> list[dict[str, Any]]:
        return [dict(rows[key]) for rows, key in self._places(table, {})]

    def deliveries(self, run: Run) -> int:
        return self.jobs.count(run.id)

    def refuse_deliveries(self) -> None:
        self.refused = True

    async def append(self, storage: Any, tenant: UUID, stream: str, payload: dict[str, Any]) -> None:
        async with self.storage.books.turn() as books:
            books.append(tenant, stream, "test", "human:é", payload)

    def _places(self, table: str, where: dict[str, Any]) -> list[tuple[dict[Any, Any], Any]]:
        groups = getattr(self.storage.books, table)._groups.values()
        return [(rows, key) for rows in groups for key, row in rows.items() if where.items() <= _plain(row).items()]


def _plain(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, dict | list)}


@dataclass(kw_only=True)
class Bench:
    """One tenant on one storage, with shorthands for what tests do again and again."""

    behind: PostgresBehind | MemoryBehind
    tenant: UUID
    control_plane: ControlPlane
    requester: Principal
    approver: Principal

    @property
    def database(self) -> DatabaseUrls:
        """The database, of a test that is about PostgreSQL."""
        assert isinstance(self.behind, PostgresBehind), "mark this test postgres_only"
        return self.behind.database

    @property
    def storage(self) -> Storage:
        return self.control_plane.storage

    def with_policy(self, **changes: Any) -> Bench:
        """The same bench under another policy."""
        plane = ControlPlane(policy=policy(**changes), registry=REGISTRY, storage=self.storage)
        return replace(self, control_plane=plane)

    def locking(self, *capabilities: str, scope: LockScope = LockScope.TENANT) -> Bench:
        """The same bench, in which calls of these capabilities, or of all, lock their resource."""
        registry = CapabilityRegistry(
            each.model_copy(update={"lock": scope}) if not capabilities or each.id in capabilities else each
            for each in self.control_plane.registry
        )
        plane = ControlPlane(policy=self.control_plane.policy, registry=registry, storage=self.storage)
        return replace(self, control_plane=plane)

    def in_tenant(self, tenant: UUID) -> Bench:
        """The same bench in another tenant of the database."""
        return replace(self, tenant=tenant)

    def request(self, **changes: Any) -> RunRequest:
        request = {
            "tenant_id": self.tenant,
            "run_id": new_id(),
            "agent": {"name": "test", "plan": {}},
            "input": {},
            "trace_id": secrets.token_hex(16),
        }
        return RunRequest(**{**request, **changes})

    async def run(self, *, principal: Principal | None = None, **changes: Any) -> Run:
        run, _ = await self.control_plane.create_run(self.request(**changes), principal=principal or self.requester)
        return run

    async def state(self, run: Run) -> RunState:
        return (await self.storage.runs.get(run.tenant_id, run.id)).state

    async def lease(self, run: Run | None = None, *, seconds: float = 60.0, owner: str = "worker") -> Lease:
        run = run or await self.run()
        lease = await self.control_plane.storage.runs.take(self.tenant, run.id, owner=owner, seconds=seconds)
        assert lease is not None
        return lease

    def proposal(self, lease: Lease, **changes: Any) -> Proposal:
        values = {
            "tenant_id": self.tenant,
            "run_id": lease.run.id,
            "fencing_token": lease.fencing_token,
            "step_index": 0,
            "attempt": 1,
            "step_id": "first",
            "capability": "thing.read",
            "resource": "thing/1",
            "arguments": {"name": "one"},
            "principal": lease.run.principal,
        }
        return Proposal(**{**values, **changes})

    async def grant(self, lease: Lease, **changes: Any) -> Grant:
        admission = await self.control_plane.admit(self.proposal(lease, **changes))
        assert isinstance(admission, Granted), admission
        return admission.grant

    async def begin(self, grant: Grant, lease: Lease) -> Begun:
        return await self.control_plane.begin(grant, fencing_token=lease.fencing_token, actor="test")

    async def begun(self, lease: Lease, **changes: Any) -> Grant:
        grant = await self.grant(lease, **changes)
        begun = await self.begin(grant, lease)
        assert begun.accepted, begun
        return grant

    async def settle(
        self, grant: Grant, lease: Lease, status: OutcomeStatus = OutcomeStatus.SUCCEEDED, **outcome: Any
    ) -> Settlement:
        keywords = {name: outcome.pop(name) for name in ("connection",) if name in outcome}
        capability = self.control_plane.capability(outcome.pop("capability_id", "thing.read"))
        return await self.control_plane.settle(
            grant,
            Outcome(status=status, **outcome),
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="test",
            capability=capability,
            **keywords,
        )

    async def ask(self, lease: Lease | None = None, **changes: Any) -> tuple[Lease, Pending]:
        """Park a run on a ticket for `thing.write`."""
        lease = lease or await self.lease()
        admission = await self.control_plane.admit(self.proposal(lease, **{"capability": "thing.write", **changes}))
        assert isinstance(admission, Pending), admission
        return lease, admission

    async def decide(self, pending: Pending, decision: TicketDecision, **changes: Any) -> ApprovalTicket:
        keywords = {"approver": self.approver, **changes}
        return await self.control_plane.decide(self.tenant, pending.ticket_id, decision, **keywords)

    async def halt(
        self, scope: HaltScope, scope_id: UUID | None = None, reason: str = "stop", subject: str | None = None
    ) -> Halt:
        return await self.control_plane.halt(
            self.tenant, scope, scope_id, subject=subject, reason=reason, by=self.approver
        )

    async def halt_over(self, scope: HaltScope, run: Run, *, capability: str = "thing.read") -> Halt:
        """A halt of that scope in which the run is, and its call of `capability`."""
        group = uuid.uuid5(run.id, "group")
        self.behind.set_rows("run_states", {"run_id": run.id}, run_group_id=group)
        ids = {HaltScope.RUN: run.id, HaltScope.RUN_GROUP: group}
        names = {HaltScope.AGENT: str(run.agent["name"]), HaltScope.CAPABILITY: capability}
        return await self.halt(scope, ids.get(scope), subject=names.get(scope))

    async def kinds(self, run: Run) -> list[str]:
        """The kinds of the events in a run's stream."""
        return [event.kind for event in await self.storage.events.read(run.tenant_id, run_stream(run.id))]

    def let_lease_expire(self, run: Run) -> None:
        """Move the end of a lease into the past, as if its holder had been away for that long."""
        self.behind.set_time("run_states", "lease_expires_at", -1, {"run_id": run.id})

    def let_deadline_pass(self, pending: Pending) -> None:
        """Move the deadline of a ticket into the past."""
        self.behind.set_time("approval_tickets", "deadline", -1, {"id": pending.ticket_id})

    def touched(self, run_id: UUID | None, seconds_ago: float) -> None:
        """Let a run, or every one, have changed last that long ago."""
        self.behind.set_time("run_states", "updated_at", -seconds_ago, {"run_id": run_id} if run_id else {})

    def other(self) -> Bench:
        """The same bench in another, new tenant."""
        return self.in_tenant(self.behind.new_tenant())

    async def append(self, stream: str, *numbers: int) -> None:
        """Append events of no meaning to a stream."""
        for number in numbers:
            await self.behind.append(self.storage, self.tenant, stream, {"n": number})

    def deliveries(self, run: Run) -> int:
        """How many jobs were enqueued for a run."""
        return self.behind.deliveries(run)

    async def budget(self, run: Run, scope: str, unit: BudgetUnit) -> tuple[Decimal, Decimal]:
        for each in await self.control_plane.storage.runs.budgets(self.tenant, run.id):
            if each.scope.value == scope and each.unit == unit:
                return each.spent, each.reserved
        raise LookupError(scope)

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement as the database's superuser, who sees every tenant."""
        return self.behind.sql(query, *parameters)


def make_bench(behind: PostgresBehind | MemoryBehind, storage: Storage) -> Bench:
    return Bench(
        behind=behind,
        tenant=behind.new_tenant(),
        control_plane=ControlPlane(policy=policy(), registry=REGISTRY, storage=storage),
        requester=Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=ALL_SCOPES),
        approver=Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=ALL_SCOPES),
    )


@pytest.fixture
def twin_benches(engine_database: DatabaseUrls) -> Callable[[Pool], list[Bench]]:
    """Makes a bench on each storage, for the same people and a new tenant each time."""
    memory, postgres = MemoryBehind(), PostgresBehind(engine_database)

    def make(pool: Pool) -> list[Bench]:
        one = make_bench(memory, memory.storage)
        other = make_bench(postgres, PostgresStorage(pool, TableDelivery()))
        return [one, replace(other, requester=one.requester, approver=one.approver)]

    return make


@pytest.fixture
def storage_kind() -> str:
    """Which storage stands behind the bench; see `pytest_generate_tests`."""
    return "postgres"


@pytest.fixture
async def bench(storage_kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """A control plane over a fresh storage."""
    if storage_kind == "memory":
        behind = MemoryBehind()
        yield make_bench(behind, behind.storage)
        return
    database: DatabaseUrls = request.getfixturevalue("engine_database")
    async with open_pool(database.app, max_size=20) as pool:
        yield make_bench(PostgresBehind(database), PostgresStorage(pool, TableDelivery()))


@pytest.fixture
async def second_pool(engine_database: DatabaseUrls) -> AsyncIterator[Pool]:
    """Another process's connections to the same database; a caller waits one second for one."""
    async with open_pool(engine_database.app, max_size=4, timeout=1.0) as pool:
        yield pool


@pytest.fixture
def people() -> tuple[Principal, Principal]:
    """Somebody who asks, and somebody else who decides."""
    asking, deciding = uuid.uuid4(), uuid.uuid4()
    return (
        Principal(user_id=asking, actor_kind="human", scopes=ALL_SCOPES),
        Principal(user_id=deciding, actor_kind="human", scopes=ALL_SCOPES),
    )


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., PolicySnapshot]:
    """A policy, with changes."""
    return policy


@pytest.fixture(scope="session")
def registry() -> CapabilityRegistry:
    """The capabilities of the bench."""
    return REGISTRY


@pytest.fixture(scope="session")
def package_root() -> Path:
    """The folder of this distribution."""
    return Path(__file__).resolve().parents[1]


SECRET = secrets.token_hex(32)


class Terminal:
    """`plm-cli` with the settings of one installation; each command has a thread, for its own event loop."""

    def __init__(self, bench: Any, policy: Any, folder: Any) -> None:
        self.bench = bench
        self.policy = folder / "policy.json"
        self.policy.write_text(policy.model_dump_json(), encoding="utf-8")
        self.environment = {
            "PG_DSN": bench.database.app,
            "PLM_IDENTITY_HS256_SECRET_ACTIVE": SECRET,
            "PLM_POLICY": str(self.policy),
        }

    def token(self, user: Any = None, scopes: tuple[str, ...] = ("plm.hitl.resolve", "plm.halt"), **claims: Any) -> str:
        now = int(time.time())
        standard = {"actor_kind": "human", "scopes": list(scopes), "iat": now, "exp": now + 600}
        names = {"sub": str(user or uuid.uuid4()), "tenant_id": str(self.bench.tenant)}
        return Hs256JwtIdentityProvider(active_secret=SECRET).issue_token({**standard, **names, **claims})

    async def run(self, *arguments: Any, status: int = 0, token: str | None = None, **environment: str) -> Any:
        settings = {**self.environment, "PLM_TOKEN": self.token() if token is None else token, **environment}
        said = await asyncio.to_thread(CliRunner().invoke, build_app(), [*map(str, arguments)], env=settings)
        assert said.exit_code == status, said.stdout + said.stderr
        return said

    async def json(self, *arguments: Any, **options: Any) -> Any:
        return json.loads((await self.run(*arguments, "--json", **options)).stdout)


# The installed application's delivery engine, which commands find by its entry point; it is not what is tested here.
DELIVERY = """
CREATE SCHEMA delivery;
CREATE FUNCTION delivery.enqueue_drive_v1(uuid, uuid) RETURNS void LANGUAGE sql AS 'SELECT';
GRANT USAGE ON SCHEMA delivery TO plm_engine_writer;
"""


@pytest.fixture
def terminal(bench, make_policy, tmp_path):
    bench.sql(DELIVERY)
    approval = {"standing": {"max_uses": 5, "max_seconds": 60, "max_risk": "high"}, "input": {}}
    return Terminal(bench, make_policy(approval=approval), tmp_path)
