"""Locks of resources: of calls that exclude each other one is granted, and nothing has to give its lock back."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from plm_engine_core.control_plane import Denied, Granted, Pending
from plm_engine_core.control_plane.events import rebuild, run_stream, verify_tenant
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    LockHolder,
    LockScope,
    OutcomeStatus,
    Reason,
    RunState,
    TicketDecision,
)
from plm_engine_core.control_plane.why import why

pytestmark = pytest.mark.every_storage


@pytest.fixture
def locks(bench):
    return bench.locking()


async def tried(bench, lease=None, **changes):
    lease = lease or await bench.lease()
    return await bench.control_plane.admit(bench.proposal(lease, **changes))


async def refused(bench, lease=None, **changes):
    denied = await tried(bench, lease, **changes)
    assert isinstance(denied, Denied), denied
    assert denied.reason is Reason.RESOURCE_LOCKED, denied
    return denied


async def held(bench):
    return [(each.run_id, each.held.value) for each in await bench.storage.locks.list(bench.tenant, limit=9)]


def told(run, step=0, *, scope="tenant", how="issued"):
    return {"scope": scope, "resource": "thing/1", "run_id": str(run.id), "step": step, "held": how}


async def test_of_many_who_want_it_at_once_one_is_granted_and_the_others_are_told_who(locks):
    leases = [await locks.lease() for _ in range(8)]
    answers = await asyncio.gather(*(tried(locks, lease) for lease in leases))
    (winner,) = [lease for lease, answer in zip(leases, answers, strict=True) if isinstance(answer, Granted)]
    others = [answer for answer in answers if not isinstance(answer, Granted)]
    words = f"thing/1 is locked by step 0 of run {winner.run.id}"
    expected = Denied(
        reason=Reason.RESOURCE_LOCKED,
        message=words,
        rule="lock",
        unblock="the end of that call",
        retry_after_ms=1000,
        lock=told(winner.run),
    )
    assert others == [expected] * 7
    assert await held(locks) == [(winner.run.id, "issued")]
    spent, reserved = await locks.budget(winner.run, "tenant", BudgetUnit.CALLS)
    assert (spent, reserved) == (0, 1), "who is refused reserves nothing"


@pytest.mark.parametrize("begin", [False, True])
async def test_it_is_held_until_the_call_is_settled(locks, begin):
    lease = await locks.lease()
    admitted = await locks.control_plane.admit(locks.proposal(lease), begin=begin)
    if not begin:
        assert (await refused(locks)).lock == told(lease.run)
        assert (await locks.begin(admitted.grant, lease)).accepted
    assert (await refused(locks)).lock == told(lease.run, how="begun")
    await locks.settle(admitted.grant, lease)
    assert await held(locks) == []
    later = await locks.lease()
    await locks.grant(later)
    assert await held(locks) == [(later.run.id, "issued")]


async def test_another_resource_another_capability_and_another_tenant(bench):
    locks = bench.locking("thing.read", "thing.fire")
    lease = await locks.begun(await locks.lease())
    assert isinstance(await tried(locks, resource="thing/2"), Granted)
    assert (await refused(locks, capability="thing.fire")).lock["run_id"] == str(lease.run_id)
    other = locks.other()
    assert isinstance(await tried(other), Granted), "tenants neither see nor delay each other"
    free = bench.locking("thing.fire")
    assert isinstance(await tried(free), Granted), "a capability without a lock asks for none"


async def test_within_a_run_the_calls_of_other_runs_pass(bench):
    locks = bench.locking(scope=LockScope.RUN)
    lease = await locks.lease()
    await locks.begun(lease)
    other = await locks.lease()
    await locks.grant(other)
    denied = await refused(locks, lease, step_index=1, step_id="second")
    assert denied.lock == told(lease.run, scope="run", how="begun")


async def test_the_same_command_is_answered_the_same(locks):
    lease, late = await locks.lease(), await locks.lease()
    first = await tried(locks, lease)
    told_late = await refused(locks, late)
    assert await tried(locks, lease) == first
    await locks.settle(first.grant, lease, OutcomeStatus.NOT_STARTED)
    assert await refused(locks, late) == told_late, "decided is decided"
    assert isinstance(await tried(locks, late, attempt=2), Granted)


async def test_an_expired_grant_holds_it_no_more_and_can_not_begin(locks):
    lease = await locks.lease()
    grant = await locks.grant(lease)
    locks.behind.set_time("grants", "expires_at", -1, {"id": grant.id})
    assert await held(locks) == []
    later = await locks.lease()
    await locks.begun(later)
    begun = await locks.begin(grant, lease)
    assert (begun.accepted, begun.reason) == (False, Reason.GRANT_EXPIRED)
    assert await held(locks) == [(later.run.id, "begun")]
    await locks.settle(grant, lease, OutcomeStatus.NOT_STARTED)
    assert await held(locks) == [(later.run.id, "begun")]


async def test_a_halt_frees_what_did_not_begin_and_keeps_what_did(locks):
    waits, runs = await locks.lease(), await locks.lease()
    await locks.grant(waits)
    begun = await locks.begun(runs, resource="thing/2")
    halts = [await locks.halt(HaltScope.RUN, each.run.id) for each in (waits, runs)]
    assert isinstance(await tried(locks), Granted)
    denied = await refused(locks, resource="thing/2")
    assert denied.lock["run_id"] == str(runs.run.id)
    assert halts[1].calls.in_flight == 1
    await locks.settle(begun, runs)
    assert isinstance(await tried(locks, resource="thing/2"), Granted)


async def test_a_halt_is_said_before_a_lock(locks):
    await locks.begun(await locks.lease())
    lease = await locks.lease()
    await locks.halt(HaltScope.RUN, lease.run.id)
    assert (await tried(locks, lease)).reason is Reason.HALTED
    drill = await locks.control_plane.drill(locks.tenant, HaltScope.TENANT, by=locks.approver)
    assert (drill.grants, drill.calls) == (0, 1), "who waits for a lock holds no grant"


async def test_who_takes_a_run_over_takes_the_lock_of_the_attempt_that_it_supersedes(locks):
    lost = await locks.lease()
    grant = await locks.begun(lost)
    locks.let_lease_expire(lost.run)
    assert (await refused(locks)).lock == told(lost.run, how="begun"), "nobody has taken the run over yet"
    present = await locks.lease(lost.run)
    await refused(locks, present, attempt=2)
    await locks.settle(grant, present, OutcomeStatus.SUPERSEDED)
    again = await locks.begun(present, attempt=3)
    assert again.step_key == grant.step_key
    assert (await refused(locks)).lock == told(lost.run, how="begun")


@pytest.mark.parametrize("happened", [True, False])
async def test_an_unknown_outcome_keeps_it_until_somebody_says_what_became_of_it(locks, happened):
    lease = await locks.lease()
    grant = await locks.begun(lease)
    await locks.settle(grant, lease, OutcomeStatus.OUTCOME_UNKNOWN)
    assert await locks.state(lease.run) is RunState.OUTCOME_UNKNOWN
    denied = await refused(locks)
    assert denied.lock == told(lease.run, how="unknown")
    assert denied.unblock == (f"finding out whether that call took place, then plm-cli run reconcile {lease.run.id}")
    (lock,) = await locks.storage.locks.list(locks.tenant, limit=9)
    assert (lock.scope, lock.resource, lock.held) == (LockScope.TENANT, "thing/1", LockHolder.UNKNOWN)
    assert (lock.grant_id, lock.step_index, lock.attempt) == (grant.id, 0, 1)
    await locks.storage.runs.reconcile(locks.tenant, lease.run.id, happened=happened, output=None, actor="test")
    assert isinstance(await tried(locks), Granted)


async def test_what_waits_for_a_human_holds_nothing_and_an_approval_outlives_a_lock(bench):
    locks = bench.locking()
    lease, pending = await locks.ask()
    assert await held(locks) == []
    reader = await locks.lease()
    grant = await locks.grant(reader)
    await locks.decide(pending, TicketDecision.APPROVE)
    lease = await locks.lease(lease.run)
    call = {"capability": "thing.write", "ticket_id": pending.ticket_id}
    await refused(locks, lease, **call)
    await locks.settle(grant, reader, OutcomeStatus.NOT_STARTED)
    granted = await tried(locks, lease, attempt=2, **call)
    assert isinstance(granted, Granted), "it was not used up by the refusal"
    assert await held(locks) == [(lease.run.id, "issued")]
    ticket = await locks.storage.approvals.get(locks.tenant, pending.ticket_id)
    assert ticket.consumed_at is not None


async def test_what_the_budget_refuses_holds_nothing(bench):
    nothing = {"run": {"EUR": "5", "calls": "0"}, "tenant": {"EUR": "9", "calls": "9"}}
    locks = bench.with_policy(budgets=nothing).locking()
    denied = await tried(locks)
    assert denied.reason is Reason.BUDGET_EXCEEDED
    assert await held(locks) == []
    assert isinstance(await tried(bench.locking()), Granted)


async def test_what_is_asked_and_refused_is_told(locks):
    lease = await locks.lease()
    grant = await locks.begun(lease)
    late = await locks.lease()
    denied = await refused(locks, late)
    told_why = (await why(locks.storage, locks.tenant, f"{late.run.id}/0")).to_json()
    assert told_why["lock"] == told(lease.run, how="begun")
    assert (told_why["reason"], told_why["stage"]) == ("resource_locked", "lock")
    assert (told_why["message"], told_why["unblocked_by"]) == (denied.message, denied.unblock)
    events = await locks.storage.events.read(locks.tenant, run_stream(late.run.id))
    assert events[-1].kind == "step_denied"
    assert events[-1].data["answer"]["lock"] == told(lease.run, how="begun")
    assert events[-1].data["decision"]["facts"]["capability"]["lock"] == "tenant"
    await locks.settle(grant, lease)
    assert (await rebuild(locks.storage, locks.tenant))[1] == []
    assert all(each.consistent for each in await verify_tenant(locks.storage, locks.tenant))


async def test_the_record_of_a_refusal_says_nothing_else_of_who_holds_it(locks):
    holder = await locks.lease()
    await locks.begun(holder, arguments={"name": "a secret"}, step_id="secret-step")
    denied = await refused(locks)
    assert "secret" not in repr(denied)


async def test_records_of_locks_that_are_over_are_swept_and_no_others(locks):
    over, live, unknown = await locks.lease(), await locks.lease(), await locks.lease()
    await locks.settle(await locks.begun(over, resource="over"), over)
    await locks.begun(live, resource="live")
    await locks.settle(await locks.begun(unknown, resource="unknown"), unknown, OutcomeStatus.OUTCOME_UNKNOWN)
    expired = await locks.grant(await locks.lease(), resource="expired")
    locks.behind.set_time("grants", "expires_at", -1, {"id": expired.id})
    before = await held(locks)
    assert len(locks.behind.rows("resource_locks")) == 4
    assert await locks.storage.locks.sweep(locks.tenant, limit=9) == 1
    assert await locks.storage.locks.sweep(locks.tenant, limit=9) == 0, "what may be about to begin stays"
    assert await held(locks) == before
    assert sorted(how for _, how in before) == ["begun", "unknown"]
    await refused(locks, resource="live")


async def test_no_resource_and_a_long_one_are_resources(locks):
    for resource in ("", "thing/" + "ü" * 5000):
        await locks.begun(await locks.lease(), resource=resource)
        denied = await refused(locks, resource=resource)
        assert denied.lock["resource"] == resource
        assert len(denied.message) < 300


async def test_a_lease_of_the_same_name_and_a_lock_do_not_exclude_each_other(locks):
    lease = await locks.control_plane.acquire_lease(
        locks.tenant, "thing/1", owner="one", seconds=60, by=locks.requester
    )
    held_run = await locks.lease()
    grant = await locks.grant(held_run)
    begun = await locks.control_plane.begin(grant, fencing_token=held_run.fencing_token, actor="test", lease=lease)
    assert begun.accepted


@pytest.mark.postgres_only
async def test_a_callers_transaction_that_stays_open_keeps_others_waiting_for_a_bounded_time(locks):
    lease, late = await locks.lease(), await locks.lease()
    async with await psycopg.AsyncConnection.connect(locks.database.app) as connection:
        granted = await locks.control_plane.admit(locks.proposal(lease), connection=connection)
        assert isinstance(granted, Granted)
        busy = await tried(locks, late)
        assert isinstance(busy, Denied)
        assert busy.reason is Reason.STORAGE_BUSY
        await connection.rollback()
    assert isinstance(await tried(locks, late), Granted), "what was rolled back holds nothing"


@pytest.mark.postgres_only
async def test_a_call_that_is_just_beginning_is_not_taken_for_an_expired_one(locks):
    """It looked at its end before that came, and begins after: who found it expired looks again."""
    lease, late = await locks.lease(), await locks.lease()
    grant = await locks.grant(lease)
    begin = [locks.tenant, lease.run.id, 0, 1, grant.id, lease.fencing_token, "test"]
    expired = "SELECT expires_at <= clock_timestamp() FROM grants WHERE id = %s"
    connect = psycopg.AsyncConnection.connect
    async with (
        await connect(locks.database.app, autocommit=True) as beginning,
        await connect(locks.database.app) as taking,
        await connect(locks.database.admin) as blocker,
    ):
        locks.behind.set_time("grants", "expires_at", 3, {"id": grant.id})
        await blocker.execute("SELECT FROM grants WHERE id = %s FOR UPDATE", [grant.id])
        begins = asyncio.create_task(
            beginning.execute("SELECT engine_begin_v5(%s, %s, %s, %s, %s, %s, %s) ->> 'status'", begin)
        )
        await waits(locks, beginning)
        while not locks.sql(expired, grant.id)[0][0]:  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.01)
        takes = asyncio.create_task(locks.control_plane.admit(locks.proposal(late), connection=taking))
        await waits(locks, taking)
        await blocker.rollback()
        begun, taken = await (await begins).fetchone(), await takes
        await taking.commit()
    assert begun == ("begun",)
    assert isinstance(taken, Denied), "two calls hold one resource"
    assert await held(locks) == [(lease.run.id, "begun")]


async def waits(bench, connection):
    """Until what a connection asked for waits for a lock."""
    query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    async with asyncio.timeout(20):
        while bench.sql(query, connection.info.backend_pid) != [(True,)]:  # noqa: ASYNC110  # in the server
            await asyncio.sleep(0.01)


async def test_an_approved_attempt_takes_the_lock_and_is_refused_by_it(bench):
    locks = bench.locking()
    lease, pending = await locks.ask()
    assert isinstance(pending, Pending)
    await locks.decide(pending, TicketDecision.APPROVE)
    lease = await locks.lease(lease.run)
    grant = await locks.grant(lease, capability="thing.write", ticket_id=pending.ticket_id)
    assert (await refused(locks)).lock == told(lease.run)
    assert (await locks.begin(grant, lease)).accepted
