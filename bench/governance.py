"""What deciding and booking cost: the pure decision, evaluators, a replay, and admission with settlement.

The database rows are real: PostgreSQL with fsync on, row-level security, the application's role. D, measured in the
same run, is a plain insert of one row, committed, under row-level security, by one client.
A pair is what a governed function books around its call, which is made at once: the admission, which uses its grant up,
and the settlement. Nothing is booked between them; a call that waits for a slot has its begin there, a third booking.
Rates are those of runs that have all been at work for a while, and still are: pairs are counted between two moments.
The server's log is that of a server that has run for a while, which has no new segments of it filled with zeros.
Idle processors are kept from being halted, as on a host that is set up for a database, where this may ask for it.
BENCH_PAIRS sets the pairs of a run alone, BENCH_SECONDS how long pairs are counted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ClassVar

import psycopg
from awake import processors_awake
from figures import Figure, command_line, percentile, report
from governance_events import recording
from plm_backend.database import upgrade_all
from plm_engine_core.control_plane import ControlPlane, Granted, Outcome, Principal, Proposal, RunRequest
from plm_engine_core.control_plane.admission.evaluators import Configured, EvaluatorResult, ParallelPolicyEvaluator
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import Decision, Facts, PolicySnapshot, decide
from plm_engine_core.control_plane.policy.replay import Attempt, Replay
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry
from plm_engine_core.control_plane.runs import Lease
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import (
    AutonomyLevel,
    BudgetUnit,
    CapabilityMode,
    EvaluationStatus,
    OutcomeStatus,
)
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from pydantic import BaseModel
from server_log import recycle_the_log

PAIRS = int(os.environ.get("BENCH_PAIRS", "500"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "1.5"))
AT_ONCE = 8
CLIENTS = 2  # processes that drive the runs at once: one cannot keep the server busy, more only take its cores away
WARM = 0.5  # seconds of the same load before pairs are counted: plans, caches and processors are as they stay
WINDOWS = 5  # of rates on a machine that others use too, the middle one is told
LONGEST = 600.0  # seconds
DECISIONS = 20_000
REPLAYED = 20_000
ASKED = 30
TURNS = 10  # of rows, and of pairs, long enough that what the first few of them cost is not what is told
INSERTS = 100  # a turn
SEGMENTS = 40  # of the server's log, 16 MB each: more than all windows write

BASE: dict[str, Any] = {
    "version": "bench",
    "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
    "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
    "rate_limit": {"per_second": 1e6, "burst": 1e6},
    "budgets": {"run": {"EUR": "1000", "calls": "100000"}, "tenant": {"EUR": "1000000", "calls": "100000000"}},
}
RULED = CapabilityDescriptor(id="bench.ruled", description="x", mode=CapabilityMode.READ, plugin="bench")
PLAIN = CapabilityDescriptor(id="bench.plain", description="x", mode=CapabilityMode.READ, plugin="bench")


@dataclass(frozen=True)
class Proposed:
    """One proposal."""

    capability: str
    resource: str = "thing/1"
    arguments: Mapping[str, Any] = field(default_factory=dict)


def leaf(name: str, operator: str, value: Any) -> dict[str, Any]:
    return {"type": "field", "path": f"arguments.{name}", "operator": operator, "value": value}


def ruled_policy() -> PolicySnapshot:
    """100 rules, 25 about one capability and none applying; auto-approval under a tree of 30 leaves, all tested."""
    then = [
        {"then": "deny"},
        {"then": "ask"},
        {"then": "steer", "guidance": "x"},
        {"then": "raise_risk", "risk": "high"},
    ]
    rules = [
        {
            "id": f"rule-{number}",
            "capabilities": ["bench.ruled" if number % 4 == 0 else f"other.c{number % 4}"],
            "when": leaf("kind", "eq", f"kind-{number}"),
            **then[number // 4 % 4],
        }
        for number in range(100)
    ]
    thirds = [
        {"type": "and", "conditions": [leaf(f"n{3 * group + each}", "le", 100) for each in range(3)]}
        for group in range(10)
    ]
    return PolicySnapshot.model_validate(
        {**BASE, "rules": rules, "auto_approve_when": {"type": "and", "conditions": thirds}}
    )


RULED_PROPOSAL = Proposed("bench.ruled", arguments={"kind": "other", **{f"n{number}": number for number in range(30)}})


def facts(capability: CapabilityDescriptor) -> Facts:
    return Facts(
        capability=capability,
        principal_scopes=frozenset({"bench"}),
        requester=uuid.UUID(int=1),
        autonomy=AutonomyLevel.L3,
        rate_allowed=True,
        actor_kind="human",
        agent="bench",
        at=datetime(2024, 1, 1, tzinfo=UTC),
    )


def microseconds(work: Callable[[], object], times: int) -> list[float]:
    samples = []
    for _ in range(times):
        started = time.perf_counter_ns()
        work()
        samples.append((time.perf_counter_ns() - started) / 1e3)
    return samples[times // 10 :]


def decisions() -> dict[str, Figure]:
    policy, known = ruled_policy(), facts(RULED)
    decision = decide(RULED_PROPOSAL, policy, known)
    assert isinstance(decision, Decision)
    assert len(decision.leaves) == 30
    ruled = microseconds(lambda: decide(RULED_PROPOSAL, policy, known), DECISIONS)
    unruled, plain = (
        PolicySnapshot.model_validate({**BASE, "rules": policy.model_dump(mode="json")["rules"]}),
        facts(PLAIN),
    )
    nothing = microseconds(lambda: decide(Proposed("bench.plain"), unruled, plain), DECISIONS)
    return {
        "decide, 100 rules and 30 leaves, p50": Figure(
            value=percentile(ruled, 0.5), unit="us", better="lower", target=30
        ),
        "decide, 100 rules and 30 leaves, p99": Figure(
            value=percentile(ruled, 0.99), unit="us", better="lower", target=100
        ),
        "decide, no rule applies, p50": Figure(value=percentile(nothing, 0.5), unit="us", better="lower", target=3),
    }


def replay() -> dict[str, Figure]:
    """Decide recorded proposals again, from the JSON that the database keeps to the report."""
    policy, known = ruled_policy(), facts(RULED)
    decision = decide(RULED_PROPOSAL, policy, known)
    assert isinstance(decision, Decision)
    attempt = Attempt(
        run_id=str(uuid.UUID(int=1)),
        step_index=0,
        attempt=1,
        capability=RULED_PROPOSAL.capability,
        resource=RULED_PROPOSAL.resource,
        arguments=RULED_PROPOSAL.arguments,
        decision={**decision.to_json(), "facts": known.to_json()},
    )
    stored = json.dumps(attempt.decision)
    draft = PolicySnapshot.model_validate({**policy.model_dump(mode="json"), "version": "draft"})
    report_of_it = Replay(policy=draft)
    started = time.perf_counter()
    report_of_it.feed(replace(attempt, decision=json.loads(stored)) for _ in range(REPLAYED))
    rate = REPLAYED / (time.perf_counter() - started)
    assert report_of_it.changed == 0
    return {"policy replay, 100 rules and 30 leaves": Figure(value=rate, unit="/s", better="higher", target=10_000)}


class NoConfig(BaseModel):
    """Nothing to configure."""


class Waiting:
    """An evaluator that asks somebody outside, and gets its answer after some time."""

    kind: ClassVar[str] = "waiting"
    config_schema: ClassVar[type[BaseModel]] = NoConfig

    def __init__(self, seconds: float, *, allow: bool) -> None:
        self.seconds = seconds
        self.allow = allow

    async def evaluate(self, proposal: Any, facts: Facts) -> EvaluatorResult:  # noqa: ARG002  # an evaluator's interface
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return EvaluatorResult(allow=self.allow)


async def evaluators() -> dict[str, Figure]:
    async def asked(waits: list[Waiting]) -> tuple[float, list[EvaluationStatus]]:
        names = [f"e{number}" for number in range(len(waits))]
        parallel = ParallelPolicyEvaluator(
            [
                Configured(name=name, evaluator=each, gate=True, timeout_seconds=5)
                for name, each in zip(names, waits, strict=True)
            ]
        )
        samples = []
        for _ in range(ASKED):
            started = time.perf_counter()
            answers = await parallel.evaluate_all(names, RULED_PROPOSAL, facts(RULED))
            samples.append((time.perf_counter() - started) * 1e3)
        return percentile(samples, 0.5), [each.status for each in answers]

    twenty, statuses = await asked([Waiting(0.010, allow=True) for _ in range(20)])
    assert set(statuses) == {EvaluationStatus.ALLOWED}
    denied, statuses = await asked([*(Waiting(0.200, allow=True) for _ in range(19)), Waiting(0, allow=False)])
    assert statuses[-1] is EvaluationStatus.DENIED
    return {
        "20 evaluators of 10 ms, p50": Figure(value=twenty, unit="ms", better="lower", target=20),
        "an instant denial beside 200 ms ones, p50": Figure(value=denied, unit="ms", better="lower", target=5),
    }


class NoDelivery:
    """The benchmark moves its runs itself."""

    async def enqueue(
        self, connection: Any, tenant_id: uuid.UUID, run_id: uuid.UUID, *, after_seconds: float = 0.0
    ) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Booking:
    """Runs that admit and settle, one pair after another."""

    control_plane: ControlPlane
    principal: Principal

    async def lease(self, tenant: uuid.UUID) -> Lease:
        run, _ = await self.control_plane.create_run(
            RunRequest(
                tenant_id=tenant,
                run_id=new_id(),
                agent={"name": "bench"},
                input={},
                trace_id=secrets.token_hex(16),
                budget={BudgetUnit.EUR: Decimal(10)},
            ),
            principal=self.principal,
        )
        lease = await self.control_plane.storage.runs.take(tenant, run.id, owner="bench", seconds=600)
        assert lease is not None
        return lease

    async def pair(self, lease: Lease, step: int) -> None:
        """An admission that uses its grant up, with the settlement right after it."""
        admission = await self.control_plane.admit(_proposal(lease, step), begin=True)
        assert isinstance(admission, Granted), admission
        assert admission.begun
        await self.control_plane.settle(
            admission.grant,
            Outcome(status=OutcomeStatus.SUCCEEDED),
            capability=PLAIN,
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="bench",
        )

    async def pairs(self, lease: Lease, steps: Iterable[int]) -> list[float]:
        """Milliseconds of the pair of each step."""
        samples = []
        for step in steps:
            started = time.perf_counter()
            await self.pair(lease, step)
            samples.append((time.perf_counter() - started) * 1e3)
        return samples

    async def pairs_between(self, lease: Lease, opens: float, closes: float) -> int:
        """How many pairs end between the two moments of the clock, of a run that makes one after another until then."""
        ended = 0
        for step in itertools.count():
            await self.pair(lease, step)
            now = time.perf_counter()
            if now >= closes:
                break
            ended += now >= opens
        return ended


@asynccontextmanager
async def opened(app: str) -> AsyncIterator[Booking]:
    """A control plane on connections of its own."""
    async with open_pool(app, max_size=20) as pool:
        plane = ControlPlane(
            policy=PolicySnapshot.model_validate(BASE),
            registry=CapabilityRegistry([PLAIN]),
            storage=PostgresStorage(pool, NoDelivery()),
        )
        scopes = frozenset({"plm.runs.create"})
        yield Booking(control_plane=plane, principal=Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=scopes))


def client(app: str, tenants: list[uuid.UUID], gate: Barrier, counts: Queue[int]) -> None:
    """One process of `rate`."""

    async def run() -> int:
        async with opened(app) as books:
            leases = [await books.lease(tenant) for tenant in tenants]
            gate.wait(LONGEST)
            opens = time.perf_counter() + WARM
            return sum(await asyncio.gather(*(books.pairs_between(lease, opens, opens + SECONDS) for lease in leases)))

    counts.put(asyncio.run(run()))


def rate(app: str, tenants: list[uuid.UUID]) -> float:
    """Pairs per second of runs at once, one in each of `tenants`."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(CLIENTS)
    counts: Queue[int] = context.Queue()
    clients = [
        context.Process(target=client, args=(app, tenants[number::CLIENTS], gate, counts), daemon=True)
        for number in range(CLIENTS)
    ]
    for each in clients:
        each.start()
    ended = sum(counts.get(timeout=LONGEST) for _ in clients)
    for each in clients:
        each.join()
    return ended / SECONDS


