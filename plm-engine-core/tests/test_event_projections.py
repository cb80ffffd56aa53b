"""Runs, tickets and budgets rebuilt from events alone are those of the tables, whatever happened, in both storages."""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from plm_engine_core.control_plane import Granted, InputRequest, Pending
from plm_engine_core.control_plane.admission.ask import Failure
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.events import Event, Projections, rebuild, run_stream
from plm_engine_core.control_plane.events.projections import CHANGES_NOTHING
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    EventKind,
    HaltScope,
    OutcomeStatus,
    RunState,
    TicketDecision,
)

pytestmark = pytest.mark.every_storage

SOAK = float(os.environ.get("SOAK", "0.05"))
_FAILURE = Failure(step=0, attempt=1, reason="attempts_exhausted", message="nothing càme of it")


def test_every_kind_of_event_is_folded_or_known_to_change_nothing():
    folded = Projections().folded_kinds
    assert folded | CHANGES_NOTHING == set(EventKind)
    assert not folded & CHANGES_NOTHING


async def agrees(bench):
    folded, found = await rebuild(bench.storage, bench.tenant)
    assert found == []
    return folded


async def test_a_run_that_was_granted_settled_and_ended(bench):
    lease = await bench.lease()
    await agrees(bench)
    grant = await bench.begun(lease)
    folded = await agrees(bench)
    assert sum(each.reserved for each in folded.budgets.values()) > 0
    await bench.settle(grant, lease, usage={"thing": Decimal(7)})
    await bench.storage.runs.finish(
        bench.tenant,
        lease.run.id,
        fencing_token=lease.fencing_token,
        state=RunState.SUCCEEDED,
        actor="worker:w",
        result={"n": [1, None]},
    )
    folded = await agrees(bench)
    assert folded.runs[lease.run.id].result == {"n": [1, None]}
    run_eur = [b.spent for key, b in folded.budgets.items() if (key.scope, key.unit) == ("run", BudgetUnit.EUR)]
    assert run_eur == [Decimal("0.07")]


async def test_a_run_that_was_given_back_with_a_result_and_then_halted(bench):
    lease = await bench.lease()
    given_back = {"state": RunState.QUEUED, "actor": "worker:w", "result": [1, None]}
    await bench.storage.runs.finish(bench.tenant, lease.run.id, fencing_token=lease.fencing_token, **given_back)
    await agrees(bench)
    await bench.halt(HaltScope.RUN, lease.run.id)
    assert await bench.storage.runs.take(bench.tenant, lease.run.id, owner="w", seconds=60) is None
    folded = await agrees(bench)
    assert folded.runs[lease.run.id].state is RunState.HALTED


async def test_what_the_tables_say_otherwise_is_told(bench):
    lease = await bench.lease()
    await bench.begun(lease)
    bench.behind.set_rows("run_states", {"run_id": lease.run.id}, reason="made up")
    bench.behind.set_rows("budgets", {"scope_kind": "run", "unit": "EUR"}, spent=Decimal(1))
    _, found = await rebuild(bench.storage, bench.tenant)
    assert [each.what.split()[0] for each in found] == ["run", "budget"]
    assert found[0].table.reason == "made up"
    assert found[1].table.spent == 1


@pytest.mark.postgres_only
@pytest.mark.parametrize("payload", ["x", "[]", "{}", '{"answer": 1, "reserved": [{}]}'])
async def test_an_event_that_cannot_be_read_is_named_and_hides_no_other(bench, payload):
    (lease, other) = [await bench.lease() for _ in range(2)]
    await bench.begun(lease)
    bench.sql("ALTER TABLE events DISABLE TRIGGER ALL")
    stream = run_stream(lease.run.id)
    bench.sql("UPDATE events SET payload = %s WHERE stream = %s AND kind = 'step_granted'", payload, stream)
    bench.sql("UPDATE run_states SET principal = '[]'")
    folded, found = await rebuild(bench.storage, bench.tenant)
    assert found[0].what == f"event 3 of {stream}"
    assert found[0].events.startswith("it cannot be read: ")
    assert {each.what.split()[0] for each in found[1:]} == {"budget"}
    assert folded.runs[other.run.id].state is RunState.RUNNING


def test_of_very_many_events_that_cannot_be_read_the_first_are_told():
    folded, hashed = Projections(), bytes(32)
    where = {"tenant_id": uuid.uuid4(), "stream": run_stream(uuid.uuid4()), "prev_hash": hashed, "hash": hashed}
    what = {"kind": EventKind.RUN_CREATED, "actor": "x", "occurred_at": datetime.now(UTC), "payload": "[]"}
    for seq in range(1, 1_003):
        folded.apply(Event(**where, **what, seq=seq))
    assert len(folded.unreadable) == 1_001
    assert folded.unreadable["further events"] == "some cannot be read either; the first 1000 are told"


