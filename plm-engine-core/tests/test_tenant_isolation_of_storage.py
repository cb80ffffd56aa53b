"""Every port, called in one tenant with the ids of another, finds nothing and changes nothing."""

from __future__ import annotations

import inspect
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core.control_plane import ArtifactRecord, Denied
from plm_engine_core.control_plane.errors import FencingLost, NotFound
from plm_engine_core.control_plane.events import BEGINNING, Piece, run_stream
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.events.pruning import PrunedBatch
from plm_engine_core.control_plane.events.signing import Signer
from plm_engine_core.control_plane.events.standing import Standing
from plm_engine_core.control_plane.hitl import ScopeTerms
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.storage.ports import (
    ApprovalStore,
    AskCommand,
    BudgetStore,
    CheckpointStore,
    Correction,
    EventStore,
    HaltStore,
    IdempotencyStore,
    InputCommand,
    MarkCommand,
    PolicyStore,
    ResourceLeaseStore,
    ResourceLockStore,
    RunStore,
    VoteCommand,
)
from plm_engine_core.control_plane.sweeping import ExpiredBatch
from plm_engine_core.control_plane.vocabulary import BudgetScope, HaltScope, RunState, StepState, TicketDecision

pytestmark = pytest.mark.every_storage

ABSENT = {
    "runs.get": NotFound,
    "runs.list": [],
    "runs.steps": [],
    "runs.attempts": [],
    "runs.budgets": [],
    "runs.take": None,
    "runs.renew": False,
    "runs.finish": FencingLost,
    "runs.request_cancel": NotFound,
    "runs.mark": NotFound,
    "runs.reconcile": NotFound,
    "runs.revive": False,
    "runs.set_back": False,
    "runs.mcrc": NotFound,
    "runs.artifact": NotFound,
    "runs.unrecorded": "the same as of an id that nobody has",
    "idempotency.expire": ExpiredBatch(records=0, more=False),
    "approvals.get": NotFound,
    "approvals.list": [],
    "approvals.votes": [],
    "approvals.decide": NotFound,
    "approvals.ask": NotFound,
    "approvals.provide_input": NotFound,
    "approvals.comments": [],
    "approvals.comment": NotFound,
    "approvals.scopes": [],
    "approvals.revoke_scope": NotFound,
    "budgets.list": [],
    "budgets.correct": NotFound,
    "halts.trigger": NotFound,
    "halts.met": NotFound,
    "halts.get": NotFound,
    "halts.list": [],
    "halts.end_halted": 0,
    "halts.lift": NotFound,
    "leases.renew": FencingLost,
    "leases.release": FencingLost,
    "leases.require": FencingLost,
    "leases.list": [],
    "locks.list": [],
    "locks.sweep": 0,
    "events.read": [],
    "events.heads": [],
    "events.feed": ([], replace(BEGINNING, pruned=0), None),
    "events.misplaced": {},
    "events.fold": Standing(runs={}, tickets={}, budgets={}),
    "checkpoints.take": None,
    "checkpoints.read": [],
    "checkpoints.newest": None,
    "checkpoints.heads": [],
    "checkpoints.archived": 0,
    "checkpoints.record_piece": NotFound,
    "checkpoints.pruned": 0,
    "checkpoints.prune": PrunedBatch(checkpoint=None),
    "checkpoints.covered": [],
    "checkpoints.links": [],
}
SPANS_TENANTS = {
    "runs.create",
    "runs.refuse",
    "budgets.set_limit",
    "leases.acquire",
    "runs.abandoned",
    "runs.ahead",
    "runs.now",
    "runs.expired",
    "runs.orphaned",
    "checkpoints.tenants",
    "halts.unfinished",
}  # makes its own; answer ids only, by design
OF_THE_INSTALLATION = {"policies.standing", "policies.content", "policies.history", "policies.activate"}