def _proposal(lease: Lease, step: int) -> Proposal:
    return Proposal(
        tenant_id=lease.run.tenant_id,
        run_id=lease.run.id,
        fencing_token=lease.fencing_token,
        step_index=step,
        attempt=1,
        step_id=f"step-{step}",
        capability=PLAIN.id,
        resource="thing/1",
        arguments={"number": step},
        principal=lease.run.principal,
        agent="bench",
    )


async def replay_of_rows(app: str, tenant: uuid.UUID) -> float:
    """Proposals per second that are read from the database and decided again: all that the tenant has made by now."""
    report_of_it = Replay(policy=ruled_policy())
    async with opened(app) as books:
        started = time.perf_counter()
        async for batch in books.control_plane.storage.runs.attempts(tenant, since=datetime(2024, 1, 1, tzinfo=UTC)):
            report_of_it.feed(batch)
        return report_of_it.attempts / (time.perf_counter() - started)


@contextmanager
def durable_rows(owner: str, app: str, tenant: uuid.UUID) -> Iterator[Callable[[int], list[float]]]:
    """For D: inserts so many rows, each committed under row-level security, by one client; milliseconds of each."""
    with psycopg.connect(owner, autocommit=True) as connection:
        for statement in (
            "CREATE TABLE bench_rows (tenant_id uuid NOT NULL, id bigint NOT NULL, PRIMARY KEY (tenant_id, id))",
            "ALTER TABLE bench_rows ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE bench_rows FORCE ROW LEVEL SECURITY",
            "CREATE POLICY tenant ON bench_rows USING (tenant_id = current_setting('app.tenant_id')::uuid)",
            "GRANT INSERT ON bench_rows TO plm_engine_writer",
        ):
            connection.execute(statement.encode())
    numbers = itertools.count()
    with psycopg.connect(app, autocommit=True) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", [str(tenant)])

        def inserts(count: int) -> list[float]:
            samples = []
            for number in itertools.islice(numbers, count):
                started = time.perf_counter()
                connection.execute("INSERT INTO bench_rows VALUES (%s, %s)", [tenant, number])
                samples.append((time.perf_counter() - started) * 1e3)
            return samples

        yield inserts