class Walk:
    """One run that does whatever dice say, legal or not; what the control plane refuses changes nothing."""

    def __init__(self, bench, seed):
        self.bench = bench
        self.dice = random.Random(seed)
        self.step = 0
        self.halt = self.pending = self.granted = self.asked = None
        self.asking = bench.with_policy(approval={"input": {"max_per_run": 3}})

    async def go(self, moves):
        self.lease = await self.bench.lease()
        self.run = self.lease.run
        for _ in range(moves):
            move = self.dice.choice(
                [
                    self.admit,
                    self.admit,
                    self.ask,
                    self.settle,
                    self.settle,
                    self.decide,
                    self.answer,
                    self.take,
                    self.stop,
                    self.end,
                ]
            )
            try:
                await move()
            except ControlPlaneError:
                continue

    async def admit(self):
        capability = self.dice.choice(["thing.read", "thing.write", "thing.fire"])
        ticket = self.pending.ticket_id if self.pending is not None and self.dice.random() < 0.8 else None
        if self.pending is not None and ticket is not None:
            capability = "thing.write"
        else:
            self.step += 1
        changes = {"step_index": self.step, "step_id": f"s{self.step}", "capability": capability, "ticket_id": ticket}
        at_once = self.step % 3 == 0
        admission = await self.bench.control_plane.admit(self.bench.proposal(self.lease, **changes), begin=at_once)
        if isinstance(admission, Pending):
            self.pending = admission
        elif isinstance(admission, Granted):
            self.granted, self.pending = admission.grant, None
            if self.dice.random() < 0.8 and not at_once:
                await self.bench.begin(self.granted, self.lease)

    async def ask(self):
        self.step += 1
        request = InputRequest(
            tenant_id=self.bench.tenant,
            run_id=self.run.id,
            fencing_token=self.lease.fencing_token,
            step_index=self.step,
            attempt=1,
            step_id=f"s{self.step}",
            question="Well?",
            principal=self.run.principal,
            escalates=_FAILURE if self.step % 2 else None,
        )
        answer = await self.asking.control_plane.ask(request)
        self.asked = answer if isinstance(answer, Pending) else self.asked

    async def answer(self):
        if self.asked is not None:
            plane, where = self.asking.control_plane, (self.bench.tenant, self.asked.ticket_id)
            if self.dice.random() < 0.6:
                await plane.provide_input(*where, [None, 1], approver=self.bench.approver, comment="so")
            else:
                await plane.decide(*where, TicketDecision.DENY, approver=self.bench.approver)

    async def settle(self):
        if self.granted is not None:
            status = self.dice.choice([*OutcomeStatus])
            error = {"message": "because"} if self.dice.random() < 0.5 else None
            usage = {"thing": Decimal(self.dice.randrange(80))}
            await self.bench.settle(self.granted, self.lease, status, usage=usage, error=error)
            self.granted = None

    async def decide(self):
        if self.pending is not None:
            if self.dice.random() < 0.3:
                self.bench.behind.set_time("approval_tickets", "deadline", -1, {"id": self.pending.ticket_id})
            await self.bench.decide(self.pending, self.dice.choice([*TicketDecision]), comment="well")

    async def take(self):
        runs = self.bench.storage.runs
        run = await runs.get(self.bench.tenant, self.run.id)
        if run.state is RunState.OUTCOME_UNKNOWN:
            await runs.reconcile(
                self.bench.tenant, run.id, happened=self.dice.random() < 0.5, output=None, actor="human:x"
            )
        if run.state is RunState.RUNNING and self.dice.random() < 0.3:
            self.bench.let_lease_expire(run)
        self.lease = await runs.take(self.bench.tenant, run.id, owner="w", seconds=60) or self.lease

    async def stop(self):
        if self.halt is None:
            self.halt = await self.bench.halt(HaltScope.RUN, self.run.id)
        else:
            await self.bench.control_plane.lift(self.bench.tenant, self.halt.id, by=self.bench.approver)
            self.halt = None

    async def end(self):
        runs, dice = self.bench.storage.runs, self.dice.random()
        if dice < 0.2:
            await runs.request_cancel(self.bench.tenant, self.run.id, actor="human:x")
        state = self.dice.choice([RunState.QUEUED, RunState.HALTED])
        if dice > 0.9:
            state = self.dice.choice([RunState.FAILED, RunState.SUCCEEDED, RunState.CANCELLED])
        told = {"reason": "why", "message": "because"} if dice < 0.7 else {"result": [1, None]}
        await runs.finish(
            self.bench.tenant, self.run.id, fencing_token=self.lease.fencing_token, state=state, actor="w", **told
        )


async def test_whatever_runs_do_at_once_their_events_tell_where_they_stand(bench):
    """Runs of one tenant, at once, each with moves that dice choose; looked at in between, while they move."""
    for seed in range(max(3, int(40 * SOAK))):
        walks = [Walk(bench, seed * 100 + number) for number in range(6)]
        moving = asyncio.gather(*(walk.go(25) for walk in walks))
        while not moving.done():
            await agrees(bench)
            await asyncio.sleep(0)
        await moving
    folded = await agrees(bench)
    assert len({run.state for run in folded.runs.values()}) >= 4
    assert len({ticket.state for ticket in folded.tickets.values()}) >= 3