def test_every_operation_of_every_port_is_tried():
    ports = {
        "runs": RunStore,
        "approvals": ApprovalStore,
        "budgets": BudgetStore,
        "halts": HaltStore,
        "idempotency": IdempotencyStore,
        "leases": ResourceLeaseStore,
        "locks": ResourceLockStore,
        "events": EventStore,
        "checkpoints": CheckpointStore,
        "policies": PolicyStore,
    }
    operations = {
        f"{name}.{operation}"
        for name, port in ports.items()
        for operation, _ in inspect.getmembers(port, inspect.isfunction)
        if not operation.startswith("_")
    }
    assert operations == set(ABSENT) | SPANS_TENANTS | OF_THE_INSTALLATION


@pytest.fixture
async def foreign(bench):
    """Something of everything in the first tenant, and calls with its ids from the second."""
    other = bench.behind.new_tenant()
    lease, pending = await bench.ask()
    run = lease.run
    holder = await bench.lease()
    grant = await bench.begun(holder)
    record = ArtifactRecord(
        id=new_id(), name="a", mime_type="x/y", size_bytes=1, sha256="0", backend="local", storage_uri="local://a"
    )
    await bench.settle(grant, holder, artifacts=(record,))
    standing = bench.with_policy(approval={"standing": {"max_uses": 9, "max_seconds": 99, "max_risk": "high"}})
    _, approved = await standing.ask()
    await standing.decide(approved, TicketDecision.APPROVE, scope=ScopeTerms(uses=2, seconds=60))
    (scope,) = await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None)
    await bench.control_plane.approvals.comment(bench.tenant, approved.ticket_id, "why?", author=bench.approver)
    halt = await bench.halt(HaltScope.RUN, run.id)
    checkpointer = Checkpointer(bench.storage.checkpoints, Signer(Ed25519PrivateKey.generate()))
    checkpoint = await checkpointer.take(bench.tenant)
    piece = Piece(after=0, number=checkpoint.number, uri="file:///x", size_bytes=1, sha256="x")
    await bench.storage.checkpoints.record_piece(bench.tenant, piece)
    storage, by = bench.storage, bench.approver
    for resource in ("held", "over"):
        locked = await bench.locking().begun(await bench.lease(), resource=resource)
    bench.behind.set_rows("grants", {"id": locked.id}, state="revoked")
    mine = await bench.control_plane.acquire_lease(bench.tenant, "x", owner="x", seconds=60, by=by)
    theirs = replace(mine, tenant_id=other)
    held = {"fencing_token": holder.fencing_token}
    calls = {
        "runs.get": lambda: storage.runs.get(other, run.id),
        "runs.list": lambda: storage.runs.list(other, limit=9, before=None, state=None),
        "runs.steps": lambda: storage.runs.steps(other, run.id),
        "runs.attempts": lambda: walked(storage.runs.attempts(other, since=datetime(2024, 1, 1, tzinfo=UTC))),
        "runs.budgets": lambda: storage.runs.budgets(other, run.id),
        "runs.take": lambda: storage.runs.take(other, run.id, owner="w", seconds=9),
        "runs.renew": lambda: storage.runs.renew(other, holder.run.id, seconds=9, **held),
        "runs.finish": lambda: storage.runs.finish(
            other, holder.run.id, state=RunState.FAILED, actor="worker:w", **held
        ),
        "runs.request_cancel": lambda: storage.runs.request_cancel(other, run.id, actor="human:x"),
        "runs.mark": lambda: storage.runs.mark(
            MarkCommand(
                tenant_id=other,
                run_id=run.id,
                name="x",
                details={},
                command_id="x",
                digest="x",
                actor=by.actor,
            )
        ),
        "runs.reconcile": lambda: storage.runs.reconcile(other, run.id, happened=True, output=None, actor="human:x"),
        "runs.revive": lambda: storage.runs.revive(other, run.id, patience_seconds=0),
        "runs.set_back": lambda: storage.runs.set_back(other, run.id, patience_seconds=-3600),
        "runs.mcrc": lambda: storage.runs.mcrc(other, run.id),
        "runs.artifact": lambda: storage.runs.artifact(other, record.id),
        "runs.unrecorded": lambda: as_of_nobody(storage, other, record.id),
        "idempotency.expire": lambda: storage.idempotency.expire(other, keep_seconds=86_400, limit=9),
        "approvals.get": lambda: storage.approvals.get(other, pending.ticket_id),
        "approvals.list": lambda: storage.approvals.list(other, limit=9, after=None, state=None),
        "approvals.votes": lambda: storage.approvals.votes(other, approved.ticket_id),
        "approvals.decide": lambda: storage.approvals.decide(
            VoteCommand(
                tenant_id=other,
                ticket_id=pending.ticket_id,
                vote=TicketDecision.APPROVE,
                voter=by.user_id,
                actor=by.actor,
                comment="",
                quorum=1,
                authority=(),
                escalated=False,
                scope=None,
                scope_id=new_id(),
            )
        ),
        "approvals.ask": lambda: storage.approvals.ask(
            AskCommand(
                tenant_id=other,
                run_id=run.id,
                fencing_token=1,
                step_index=0,
                attempt=1,
                step_id="x",
                step_key="x",
                resource="x",
                arguments={"question": "x", "schema": {}},
                digest="x",
                policy_digest="x",
                requester=run.id,
                actor="x",
                decision={"outcome": "ask"},
                beyond={},
                most=1,
                ticket_id=run.id,
                ticket_seconds=1.0,
                escalate_seconds=None,
            )
        ),
        "approvals.provide_input": lambda: storage.approvals.provide_input(
            InputCommand(
                tenant_id=other,
                ticket_id=pending.ticket_id,
                input=1,
                voter=run.id,
                actor="x",
                comment="",
                authority=(),
                escalated=False,
                requester_may=True,
            )
        ),
        "approvals.comments": lambda: storage.approvals.comments(other, approved.ticket_id),
        "approvals.comment": lambda: storage.approvals.comment(
            other, approved.ticket_id, new_id(), body="x", author=by.user_id, actor=by.actor
        ),
        "approvals.scopes": lambda: storage.approvals.scopes(other, limit=9, after=None),
        "approvals.revoke_scope": lambda: storage.approvals.revoke_scope(
            other, scope.id, by=by.user_id, actor=by.actor
        ),
        "budgets.list": lambda: storage.budgets.list(other, limit=9),
        "budgets.correct": lambda: storage.budgets.correct(
            other,
            Correction(
                key=BudgetKey(scope=BudgetScope.RUN, scope_id=run.id, unit="calls"),
                amount=Decimal(1),
                reason="x",
                command_id="x",
                digest="x",
            ),
            actor=by.actor,
        ),
        "halts.trigger": lambda: storage.halts.trigger(
            other,
            HaltScope.RUN,
            run.id,
            subject=None,
            reason="x",
            by=by.user_id,
            actor=by.actor,
            cancel_seconds=9,
        ),
        "halts.list": lambda: storage.halts.list(other, limit=9, before=None, standing=False),
        "halts.end_halted": lambda: storage.halts.end_halted(other),
        "halts.met": lambda: storage.halts.met(other, HaltScope.RUN, run.id, subject=None),
        "halts.get": lambda: storage.halts.get(other, halt.id),
        "halts.lift": lambda: storage.halts.lift(other, halt, by=by.user_id, actor=by.actor),
        "leases.renew": lambda: storage.leases.renew(theirs, seconds=9),
        "leases.release": lambda: storage.leases.release(theirs, actor=by.actor),
        "leases.require": lambda: storage.leases.require(theirs),
        "leases.list": lambda: storage.leases.list(other, limit=9),
        "locks.list": lambda: storage.locks.list(other, limit=9),
        "locks.sweep": lambda: storage.locks.sweep(other, limit=9),
        "events.read": lambda: storage.events.read(other, run_stream(run.id)),
        "events.heads": lambda: storage.events.heads(other),
        "events.feed": lambda: fed(storage.events.feed(other)),
        "events.misplaced": lambda: storage.events.misplaced(other),
        "events.fold": lambda: storage.events.fold(other, pytest.fail),
        "checkpoints.take": lambda: checkpointer.take(other),
        "checkpoints.read": lambda: storage.checkpoints.read(other),
        "checkpoints.newest": lambda: storage.checkpoints.newest(other),
        "checkpoints.heads": lambda: storage.checkpoints.heads(other, number=checkpoint.number),
        "checkpoints.archived": lambda: storage.checkpoints.archived(other),
        "checkpoints.record_piece": lambda: storage.checkpoints.record_piece(other, piece),
        "checkpoints.pruned": lambda: storage.checkpoints.pruned(other),
        "checkpoints.prune": lambda: storage.checkpoints.prune(other, actor="system:test", limit=10),
        "checkpoints.covered": lambda: collected(storage.checkpoints.covered(other, checkpoint.number)),
        "checkpoints.links": lambda: collected(storage.checkpoints.links(other, streams=[run_stream(run.id)])),
    }
    return bench, calls


