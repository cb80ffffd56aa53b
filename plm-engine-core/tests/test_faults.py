"""What fails around a decision is a denial or a typed refusal with its documented reason, whichever face asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Outcome, SyncControlPlane
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry, EvaluatorResult
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import HaltScope, OutcomeStatus, TicketDecision
from pydantic import BaseModel

ADMIT, BEGIN, SETTLE, DECIDE, HALT, LIFT, VERIFY = "admit", "begin", "settle", "decide", "halt", "lift", "verify"
UNHARMED = "unharmed"
BUSY = "storage_unavailable"

# By fault, what each operation answers: a reason, the code of an error, or that the fault does not concern it.
TABLE = {
    "storage gone": {
        ADMIT: "storage_busy",
        BEGIN: BUSY,
        SETTLE: BUSY,
        DECIDE: BUSY,
        HALT: BUSY,
        LIFT: BUSY,
        VERIFY: BUSY,
    },
    "storage slow": {ADMIT: "storage_busy", BEGIN: BUSY, SETTLE: BUSY, DECIDE: BUSY, HALT: BUSY, LIFT: BUSY},
    "policy missing": {
        ADMIT: "policy_missing",
        BEGIN: UNHARMED,
        SETTLE: UNHARMED,
        DECIDE: BUSY,
        HALT: UNHARMED,
        LIFT: UNHARMED,
        VERIFY: UNHARMED,
    },
    "clock jumps an hour": {
        ADMIT: "fencing_lost",
        BEGIN: "fencing_lost",
        SETTLE: UNHARMED,  # what happened is recorded as long as nobody took the run over
        DECIDE: "approval_expired",
        HALT: UNHARMED,
        LIFT: UNHARMED,
        VERIFY: UNHARMED,
    },
}
CASES = [(fault, operation, face) for fault, row in TABLE.items() for operation in row for face in ("async", "sync")]


class Configuration(BaseModel):
    """Nothing to configure."""


def evaluator(behaviour: Callable[[], Any]) -> type[Any]:
    class Odd:
        kind = "odd"
        config_schema = Configuration

        def __init__(self, config: Configuration) -> None:
            self.config = config

        async def evaluate(self, proposal: Any, facts: Any) -> Any:
            answer = behaviour()
            return await answer if asyncio.iscoroutine(answer) else answer

    return Odd


def broken() -> EvaluatorResult:
    raise RuntimeError("a defect")


@dataclass(kw_only=True)
class Scene:
    """One of everything that the operations need, made while all was well."""

    bench: Any
    lease: Any
    begins: tuple[Any, Any]
    settles: tuple[Any, Any]
    pending: Any
    standing: Any

    def work(self, operation: str) -> Callable[[ControlPlane], Awaitable[Any]]:
        bench, tenant, by = self.bench, self.bench.tenant, self.bench.approver
        begins, settles = self.begins, self.settles
        capability = bench.control_plane.capability("thing.read")
        return {
            ADMIT: lambda plane: plane.admit(bench.proposal(self.lease)),
            BEGIN: lambda plane: plane.begin(begins[0], fencing_token=begins[1].fencing_token, actor="test"),
            SETTLE: lambda plane: plane.settle(
                settles[0],
                Outcome(status=OutcomeStatus.SUCCEEDED),
                capability=capability,
                fencing_token=settles[1].fencing_token,
                trace_id=settles[1].run.trace_id,
                actor="test",
            ),
            DECIDE: lambda plane: plane.decide(tenant, self.pending.ticket_id, TicketDecision.APPROVE, approver=by),
            HALT: lambda plane: plane.halt(tenant, HaltScope.TENANT, reason="stop", by=by),
            LIFT: lambda plane: plane.lift(tenant, self.standing.id, by=by),
            VERIFY: lambda plane: plane.verify_events(tenant),
        }[operation]


async def said(work: Callable[[ControlPlane], Awaitable[Any]], plane: ControlPlane, face: str) -> str:
    """How an operation ended, through one face."""

    def synchronously() -> Any:
        with SyncControlPlane(plane) as sync:
            return sync.call(work)

    try:
        answer = await work(plane) if face == "async" else await asyncio.to_thread(synchronously)
    except ControlPlaneError as error:
        return str(getattr(error, "reason", error.code))
    return answer.reason.value if isinstance(answer, Denied) else UNHARMED


@pytest.fixture
async def scene(bench):
    leases = [await bench.lease() for _ in range(3)]
    elsewhere = await bench.run(agent={"name": "another"})
    standing = await bench.halt_over(HaltScope.RUN, elsewhere)
    _, pending = await bench.ask()
    return Scene(
        bench=bench,
        lease=leases[0],
        begins=(await bench.grant(leases[1]), leases[1]),
        settles=(await bench.begun(leases[2]), leases[2]),
        pending=pending,
        standing=standing,
    )


async def plane_under(bench: Any, fault: str, face: str) -> ControlPlane:
    """The control plane that meets a fault; the synchronous face has an event loop, and so a pool, of its own."""
    pool = open_pool(bench.database.app, max_size=4, timeout=1.0)
    plane = ControlPlane(
        policy=bench.control_plane.policy,
        registry=bench.control_plane.registry,
        storage=PostgresStorage(pool, Nobody()),
    )
    if fault == "policy missing":
        plane.in_force.withdraw("the activated policy cannot be read")
    elif fault == "clock jumps an hour":
        for table, column in (
            ("run_states", "lease_expires_at"),
            ("grants", "expires_at"),
            ("approval_tickets", "deadline"),
        ):
            bench.behind.set_time(table, column, -1, {})
    return plane


class Nobody:
    """A delivery that nobody waits for."""

    async def enqueue(self, connection: Any, tenant_id: Any, run_id: Any) -> None:
        """Deliver nothing."""


@pytest.mark.parametrize(("fault", "operation", "face"), [case for case in CASES if case[0] != "storage slow"])
async def test_an_operation_under_a_fault_is_refused_as_the_table_says(scene, fault, operation, face):
    plane = await plane_under(scene.bench, fault, face)
    pool = plane.storage.runs._gateway._pool

    async def opened(core: ControlPlane) -> Any:
        if fault == "storage gone":
            return await scene.work(operation)(core)  # a pool that was never opened has no connection to give
        async with pool:
            return await scene.work(operation)(core)

    assert await said(opened, plane, face) == TABLE[fault][operation]


async def test_behind_locks_that_nobody_gives_back_each_is_refused_in_bounded_time(scene):
    """All at once: each waits for its own lock, as long as the functions allow."""
    bench, row = scene.bench, TABLE["storage slow"]
    with psycopg.connect(bench.database.admin) as holder:
        holder.execute("SELECT 1 FROM run_states FOR UPDATE")
        holder.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended(%s, 0))", [f"halt/tenant/{bench.tenant}"])
        answers = await asyncio.gather(*(said(scene.work(each), bench.control_plane, "async") for each in row))
    assert dict(zip(row, answers, strict=True)) == row


@pytest.mark.parametrize("face", ["async", "sync"])
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (broken, "evaluator_failed"),
        (lambda: asyncio.sleep(600), "evaluator_failed"),
        (lambda: "yes", "evaluator_failed"),
        (lambda: EvaluatorResult(allow=False, reason="no"), "evaluator_denied"),
    ],
    ids=["raises", "hangs", "answers nonsense", "denies"],
)
async def test_an_evaluator_that_fails_denies_a_proposal_and_concerns_nothing_else(bench, behaviour, reason, face):
    gate = {"name": "odd", "kind": "odd", "timeout_ms": 50}
    policy = bench.with_policy().control_plane.policy.model_copy()
    policy = type(policy).model_validate({**policy.model_dump(mode="json"), "evaluators": [gate]})
    pool = open_pool(bench.database.app, max_size=4)
    plane = ControlPlane(
        policy=policy,
        registry=bench.control_plane.registry,
        storage=PostgresStorage(pool, Nobody()),
        evaluators=EvaluatorRegistry([evaluator(behaviour)]),
    )
    lease = await bench.lease()

    async def admit(core: ControlPlane) -> Any:
        async with pool:
            return await core.admit(bench.proposal(lease))

    assert await said(admit, plane, face) == reason
