"""What fails around an operation is a denial or a typed refusal with its documented reason, whichever door is used.

The table stands in `docs/reasons.md` and is walked here through both faces and the terminal; the backend's
`test_faults_over_http.py` walks it over HTTP.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.cli.storage import DELIVERY_GROUP
from plm_engine_core.control_plane import ControlPlane, Denied, InputRequest, Outcome, SyncControlPlane
from plm_engine_core.control_plane.admission.admit import decided
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry, EvaluatorResult
from plm_engine_core.control_plane.admission.prepare import prepare
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.policy import PolicySnapshot, Verdict
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import EvaluationPhase, HaltScope, OutcomeStatus, TicketDecision
from plm_engine_core.testing.fault_table import CANNOT_BE, GOES_ON, Fault, due, read_fault_table
from pydantic import BaseModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reasons.md"
# In the order in which one scene is used up: what changes more comes later.
OPERATIONS = (
    "verify",
    "create a run",
    "prepare",
    "decide",
    "begin",
    "settle",
    "decide a ticket",
    "give an input",
    "admit",
    "ask",
    "lift",
    "halt",
)
SECRET = {"key": "AKIAEXAMPLE0000000000"}
COMMANDS = ("verify", "decide a ticket", "give an input", "lift", "halt")
NOWHERE = "postgresql://plm_app@127.0.0.1:1/nothing?connect_timeout=1"
EXPIRIES = (("run_states", "lease_expires_at"), ("grants", "expires_at"), ("approval_tickets", "deadline"))


TABLE = read_fault_table(PAGE.read_text(encoding="utf-8"))


def test_the_table_crosses_every_operation_with_every_fault_and_says_why_a_cell_cannot_be() -> None:
    assert set(TABLE) == set(Fault)
    for row in TABLE.values():
        assert set(row) == set(OPERATIONS)
        for said in row.values():
            assert said == GOES_ON or re.fullmatch(rf"{CANNOT_BE}\w.+|[a-z_]+", said)


class Configuration(BaseModel):
    """Nothing to configure."""


def evaluator(behaviour: Callable[[], Any]) -> type[Any]:
    class Odd:
        kind = "odd"
        config_schema = Configuration

        def __init__(self, config: Configuration) -> None:
            self.config = config

        async def evaluate(self, proposal: Any, facts: Any) -> Any:
            return await self.examine(None)

        async def examine(self, examined: Any) -> Any:
            answer = behaviour()
            return await answer if asyncio.iscoroutine(answer) else answer

    return Odd


def broken() -> EvaluatorResult:
    raise RuntimeError("a defect")


ODD = {"raises": broken, "hangs": lambda: asyncio.sleep(600), "answers nonsense": lambda: "yes"}


class Nobody:
    """A delivery that nobody waits for."""

    async def enqueue(self, connection: Any, tenant_id: Any, run_id: Any, *, after_seconds: float = 0.0) -> None:
        """Deliver nothing."""


@dataclass(kw_only=True)
class Scene:
    """One of everything that the operations need, made while all was well."""

    bench: Any
    lease: Any
    begins: tuple[Any, Any]
    settles: tuple[Any, Any]
    pending: Any
    asks: Any
    asked: Any
    standing: Any
    facts: Any

    def work(self, operation: str) -> Callable[[ControlPlane], Awaitable[Any]]:
        bench, tenant, by = self.bench, self.bench.tenant, self.bench.approver
        begins, settles = self.begins, self.settles
        proposal = bench.proposal(self.lease)
        capability = bench.control_plane.capability("thing.read")
        return {
            "create a run": lambda plane: plane.create_run(bench.request(input=SECRET), principal=bench.requester),
            "prepare": lambda plane: prepare(
                proposal, policy=plane.policy, registry=plane.registry, storage=plane.storage.admission
            ),
            "decide": lambda plane: decided(proposal, plane.policy, self.facts, plane.in_force.now.evaluators),
            "admit": lambda plane: plane.admit(proposal),
            "begin": lambda plane: plane.begin(begins[0], fencing_token=begins[1].fencing_token, actor="test"),
            "settle": lambda plane: plane.settle(
                settles[0],
                Outcome(status=OutcomeStatus.SUCCEEDED, output=SECRET),
                capability=capability,
                fencing_token=settles[1].fencing_token,
                trace_id=settles[1].run.trace_id,
                actor="test",
            ),
            "decide a ticket": lambda plane: plane.decide(
                tenant, self.pending.ticket_id, TicketDecision.APPROVE, approver=by
            ),
            "give an input": lambda plane: plane.provide_input(tenant, self.asked.ticket_id, 3, approver=by),
            "ask": lambda plane: plane.ask(self.asks),
            "halt": lambda plane: plane.halt(tenant, HaltScope.TENANT, reason="stop", by=by),
            "lift": lambda plane: plane.lift(tenant, self.standing.id, by=by),
            "verify": lambda plane: plane.verify_events(tenant),
        }[operation]

    def command(self, operation: str) -> tuple[Any, ...]:
        return {
            "decide a ticket": ("approvals", "approve", self.pending.ticket_id),
            "give an input": ("approvals", "provide-input", self.asked.ticket_id, "--input", "3"),
            "halt": ("halt", "trigger", "tenant", "--reason", "stop"),
            "lift": ("halt", "lift", self.standing.id),
            "verify": ("events", "verify", "--tenant-id", self.bench.tenant),
        }[operation]


ASKING: dict[str, Any] = {"input": {}}


def asking(bench: Any, lease: Any) -> InputRequest:
    """A question of the holder of a run."""
    return InputRequest(
        tenant_id=bench.tenant,
        run_id=lease.run.id,
        fencing_token=lease.fencing_token,
        step_index=0,
        attempt=1,
        step_id="ask",
        question="How many?",
        principal=lease.run.principal,
    )


@pytest.fixture
async def scene(bench: Any) -> Scene:
    bench = bench.with_policy(approval=ASKING)
    leases = [await bench.lease(seconds=600) for _ in range(5)]
    elsewhere = await bench.run(agent={"name": "another"})
    standing = await bench.halt_over(HaltScope.RUN, elsewhere)
    _, pending = await bench.ask()
    plane = bench.control_plane
    facts, _ = await prepare(
        bench.proposal(leases[0]), policy=plane.policy, registry=plane.registry, storage=bench.storage.admission
    )
    return Scene(
        bench=bench,
        lease=leases[0],
        begins=(await bench.grant(leases[1]), leases[1]),
        settles=(await bench.begun(leases[2]), leases[2]),
        pending=pending,
        asks=asking(bench, leases[3]),
        asked=await bench.control_plane.ask(asking(bench, leases[4])),
        standing=standing,
        facts=replace(facts, principal_until=datetime.now(UTC) + timedelta(minutes=30)),
    )


@contextmanager
def suffering(scene: Scene, fault: Fault) -> Iterator[None]:
    """The fault, as far as it is one of the database."""
    bench = scene.bench
    with ExitStack() as stack:
        if fault == Fault.STORAGE_SLOW:
            holder = stack.enter_context(psycopg.connect(bench.database.admin))
            holder.execute("LOCK TABLE events, run_states, rate_buckets IN ACCESS EXCLUSIVE MODE")
        elif fault in (Fault.CLOCK_AHEAD, Fault.CLOCK_BACK):
            sign = "-" if fault == Fault.CLOCK_AHEAD else "+"
            for table, column in EXPIRIES:
                bench.sql(f"UPDATE {table} SET {column} = {column} {sign} interval '1 hour'")  # noqa: S608  # as above
            jump = timedelta(hours=1 if fault == Fault.CLOCK_AHEAD else -1)
            scene.facts = replace(scene.facts, at=scene.facts.at + jump)
        yield


@asynccontextmanager
async def plane_under(bench: Any, fault: Fault, behaviour: Callable[[], Any]) -> AsyncIterator[ControlPlane]:
    """The control plane that meets a fault, with connections of its own."""
    policy = bench.control_plane.policy
    if fault == Fault.EVALUATOR:
        gates = [{"name": f"odd-{phase}", "kind": "odd", "timeout_ms": 50, "phase": phase} for phase in EvaluationPhase]
        policy = PolicySnapshot.model_validate({**policy.model_dump(mode="json"), "evaluators": gates})
    address, patience = (NOWHERE, 0.5) if fault == Fault.STORAGE_GONE else (bench.database.app, 10.0)
    async with open_pool(address, max_size=12, timeout=patience) as pool:
        plane = ControlPlane(
            policy=policy,
            registry=bench.control_plane.registry,
            storage=PostgresStorage(pool, Nobody()),
            evaluators=EvaluatorRegistry([evaluator(behaviour)]),
        )
        if fault == Fault.NO_POLICY:
            plane.in_force.withdraw("the activated policy cannot be read")
        yield plane


async def said(asked: Awaitable[Any]) -> str:
    """How an operation ended."""
    try:
        return ending(await asked)
    except ControlPlaneError as error:
        return ending(error)


def ending(answer: Any) -> str:
    if isinstance(answer, ControlPlaneError):
        return str(getattr(answer, "reason", answer.code))
    if isinstance(answer, Denied):
        return answer.reason.value
    decision = answer[0] if isinstance(answer, tuple) else None  # or a run that was created
    return decision.reason.value if getattr(decision, "outcome", None) is Verdict.DENY else GOES_ON


async def each(names: tuple[str, ...], ask: Callable[[str], Awaitable[str]], *, at_once: bool) -> dict[str, str]:
    if at_once:  # nothing is changed, and each waits
        return dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))
    return {name: await ask(name) for name in names}


def through_the_sync_face(opened: Any, scene: Scene, names: tuple[str, ...], *, at_once: bool) -> dict[str, str]:
    def ask(name: str) -> str:
        try:
            return ending(sync.call(scene.work(name)))
        except ControlPlaneError as error:
            return ending(error)

    with SyncControlPlane(opened) as sync, ThreadPoolExecutor(len(names) if at_once else 1) as threads:
        return dict(zip(names, threads.map(ask, names), strict=True))


@pytest.mark.parametrize("face", ["async", "sync"])
@pytest.mark.parametrize(
    ("fault", "behaviour"),
    [*((Fault.EVALUATOR, name) for name in ODD), *((fault, "raises") for fault in TABLE if fault != Fault.EVALUATOR)],
)
async def test_under_a_fault_either_face_answers_as_the_table_says(
    scene: Scene, fault: Fault, behaviour: str, face: str
) -> None:
    answers_due = due(TABLE, fault, OPERATIONS)
    names = tuple(answers_due)
    opened = plane_under(scene.bench, fault, ODD[behaviour])
    at_once = fault in (Fault.STORAGE_GONE, Fault.STORAGE_SLOW)
    with suffering(scene, fault):
        if face == "async":
            async with opened as plane:
                answers = await each(names, lambda name: said(scene.work(name)(plane)), at_once=at_once)
        else:
            answers = await asyncio.to_thread(through_the_sync_face, opened, scene, names, at_once=at_once)
    assert answers == answers_due
    if fault in (Fault.EVALUATOR, Fault.NO_POLICY):  # it goes on: what happened is settled, and nothing of it kept
        (step,) = await scene.bench.storage.runs.steps(scene.bench.tenant, scene.settles[1].run.id)
        reason = "policy_missing" if fault == Fault.NO_POLICY else "evaluator_failed"
        assert (step.state.value, step.output, step.error["reason"]) == ("succeeded", None, reason)


@pytest.mark.parametrize("fault", [fault for fault in TABLE if fault != Fault.EVALUATOR])
async def test_under_a_fault_the_terminal_answers_as_the_table_says(
    scene: Scene, terminal: Any, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    answers_due = due(TABLE, fault, COMMANDS)
    settings = {}
    if fault == Fault.STORAGE_GONE:
        answers_due |= {name: "AUDIT_UNAVAILABLE" for name in COMMANDS if name != "verify"}
        settings = {"PG_DSN": NOWHERE}
    elif fault == Fault.NO_POLICY:
        activate_what_nobody_can_read(scene.bench)

    for name, value in {**terminal.environment, "PLM_TOKEN": terminal.token(), **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", EachItsOwn())

    for entry in entry_points(group=DELIVERY_GROUP):
        entry.load()  # once, before the threads: side by side they might see half of it
    app = build_app()

    async def ask(name: str) -> str:
        return await asyncio.to_thread(typed, app, *scene.command(name), "--json")

    with suffering(scene, fault):
        answers = await each(tuple(answers_due), ask, at_once=fault in (Fault.STORAGE_GONE, Fault.STORAGE_SLOW))
    assert answers == answers_due


PRINTED: ContextVar[io.StringIO] = ContextVar("PRINTED")


class EachItsOwn(io.TextIOBase):
    """Standard output of commands that run side by side in threads."""

    def write(self, text: str) -> int:
        return PRINTED.get().write(text)


def typed(app: Any, *command: Any) -> str:
    """How a command ended; its output is this thread's own."""
    printed = io.StringIO()
    PRINTED.set(printed)
    status = app([*map(str, command)], standalone_mode=False)
    return GOES_ON if not status else str(json.loads(printed.getvalue())["reason"])


def activate_what_nobody_can_read(bench: Any) -> None:
    content = '{"of": "a later release"}'
    digest = sha256(content.encode()).hexdigest()
    bench.sql("INSERT INTO policy_versions (digest, version, content) VALUES (%s, '9', %s)", digest, content)
    bench.sql(
        "INSERT INTO policy_activations (number, role, digest, reason, activated_by) "
        "VALUES (1, 'active', %s, 'x', gen_random_uuid())",
        digest,
    )


async def test_what_an_evaluator_failed_to_say_stands_in_the_record_as_it_was_answered(
    scene: Scene, terminal: Any
) -> None:
    async with plane_under(scene.bench, Fault.EVALUATOR, broken) as plane:
        assert await said(scene.work("admit")(plane)) == TABLE[Fault.EVALUATOR]["admit"]
    asked = f"{scene.lease.run.id}/0"
    told = await terminal.json("why", asked, "--tenant-id", scene.bench.tenant)
    assert told["reason"] == TABLE[Fault.EVALUATOR]["admit"]