async def as_of_nobody(storage, tenant, artifact_id):
    unknown = new_id()
    assert set(await storage.runs.unrecorded(tenant, [artifact_id, unknown])) == {artifact_id, unknown}
    return ABSENT["runs.unrecorded"]


async def collected(events):
    return list(events)


async def fed(page):
    """What a page holds, and where it ends whosever feed it is of."""
    shown = await page
    return shown.events, replace(shown.cursor, tenant=""), shown.held_back


async def walked(batches):
    return [each async for batch in batches for each in batch]


def everything(bench):
    """Every row of the engine."""
    tables = ["run_states", "run_steps", "approval_tickets", "grants", "budgets", "halts", "events", "event_streams"]
    tables += ["event_checkpoints", "event_exports", "approval_votes", "approval_comments", "approval_scopes"]
    tables += ["halt_calls", "resource_leases", "resource_locks"]
    return {table: sorted(map(str, bench.behind.rows(table))) for table in tables}


async def test_nothing_of_another_tenant_is_found_or_changed(foreign):
    bench, calls = foreign
    before = everything(bench)
    for name, expected in ABSENT.items():
        if isinstance(expected, type):
            with pytest.raises(expected):
                await calls[name]()
        elif name == "runs.renew":
            assert not (await calls[name]()).held
        else:
            assert await calls[name]() == expected, name
    assert everything(bench) == before