async def one_run(owner: str, app: str, tenant: uuid.UUID) -> tuple[float, float]:
    """D, and a pair with nothing beside it: by turns, so that both meet the machine as it is meanwhile."""
    rows: list[float] = []
    pairs: list[float] = []
    steps = itertools.count()

    def next_steps() -> Iterator[int]:
        return itertools.islice(steps, max(1, PAIRS // TURNS))

    with durable_rows(owner, app, tenant) as inserts:
        async with opened(app) as books:
            lease = await books.lease(tenant)
            inserts(INSERTS)
            await books.pairs(lease, next_steps())  # plans and statements are prepared
            for _ in range(TURNS):
                rows += inserts(INSERTS)
                pairs += await books.pairs(lease, next_steps())
    return percentile(rows, 0.5), percentile(pairs, 0.5)


async def booking(folder: Path) -> dict[str, Figure]:
    with EmbeddedPostgres(folder / "postgres") as server:
        urls = provision(server.admin_dsn, "bench")
        upgrade_all(urls.owner)
        tenants = [uuid.uuid4() for _ in range(AT_ONCE)]
        with psycopg.connect(urls.owner) as connection:
            for number, tenant in enumerate(tenants):
                connection.execute("INSERT INTO tenants (id, name) VALUES (%s, %s)", [tenant, f"bench-{number}"])
        recycle_the_log(server.admin_dsn, SEGMENTS)
        plain, alone = await one_run(urls.owner, urls.app, tenants[0])
        rates = [(rate(urls.app, tenants[:1] * AT_ONCE), rate(urls.app, tenants)) for _ in range(WINDOWS)]
        shared, apart = (percentile(list(each), 0.5) for each in zip(*rates, strict=True))
        replayed = percentile([await replay_of_rows(urls.app, tenants[0]) for _ in range(WINDOWS)], 0.5)
    return {
        "D: one durable row, p50": Figure(value=plain, unit="ms", better="lower"),
        "admit with begin + settle, one run, p50": Figure(
            value=alone, unit="ms", better="lower", target=2 * plain + 1.5, baseline=plain
        ),
        "admit with begin + settle, 8 runs, one tenant": Figure(value=shared, unit="/s", better="higher", target=800),
        "admit with begin + settle, 8 runs, 8 tenants": Figure(value=apart, unit="/s", better="higher", target=1200),
        "policy replay, read from the database": Figure(value=replayed, unit="/s", better="higher", target=10_000),
    }


def main() -> dict[str, Figure]:
    figures = {**decisions(), **replay(), **asyncio.run(evaluators())}
    with tempfile.TemporaryDirectory(prefix="plm-bench-") as name, processors_awake():
        folder = Path(name)
        folder.chmod(0o711)  # the database's account must pass through it when this runs as root
        return {**figures, **asyncio.run(booking(folder)), **asyncio.run(recording(folder))}


if __name__ == "__main__":
    asked = command_line(__doc__ or "").parse_args()
    report(
        f"what deciding and booking cost ({PAIRS} pairs of a run alone, {WINDOWS} windows of {SECONDS:g} s)",
        main(),
        as_json=asked.as_json,
    )