async def test_admission_begin_and_settlement_do_not_cross_tenants_either(bench, monkeypatch):
    other = bench.behind.new_tenant()
    lease = await bench.lease()
    grant = await bench.begun(lease)
    neighbour = bench.in_tenant(other)
    foreign = replace(grant, tenant_id=other)
    for begin in (False, True):
        with pytest.raises(NotFound):
            await neighbour.control_plane.admit(neighbour.proposal(lease, step_index=1), begin=begin)
    booked, admit_as_assumed = [], bench.storage.admission.admit_as_assumed

    async def noted(command, assumed):
        booked.append((command, assumed))
        return await admit_as_assumed(command, assumed)

    monkeypatch.setattr(bench.storage.admission, "admit_as_assumed", noted)
    denied = await bench.control_plane.admit(bench.proposal(lease, capability="thing.unknown", step_index=1))
    assert isinstance(denied, Denied)
    ((command, assumed),) = booked
    for begin in (False, True):
        elsewhere = command._replace(tenant_id=other, step_index=2, command_id="another", begin=begin)
        with pytest.raises(NotFound):
            await admit_as_assumed(elsewhere, assumed)
    with pytest.raises(NotFound):
        await neighbour.begin(foreign, lease)
    with pytest.raises(NotFound):
        await neighbour.settle(foreign, lease)
    await bench.settle(grant, lease)
    steps = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert [step.state for step in steps] == [StepState.SUCCEEDED, StepState.DENIED]
